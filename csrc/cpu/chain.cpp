// Chains on the CPU: checks, packing, the portable loops, and the choice of instruction set.
#include <stdexcept>
#include <string>

#include "cpu/chain_moments.h"
#include "cpu/isa.h"

namespace tsr {

constexpr int64_t kLargest = 1 << 24;  // of one size: products of a few of them are exact
constexpr double kMostUnits = 0x1p40;

void check_chain(const ChainPlan& plan, int64_t parameters) {
  const auto fail = [](int64_t i, const char* what) {
    throw std::invalid_argument("plan: record " + std::to_string(i) + ": " + what);
  };
  for (int64_t i = 0; i < plan.records; ++i) {
    const ChainRecord& r = plan.record[i];
    const auto within = [&](int64_t offset, int64_t count) { return offset >= 0 && count <= parameters - offset; };
    const bool pool = r.kind == ChainKind::avg_pool || r.kind == ChainKind::max_pool;
    for (int64_t size : {r.c, r.h, r.w, r.oc, r.oh, r.ow})
      if (size < 1 || size > kLargest) fail(i, "sizes must be in 1 .. 2^24");
    for (int64_t size : {r.kh, r.kw, r.sh, r.sw, r.ph, r.pw})
      if (size > kLargest) fail(i, "kernel, stride and padding must be at most 2^24");
    if (double(r.c) * double(r.h) * double(r.w) > kMostUnits ||
        double(r.oc) * double(r.oh) * double(r.ow) > kMostUnits || double(r.c) * double(r.oc) * 49 > kMostUnits)
      fail(i, "must have at most 2^40 units and parameters");
    if (i && r.inputs() != plan.record[i - 1].outputs()) fail(i, "does not take what the record before gives");
    if (r.activation < ChainActivation::none || r.activation > ChainActivation::leaky_relu)
      fail(i, "unknown activation");
    if (r.activation == ChainActivation::leaky_relu && !within(r.slope, 1))
      fail(i, "slope lies outside the parameters");
    if (pool || r.kind == ChainKind::conv) {
      if (r.kh < 1 || r.kw < 1 || r.sh < 1 || r.sw < 1 || r.ph < 0 || r.pw < 0 || r.ph >= r.kh || r.pw >= r.kw)
        fail(i, "kernel, stride and padding must be >= 1, >= 1 and 0 .. kernel - 1");
      if (r.h + 2 * r.ph < r.kh || r.oh != (r.h + 2 * r.ph - r.kh) / r.sh + 1 || r.w + 2 * r.pw < r.kw ||
          r.ow != (r.w + 2 * r.pw - r.kw) / r.sw + 1)
        fail(i, "output size does not follow from kernel, stride and padding");
    }
    switch (r.kind) {
      case ChainKind::conv:
        if (r.kh * r.kw > kMostTaps) fail(i, "kernel must have at most 49 taps");
        if (r.winograd && (r.kh != 3 || r.kw != 3 || r.sh != 1 || r.sw != 1)) fail(i, "Winograd is for 3x3, stride 1");
        if (!within(r.weight, r.oc * r.c * r.kh * r.kw) || !within(r.bias, r.oc)) fail(i, "parameters lie outside");
        break;
      case ChainKind::linear:
        if (r.h * r.w * r.oh * r.ow != 1) fail(i, "linear must have height and width 1");
        if (!within(r.weight, r.oc * r.c) || !within(r.bias, r.oc)) fail(i, "parameters lie outside");
        break;
      case ChainKind::affine:
        if (r.c != r.oc || r.h != r.oh || r.w != r.ow) fail(i, "affine must keep the shape");
        if (!within(r.weight, r.c) || !within(r.bias, r.c)) fail(i, "parameters lie outside");
        break;
      case ChainKind::avg_pool:
      case ChainKind::max_pool:
        if (r.c != r.oc) fail(i, "a pool must keep the channels");
        if (r.h * r.w >= int64_t(1) << 31) fail(i, "a pool's map must have fewer than 2^31 pixels");
        break;
      default:
        fail(i, "unknown kind");
    }
  }
}

int64_t chain_packed_size(const ChainPlan& plan) {
  int64_t end = 0;
  for (int64_t i = 0; i < plan.records; ++i) end = Packed(plan.record[i], end).end;
  return plan.records ? end + kBlock : 0;  // a vector of the last block's outputs may reach beyond it
}

namespace {

// [block][row][output], the output's index running fastest, of value(row, output).
template <class F>
float* pack_blocks(float* to, int64_t outputs, int64_t rows, F value) {
  const Blocks blocks(outputs);
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t o = blocks.first(b); o < blocks.first(b + 1); ++o) *to++ = value(k, o);
  return to;
}

// G of F(4, 3): its row p turns a kernel g into g(p) / prod_{q != p} (p - q).
constexpr double kA = kWinogradA, kB = kWinogradB, kNa = 1 / (2 * kA * kA * (kA * kA - kB * kB)),
                 kNb = 1 / (2 * kB * kB * (kB * kB - kA * kA)), kN0 = 1 / (kA * kA * kB * kB);
constexpr double kG[6][3] = {{kN0, 0, 0},
                             {kNa, kNa * kA, kNa * kA * kA},
                             {kNa, -kNa * kA, kNa * kA * kA},
                             {kNb, kNb * kB, kNb * kB * kB},
                             {kNb, -kNb * kB, kNb * kB * kB},
                             {0, 0, 1}};

void winograd_kernel(const float* g, bool flipped, double u[36]) {
  double rows[6][3];
  const auto tap = [&](int r, int s) { return double(flipped ? g[8 - 3 * r - s] : g[3 * r + s]); };
  for (int i = 0; i < 6; ++i)
    for (int s = 0; s < 3; ++s) rows[i][s] = kG[i][0] * tap(0, s) + kG[i][1] * tap(1, s) + kG[i][2] * tap(2, s);
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j) u[6 * i + j] = rows[i][0] * kG[j][0] + rows[i][1] * kG[j][1] + rows[i][2] * kG[j][2];
}

