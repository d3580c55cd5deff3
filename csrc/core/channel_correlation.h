// Moments of two networks' channels over one batch.   Twins: cpu/channel_correlation.cpp, cuda/channel_correlation.cu
//
//   A sample is one position of one image, n = N H W samples in all; x_c(s) is a channel of either network.
//   mean_c = 1/n sum_s x_c(s)      m2_c = sum_s (x_c(s) - mean_c)^2      cross_kj = sum_s (x_k(s) - mean_k) (y_j(s) -
//   mean_j)
//
// Both twins cut the samples into chunks and the chunks into short tiles. Within a tile, values are taken relative to a
// shift near their mean, so that float32 products lose nothing to a large mean; tiles and chunks are joined in float64
// (Chan, Golub, LeVeque 1979). Chunks depend on the shape alone, and are joined in order: any thread count, same bits.
#pragma once
#include "core/dtype.h"

namespace tsr {

// One network's activations; strides in values. A value is at image * s_image + channel * s_channel + position *
// s_position.
struct Activations {
  const void* values;
  int64_t channels, s_image, s_channel, s_position;
};

struct ChannelCorrelation {
  Activations student, teacher;
  double* moments;  // out: `moments_size` numbers, laid out as below
  void* workspace;  // `channel_correlation_workspace_*` bytes, 64-byte aligned
  int64_t images, positions;
  Dtype dtype;
};

TSR_HD int64_t samples(const ChannelCorrelation& a) { return a.images * a.positions; }

// [count | mean: student, teacher | m2: student, teacher | cross [Cs, Ct]], all float64
TSR_HD int64_t moments_size(int64_t cs, int64_t ct) { return 1 + 2 * (cs + ct) + cs * ct; }
TSR_HD int64_t mean_at(int64_t channel) { return 1 + channel; }
TSR_HD int64_t m2_at(int64_t channel, int64_t cs, int64_t ct) { return 1 + cs + ct + channel; }
TSR_HD int64_t cross_at(int64_t k, int64_t j, int64_t cs, int64_t ct) { return 1 + 2 * (cs + ct) + k * ct + j; }

// Joining b to a, with delta = mean_b - mean_a:   mean += delta part   m2 += m2_b + delta^2 weight   (cross alike)
struct Join {
  double part, weight;
};
TSR_HD Join join(double na, double nb) { return {nb / (na + nb), na * nb / (na + nb)}; }

// A shift of 16 significant bits: sums over the many equal values of a ReLU's channel (its zeros) then round less.
TSR_HD float few_bits(float v) { return bit_cast<float>(bit_cast<uint32_t>(v) & 0xffffff00u); }
TSR_HD double few_bits(double v) { return few_bits(float(v)); }

// Chunks of equal length (the last may be shorter), a multiple of `tile`, at most `most` of them.
struct Chunks {
  int64_t length, count;
};
TSR_HD Chunks cut(int64_t samples, int64_t tile, int64_t most) {
  const int64_t tiles = (samples + tile - 1) / tile, each = (tiles + most - 1) / most;
  return {each * tile, each ? (tiles + each - 1) / each : 0};
}

int64_t channel_correlation_workspace_cpu(const ChannelCorrelation& args, int threads);
int64_t channel_correlation_workspace_cuda(const ChannelCorrelation& args);
void channel_correlation_cpu(const ChannelCorrelation& args, int threads);
void channel_correlation_cuda(const ChannelCorrelation& args, int device, void* stream);

}  // namespace tsr
