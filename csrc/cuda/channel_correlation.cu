// Moments of two networks' channels.   Formula, shapes, layout of the moments: core/channel_correlation.h
//
// Work: a block makes the moments of up to 16 MT x 8 NT channel pairs over one chunk of the samples. Each of its four
// warps takes 64 bytes of every channel at a time, brings them to its own ring in shared memory by asynchronous copies,
// and multiplies all its pairs over these samples on tensor cores: each value is read from shared memory once, by one
// thread, which subtracts the shift, adds the value and its square to float32 sums, and splits it into two terms. A
// pair has three products: hi hi + hi lo + lo hi. Warps wait for each other only when their float32 sums are folded
// into the block's float64 sums, every `kTilePieces` pieces; they add in a fixed order. A second kernel joins the
// chunks in order: no atomics, same bits each time. One pass over the activations (channels beyond 64 x 64: one per
// tile of channels, from the second-level cache where the blocks of a chunk meet there).
//
// The terms: float32 as two tf32 numbers (22 bits); 16-bit values less their shift as two bf16 numbers (16 bits, and
// all of float32's range, which float16 has not). Tensor cores cut their sums off instead of rounding them, so a step's
// products (8 or 16 samples) start from 0, small ones first, and are then added to the sums by rounding additions:
// simulated on 40,000 samples (ReLU's half zeros, means of 30 and of 1000 deviations), correlations are off by 4e-8,
// 16-bit terms 2e-7; in one chain of mma they would be by 3e-6. The shift is the mean of the tile before, of few bits,
// at first that of a few samples: where the mean jumps, the jump itself is variance, so nothing is lost.
//
// Bound by memory: 50 + 45 float32 channels are 48,640 bytes per 128 samples, 2,760 cycles of an H200's SM at 4.3 TB/s.
// In that time it has to issue (model, not measured) 2,700 instructions on values, 1,008 mma and 1,344 additions: with
// addresses 1,500 cycles of each of its four schedulers, and 1,600 cycles of tensor cores at 63 % of their rate. Of
// 16-bit values 256 samples take these 2,760 cycles, and 2,300 cycles of issue. Exceptions: 16-bit values that have no
// neighbours in memory to be copied with (channels last, an odd number of positions) go through registers and wait for
// their loads; float64 has a kernel of its own, without tensor cores and bound by arithmetic.
//
// A block of 3 x 7 has 77 KB of shared memory and at most 255 registers a thread, so two are on an SM; 4 x 8 spills.
#include "core/channel_correlation.h"
#include "cuda/launch.cuh"
#include "cuda/tensor.cuh"

