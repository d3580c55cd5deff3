// Chains on the CPU at every instruction set, against the portable one, on small odd networks.
//
// Made for AddressSanitizer and UBSan (CMake target chain_check, -DTSRFAST_SANITIZE=ON): every buffer is a heap block
// of exactly the size that the engine asks for, and starts as NaN, so a value that was never written is seen. Exit code
// 1 and a line for each mismatch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "core/chain_correlation.h"
#include "cpu/isa.h"

#include "check.h"

namespace {

using namespace tsr;
using namespace check;

struct Network {
  std::vector<ChainRecord> records;
  std::vector<float> weights, packed;

  ChainPlan plan() const { return {records.data(), int64_t(records.size())}; }
  ChainNet net() const { return {plan(), packed.data()}; }

  int64_t parameters(Random& random, int64_t count, float scale) {
    const int64_t at = int64_t(weights.size());
    for (int64_t i = 0; i < count; ++i) weights.push_back(scale * (2 * random.uniform() - 1));
    return at;
  }
  void add(Random& random, ChainKind kind, int64_t oc, int64_t kh, int64_t kw, int64_t s, int64_t p,
           ChainActivation activation, bool winograd, int64_t c, int64_t h, int64_t w) {
    if (!records.empty()) c = records.back().oc, h = records.back().oh, w = records.back().ow;
    if (kind == ChainKind::linear) c *= h * w, h = w = 1;
    const bool weighted = kind == ChainKind::conv || kind == ChainKind::linear;
    ChainRecord r{kind,
                  c,
                  h,
                  w,
                  weighted ? oc : c,
                  (h + 2 * p - kh) / s + 1,
                  (w + 2 * p - kw) / s + 1,
                  kh,
                  kw,
                  s,
                  s,
                  p,
                  p,
                  activation,
                  -1,
                  -1,
                  -1,
                  winograd,
                  0};
    const float scale = 2 / std::sqrt(float(c * kh * kw));
    if (weighted) r.weight = parameters(random, oc * c * kh * kw, scale), r.bias = parameters(random, oc, 0.3f);
    if (kind == ChainKind::affine) r.weight = parameters(random, c, 1.5f), r.bias = parameters(random, c, 0.3f);
    if (activation == ChainActivation::leaky_relu) r.slope = parameters(random, 1, 0.3f);
    records.push_back(r);
  }
  void pack() {
    check_chain(plan(), int64_t(weights.size()));
    packed.resize(size_t(chain_packed_size(plan())));
    chain_pack_cpu({plan(), weights.data(), packed.data()});
  }
};

Network network(uint64_t seed, int variant) {
  using K = ChainKind;
  using A = ChainActivation;
  Random random{seed};
  Network n;
  switch (variant) {
    case 0:  // Winograd with every padding, tiles that hang over
      n.add(random, K::conv, 9, 3, 3, 1, 0, A::relu, true, 3, 11, 10);
      n.add(random, K::conv, 5, 3, 3, 1, 1, A::leaky_relu, true, 0, 0, 0);
      n.add(random, K::conv, 17, 3, 3, 1, 2, A::relu, true, 0, 0, 0);
      break;
    case 1:  // direct: strides, kernels, paddings
      n.add(random, K::affine, 0, 1, 1, 1, 0, A::none, false, 2, 13, 9);
      n.add(random, K::conv, 7, 5, 3, 2, 1, A::relu, false, 0, 0, 0);
      n.add(random, K::conv, 3, 1, 1, 3, 0, A::none, false, 0, 0, 0);
      n.add(random, K::conv, 8, 2, 1, 1, 0, A::leaky_relu, false, 0, 0, 0);
      break;
    case 2:  // pools
      n.add(random, K::max_pool, 0, 3, 2, 1, 1, A::none, false, 3, 8, 7);
      n.add(random, K::conv, 6, 3, 3, 1, 0, A::relu, false, 0, 0, 0);
      n.add(random, K::avg_pool, 0, 2, 2, 2, 1, A::relu, false, 0, 0, 0);
      break;
    default:  // features only
      n.add(random, K::linear, 19, 1, 1, 1, 0, A::relu, false, 300, 1, 1);
  }
  n.add(random, K::linear, 4, 1, 1, 1, 0, A::none, false, 0, 0, 0);
  n.pack();
  return n;
}

// Everything a call returns, as doubles in one row.
using Row = std::vector<double>;
template <class T>
void append(Row& row, const T* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row.push_back(double(v[i]));
}

Row run(const Network& student, const Network& teacher, int64_t n, int threads, Norm norm, ChainLoss loss, bool all) {
  const ChainPlan plan = student.plan();
  const int64_t d = plan.inputs(), classes = plan.classes(), steps = 3, records = plan.records;
  Row row;
  Random random{7};
  auto x = unwritten<float>(n * d);
  for (int64_t i = 0; i < n * d; ++i) x[i] = random.uniform();
  const Memory room = memory<64>(threads * chain_workspace(plan, teacher.plan()));

  std::vector<std::unique_ptr<float[]>> maps;
  std::vector<float*> out;
  std::vector<int64_t> at;
  for (int64_t i = 0; i < records; ++i) {
    maps.push_back(unwritten<float>(n * plan.record[i].outputs()));
    out.push_back(maps.back().get());
    at.push_back(i);
  }
  chain_forward_cpu({student.net(), x.get(), at.data(), out.data(), n, records, room.get()}, threads);
  for (int64_t i = 0; i < records; ++i) append(row, out[i], n * plan.record[i].outputs());

  const int64_t rows = 2;
  auto cotangent = unwritten<float>(n * rows * classes);
  for (int64_t i = 0; i < n * rows * classes; ++i) cotangent[i] = random.uniform() - 0.5f;
  for (int64_t layer = -1; layer < records; ++layer) {
    const int64_t units = layer < 0 ? d : plan.record[layer].outputs();
    auto gradient = unwritten<float>(n * rows * units);
    chain_gradient_cpu({student.net(), x.get(), cotangent.get(), gradient.get(), n, rows, layer, room.get()}, threads);
    append(row, gradient.get(), n * rows * units);
  }

  auto result = unwritten<float>(n * d), value = unwritten<float>(n), closeness = unwritten<float>(n);
  auto iterates = unwritten<float>((steps + 1) * n * d);
  auto adversarial = unwritten<bool>(n);
  auto bad = unwritten<int64_t>(n), queries = unwritten<int64_t>(n), labels = unwritten<int64_t>(n);
  auto eps = unwritten<double>(n);
  for (int64_t i = 0; i < n; ++i) labels[i] = i % classes, eps[i] = 0.05 + 0.01 * double(i);
  const bool pair = needs_teacher(loss);
  chain_pgd_cpu({student.net(),
                 pair ? teacher.net() : ChainNet{{nullptr, 0}, nullptr},
                 x.get(),
                 x.get(),
                 result.get(),
                 labels.get(),
                 value.get(),
                 adversarial.get(),
                 closeness.get(),
                 bad.get(),
                 queries.get(),
                 iterates.get(),
                 nullptr,
                 eps.get(),
                 0.02,
                 0,
                 0,
                 1,
                 0.1,
                 n,
                 steps,
                 norm,
                 loss,
                 false,
                 all,
                 all,
                 all,
                 room.get()},
                threads);
  append(row, result.get(), n * d);
  append(row, iterates.get(), (steps + 1) * n * d);
  append(row, bad.get(), n);
  append(row, queries.get(), n);
  append(row, adversarial.get(), n);
  if (pair) append(row, closeness.get(), n);
  if (all) append(row, value.get(), n);
  return row;
}

// Moments of all records in pairs, and of the first and the last once more, in this order.
Row correlations(const Network& student, const Network& teacher, int64_t n, int threads) {
  const ChainPlan plan = student.plan();
  Random random{9};
  auto x = unwritten<float>(n * plan.inputs());
  for (int64_t i = 0; i < n * plan.inputs(); ++i) x[i] = random.uniform();
  std::vector<int64_t> at;
  for (int64_t i = 0; i < plan.records; ++i) at.push_back(plan.records - 1 - i);
  at.push_back(0), at.push_back(plan.records - 1);
  std::vector<std::unique_ptr<double[]>> held;
  std::vector<double*> moments;
  for (int64_t i : at) {
    held.push_back(unwritten<double>(moments_size(plan.record[i].oc, teacher.plan().record[i].oc)));
    moments.push_back(held.back().get());
  }
  ChainCorrelation args{student.net(),      teacher.net(), x.get(), at.data(), at.data(), moments.data(), n,
                        int64_t(at.size()), nullptr};
  const Memory room = memory<64>(chain_correlation_workspace_cpu(args, threads));
  args.workspace = room.get();
  chain_correlation_cpu(args, threads);
  Row row;
  for (size_t p = 0; p < at.size(); ++p)
    append(row, moments[p], moments_size(plan.record[at[p]].oc, teacher.plan().record[at[p]].oc));
  return row;
}

void check_correlations() {
  for (int variant = 0; variant < 4; ++variant) {
    const Network student = network(11, variant), teacher = network(12, variant);
    for (int64_t n : {0, 1, 3, 16, 37, 300}) {
      set_isa("portable");
      const Row expected = correlations(student, teacher, n, 1);
      double largest = 0;
      for (double v : expected) largest = std::fmax(largest, std::fabs(v));
      for (const std::string& level : isa_levels()) {
        set_isa(level);
        const Row one = correlations(student, teacher, n, 1), three = correlations(student, teacher, n, 3);
        double error = 0;
        bool same = one.size() == expected.size();
        for (size_t i = 0; same && i < one.size(); ++i) {
          error = std::fmax(error, std::fabs(one[i] - expected[i]));
          same = one[i] == three[i];  // not for a NaN
        }
        if (same && error <= 1e-5 * largest) continue;
        ++failures;
        std::printf("correlation: variant %d, %lld images, %s: off by %g of %g, threads agree: %d\n", variant,
                    static_cast<long long>(n), level.c_str(), error, largest, same);
      }
    }
  }
}

}  // namespace

