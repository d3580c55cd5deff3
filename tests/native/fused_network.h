// A network that fused kernels take, packed for them and for the CPU; what the checks of these kernels say of a
// mismatch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/chain_correlation.h"
#include "core/chain_fused.h"

#include "check.h"

namespace check {

using namespace tsr;

inline void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("%s: %s\n", where.c_str(), what.c_str());
}
inline std::string number(double v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", v);
  return text;
}

struct Network {
  std::vector<ChainRecord> records;
  std::vector<float> weights, packed, floats, packed_cuda;
  std::vector<uint16_t> halves;

  Network() = default;
  Network(uint64_t seed, int64_t side, int64_t classes, const std::vector<int64_t>& channels) {
    Random random{seed};
    int64_t c = 3;
    for (const int64_t oc : channels) {
      add(random, {ChainKind::conv, c, side, side, oc, side - 2, side - 2, 3, 3, 1, 1, 0, 0, ChainActivation::relu, 0,
                   0, -1, 0, 0});
      c = oc, side -= 2;
    }
    add(random, {ChainKind::linear, c * side * side, 1, 1, classes, 1, 1, 1, 1, 1, 1, 0, 0, ChainActivation::none, 0, 0,
                 -1, 0, 0});
    pack();
  }
  ChainPlan plan() const { return {records.data(), int64_t(records.size())}; }
  ChainNet cpu() const { return {plan(), packed.data()}; }
  ChainNet cuda() const { return {plan(), packed_cuda.data()}; }
  ChainFusedNet fused() const { return {plan(), floats.data(), halves.data()}; }
  // With weights of 0, so that every channel of every layer is one of these constants, in turns.
  void make_constant(const std::vector<float>& constants) {
    std::fill(weights.begin(), weights.end(), 0.f);
    for (const ChainRecord& r : records)
      for (int64_t c = 0; c < r.oc; ++c) weights[size_t(r.bias + c)] = constants[size_t(c) % constants.size()];
    floats.clear(), halves.clear();
    pack();
  }
  int64_t inputs() const { return plan().inputs(); }
  int64_t classes() const { return plan().classes(); }

 private:
  int64_t parameters(Random& random, int64_t count, float scale) {
    const int64_t at = int64_t(weights.size());
    for (int64_t i = 0; i < count; ++i) weights.push_back(scale * (2 * random.uniform() - 1));
    return at;
  }
  void add(Random& random, ChainRecord r) {
    const int64_t depth = r.c * r.kh * r.kw;
    r.weight = parameters(random, r.oc * depth, std::sqrt(6.f / float(depth)));
    r.bias = parameters(random, r.oc, 0.1f);
    records.push_back(r);
  }
  void pack() {
    packed.resize(size_t(chain_packed_size(plan())));
    chain_pack_cpu({plan(), weights.data(), packed.data()});
    const ChainFusedSize size = chain_fused_size(plan());
    if (!size.hi) throw std::runtime_error("there is no fused kernel for a network of this check");
    std::vector<int32_t> to_floats(size_t(size.floats)), to_halves(size_t(size.hi));
    chain_fused_map(plan(), to_floats.data(), to_halves.data());
    for (const int32_t at : to_floats) floats.push_back(at < 0 ? 0.f : weights[size_t(at)]);
    for (const int32_t at : to_halves) halves.push_back(half(at));
    pack_cuda();
  }
  uint16_t half(int32_t at) const { return bit_cast<uint16_t>(_Float16(at < 0 ? 0.f : weights[size_t(at)])); }
  void pack_cuda() {  // without the section `lo`, which no fused kernel reads
    const ChainPackedCuda size = chain_packed_cuda(plan());
    std::vector<int32_t> map(size_t(size.floats + size.hi + size.lo));
    chain_map_cuda(plan(), map.data());
    packed_cuda.assign(size_t(size.size), NAN);
    for (int64_t i = 0; i < size.floats; ++i)
      packed_cuda[size_t(i)] = map[size_t(i)] < 0 ? 0.f : weights[size_t(map[size_t(i)])];
    for (int64_t i = 0; i < size.hi; ++i) {
      const uint16_t value = half(map[size_t(size.floats + i)]);
      std::memcpy(reinterpret_cast<unsigned char*>(packed_cuda.data() + size.hi_at) + 2 * i, &value, 2);
    }
  }
};

// For the CPU's chains.
inline Memory room_of(const Network& net) { return memory<64>(chain_workspace(net.plan(), {})); }

// What a check's main returns.
inline int run_checks(void (*checks)()) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    checks();
  } catch (const std::exception& e) {
    std::printf("%s: %s\n", where.c_str(), e.what());
    return 1;
  }
  std::printf(failures ? "%d mismatches\n" : "all agree\n", failures);
  return failures != 0;
}

}  // namespace check
