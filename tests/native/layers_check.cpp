// Chains layer by layer (cuda/chain.cu) through the emulator, in every precision, against the engine for CPUs.
//
// Made for AddressSanitizer and UBSan (CMake target layers_check, -DTSRFAST_SANITIZE=ON): every buffer is a heap block
// of exactly the size that a call may use, and starts as NaN, so a value that was never written is seen. Exit code 1
// and a line for each mismatch. EMU_ORDER=forward | reverse | random picks the order of threads (csrc/emu/emu.h).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "core/chain.h"

#include "check.h"

namespace {

using namespace tsr;
using namespace check;

template <class T>
std::unique_ptr<T[]> uniform(uint64_t seed, int64_t size, T lo, T hi) {
  Random random{seed};
  auto v = unwritten<T>(size);
  for (int64_t i = 0; i < size; ++i) v[size_t(i)] = lo + (hi - lo) * T(random.uniform());
  return v;
}

using K = ChainKind;
using A = ChainActivation;

struct Window {
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, ph = 0, pw = 0;
};

struct Network {
  std::vector<ChainRecord> records;
  std::vector<float> weights, packed;
  Memory packed_cuda;
  Random random;

  Network(uint64_t seed, int64_t c, int64_t h, int64_t w) : random{seed}, c_(c), h_(h), w_(w) {}

  ChainPlan plan() const { return {records.data(), int64_t(records.size())}; }
  ChainNet cpu() const { return {plan(), packed.data()}; }
  ChainNet cuda() const { return {plan(), static_cast<const float*>(packed_cuda.get())}; }

  Network& add(K kind, int64_t oc, Window q = {}, A activation = A::none, bool count_pad = false) {
    const bool weighted = kind == K::conv || kind == K::linear;
    if (kind == K::linear) flatten();
    ChainRecord r{kind,
                  c_,
                  h_,
                  w_,
                  weighted ? oc : c_,
                  (h_ + 2 * q.ph - q.kh) / q.sh + 1,
                  (w_ + 2 * q.pw - q.kw) / q.sw + 1,
                  q.kh,
                  q.kw,
                  q.sh,
                  q.sw,
                  q.ph,
                  q.pw,
                  activation,
                  -1,
                  -1,
                  -1,
                  0,
                  count_pad};
    const int64_t inputs = c_ * q.kh * q.kw;
    if (weighted) r.weight = parameters(oc * inputs, 2 / std::sqrt(float(inputs))), r.bias = parameters(oc, 0.3f);
    if (kind == K::affine) r.weight = parameters(c_, 1.5f), r.bias = parameters(c_, 0.3f);
    if (activation == A::leaky_relu) r.slope = parameters(1, 0.3f);
    records.push_back(r);
    c_ = r.oc, h_ = r.oh, w_ = r.ow;
    return *this;
  }
  Network& flatten() {
    c_ *= h_ * w_, h_ = w_ = 1;
    return *this;
  }
  Network&& pack() {
    check_chain(plan(), int64_t(weights.size()));
    packed.resize(size_t(chain_packed_size(plan())));
    chain_pack_cpu({plan(), weights.data(), packed.data()});
    const ChainPackedCuda size = chain_packed_cuda(plan());
    auto map = unwritten<int32_t>(size.floats + size.hi + size.lo);
    chain_map_cuda(plan(), map.get());
    packed_cuda = memory<256>(size.size * int64_t(sizeof(float)));
    chain_pack_cuda({plan(), weights.data(), static_cast<float*>(packed_cuda.get())}, map.get(), 0, nullptr);
    return std::move(*this);
  }

