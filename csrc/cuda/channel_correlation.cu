// Moments of two networks' channels.   Formula, shapes, layout of the moments: core/channel_correlation.h
//
// Work: a block makes the moments of up to 64 x 64 channel pairs over one chunk of the samples, tile after tile of 256
// bytes a channel. In a tile every thread first brings values to shared memory, less a shift; then thread c sums up
// channel c, and every thread adds RK x RJ products a sample in registers (float32, at most 64 terms), which are folded
// into float64 sums of the chunk, also in registers. The shift is the mean of the tile before: where the mean jumps,
// the jump itself is variance, so nothing is lost. A second kernel joins the chunks in order: no atomics, same bits
// each time. One pass over the activations. Bound by float32 arithmetic, 2 flops a sample and (padded) pair, about
// twice the time of reading 50 + 45 float32 channels once.
#include "core/channel_correlation.h"
#include "cuda/launch.cuh"

namespace tsr {
namespace {

constexpr int kThreads = 256, kSide = 16, kTileBytes = 256, kBlocks = 264, kMerge = 128;

template <class C>
struct alignas(16) Quad {
  C v[16 / sizeof(C)];
};

// The sample a thread is at, moved along without divisions.
struct Sample {
  int64_t image, position;
  __device__ void advance(int64_t by, int64_t positions) {
    position += by;
    while (position >= positions) position -= positions, ++image;
  }
};

// Samples [start, start + n) of channels [first, first + edge), minus their shifts, to rows of shared memory; 0
// elsewhere. `at` is sample `start` + the thread's offset: see `offset_of`.
template <class T, class C, int kTile, int kRow>
__device__ void stage(const Activations& x, Sample at, int64_t positions, int n, int64_t first, int edge,
                      const C* shift, C* rows) {
  const T* values = static_cast<const T*>(x.values);
  const int64_t left = x.channels - first;
  if (x.s_channel == 1) {  // lanes are channels
    for (int s = int(threadIdx.x / 32); s < kTile; s += kThreads / 32) {
      const T* from = values + at.image * x.s_image + at.position * x.s_position + first;
      for (int c = int(threadIdx.x % 32); c < edge; c += 32)
        rows[c * kRow + s] = s < n && c < left ? load(from[c]) - shift[c] : C(0);
      if (s + kThreads / 32 < n) at.advance(kThreads / 32, positions);
    }
  } else {  // lanes are samples
    const int s = int(threadIdx.x % kTile);
    const T* from = values + at.image * x.s_image + at.position * x.s_position + first * x.s_channel;
    for (int c = int(threadIdx.x / kTile); c < edge; c += kThreads / kTile)
      rows[c * kRow + s] = s < n && c < left ? load(from[c * x.s_channel]) - shift[c] : C(0);
  }
}

template <class T, int RK, int RJ>
__global__ void __launch_bounds__(kThreads) channel_correlation_kernel(ChannelCorrelation a, int64_t length) {
  using C = compute_t<T>;
  constexpr int kTile = kTileBytes / int(sizeof(C)), kQuad = 16 / int(sizeof(C)), kRow = kTile + kQuad;
  constexpr int kK = kSide * RK, kJ = kSide * RJ, kChannels = kK + kJ;
  TSR_DYNAMIC_SHARED(double, sum);                          // [kChannels] of a tile's shifted values
  double* const delta = sum + kChannels;                    // [kChannels] tile's mean - chunk's mean so far
  C* const rows = reinterpret_cast<C*>(delta + kChannels);  // [kChannels, kRow]: student, then teacher
  C* const shift = rows + kChannels * kRow;                 // [kChannels]

  const int t = int(threadIdx.x), tk = t / kSide, tj = t % kSide;
  const int64_t cs = a.student.channels, ct = a.teacher.channels;
  const int64_t blocks_j = (ct + kJ - 1) / kJ, block_k = int64_t(blockIdx.x) / blocks_j,
                block_j = int64_t(blockIdx.x) % blocks_j;
  const int64_t first_k = block_k * kK, first_j = block_j * kJ;
  const int64_t begin = int64_t(blockIdx.y) * length, end = begin + length < samples(a) ? begin + length : samples(a);

  // Threads start at their own offset within a tile, one for each order of staging, and advance by whole tiles.
  Sample by_channel{begin / a.positions, begin % a.positions}, by_sample = by_channel;
  by_channel.advance(t / 32, a.positions);
  by_sample.advance(t % kTile, a.positions);

  double cross[RK][RJ] = {};
  double mean = 0, m2 = 0;  // of channel t
  if (t < kChannels) shift[t] = 0;
  __syncthreads();

  for (int64_t at = begin; at < end; at += kTile) {
    const int n = int(end - at < kTile ? end - at : kTile);
    stage<T, C, kTile, kRow>(a.student, a.student.s_channel == 1 ? by_channel : by_sample, a.positions, n, first_k, kK,
                             shift, rows);
    stage<T, C, kTile, kRow>(a.teacher, a.teacher.s_channel == 1 ? by_channel : by_sample, a.positions, n, first_j, kJ,
                             shift + kK, rows + kK * kRow);
    by_channel.advance(kTile, a.positions);
    by_sample.advance(kTile, a.positions);
    __syncthreads();

    if (t < kChannels) {
      C* row = rows + t * kRow;
      if (at == begin) {  // nothing before: the mean of this very tile
        C total = 0;
        for (int s = 0; s < n; ++s) total += row[s];
        shift[t] = few_bits(total / C(n));
        for (int s = 0; s < n; ++s) row[s] -= shift[t];
      }
      C total[kQuad] = {}, square[kQuad] = {};
      for (int s = 0; s < kTile; s += kQuad) {
        const Quad<C> d = *reinterpret_cast<const Quad<C>*>(row + s);
        for (int q = 0; q < kQuad; ++q) total[q] += d.v[q], square[q] += d.v[q] * d.v[q];
      }
      double total_all = 0, square_all = 0;
      for (int q = 0; q < kQuad; ++q) total_all += double(total[q]), square_all += double(square[q]);
      const Join to = join(double(at - begin), double(n));
      const double tile_mean = double(shift[t]) + total_all / n, change = tile_mean - mean;
      sum[t] = total_all;
      delta[t] = change;
      mean += change * to.part;
      m2 += square_all - total_all * total_all / n + change * change * to.weight;
      shift[t] = few_bits(C(tile_mean));
    }
    if (at == begin) __syncthreads();  // the rows have changed

    C product[RK][RJ] = {};
    for (int s = 0; s < kTile; s += kQuad) {
      Quad<C> k[RK];
#pragma unroll
      for (int i = 0; i < RK; ++i) k[i] = *reinterpret_cast<const Quad<C>*>(rows + (tk + i * kSide) * kRow + s);
#pragma unroll
      for (int j = 0; j < RJ; ++j) {
        const Quad<C> y = *reinterpret_cast<const Quad<C>*>(rows + (kK + tj + j * kSide) * kRow + s);
#pragma unroll
        for (int i = 0; i < RK; ++i)
#pragma unroll
          for (int q = 0; q < kQuad; ++q) product[i][j] += k[i].v[q] * y.v[q];
      }
    }
    __syncthreads();  // sums are there, rows may be overwritten

    const double weight = join(double(at - begin), double(n)).weight;
#pragma unroll
    for (int i = 0; i < RK; ++i) {
      const int k = tk + i * kSide;
      const double left = -sum[k] / n, moved = delta[k] * weight;
#pragma unroll
      for (int j = 0; j < RJ; ++j) {
        const int other = kK + tj + j * kSide;
        cross[i][j] += double(product[i][j]) + (left * sum[other] + moved * delta[other]);
      }
    }
  }

  double* out = static_cast<double*>(a.workspace) + int64_t(blockIdx.y) * moments_size(cs, ct);
  if (t == 0 && blockIdx.x == 0) out[0] = double(end - begin);
  // The channel's number among all, students first; every channel is written by one block of the chunk.
  const bool student = t < kK;
  const int64_t local = student ? first_k + t : first_j + t - kK;
  if (t < kChannels && local < (student ? cs : ct) && (student ? block_j : block_k) == 0) {
    const int64_t c = student ? local : cs + local;
    out[mean_at(c)] = mean;
    out[m2_at(c, cs, ct)] = m2;
  }
#pragma unroll
  for (int i = 0; i < RK; ++i) {
    const int64_t k = first_k + tk + i * kSide;
#pragma unroll
    for (int j = 0; j < RJ; ++j) {
      const int64_t col = first_j + tj + j * kSide;
      if (k < cs && col < ct) out[cross_at(k, col, cs, ct)] = cross[i][j];
    }
  }
}

// Joins the chunks' moments in order; a thread has one channel (its mean and m2) or one pair.
__global__ void __launch_bounds__(kMerge) channel_correlation_join_kernel(ChannelCorrelation a, int64_t chunks) {
  const int64_t cs = a.student.channels, ct = a.teacher.channels, size = moments_size(cs, ct);
  const int64_t e = int64_t(blockIdx.x) * kMerge + threadIdx.x, pair = e - (cs + ct);
  if (pair >= cs * ct) return;
  const int64_t left = pair < 0 ? e : pair / ct, right = pair < 0 ? e : cs + pair % ct;
  const int64_t second = pair < 0 ? m2_at(e, cs, ct) : 1 + 2 * (cs + ct) + pair;
  double count = 0, mean_left = 0, mean_right = 0, total = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const double* p = static_cast<const double*>(a.workspace) + i * size;
    const Join to = join(count, p[0]);
    const double dl = p[mean_at(left)] - mean_left, dr = p[mean_at(right)] - mean_right;
    mean_left += dl * to.part;
    mean_right += dr * to.part;
    total += p[second] + dl * dr * to.weight;
    count += p[0];
  }
  if (pair < 0) a.moments[mean_at(e)] = mean_left;
  a.moments[second] = total;
  if (e == 0) a.moments[0] = count;
}

int edge(int64_t channels) {  // channels a thread has, of one network: blocks of 32, 48 or 64
  const int64_t r = (channels + kSide - 1) / kSide;
  return r <= 2 ? 2 : r == 3 ? 3 : 4;
}

Chunks chunks_of(const ChannelCorrelation& a) {
  const int64_t rk = edge(a.student.channels) * kSide, rj = edge(a.teacher.channels) * kSide;
  const int64_t pairs = (a.student.channels + rk - 1) / rk * ((a.teacher.channels + rj - 1) / rj);
  const int64_t tile = kTileBytes / (a.dtype == Dtype::f64 ? 8 : 4);
  return cut(samples(a), tile, pairs < kBlocks ? (kBlocks + pairs - 1) / pairs : 1);
}

template <class T, int RK, int RJ>
void run(const ChannelCorrelation& a, void* stream) {
  using C = compute_t<T>;
  constexpr int kChannels = kSide * (RK + RJ);
  const size_t smem = size_t(kChannels) * (2 * sizeof(double) + kTileBytes + 16 + sizeof(C));
  const Chunks chunks = chunks_of(a);
  const int64_t pairs =
      (a.student.channels + kSide * RK - 1) / (kSide * RK) * ((a.teacher.channels + kSide * RJ - 1) / (kSide * RJ));
  launch(channel_correlation_kernel<T, RK, RJ>, dim3(unsigned(pairs), unsigned(chunks.count)), dim3(kThreads), smem,
         stream, a, chunks.length);
}

template <class T, int RK>
void run_j(const ChannelCorrelation& a, void* stream) {
  switch (edge(a.teacher.channels)) {
    case 2:
      return run<T, RK, 2>(a, stream);
    case 3:
      return run<T, RK, 3>(a, stream);
    default:
      return run<T, RK, 4>(a, stream);
  }
}

template <class T>
void run_k(const ChannelCorrelation& a, void* stream) {
  switch (edge(a.student.channels)) {
    case 2:
      return run_j<T, 2>(a, stream);
    case 3:
      return run_j<T, 3>(a, stream);
    default:
      return run_j<T, 4>(a, stream);
  }
}

}  // namespace

int64_t channel_correlation_workspace_cuda(const ChannelCorrelation& a) {
  return chunks_of(a).count * moments_size(a.student.channels, a.teacher.channels) * int64_t(sizeof(double));
}

void channel_correlation_cuda(const ChannelCorrelation& a, int device, void* stream) {
  DeviceGuard guard(device);
  if (samples(a) > 0) TSR_WITH_DTYPE(a.dtype, T, run_k<T>(a, stream))
  const int64_t cs = a.student.channels, ct = a.teacher.channels;
  launch(channel_correlation_join_kernel, dim3(unsigned((cs + ct + cs * ct + kMerge - 1) / kMerge)), dim3(kMerge), 0,
         stream, a, chunks_of(a).count);
}

}  // namespace tsr