namespace tsr {
namespace {

// Blocks in flight: two on each of an H200's SMs. Pieces of a warp between two folds: float32 sums of 64 steps. The
// emulator has less of both, so that short inputs have chunks of several tiles and tiles of several pieces.
#ifdef TSR_EMU
constexpr int kBlocks = 5, kTilePieces = 3;
#else
constexpr int kBlocks = 264, kTilePieces = 32;
#endif
constexpr int kMerge = 128;

// float64: threads in a square, channels a thread has of either network, samples of a tile.
constexpr int kSide = 16, kDoubles = 3, kDoubleThreads = kSide * kSide, kDoubleTile = 32;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPieceBytes = 64;  // of a channel, that a warp takes at a time: two steps of 32, 8 for each of 4 lanes

template <class T>
constexpr int kPiece = kPieceBytes / int(sizeof(T));  // samples
template <class T>
constexpr int kSlab = kWarps * kPiece<T>;  // samples, of all warps

// One network's channels, and how they are copied: `unit` bytes at once (2: single values, by way of registers), with
// neighbouring lanes at neighbouring channels or at neighbouring samples.
struct Side {
  Activations x;
  int unit;
  bool by_channel;
};

struct Task {
  Side side[2];  // rows m and columns n of the products: the student's and the teacher's channels, or swapped
  bool swapped;
  int64_t positions, samples, length;
  double* workspace;
};

// A sample, moved along without divisions.
struct Sample {
  int64_t image, position;
  __device__ void advance(int64_t by, int64_t positions) {
    position += by;
    while (position >= positions) position -= positions, ++image;
  }
};

// Where a warp's stage has byte b of a channel: rows of 64 bytes, whose quarters are permuted such that neither the
// copies nor the loads of 8 bytes, eight channels by four lanes, meet in a bank.
__device__ Shared location(int channel, int b) {
  const int quarter = (channel & 2) | (channel >> 2 & 1);
  return Shared(channel * kPieceBytes + (b ^ (quarter << 4)));
}

// ---------------------------------------------------------------------------- what depends on the type of the values

template <class T>
constexpr int kValues = 8 / int(sizeof(T));  // that a thread has of a channel, in a step

__device__ void unpack(float, const uint32_t (&raw)[2], float (&v)[2]) {
  for (int i = 0; i < 2; ++i) v[i] = bit_cast<float>(raw[i]);
}
__device__ void unpack(bfloat16, const uint32_t (&raw)[2], float (&v)[4]) {
  for (int i = 0; i < 2; ++i)
    v[2 * i] = bit_cast<float>(raw[i] << 16), v[2 * i + 1] = bit_cast<float>(raw[i] & 0xffff0000u);
}
__device__ void unpack(float16, const uint32_t (&raw)[2], float (&v)[4]) {
  for (int i = 0; i < 2; ++i) unpack_f16(raw[i], v[2 * i], v[2 * i + 1]);
}

// A channel's values of a step as operands: v = hi + lo.
struct Terms {
  uint32_t hi[2], lo[2];
};
__device__ Terms split(const float (&v)[2]) {
  Terms t;
  for (int i = 0; i < 2; ++i) {
    t.hi[i] = round_tf32(v[i]);
    t.lo[i] = round_tf32(v[i] - bit_cast<float>(t.hi[i]));
  }
  return t;
}
__device__ Terms split(const float (&v)[4]) {
  Terms t;
  for (int i = 0; i < 2; ++i) {
    t.hi[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
    t.lo[i] =
        pack_bf16(v[2 * i] - bit_cast<float>(t.hi[i] << 16), v[2 * i + 1] - bit_cast<float>(t.hi[i] & 0xffff0000u));
  }
  return t;
}

__device__ void multiply(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_tf32_k8(d, a, b[0], b[1]);
}
template <class T>
__device__ void multiply(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_bf16_k16(d, a, b[0], b[1]);
}

// ---------------------------------------------------------------------------------------------- copies to the ring

// Values of `n` samples, of `rows` channels from `first` on, to a stage; zeros behind the n-th sample. A unit lies
// within one image.
template <class T, int kUnit>
__device__ void fetch_units(const Side& side, int64_t first, int rows, Sample piece, int64_t positions, int n,
                            Shared to) {
  constexpr int kBytes = kUnit == 2 ? 4 : kUnit, kUnits = kPieceBytes / kBytes, kPer = kBytes / int(sizeof(T));
  const int lane = int(lane_id()), lane_units = side.by_channel ? 4 : kUnits, lane_rows = 32 / lane_units;
  const int row = side.by_channel ? lane % lane_rows : lane / lane_units;
  const int64_t rows_apart = lane_rows * side.x.s_channel;
  const T* const values = static_cast<const T*>(side.x.values) + (first + row) * side.x.s_channel;
  for (int u = side.by_channel ? lane / lane_rows : lane % lane_units; u < kUnits; u += lane_units) {
    Sample at = piece;
    at.advance(u * kPer, positions);
    const bool there = u * kPer < n;
    const T* from = values + at.image * side.x.s_image + at.position * side.x.s_position;
    if constexpr (kUnit == 2) {
      at.advance(1, positions);
      const bool both = u * kPer + 1 < n;
      const T* second = values + at.image * side.x.s_image + at.position * side.x.s_position;
#pragma unroll 4
      for (int c = row; c < rows; c += lane_rows, from += rows_apart, second += rows_apart) {
        const uint32_t lo = there ? from->bits : 0u, hi = both ? second->bits : 0u;
        store_u32(to + location(c, u * kBytes), lo | hi << 16);
      }
    } else {
#pragma unroll 4
      for (int c = row; c < rows; c += lane_rows, from += rows_apart) {
        const Shared here = to + location(c, u * kBytes);
        if constexpr (kUnit == 16)
          copy_async_16(here, from, there);
        else
          copy_async_cached<kUnit>(here, from, there);
      }
    }
  }
}

template <class T>
__device__ void fetch(const Side& side, int64_t first, int rows, const Sample& piece, int64_t positions, int n,
                      Shared to) {
  switch (side.unit) {
    case 16:
      return fetch_units<T, 16>(side, first, rows, piece, positions, n, to);
    case 8:
      return fetch_units<T, 8>(side, first, rows, piece, positions, n, to);
    case 4:
      return fetch_units<T, 4>(side, first, rows, piece, positions, n, to);
    default:
      if constexpr (sizeof(T) == 2) fetch_units<T, 2>(side, first, rows, piece, positions, n, to);
  }
}

// ------------------------------------------------------------------------------------------------------- the kernel

__device__ float quad_sum(float v) {  // of the four lanes that share a channel
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

__device__ void add_f64(Shared to, double v) { store_f64(to, load_f64(to) + v); }

template <int kRows>  // two blocks fit on an SM then, and have 64 KB on their way
constexpr int kStages = kRows > 80 ? 2 : 4;

template <int MT, int NT>
constexpr size_t shared_bytes() {
  constexpr size_t kRows = 16 * MT + 8 * NT;
  return 16 * MT * 8 * NT * sizeof(double) + kRows * (2 * sizeof(double) + sizeof(float)) +
         kWarps * kStages<kRows> * kRows * kPieceBytes;
}

template <class T, int MT, int NT>
__global__ void __launch_bounds__(kThreads, 2) channel_correlation_kernel(Task a) {
  constexpr int kM = 16 * MT, kN = 8 * NT, kRows = kM + kN, kDepth = kStages<kRows>, kStage = kRows * kPieceBytes;
  constexpr int kTile = kTilePieces * kSlab<T>, kMine = 2 * MT + NT;  // kMine: channels of which a lane has values
  static_assert(kRows <= kThreads, "a thread has at most one channel");
  TSR_DYNAMIC_SHARED(double, memory);
  const Shared cross = shared_address(memory);  // [kM, kN] float64
  const Shared sum = cross + kM * kN * 8;       // [kRows] float64, of a tile's shifted values
  const Shared square = sum + kRows * 8;        // [kRows] float64, likewise; then delta, see below
  const Shared shift = square + kRows * 8;      // [kRows] float32
  const Shared rings = shift + kRows * 4;       // [kWarps, kDepth, kRows] of 64 bytes: M's rows, then N's
  const int t = int(threadIdx.x), warp = warp_id(), lane = int(lane_id()), g = lane / 4, q = lane % 4;
  const Shared ring = rings + Shared(warp * kDepth * kStage);

  const int64_t channels_m = a.side[0].x.channels, channels_n = a.side[1].x.channels;
  const int64_t blocks_n = (channels_n + kN - 1) / kN;
  const int64_t first_m = int64_t(blockIdx.x) / blocks_n * kM, first_n = int64_t(blockIdx.x) % blocks_n * kN;
  const int rows_m = int(channels_m - first_m < kM ? channels_m - first_m : kM);
  const int rows_n = int(channels_n - first_n < kN ? channels_n - first_n : kN);
  const int64_t begin = int64_t(blockIdx.y) * a.length;
  const int64_t end = begin + a.length < a.samples ? begin + a.length : a.samples;

  for (int i = t; i < kM * kN; i += kThreads) store_f64(cross + i * 8, 0);
  for (int i = lane; i < kDepth * kStage / 16; i += 32) store_u32x4(ring + i * 16, 0, 0, 0, 0);  // rows without channel
  __syncwarp();

  Sample next{begin / a.positions, begin % a.positions};  // the first of the piece that is to be fetched
  next.advance(warp * kPiece<T>, a.positions);
  int64_t next_at = begin + warp * kPiece<T>;
  const int64_t slab_images = kSlab<T> / a.positions, slab_positions = kSlab<T> % a.positions;
  const auto fetch_next = [&](Shared to) {
    if (next_at < end) {
      const int n = int(end - next_at < kPiece<T> ? end - next_at : kPiece<T>);
#pragma unroll 1
      for (int s = 0; s < 2; ++s)
        fetch<T>(a.side[s], s ? first_n : first_m, s ? rows_n : rows_m, next, a.positions, n,
                 to + s * kM * kPieceBytes);
      next.image += slab_images;
      next.advance(slab_positions, a.positions);
      next_at += kSlab<T>;
    }
    copy_async_commit();  // an empty group where there is nothing: groups are counted
  };
  for (int s = 0; s < kDepth; ++s) fetch_next(ring + s * kStage);

  // Nothing before: the mean of the first warp's first piece.
  copy_async_wait<kDepth - 1>();
  __syncthreads();
  if (t < kRows) {
    const int n = int(end - begin < kPiece<T> ? end - begin : kPiece<T>);
    float total = 0;
    for (int b = 0; b < kPieceBytes; b += 8) {
      uint32_t raw[2];
      float v[kValues<T>];
      load_u32x2(raw[0], raw[1], rings + location(t, b));
      unpack(T{}, raw, v);
      for (int i = 0; i < kValues<T>; ++i) total += v[i];  // zeros behind the n-th
    }
    store_f32(shift + t * 4, few_bits(total / float(n)));
  }
  __syncthreads();

  double mean = 0, m2 = 0;  // of channel t
  int stage = 0;
  for (int64_t at = begin; at < end; at += kTile) {
    const int n = int(end - at < kTile ? end - at : kTile);
    float products[MT][NT][4] = {}, sums[kMine] = {}, squares[kMine] = {};

#pragma unroll 1
    for (int first = warp * kPiece<T>; first < n; first += kSlab<T>) {
      const Shared here = ring + Shared(stage * kStage);
      copy_async_wait<kDepth - 1>();
      __syncwarp();  // the other lanes' copies too

#pragma unroll 1
      for (int b = 8 * q; b < kPieceBytes; b += 32) {
        float valid[kValues<T>];  // 1, behind the last sample 0
        for (int i = 0; i < kValues<T>; ++i) valid[i] = first + b / int(sizeof(T)) + i < n ? 1.f : 0.f;
        const auto terms = [&](int row, int mine) {
          uint32_t raw[2];
          float v[kValues<T>];
          load_u32x2(raw[0], raw[1], here + location(g, b) + row * kPieceBytes);
          unpack(T{}, raw, v);
          const float less = -load_f32(shift + (row + g) * 4);
          for (int i = 0; i < kValues<T>; ++i) {
            v[i] = __fmaf_rn(less, valid[i], v[i]);
            sums[mine] += v[i];
            squares[mine] = __fmaf_rn(v[i], v[i], squares[mine]);
          }
          return split(v);
        };
        uint32_t hi[MT][4], lo[MT][4];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Terms x = terms(16 * i + 8 * half, 2 * i + half);
            hi[i][half] = x.hi[0], hi[i][half + 2] = x.hi[1];
            lo[i][half] = x.lo[0], lo[i][half + 2] = x.lo[1];
          }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const Terms y = terms(kM + 8 * j, 2 * MT + j);
#pragma unroll
          for (int i = 0; i < MT; ++i) {
            float d[4] = {};
            multiply(T{}, d, lo[i], y.hi);
            multiply(T{}, d, hi[i], y.lo);
            multiply(T{}, d, hi[i], y.hi);
#pragma unroll
            for (int e = 0; e < 4; ++e) products[i][j][e] += d[e];
          }
        }
      }
      __syncwarp();  // all lanes have read the stage
      fetch_next(here);
      stage = stage + 1 == kDepth ? 0 : stage + 1;
    }

    // Fold. The warps' sums of channels first, warp after warp.
#pragma unroll
    for (int i = 0; i < kMine; ++i) sums[i] = quad_sum(sums[i]), squares[i] = quad_sum(squares[i]);
#pragma unroll 1
    for (int turn = 0; turn < kWarps; ++turn) {
      if (turn == warp && q == 0)
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const Shared to = Shared((8 * i + g) * 8);
          store_f64(sum + to, double(sums[i]) + (turn ? load_f64(sum + to) : 0));
          store_f64(square + to, double(squares[i]) + (turn ? load_f64(square + to) : 0));
        }
      __syncthreads();
    }
    const Join to = join(double(at - begin), double(n));
    if (t < kRows) {
      const double total = load_f64(sum + t * 8), tile_mean = double(load_f32(shift + t * 4)) + total / n;
      const double change = tile_mean - mean;
      mean += change * to.part;
      m2 += load_f64(square + t * 8) - total * total / n + change * change * to.weight;
      store_f64(square + t * 8, change);  // the tile's mean - the chunk's mean so far
      store_f32(shift + t * 4, few_bits(float(tile_mean)));
    }
    __syncthreads();
    // Then the products: in each turn a warp has columns of its own.
#pragma unroll 1
    for (int turn = 0; turn < kWarps; ++turn) {
      const int part = (warp + turn) % kWarps;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        if (j % kWarps != part) continue;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = 16 * i + g + e / 2 * 8, column = 8 * j + 2 * q + e % 2, other = kM + column;
            double more = double(products[i][j][e]);
            if (turn == 0)
              more += load_f64(square + row * 8) * to.weight * load_f64(square + other * 8) -
                      load_f64(sum + row * 8) / n * load_f64(sum + other * 8);
            add_f64(cross + (row * kN + column) * 8, more);
          }
      }
      __syncthreads();
    }
  }

  const int64_t cs = a.swapped ? channels_n : channels_m, ct = a.swapped ? channels_m : channels_n;
  double* out = a.workspace + int64_t(blockIdx.y) * moments_size(cs, ct);
  if (t == 0 && blockIdx.x == 0) out[0] = double(end - begin);
  // The channel's number among all, students first; every channel is written by one block of the chunk.
  const bool is_m = t < kM;
  if (t < kRows && (is_m ? t < rows_m && first_n == 0 : t - kM < rows_n && first_m == 0)) {
    const int64_t c = (is_m ? first_m + t : first_n + t - kM) + (is_m == a.swapped ? cs : 0);
    out[mean_at(c)] = mean;
    out[m2_at(c, cs, ct)] = m2;
  }
  for (int i = t; i < kM * kN; i += kThreads) {
    const int row = i / kN, column = i % kN;
    const int64_t m = first_m + row, n = first_n + column;
    if (row < rows_m && column < rows_n)
      out[a.swapped ? cross_at(n, m, cs, ct) : cross_at(m, n, cs, ct)] = load_f64(cross + i * 8);
  }
}