 private:
  int64_t parameters(int64_t count, float scale) {
    const int64_t at = int64_t(weights.size());
    for (int64_t i = 0; i < count; ++i) weights.push_back(scale * (2 * random.uniform() - 1));
    return at;
  }
  int64_t c_, h_, w_;
};

constexpr int kNetworks = 7, kLinearOne = 5;

Network network(uint64_t seed, int which) {
  switch (which) {
    case 0:  // 3x3, tiles and groups that hang over, two tiles of columns
      return Network(seed, 3, 11, 10)
          .add(K::conv, 9, {3, 3}, A::relu)
          .add(K::conv, 70, {3, 3, 1, 1, 1, 1}, A::leaky_relu)
          .add(K::conv, 17, {3, 3, 1, 1, 2, 2}, A::relu)
          .add(K::linear, 4)
          .pack();
    case 1:  // strides, kernels, paddings, 1x1 images of a map
      return Network(seed, 2, 13, 9)
          .add(K::affine, 0)
          .add(K::conv, 7, {5, 3, 2, 1, 1, 2}, A::relu)
          .add(K::conv, 3, {1, 1, 1, 3})
          .add(K::conv, 33, {2, 1, 3, 2, 1, 0}, A::leaky_relu)
          .add(K::conv, 5, {2, 2}, A::relu)
          .pack();
    case 2:  // pools
      return Network(seed, 3, 9, 7)
          .add(K::max_pool, 0, {3, 2, 1, 1, 1, 1})
          .add(K::conv, 12, {3, 3}, A::relu)
          .add(K::avg_pool, 0, {2, 2, 2, 2, 1, 1}, A::relu, true)
          .add(K::avg_pool, 0, {2, 3, 1, 2, 1, 1}, A::none, false)
          .add(K::max_pool, 0, {2, 2, 2, 2}, A::leaky_relu)
          .add(K::linear, 4)
          .pack();
    case 3:  // features; the first layer's depth in pieces
      return Network(seed, 1100, 1, 1)
          .add(K::linear, 19, {}, A::relu)
          .add(K::linear, 65, {}, A::relu)
          .add(K::linear, 4)
          .pack();
    case 4:  // shapes that change, and gates at the very end
      return Network(seed, 3, 6, 5)
          .add(K::conv, 10, {3, 3}, A::relu)
          .flatten()
          .add(K::affine, 0, {}, A::leaky_relu)
          .add(K::linear, 12, {}, A::none)
          .add(K::affine, 0, {}, A::relu)
          .add(K::linear, 5, {}, A::leaky_relu)
          .pack();
    case 6:  // convolutions as deep as what linear layers do in pieces; no gates either
      return Network(seed, 3, 6, 6).add(K::conv, 130, {3, 3}).add(K::conv, 9, {3, 3}).add(K::linear, 4).pack();
    default:  // kLinearOne: no gates, every precision must be near
      return Network(seed, 3, 8, 8)
          .add(K::conv, 20, {3, 3, 2, 2, 1, 1})
          .add(K::conv, 10, {3, 3})
          .add(K::linear, 4)
          .pack();
  }
}

const char* const kNames[] = {"float32", "split", "float16"};

// Off by more than `allowed` of the largest of the expected values; `share` of them may be.
void near(const char* what, const float* got, const float* want, int64_t count, double allowed, double share) {
  double most = 0, worst = 0;
  int64_t off = 0;
  for (int64_t i = 0; i < count; ++i) most = std::fmax(most, std::fabs(double(want[i])));
  for (int64_t i = 0; i < count; ++i) {
    const double error = std::fabs(double(got[i]) - double(want[i]));
    const bool good = error <= allowed * most;
    off += !good;
    if (!good && !(worst >= error)) worst = error;
  }
  if (double(off) <= share * double(count)) return;
  if (++failures <= 40)
    std::printf("%s: %s: %lld of %lld values differ, the worst by %.3g of %.3g\n", where.c_str(), what,
                static_cast<long long>(off), static_cast<long long>(count), worst, most);
}
template <class T>
void equal(const char* what, const T* got, const T* want, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(got[i] == want[i]) && ++failures <= 40)
      std::printf("%s: %s[%lld]: %g, wanted %g\n", where.c_str(), what, static_cast<long long>(i), double(got[i]),
                  double(want[i]));
}

double tolerance(Precision precision) { return precision == Precision::float16 ? 2e-3 : 5e-6; }

void check_forward(const Network& net, int64_t n, Precision precision) {
  const ChainPlan plan = net.plan();
  const auto x = uniform<float>(7, n * plan.inputs(), 0, 1);
  std::vector<int64_t> at;
  std::vector<std::unique_ptr<float[]>> maps;
  std::vector<float*> got, want;
  for (int64_t i = 0; i < plan.records; ++i)
    for (std::vector<float*>* to : {&got, &want}) {
      maps.push_back(unwritten<float>(n * plan.record[i].outputs()));
      to->push_back(maps.back().get());
      if (to == &got) at.push_back(i);
    }
  const Memory room = memory<256>(chain_workspace_cuda(plan, {}, n, 1, precision)),
               cpu = memory<256>(chain_workspace(plan, {}));
  chain_forward_cuda({net.cuda(), x.get(), at.data(), got.data(), n, plan.records, room.get()}, precision, 0, nullptr);
  chain_forward_cpu({net.cpu(), x.get(), at.data(), want.data(), n, plan.records, cpu.get()}, 1);
  for (size_t i = 0; i < at.size(); ++i)
    near(("record " + std::to_string(i)).c_str(), got[i], want[i], n * plan.record[i].outputs(), tolerance(precision),
         0);
}

