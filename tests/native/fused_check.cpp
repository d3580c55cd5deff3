// The fused attack (cuda/chain_fused.cu) through the emulator, on small networks and, with the argument `full`, on
// those of the paper. The CPU's chains are the reference.
//
// The gradient is read off an l2 step that nothing holds back: x' - x = step g / |g|. Every other step must then be
// what core/pgd_step.h makes of that gradient. What is kept, counted and when an attack stops is worked out again from
// the iterates. All buffers are heap blocks of exactly the size that a kernel may use and start as NaN. Exit code 1 and
// a line for each mismatch. EMU_ORDER=forward | reverse | random picks the order of threads (csrc/emu/emu.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/chain_fused.h"

#include "fused_network.h"

namespace {

using namespace tsr;
using namespace check;

struct Options {
  ChainLoss loss = ChainLoss::oracle_l2;
  Norm norm = Norm::linf;
  double step = 0.01, eps = 0.03, lo = 0, hi = 1, sparsity = 0.05;
  int64_t steps = 1;
  bool targeted = false, keep_best = false, early_stop = false, judge = true, each = false;
};

struct Result {
  std::unique_ptr<float[]> x, loss, closeness, iterates;
  std::unique_ptr<bool[]> adversarial;
  std::unique_ptr<int64_t[]> bad, queries;
};

struct Images {
  int64_t n, d;
  std::vector<float> clean, start;
  std::vector<int64_t> labels;
  std::vector<double> step, eps;  // where each image has its own
  Images(int64_t count, const Network& net, const Options& o) : n(count), d(net.inputs()) {
    Random r{uint64_t(17 + d)};
    for (int64_t i = 0; i < n * d; ++i) {
      clean.push_back(i % 11 == 0 ? float(i % 2) : r.uniform());
      start.push_back(std::fmin(1.f, std::fmax(0.f, clean.back() + 0.01f * (r.uniform() - 0.5f))));
    }
    for (int64_t i = 0; i < n; ++i) {
      labels.push_back(i % net.classes());
      step.push_back(o.step * (1 + 0.25 * double(i))), eps.push_back(o.eps * (1 + 0.5 * double(i)));
    }
  }
  Images only(int64_t i) const {
    Images one = *this;
    one.n = 1;
    one.clean.assign(clean.begin() + i * d, clean.begin() + (i + 1) * d);
    one.start.assign(start.begin() + i * d, start.begin() + (i + 1) * d);
    one.labels = {labels[size_t(i)]}, one.step = {step[size_t(i)]}, one.eps = {eps[size_t(i)]};
    return one;
  }
};

Result run(const Network& student, const Network& teacher, const Images& in, const Options& o) {
  const int64_t n = in.n, d = in.d;
  Result r{
      unwritten<float>(n * d), unwritten<float>(n),   unwritten<float>(n),  unwritten<float>((o.steps + 1) * n * d),
      unwritten<bool>(n),      unwritten<int64_t>(n), unwritten<int64_t>(n)};
  const auto workspace = unwritten<int64_t>(chain_fused_workspace(student.plan(), teacher.plan(), n) / 8);
  const ChainPgd a{{student.plan(), nullptr},
                   {teacher.plan(), nullptr},
                   in.clean.data(),
                   in.start.data(),
                   r.x.get(),
                   in.labels.data(),
                   r.loss.get(),
                   r.adversarial.get(),
                   r.closeness.get(),
                   r.bad.get(),
                   r.queries.get(),
                   r.iterates.get(),
                   o.each ? in.step.data() : nullptr,
                   o.each ? in.eps.data() : nullptr,
                   o.step,
                   o.eps,
                   o.lo,
                   o.hi,
                   o.sparsity,
                   n,
                   o.steps,
                   o.norm,
                   o.loss,
                   o.targeted,
                   o.keep_best,
                   o.early_stop,
                   o.judge,
                   workspace.get()};
  expect(chain_fused_covers(student.plan(), teacher.plan(), o.loss, o.norm, 0), "no kernel covers this attack");
  chain_fused_pgd(a, student.fused(), teacher.fused(), 0, nullptr);
  return r;
}

// The CPU's float32 chains.
std::vector<float> logits(const Network& net, const float* x) {
  if (net.records.empty()) return {};
  std::vector<float> z(size_t(net.classes()));
  const int64_t last = net.plan().records - 1;
  float* const out = z.data();
  const Memory room = room_of(net);
  chain_forward_cpu({net.cpu(), x, &last, &out, 1, 1, room.get()}, 1);
  return z;
}
std::vector<float> pull_back(const Network& net, const float* x, const float* cotangent) {
  std::vector<float> g(size_t(net.inputs()));
  const Memory room = room_of(net);
  chain_gradient_cpu({net.cpu(), x, cotangent, g.data(), 1, 1, -1, room.get()}, 1);
  return g;
}
struct Look {
  ChainLossValue at;
  double closeness;
  std::vector<float> ds, dt;
};
Look look(const Network& student, const Network& teacher, const float* x, int64_t label, const Options& o) {
  const std::vector<float> s = logits(student, x), t = needs_teacher(o.loss) ? logits(teacher, x) : s;
  Look l{{}, NAN, std::vector<float>(s.size()), std::vector<float>(s.size())};
  l.at = chain_loss(o.loss, s.data(), t.data(), label, student.classes(), o.targeted, l.ds.data(), l.dt.data());
  if (needs_teacher(o.loss)) l.closeness = chain_closeness(s.data(), t.data(), student.classes());
  return l;
}

bool near(double got, double wanted, double relative) {
  return std::fabs(got - wanted) <= relative * (0.1 + std::fabs(wanted));
}

struct Agreement {
  double cosine, signs, loss, closeness;
};
// The kernel's gradient against the CPU's; then each norm's step against pgd_step.h's on that gradient.
Agreement gradients(const Network& student, const Network& teacher, ChainLoss loss, bool steps) {
  Options o;
  o.loss = loss, o.norm = Norm::l2, o.step = 1e6, o.eps = 1e30, o.lo = -1e30, o.hi = 1e30;
  const Images in(1, student, o);
  const Result r = run(student, teacher, in, o);
  const Look l = look(student, teacher, in.start.data(), in.labels[0], o);
  std::vector<float> wanted = pull_back(student, in.start.data(), l.ds.data()), got(wanted.size());
  if (moves_teacher(loss)) {
    const std::vector<float> other = pull_back(teacher, in.start.data(), l.dt.data());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] += other[i];
  }
  double gw = 0, gg = 0, ww = 0, same = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    got[i] = r.x[i] - in.start[i];
    gw += double(got[i]) * double(wanted[i]), gg += double(got[i]) * double(got[i]);
    ww += double(wanted[i]) * double(wanted[i]), same += sign(got[i]) == sign(wanted[i]);
  }
  // the loss at the start, from an attack that takes no step
  Options none = o;
  none.steps = 0;
  const Result first = run(student, teacher, in, none);
  const Agreement a{gw / std::sqrt(gg * ww), same / double(got.size()),
                    std::fabs(double(first.loss[0]) - l.at.value) / std::fabs(l.at.value),
                    needs_teacher(loss) ? std::fabs(double(first.closeness[0]) / l.closeness - 1) : 0};
  expect(a.cosine > 0.999, "gradient: cosine " + number(a.cosine));
  expect(a.signs > 0.98, "gradient: share of equal signs " + number(a.signs));
  expect(a.loss < 5e-3, "loss: relative error " + number(a.loss));
  expect(a.closeness < 5e-3, "closeness: relative error " + number(a.closeness));
  expect(first.queries[0] == 1 && r.queries[0] == 2 && r.bad[0] == 0, "counts");
  for (int norm = 0; steps && norm < 3; ++norm)
    for (const bool targeted : {false, true}) {
      const double radius[] = {0.006, 0.1, 1.5}, step[] = {0.01, 0.3, 4};
      Options b = o;
      b.norm = Norm(norm), b.targeted = targeted, b.eps = radius[norm], b.step = step[norm], b.lo = 0, b.hi = 1;
      const Result moved = run(student, teacher, in, b);
      auto out = unwritten<float>(in.d);
      int64_t bad = 0;
      const PgdStep once{in.start.data(), in.clean.data(), got.data(), out.get(), &bad,       nullptr, nullptr,
                         b.step,          b.eps,           b.lo,       b.hi,      b.sparsity, 1,       in.d,
                         b.norm,          Dtype::f32,      targeted};
      pgd_step_cpu(once, 1);
      // sums in another order; the gradient as read off is rounded once more, which may change who is among l1's few
      const double allowed[] = {0, 1e-6, 1e-5};
      int off = 0;
      for (int64_t i = 0; i < in.d; ++i) off += !(std::fabs(double(moved.x[i]) - double(out[i])) <= allowed[norm]);
      expect(off <= (b.norm == Norm::l1 ? 2 : 0), "step of norm " + std::to_string(norm) + ": " + std::to_string(off) +
                                                      " values differ" + (targeted ? " (targeted)" : ""));
    }
  return a;
}