// --------------------------------------------------------------------------------------------------------- float64

// A tile is 32 samples: every thread brings values to shared memory, less a shift; then thread c sums up channel c, and
// every thread adds kDoubles x kDoubles products a sample in registers.
struct alignas(16) Two {
  double v[2];
};

// Samples [start, start + n) of channels [first, first + edge), minus their shifts, to rows of shared memory; 0
// elsewhere. `at` is sample `start` + the thread's offset.
__device__ void stage_doubles(const Activations& x, Sample at, int64_t positions, int n, int64_t first,
                              const double* shift, double* rows) {
  constexpr int kEdge = kSide * kDoubles, kRow = kDoubleTile + 2;
  const double* values = static_cast<const double*>(x.values);
  const int64_t left = x.channels - first;
  if (x.s_channel == 1) {  // lanes are channels
    for (int s = int(threadIdx.x / 32); s < kDoubleTile; s += kDoubleThreads / 32) {
      const double* from = values + at.image * x.s_image + at.position * x.s_position + first;
      for (int c = int(threadIdx.x % 32); c < kEdge; c += 32)
        rows[c * kRow + s] = s < n && c < left ? from[c] - shift[c] : 0;
      if (s + kDoubleThreads / 32 < n) at.advance(kDoubleThreads / 32, positions);
    }
  } else {  // lanes are samples
    const int s = int(threadIdx.x % kDoubleTile);
    const double* from = values + at.image * x.s_image + at.position * x.s_position + first * x.s_channel;
    for (int c = int(threadIdx.x / kDoubleTile); c < kEdge; c += kDoubleThreads / kDoubleTile)
      rows[c * kRow + s] = s < n && c < left ? from[c * x.s_channel] - shift[c] : 0;
  }
}