// A unit near 0 may open in one precision and not in the other: then the gradient is another one.
void check_gradient(const Network& net, int64_t n, int64_t rows, Precision precision, double share) {
  const ChainPlan plan = net.plan();
  const auto x = uniform<float>(7, n * plan.inputs(), 0, 1);
  const auto cotangent = uniform<float>(8, n * rows * plan.classes(), -1e4f, 1e4f);
  for (int64_t i = 0; i < plan.classes(); ++i) cotangent[i] *= 1e-9f;  // of one row: scaled by itself
  const Memory room = memory<256>(chain_workspace_cuda(plan, {}, n, rows, precision));
  const Memory cpu = memory<256>(chain_workspace(plan, {}));
  for (int64_t layer = -1; layer < plan.records; ++layer) {
    const int64_t units = layer < 0 ? plan.inputs() : plan.record[layer].outputs();
    const auto got = unwritten<float>(n * rows * units), want = unwritten<float>(n * rows * units);
    chain_gradient_cuda({net.cuda(), x.get(), cotangent.get(), got.get(), n, rows, layer, room.get()}, precision, 0,
                        nullptr);
    chain_gradient_cpu({net.cpu(), x.get(), cotangent.get(), want.get(), n, rows, layer, cpu.get()}, 1);
    for (int64_t row = 0; row < n * rows; ++row)
      for (const bool all_of_them : {false, true})
        near(("gradient of record " + std::to_string(layer) + ", row " + std::to_string(row)).c_str(),
             got.get() + row * units, want.get() + row * units, units, all_of_them ? 0.2 : tolerance(precision),
             all_of_them ? share / 15 : share);
  }
}

struct Case {
  Norm norm;
  ChainLoss loss;
  bool targeted, keep_best, early_stop, judge, own_radii;
};

// What an attack returns, in heap blocks of exactly their sizes.
struct Result {
  std::unique_ptr<float[]> x, loss, closeness, iterates;
  std::unique_ptr<bool[]> adversarial;
  std::unique_ptr<int64_t[]> bad, queries;
  Result(int64_t n, int64_t d, int64_t steps)
      : x(unwritten<float>(n * d)),
        loss(unwritten<float>(n)),
        closeness(unwritten<float>(n)),
        iterates(unwritten<float>((steps + 1) * n * d)),
        adversarial(unwritten<bool>(n)),
        bad(unwritten<int64_t>(n)),
        queries(unwritten<int64_t>(n)) {}
};

void check_pgd(const Network& student, const Network& teacher, int64_t n, int64_t steps, const Case& c,
               Precision precision, bool broken = false) {
  const int64_t d = student.plan().inputs(), classes = student.plan().classes();
  const auto x0 = uniform<float>(7, n * d, 0, 1), shift = uniform<float>(9, n * d, -0.005f, 0.005f);
  const auto start = unwritten<float>(n * d);
  for (int64_t i = 0; i < n * d; ++i) start[i] = clamp(x0[i] + shift[i], 0.f, 1.f);
  const auto labels = unwritten<int64_t>(n);
  for (int64_t i = 0; i < n; ++i) labels[i] = i % classes;
  const double size = c.norm == Norm::linf ? 0.02 : c.norm == Norm::l2 ? 0.3 : 3.0;
  const auto step = uniform<double>(3, n, 0.5 * size, size), eps = uniform<double>(4, n, size, 2 * size);
  const bool pair = needs_teacher(c.loss);
  const ChainPlan other = pair ? teacher.plan() : ChainPlan{nullptr, 0};
  Result got(n, d, steps), want(n, d, steps);
  const auto args = [&](const Result& r, const ChainNet& s, const ChainNet& t, void* workspace) {
    return ChainPgd{s,
                    pair ? t : ChainNet{other, nullptr},
                    x0.get(),
                    start.get(),
                    r.x.get(),
                    labels.get(),
                    r.loss.get(),
                    r.adversarial.get(),
                    r.closeness.get(),
                    r.bad.get(),
                    r.queries.get(),
                    r.iterates.get(),
                    c.own_radii ? step.get() : nullptr,
                    c.own_radii ? eps.get() : nullptr,
                    0.7 * size,
                    1.5 * size,
                    0,
                    1,
                    0.1,
                    n,
                    steps,
                    c.norm,
                    c.loss,
                    c.targeted,
                    c.keep_best,
                    c.early_stop,
                    c.judge,
                    workspace};
  };
  const Memory room = memory<256>(chain_workspace_cuda(student.plan(), other, n, 1, precision));
  const Memory cpu = memory<256>(chain_workspace(student.plan(), other));
  chain_pgd_cuda(args(got, student.cuda(), teacher.cuda(), room.get()), precision, 0, nullptr);
  chain_pgd_cpu(args(want, student.cpu(), teacher.cpu(), cpu.get()), 1);
  // A pixel whose gradient is nearly 0 may step the other way, and a gate near 0 may open: few of them in float32.
  const bool rough = precision == Precision::float16;
  const double share = rough ? 0.2 : 0.02;
  near("x", got.x.get(), want.x.get(), n * d, 1e-4, share);
  near("iterates", got.iterates.get(), want.iterates.get(), (steps + 1) * n * d, 1e-4, share);
  equal("bad", got.bad.get(), want.bad.get(), n);
  equal("queries", got.queries.get(), want.queries.get(), n);
  equal("adversarial", got.adversarial.get(), want.adversarial.get(), n);
  if (broken) {
    for (int64_t i = 0; i < n; ++i)
      if (got.bad[i] != steps * d || !std::isnan(got.loss[i])) ++failures, std::printf("%s\n", where.c_str());
    return;
  }
  const bool looks = c.judge || c.keep_best || c.early_stop, compared = pair && (looks || steps);
  for (int64_t i = 0; i < n; ++i) {
    if (looks) near("loss", &got.loss[i], &want.loss[i], 1, rough ? 5e-2 : 1e-3, 0);
    if (!looks && !std::isnan(got.loss[i])) ++failures, std::printf("%s: loss without a look\n", where.c_str());
    if (compared) near("closeness", &got.closeness[i], &want.closeness[i], 1, tolerance(precision) * 3, 0);
    if (!compared && !std::isnan(got.closeness[i])) ++failures, std::printf("%s: closeness of what\n", where.c_str());
  }
}