// [block][36][k][output] of kernels g(k, output)
template <class F>
void pack_winograd(float* to, int64_t outputs, int64_t depth, bool flipped, F kernel) {
  const Blocks blocks(outputs);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t first = blocks.first(b), size = blocks.first(b + 1) - first;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t o = 0; o < size; ++o) {
        double u[36];
        winograd_kernel(kernel(k, first + o), flipped, u);
        for (int64_t f = 0; f < 36; ++f) to[(f * depth + k) * size + o] = float(u[f]);
      }
    to += 36 * depth * size;
  }
}

void pack_conv(const ChainRecord& r, const float* w, float* forward, float* backward) {
  const int64_t taps = r.kh * r.kw;
  const auto kernel = [&](int64_t o, int64_t c) { return w + (o * r.c + c) * taps; };
  if (r.winograd) {
    pack_winograd(forward, r.oc, r.c, false, [&](int64_t c, int64_t o) { return kernel(o, c); });
    pack_winograd(backward, r.c, r.oc, true, [&](int64_t o, int64_t c) { return kernel(o, c); });
    return;
  }
  pack_blocks(forward, r.oc, r.c * taps, [&](int64_t k, int64_t o) { return kernel(o, k / taps)[k % taps]; });
  for (int64_t i = 0; i < r.sh; ++i)
    for (int64_t j = 0; j < r.sw; ++j) {
      const int64_t along = taps_of(r.kw, r.sw, j), count = taps_of(r.kh, r.sh, i) * along;
      backward = pack_blocks(backward, r.c, r.oc * count, [&](int64_t k, int64_t c) {
        const int64_t t = k % count;
        return kernel(k / count, c)[(i + t / along * r.sh) * r.kw + j + t % along * r.sw];
      });
    }
}

}  // namespace

void chain_pack_cpu(const ChainPack& a) {
  int64_t begin = 0;
  for (int64_t i = 0; i < a.plan.records; ++i) {
    const ChainRecord& r = a.plan.record[i];
    const Packed at(r, begin);
    const float* const w = r.weight < 0 ? nullptr : a.weights + r.weight;
    if (r.kind == ChainKind::conv) pack_conv(r, w, a.packed + at.forward, a.packed + at.backward);
    if (r.kind == ChainKind::linear) {
      pack_blocks(a.packed + at.forward, r.oc, r.c, [&](int64_t k, int64_t o) { return w[o * r.c + k]; });
      pack_blocks(a.packed + at.backward, r.c, r.oc, [&](int64_t o, int64_t k) { return w[o * r.c + k]; });
    }
    float* to = a.packed + at.bias;
    const auto copy = [&](int64_t from, int64_t count) {
      memcpy(to, a.weights + from, size_t(count) * sizeof(float));
      to += count;
    };
    if (r.kind == ChainKind::affine) copy(r.weight, r.c);
    if (at.slope > at.bias) copy(r.bias, r.oc);
    if (at.end > at.slope) copy(r.slope, 1);
    begin = at.end;
  }
  for (int64_t i = begin; i < chain_packed_size(a.plan); ++i) a.packed[i] = 0;
}

void chain_forward_portable(const ChainForward& a, int threads) { forward(a, threads); }
void chain_gradient_portable(const ChainGradient& a, int threads) { gradient(a, threads); }
void chain_pgd_portable(const ChainPgd& a, int threads) { pgd(a, threads); }
int64_t chain_workspace_portable(const ChainPlan& student, const ChainPlan& teacher) {
  return workspace(student, teacher);
}

void channel_correlation_chunk_portable(const ChannelCorrelation&, int64_t, int64_t, double*, void*);
int64_t channel_correlation_scratch_portable(const ChannelCorrelation&);
constexpr MomentsOf kMoments{channel_correlation_chunk_portable, channel_correlation_scratch_portable};
int64_t chain_correlation_lanes_portable() { return kMostLanes; }
int64_t chain_correlation_scratch_portable(const ChainCorrelation& a) { return group_scratch(a, kMoments); }
void chain_correlation_group_portable(const ChainCorrelation& a, int64_t first, int64_t count, double* moments,
                                      void* memory) {
  group_moments(a, first, count, kMoments, moments, memory);
}

void chain_forward_avx2(const ChainForward& a, int threads);
void chain_gradient_avx2(const ChainGradient& a, int threads);
void chain_pgd_avx2(const ChainPgd& a, int threads);
int64_t chain_workspace_avx2(const ChainPlan& student, const ChainPlan& teacher);
void chain_forward_avx512(const ChainForward& a, int threads);
void chain_gradient_avx512(const ChainGradient& a, int threads);
void chain_pgd_avx512(const ChainPgd& a, int threads);
int64_t chain_workspace_avx512(const ChainPlan& student, const ChainPlan& teacher);

int64_t chain_workspace(const ChainPlan& student, const ChainPlan& teacher) {
  return TSR_PICK_ISA(chain_workspace)(student, teacher);
}
void chain_forward_cpu(const ChainForward& a, int threads) { TSR_PICK_ISA(chain_forward)(a, threads); }
void chain_gradient_cpu(const ChainGradient& a, int threads) { TSR_PICK_ISA(chain_gradient)(a, threads); }
void chain_pgd_cpu(const ChainPgd& a, int threads) { TSR_PICK_ISA(chain_pgd)(a, threads); }

}  // namespace tsr