__global__ void __launch_bounds__(kDoubleThreads) channel_correlation_f64_kernel(ChannelCorrelation a, int64_t length) {
  constexpr int kTile = kDoubleTile, kRow = kTile + 2, kEdge = kSide * kDoubles, kChannels = 2 * kEdge;
  TSR_DYNAMIC_SHARED(double, sum);                // [kChannels] of a tile's shifted values
  double* const delta = sum + kChannels;          // [kChannels] tile's mean - chunk's mean so far
  double* const rows = delta + kChannels;         // [kChannels, kRow]: student, then teacher
  double* const shift = rows + kChannels * kRow;  // [kChannels]

  const int t = int(threadIdx.x), tk = t / kSide, tj = t % kSide;
  const int64_t cs = a.student.channels, ct = a.teacher.channels;
  const int64_t blocks_j = (ct + kEdge - 1) / kEdge, block_k = int64_t(blockIdx.x) / blocks_j,
                block_j = int64_t(blockIdx.x) % blocks_j;
  const int64_t first_k = block_k * kEdge, first_j = block_j * kEdge;
  const int64_t begin = int64_t(blockIdx.y) * length, end = begin + length < samples(a) ? begin + length : samples(a);

  // Threads start at their own offset within a tile, one for each order of staging, and advance by whole tiles.
  Sample by_channel{begin / a.positions, begin % a.positions}, by_sample = by_channel;
  by_channel.advance(t / 32, a.positions);
  by_sample.advance(t % kTile, a.positions);

  double cross[kDoubles][kDoubles] = {};
  double mean = 0, m2 = 0;  // of channel t
  if (t < kChannels) shift[t] = 0;
  __syncthreads();

  for (int64_t at = begin; at < end; at += kTile) {
    const int n = int(end - at < kTile ? end - at : kTile);
    stage_doubles(a.student, a.student.s_channel == 1 ? by_channel : by_sample, a.positions, n, first_k, shift, rows);
    stage_doubles(a.teacher, a.teacher.s_channel == 1 ? by_channel : by_sample, a.positions, n, first_j, shift + kEdge,
                  rows + kEdge * kRow);
    by_channel.advance(kTile, a.positions);
    by_sample.advance(kTile, a.positions);
    __syncthreads();

    if (t < kChannels) {
      double* row = rows + t * kRow;
      if (at == begin) {  // nothing before: the mean of this very tile
        double total = 0;
        for (int s = 0; s < n; ++s) total += row[s];
        shift[t] = few_bits(total / n);
        for (int s = 0; s < n; ++s) row[s] -= shift[t];
      }
      double total[2] = {}, square[2] = {};
      for (int s = 0; s < kTile; s += 2) {
        const Two d = *reinterpret_cast<const Two*>(row + s);
        for (int q = 0; q < 2; ++q) total[q] += d.v[q], square[q] += d.v[q] * d.v[q];
      }
      double total_all = 0, square_all = 0;
      for (int q = 0; q < 2; ++q) total_all += double(total[q]), square_all += double(square[q]);
      const Join to = join(double(at - begin), double(n));
      const double tile_mean = double(shift[t]) + total_all / n, change = tile_mean - mean;
      sum[t] = total_all;
      delta[t] = change;
      mean += change * to.part;
      m2 += square_all - total_all * total_all / n + change * change * to.weight;
      shift[t] = few_bits(tile_mean);
    }
    if (at == begin) __syncthreads();  // the rows have changed

    double product[kDoubles][kDoubles] = {};
    for (int s = 0; s < kTile; s += 2) {
      Two k[kDoubles];
#pragma unroll
      for (int i = 0; i < kDoubles; ++i) k[i] = *reinterpret_cast<const Two*>(rows + (tk + i * kSide) * kRow + s);
#pragma unroll
      for (int j = 0; j < kDoubles; ++j) {
        const Two y = *reinterpret_cast<const Two*>(rows + (kEdge + tj + j * kSide) * kRow + s);
#pragma unroll
        for (int i = 0; i < kDoubles; ++i)
#pragma unroll
          for (int q = 0; q < 2; ++q) product[i][j] += k[i].v[q] * y.v[q];
      }
    }
    __syncthreads();  // sums are there, rows may be overwritten

    const double weight = join(double(at - begin), double(n)).weight;
#pragma unroll
    for (int i = 0; i < kDoubles; ++i) {
      const int k = tk + i * kSide;
      const double left = -sum[k] / n, moved = delta[k] * weight;
#pragma unroll
      for (int j = 0; j < kDoubles; ++j) {
        const int other = kEdge + tj + j * kSide;
        cross[i][j] += double(product[i][j]) + (left * sum[other] + moved * delta[other]);
      }
    }
  }

  double* out = static_cast<double*>(a.workspace) + int64_t(blockIdx.y) * moments_size(cs, ct);
  if (t == 0 && blockIdx.x == 0) out[0] = double(end - begin);
  // The channel's number among all, students first; every channel is written by one block of the chunk.
  const bool student = t < kEdge;
  const int64_t local = student ? first_k + t : first_j + t - kEdge;
  if (t < kChannels && local < (student ? cs : ct) && (student ? block_j : block_k) == 0) {
    const int64_t c = student ? local : cs + local;
    out[mean_at(c)] = mean;
    out[m2_at(c, cs, ct)] = m2;
  }
#pragma unroll
  for (int i = 0; i < kDoubles; ++i) {
    const int64_t k = first_k + tk + i * kSide;
#pragma unroll
    for (int j = 0; j < kDoubles; ++j) {
      const int64_t col = first_j + tj + j * kSide;
      if (k < cs && col < ct) out[cross_at(k, col, cs, ct)] = cross[i][j];
    }
  }
}