// What the attack kept, counted and reported, from its iterates. fp16 logits differ from the reference's by 1e-3, so
// which of two nearly equal losses is the better one is left open.
void bookkeeping(const Network& student, const Network& teacher, int64_t n, const Options& o) {
  const Images in(n, student, o);
  const Result r = run(student, teacher, in, o);
  const bool evaluated_last = o.judge || o.early_stop || o.keep_best;
  for (int64_t i = 0; i < n; ++i) {
    const auto name = [&](const char* what) { return std::string(what) + " of image " + std::to_string(i); };
    const auto iterate = [&](int64_t k) { return r.iterates.get() + (k * n + i) * in.d; };
    const auto is_result = [&](int64_t k) { return !std::memcmp(iterate(k), r.x.get() + i * in.d, size_t(in.d) * 4); };
    std::vector<Look> looks;
    for (int64_t k = 0; k <= o.steps; ++k) looks.push_back(look(student, teacher, iterate(k), in.labels[size_t(i)], o));
    int64_t end = evaluated_last ? o.steps : o.steps - 1;  // the last evaluation
    for (int64_t k = 0; o.early_stop && k < end; ++k)
      if (looks[size_t(k)].at.adversarial) end = k;
    expect(!std::memcmp(iterate(0), in.start.data() + i * in.d, size_t(in.d) * 4), name("start"));
    expect(r.queries[i] == end + 1,
           name("queries") + ": " + std::to_string(r.queries[i]) + ", expected " + std::to_string(end + 1));
    expect(r.bad[i] == 0, name("bad"));
    for (int64_t k = end; k < o.steps && evaluated_last; ++k)
      expect(!std::memcmp(iterate(k), iterate(k + 1), size_t(in.d) * 4), name("an iterate after the end"));
    const double eps = o.each ? in.eps[size_t(i)] : o.eps;
    for (int64_t j = 0; o.norm == Norm::linf && j < in.d; ++j) {
      const float v = r.x[i * in.d + j], clean = in.clean[size_t(i * in.d + j)];
      expect(v >= 0 && v <= 1 && v >= clean - float(eps) && v <= clean + float(eps), name("a value outside"));
    }
    if (needs_teacher(o.loss) && end >= 0)
      expect(near(r.closeness[i], looks[0].closeness, 5e-3), name("closeness"));
    else
      expect(std::isnan(r.closeness[i]), name("closeness without evaluation or teacher"));
    if (!evaluated_last) {
      expect(is_result(o.steps) && std::isnan(r.loss[i]) && !r.adversarial[i], name("result without a last look"));
      continue;
    }
    bool found = false;  // an iterate that can be the result, with its loss and verdict
    for (int64_t k = 0; k <= end; ++k) {
      const ChainLossValue& at = looks[size_t(k)].at;
      bool best = o.keep_best || k == end;
      for (int64_t m = 0; o.keep_best && m <= end; ++m) {
        const ChainLossValue& other = looks[size_t(m)].at;
        const double up = o.targeted ? at.value - other.value : other.value - at.value;
        const bool beats =
            other.adversarial == at.adversarial ? up > 5e-3 * (0.1 + std::fabs(at.value)) : other.adversarial;
        best = best && !beats;
      }
      found = found || (best && is_result(k) && near(r.loss[i], at.value, 5e-3) && r.adversarial[i] == at.adversarial);
    }
    expect(found, name("result, loss or verdict"));
  }
}