// An image's result does not depend on its company.
void check_batches(const Network& net, Precision precision) {
  const ChainPlan plan = net.plan();
  const int64_t n = 3, d = plan.inputs(), classes = plan.classes();
  const auto x = uniform<float>(7, n * d, 0, 1);
  const auto together = unwritten<float>(n * classes), alone = unwritten<float>(n * classes);
  const int64_t last = plan.records - 1;
  const auto run = [&](int64_t first, int64_t count, float* out) {
    float* const to[] = {out + first * classes};
    const Memory room = memory<256>(chain_workspace_cuda(plan, {}, count, 1, precision));
    chain_forward_cuda({net.cuda(), x.get() + first * d, &last, to, count, 1, room.get()}, precision, 0, nullptr);
  };
  run(0, n, together.get());
  for (int64_t i = 0; i < n; ++i) run(i, 1, alone.get());
  equal("alone", alone.get(), together.get(), n * classes);
}

void all() {
  for (const Precision precision : {Precision::float32, Precision::split, Precision::float16}) {
    const auto at = [&](int which, const std::string& what) {
      where = "network " + std::to_string(which) + ", " + kNames[int(precision)] + ", " + what;
    };
    for (int which = 0; which < kNetworks; ++which) {
      const Network net = network(11, which), teacher = network(12, which);
      const int64_t n = 3;
      at(which, "forward");
      check_forward(net, n, precision);
      check_batches(net, precision);
      at(which, "gradient");
      check_gradient(net, n, 2, precision, precision == Precision::float16 && which < kLinearOne ? 0.3 : 0);
      if (which == 0) {
        at(which, "a NaN among the weights");
        Network nan = network(11, which);
        nan.weights[0] = NAN;
        check_pgd(nan.pack(), teacher, n, 2, {Norm::linf, ChainLoss::cross_entropy, false, false, false, true, false},
                  precision, true);
      }
      for (int loss = 0; loss <= int(ChainLoss::oracle_max_difference); ++loss) {
        if (precision != Precision::float32 && loss % 3 != which % 3) continue;
        const bool odd = (loss + which) % 2;
        const Case c{Norm((loss + which) % 3), ChainLoss(loss), loss == 1, odd, loss % 3 == 1, loss % 4 == 0, odd};
        at(which, "attack by loss " + std::to_string(loss) + ", norm " + std::to_string(int(c.norm)));
        check_pgd(net, teacher, n, loss == 6 ? 0 : 3, c, precision);
      }
    }
  }
}

}  // namespace

int main() {
  try {
    all();
  } catch (const std::exception& e) {
    std::printf("%s: %s\n", where.c_str(), e.what());
    return 1;
  }
  std::printf(failures ? "%d mismatches\n" : "all equal\n", failures);
  return failures != 0;
}