// -------------------------------------------------------------------------------------------------------- all chunks

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

// Channels of a block: rows in 16s, columns in 8s. For the paper's pairs, for small ones, for all the rest.
struct Shape {
  int mt, nt;
  bool swapped;
};

int64_t tiles(const Shape& s, int64_t cs, int64_t ct) {
  const int64_t m = s.swapped ? ct : cs, n = s.swapped ? cs : ct;
  return (m + 16 * s.mt - 1) / (16 * s.mt) * ((n + 8 * s.nt - 1) / (8 * s.nt));
}

// The cheapest: a step's row of values is about as much work as 30 pairs (50 instructions of 32 lanes, 7 for 128).
Shape shape_of(int64_t cs, int64_t ct) {
  Shape best{};
  int64_t least = INT64_MAX;
  for (const auto& [mt, nt] : {std::pair<int, int>{2, 4}, {2, 5}, {3, 7}, {4, 8}})
    for (const bool swapped : {false, true}) {
      const Shape s{mt, nt, swapped};
      const int64_t cost = tiles(s, cs, ct) * (128 * mt * nt + 30 * (16 * mt + 8 * nt));
      if (cost < least) least = cost, best = s;
    }
  return best;
}

// ---------------------------------------------------------------------------------------------------------- launches

Chunks chunks_of(const ChannelCorrelation& a) {
  const int64_t cs = a.student.channels, ct = a.teacher.channels, edge = kSide * kDoubles;
  const bool f64 = a.dtype == Dtype::f64;
  const int64_t blocks = f64 ? (cs + edge - 1) / edge * ((ct + edge - 1) / edge) : tiles(shape_of(cs, ct), cs, ct);
  const int64_t slab = f64 ? kDoubleTile : a.dtype == Dtype::f32 ? kSlab<float> : kSlab<float16>;
  return cut(samples(a), slab, blocks < kBlocks ? (kBlocks + blocks - 1) / blocks : 1);
}