// An image's result does not depend on who else is there, or on their NaNs.
void alone(const Network& student, const Network& teacher, const Options& o) {
  constexpr int64_t kBroken = 1, kHuge = 2;
  Images in(4, student, o);
  in.start[size_t(kBroken * in.d + 5)] = NAN;
  for (int64_t j = 0; j < in.d; ++j) in.start[size_t(kHuge * in.d + j)] = 1e5f;  // infinite in 16 bits
  const Result all = run(student, teacher, in, o);
  for (int64_t i = 0; i < in.n; ++i) {
    const Result one = run(student, teacher, in.only(i), o);
    expect(!std::memcmp(one.x.get(), all.x.get() + i * in.d, size_t(in.d) * 4) &&
               !std::memcmp(one.loss.get(), all.loss.get() + i, 4) && one.queries[0] == all.queries[i] &&
               one.bad[0] == all.bad[i] && one.adversarial[0] == all.adversarial[i],
           "image " + std::to_string(i) + " fares differently alone");
  }
  expect(std::isnan(all.loss[kBroken]) && all.bad[kBroken] > 0, "an image with NaN has a loss or a gradient");
  expect(all.bad[0] == 0 && all.bad[3] == 0 && all.loss[0] == all.loss[0], "NaN has spread to another image");
}