int main() {
  check_correlations();
  for (int variant = 0; variant < 4; ++variant)
    for (int loss = 0; loss <= int(ChainLoss::oracle_max_difference); ++loss) {
      const Network student = network(11, variant), teacher = network(12, variant);
      const Norm norm = Norm(loss % 3);
      for (int64_t n : {1, 5, 19})
        for (bool all : {false, true}) {
          set_isa("portable");
          const Row expected = run(student, teacher, n, 1, norm, ChainLoss(loss), all);
          for (const std::string& level : isa_levels())
            for (int threads : {1, 3}) {
              set_isa(level);
              const Row got = run(student, teacher, n, threads, norm, ChainLoss(loss), all);
              int64_t off = 0;  // a pixel whose gradient is nearly 0 may step the other way
              for (size_t i = 0; i < got.size(); ++i)
                off += !(std::fabs(got[i] - expected[i]) <= 1e-4 * (1 + std::fabs(expected[i])));
              if (got.size() == expected.size() && double(off) <= 0.01 * double(got.size())) continue;
              ++failures;
              std::printf("variant %d, loss %d, %lld images, %s, %d threads: %lld of %zu values differ\n", variant,
                          loss, static_cast<long long>(n), level.c_str(), threads, static_cast<long long>(off),
                          got.size());
            }
        }
    }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