// As many bytes at once as are neighbours and aligned in every channel and image.
Side side_of(const Activations& x, int64_t images, int64_t positions, int size) {
  const auto aligned = [&](int64_t unit) {
    return x.s_position == 1 && reinterpret_cast<uintptr_t>(x.values) % unit == 0 && positions * size % unit == 0 &&
           (x.channels == 1 || x.s_channel * size % unit == 0) && (images == 1 || x.s_image * size % unit == 0);
  };
  for (const int unit : {16, 8, 4})
    if (unit > size && aligned(unit)) return {x, unit, false};
  return {x, size, x.s_channel < x.s_position};
}

template <class T, int MT, int NT>
void run(const ChannelCorrelation& a, bool swapped, void* stream) {
  const Chunks chunks = chunks_of(a);
  const Side student = side_of(a.student, a.images, a.positions, sizeof(T));
  const Side teacher = side_of(a.teacher, a.images, a.positions, sizeof(T));
  const Task task{{swapped ? teacher : student, swapped ? student : teacher},
                  swapped,
                  a.positions,
                  samples(a),
                  chunks.length,
                  static_cast<double*>(a.workspace)};
  const dim3 grid(unsigned(tiles({MT, NT, swapped}, a.student.channels, a.teacher.channels)), unsigned(chunks.count));
  launch(channel_correlation_kernel<T, MT, NT>, grid, dim3(kThreads), shared_bytes<MT, NT>(), stream, task);
}