const char* const kLosses[] = {"cross_entropy",        "margin",        "oracle_l2",
                               "oracle_cross_entropy", "oracle_margin", "oracle_kl",
                               "oracle_max_difference"};

void report(const Agreement& a) {
  std::printf("%-60s cosine %.6f  signs %.4f  loss %.1e  closeness %.1e\n", where.c_str(), a.cosine, a.signs, a.loss,
              a.closeness);
}

void small() {
  const Network nobody;
  const std::pair<const char*, Network> singles[] = {{"12: 9-8-5", Network(1, 12, 10, {9, 8, 5})},
                                                     {"12: 8-16", Network(2, 12, 4, {8, 16})},
                                                     {"32: 24-64-8", Network(3, 32, 3, {24, 64, 8})},
                                                     {"16: 5-16-9-8-12-7", Network(4, 16, 5, {5, 16, 9, 8, 12, 7})}};
  for (const auto& [name, net] : singles)
    for (const ChainLoss loss : {ChainLoss::cross_entropy, ChainLoss::margin}) {
      if (net.inputs() > 1000 && loss == ChainLoss::margin) continue;
      where = std::string(name) + " " + kLosses[int(loss)];
      report(gradients(net, nobody, loss, loss == ChainLoss::cross_entropy && net.inputs() < 1000));
    }
  const std::pair<Network, Network> pairs[] = {// teacher, student
                                               {Network(5, 12, 10, {9, 8, 5}), Network(6, 12, 10, {17, 8, 24, 6})},
                                               {Network(7, 14, 3, {20, 8}), Network(8, 14, 3, {7, 33, 8})}};
  for (const auto& [teacher, student] : pairs) {
    const std::string name = "pair of side " + std::to_string(teacher.records[0].h) + " ";
    for (int loss = int(ChainLoss::oracle_l2); loss <= int(ChainLoss::oracle_max_difference); ++loss) {
      where = name + kLosses[loss];
      report(gradients(student, teacher, ChainLoss(loss), ChainLoss(loss) == ChainLoss::oracle_l2));
    }
    Options o;
    o.steps = 4, o.each = true;
    constexpr ChainLoss kSome[] = {ChainLoss::oracle_l2, ChainLoss::oracle_cross_entropy, ChainLoss::oracle_kl};
    for (int run = 0; run < 8; ++run) {  // every combination of the three flags, with losses and norms in turn
      o.judge = run & 1, o.early_stop = run & 2, o.keep_best = run & 4;
      o.loss = kSome[run % 3], o.norm = Norm(run / 3), o.targeted = run % 3 == 2;
      o.eps = o.norm == Norm::linf ? 0.05 : o.norm == Norm::l2 ? 0.5 : 4, o.step = o.eps / 3;
      where = name + kLosses[int(o.loss)] + " bookkeeping " + std::to_string(run);
      bookkeeping(student, teacher, 3, o);
    }
  }
  Options o;
  o.steps = 3;
  for (const bool early_stop : {false, true}) {
    o.loss = ChainLoss::cross_entropy, o.early_stop = early_stop, o.keep_best = !early_stop, o.each = false;
    where = std::string("12: 9-8-5 bookkeeping, early stop ") + (early_stop ? "on" : "off");
    bookkeeping(singles[0].second, nobody, 5, o);
    o.loss = ChainLoss::oracle_l2;
    where = std::string("pair of side 12, images alone, early stop ") + (early_stop ? "on" : "off");
    alone(pairs[0].second, pairs[0].first, o);
  }
  o.steps = 0, o.judge = false, o.keep_best = o.early_stop = false;
  where = "no steps";
  bookkeeping(pairs[0].second, pairs[0].first, 3, o);
}

void full() {
  const Network teacher(21, 32, 10, {45, 32, 32, 20}), student(22, 32, 10, {50, 35, 35, 22}), nobody;
  where = "45-32-32-20, 50-35-35-22 oracle_l2";
  report(gradients(student, teacher, ChainLoss::oracle_l2, true));
  where = "50-35-35-22 cross_entropy";
  report(gradients(student, nobody, ChainLoss::cross_entropy, false));
  const Network teacher5(23, 32, 10, {45, 32, 32, 32, 20}), student5(24, 32, 10, {50, 35, 35, 35, 22});
  where = "45-32-32-32-20, 50-35-35-35-22 oracle_l2";
  report(gradients(student5, teacher5, ChainLoss::oracle_l2, false));
}

}  // namespace

int main(int argc, char** argv) { return run_checks(argc > 1 && std::string(argv[1]) == "full" ? full : small); }