template <class T>
void run(const ChannelCorrelation& a, void* stream) {
  const Shape s = shape_of(a.student.channels, a.teacher.channels);
  switch (s.nt) {
    case 4:
      return run<T, 2, 4>(a, s.swapped, stream);
    case 5:
      return run<T, 2, 5>(a, s.swapped, stream);
    case 7:
      return run<T, 3, 7>(a, s.swapped, stream);
    default:
      return run<T, 4, 8>(a, s.swapped, stream);
  }
}

template <>
void run<double>(const ChannelCorrelation& a, void* stream) {
  constexpr int kEdge = kSide * kDoubles, kChannels = 2 * kEdge;
  const size_t smem = sizeof(double) * kChannels * (2 + kDoubleTile + 2 + 1);
  const Chunks chunks = chunks_of(a);
  const int64_t pairs = (a.student.channels + kEdge - 1) / kEdge * ((a.teacher.channels + kEdge - 1) / kEdge);
  launch(channel_correlation_f64_kernel, dim3(unsigned(pairs), unsigned(chunks.count)), dim3(kDoubleThreads), smem,
         stream, a, chunks.length);
}

}  // namespace

int64_t channel_correlation_workspace_cuda(const ChannelCorrelation& a) {
  return chunks_of(a).count * moments_size(a.student.channels, a.teacher.channels) * int64_t(sizeof(double));
}

void channel_correlation_cuda(const ChannelCorrelation& a, int device, void* stream) {
  DeviceGuard guard(device);
  if (samples(a) > 0) TSR_WITH_DTYPE(a.dtype, T, run<T>(a, stream))
  const int64_t cs = a.student.channels, ct = a.teacher.channels;
  launch(channel_correlation_join_kernel, dim3(unsigned((cs + ct + cs * ct + kMerge - 1) / kMerge)), dim3(kMerge), 0,
         stream, a, chunks_of(a).count);
}

}  // namespace tsr
