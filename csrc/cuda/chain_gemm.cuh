// The product behind convolutions and linear layers, forward and backward: results [row][column] = sum over depth of
// gathered activations times weights [depth][column].
//
// A row is a pixel of the result in one image; the depth runs over taps, and channels within a tap. Forward, the tap
// (r, s) of pixel (y, x) is the source's pixel (y sh - ph + r, x sw - pw + s); backward it is ((y + ph - r) / sh, ...)
// where that divides. Taps outside are 0. A linear layer has one tap and one pixel.
//
// A block of 4 warps makes a tile of 128 rows (64 in split precision) times up to 64 columns; a warp 32 (16) rows times
// all columns. Depth goes by 64 bytes a row through a ring of 2 or 3 stages in shared memory, filled by cp.async 16
// bytes at a time, one barrier a stage. Rows of shared memory are an odd number of 16 bytes long, so that ldmatrix has
// no bank conflicts. Tensor cores: m16n8k16, float32 sums; in split precision hi hi + (hi lo + lo hi) 2^-11 with a sum
// each. In float32 the same thread owns the same results, by FMA. The order of a sum depends on the depth alone: a
// row's result is the same in any batch.
//
// Bound: the multiply-accumulates, padded to groups of 8 channels and 16 columns; 64 columns take 120 (split 133) bytes
// of shared memory a cycle where tensor cores take one product in 6.4 cycles, near the limit of 128.
#pragma once
#include <climits>

#include "cuda/chain_layers.cuh"

namespace tsr {
namespace {

constexpr int kProductWarps = 4, kProductThreads = 32 * kProductWarps;

struct Product {
  Map a;                                  // [image][source_h][source_w][channels]
  const void *b_hi, *b_lo;                // weights [depth][columns], as `a` is
  const float* bias;                      // [columns], or null
  int64_t rows, columns, depth, piece;    // a block sums `piece` of the depth, a multiple of 32
  int64_t pixels, channels;               // pixels of the result; channels of the source, filled up
  int width, taps_w, source_h, source_w;  // width: of the result
  int step_y, step_x, first_y, first_x;   // pixel (y, x) starts at (y step_y + first_y, ...)
  int direction, every_y, every_x;        // forward 1, 1, 1; backward -1, strides
  const bool* done;                       // [images], or null: rows of images that are done need not be computed
  Finish finish;
};

template <Precision P, int N>
struct Tile {
  static constexpr bool split = P == Precision::split;
  static constexpr int planes = split ? 2 : 1, bytes = P == Precision::float32 ? 4 : 2;
  static constexpr int m = split ? 1 : 2, n = N;  // of 16 rows in a warp; of 8 columns
  static constexpr int rows = 16 * m * kProductWarps, columns = 8 * n;
  static constexpr int each = 16 / bytes, depth = 4 * each;  // values in 16 bytes; depth of a stage
  static constexpr int a_row = 64 + 16, b_row = columns * bytes + 16;
  static constexpr int a_plane = rows * a_row, b_plane = depth * b_row, stage = planes * (a_plane + b_plane);
  static constexpr int stages = split ? 2 : 3;
  static_assert(stages * stage <= 48 * 1024, "what a block may have without being asked");
};

// Brings tiles from global to shared memory. A thread takes the same 16 bytes of 64 in some rows.
template <class T>
struct Loader {
  static constexpr int kRows = T::rows / (kProductThreads / 4);
  const Product& p;
  Shared memory;
  int64_t source[kRows];      // of each row: where its first tap is, or would be
  int y[kRows], x[kRows];     // and at which pixel
  int64_t column, k, end, c;  // k: of this thread's 16 bytes, at channel c
  int tap_y, tap_x;

  __device__ Loader(const Product& product, Shared at, int64_t row, int64_t first_column, int64_t first, int64_t last)
      : p(product), memory(at), column(first_column), k(first + threadIdx.x % 4 * T::each), end(last) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = row + threadIdx.x / 4 + kProductThreads / 4 * i, image = r / p.pixels, pixel = r % p.pixels;
      y[i] = int(pixel / p.width) * p.step_y + p.first_y;
      x[i] = int(pixel % p.width) * p.step_x + p.first_x;
      source[i] = image * p.source_h * p.source_w * p.channels;
      if (p.every_y == 1 && p.every_x == 1) source[i] += (int64_t(y[i]) * p.source_w + x[i]) * p.channels;
      if (r >= p.rows) y[i] = INT_MIN / 2;  // outside, at every tap
    }
    const int tap = int(k / p.channels);
    c = k % p.channels, tap_y = tap / p.taps_w, tap_x = tap % p.taps_w;
  }
  __device__ static bool inside(int at, int size) { return unsigned(at) < unsigned(size); }
  __device__ static bool hits(int at, int every, int size) { return at >= 0 && at % every == 0 && at / every < size; }

  __device__ void next(int stage) {
    const Shared a = memory + Shared(stage * T::stage);
    const int along_y = p.direction * tap_y, along_x = p.direction * tap_x;
    const bool dense = p.every_y == 1 && p.every_x == 1;
    const int64_t offset = (dense ? (int64_t(along_y) * p.source_w + along_x) * p.channels : 0) + c;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int sy = y[i] + along_y, sx = x[i] + along_x;
      bool there = k < end;
      int64_t at = source[i] + offset;
      if (dense) {
        there = there && inside(sy, p.source_h) && inside(sx, p.source_w);
      } else {
        there = there && hits(sy, p.every_y, p.source_h) && hits(sx, p.every_x, p.source_w);
        at += (int64_t(sy / p.every_y) * p.source_w + sx / p.every_x) * p.channels;
      }
      at = there ? at : 0;
      const Shared to = a + (threadIdx.x / 4 + kProductThreads / 4 * i) * T::a_row + threadIdx.x % 4 * 16;
      // cached: the taps of a window read the same pixels
      copy_async_cached<16>(to, static_cast<const char*>(p.a.hi) + at * T::bytes, there);
      if (T::split) copy_async_cached<16>(to + T::a_plane, static_cast<const char*>(p.a.lo) + at * T::bytes, there);
    }
    weights(a + T::planes * T::a_plane);
    k += T::depth;
    for (c += T::depth; c >= p.channels; c -= p.channels)
      if (++tap_x == p.taps_w) tap_x = 0, ++tap_y;
    copy_async_commit();
  }
  __device__ void weights(Shared b) const {
    constexpr int kEach = T::columns / T::each;  // 16 bytes in a row of the tile
    const int64_t first = k - threadIdx.x % 4 * T::each;
    for (int i = threadIdx.x; i < T::depth * kEach; i += kProductThreads) {
      const int64_t row = first + i / kEach, col = column + i % kEach * T::each;
      const bool there = row < end && col < p.columns;
      const int64_t at = there ? row * p.columns + col : 0;
      const Shared to = b + i / kEach * T::b_row + i % kEach * 16;
      copy_async_cached<16>(to, static_cast<const char*>(p.b_hi) + at * T::bytes, there);
      if (T::split) copy_async_cached<16>(to + T::b_plane, static_cast<const char*>(p.b_lo) + at * T::bytes, there);
    }
  }
};

// A warp's results, each thread's as mma.m16n8k16 has them.
template <class T>
struct Sums {
  float high[T::m][T::n][4], low[T::split ? T::m : 1][T::n][4];  // low: in units of 2^-11

  __device__ void add(Shared a, Shared b) {
    const int lane = int(lane_id());
    if constexpr (T::bytes == 4)
      add_f32(a + (warp_id() * 16 * T::m + lane / 4) * T::a_row, b + lane % 4 * 8);
    else  // lane's row of the matrices that ldmatrix takes: rows before columns in A, depth before columns in B
      add_f16(a + (warp_id() * 16 * T::m + lane % 16) * T::a_row + lane / 16 * 16,
              b + lane % 16 * T::b_row + lane / 16 * 16);
  }
  __device__ void add_f16(Shared a, Shared b) {
#pragma unroll
    for (int k = 0; k < T::depth; k += 16, a += 32, b += 16 * T::b_row) {
      uint32_t rows[T::planes][T::m][4];
#pragma unroll
      for (int i = 0; i < T::planes; ++i)
#pragma unroll
        for (int m = 0; m < T::m; ++m) ldmatrix_x4(rows[i][m], a + i * T::a_plane + m * 16 * T::a_row);
#pragma unroll
      for (int n = 0; n < T::n; n += 2) {
        uint32_t columns[T::planes][4];
#pragma unroll
        for (int i = 0; i < T::planes; ++i) ldmatrix_x4_trans(columns[i], b + i * T::b_plane + n * 16);
#pragma unroll
        for (int m = 0; m < T::m; ++m)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            mma_f16_k16(high[m][n + j], rows[0][m], columns[0][2 * j], columns[0][2 * j + 1]);
            if constexpr (T::split) {
              mma_f16_k16(low[m][n + j], rows[0][m], columns[1][2 * j], columns[1][2 * j + 1]);
              mma_f16_k16(low[m][n + j], rows[1][m], columns[0][2 * j], columns[0][2 * j + 1]);
            }
          }
      }
    }
  }
  __device__ void add_f32(Shared a, Shared b) {
#pragma unroll 1
    for (int k = 0; k < T::depth; k += 4, a += 16) {
      float row[2 * T::m][4];
#pragma unroll
      for (int i = 0; i < 2 * T::m; ++i) {
        uint32_t w[4];
        load_u32x4(w[0], w[1], w[2], w[3], a + i * 8 * T::a_row);
#pragma unroll
        for (int j = 0; j < 4; ++j) row[i][j] = bit_cast<float>(w[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j, b += T::b_row)
#pragma unroll
        for (int n = 0; n < T::n; ++n) {
          uint32_t x, y;
          load_u32x2(x, y, b + n * 32);
#pragma unroll
          for (int i = 0; i < 2 * T::m; ++i) {
            high[i / 2][n][i % 2 * 2] += row[i][j] * bit_cast<float>(x);
            high[i / 2][n][i % 2 * 2 + 1] += row[i][j] * bit_cast<float>(y);
          }
        }
    }
  }
  __device__ float result(int m, int n, int i) const {
    return T::split ? high[m][n][i] + low[T::split ? m : 0][n][i] * kLowUnit : high[m][n][i];
  }
};

// Two neighbouring columns, the four lanes that have a group of them together; all lanes come here, some without a row.
TSR_DEVICE void put_pair(const Finish& f, bool there, int64_t row, int64_t pixels, int64_t columns, int64_t column,
                         float x, float y) {
  if (f.gates) {
    const int64_t image = row / pixels / f.sharing, at = (row % pixels * columns + column) / kGroup;
    uint8_t* const byte = f.gates + image * (pixels * columns / kGroup) + at;
    const int first = int(lane_id()) % 4 * 2;
    uint32_t open = 0;
    if (f.opens) {
      open = ((is_open(x) ? 1u : 0u) | (is_open(y) ? 2u : 0u)) << first;
      open |= __shfl_xor_sync(0xffffffffu, open, 1);
      open |= __shfl_xor_sync(0xffffffffu, open, 2);
      if (there && first == 0) *byte = uint8_t(open);
    } else if (there) {
      open = *byte;
    }
    x = gated(f, open >> first & 1, x);
    y = gated(f, open >> (first + 1) & 1, y);
  }
  if (there) store_pair(f.out, row * columns + column, x, y);
}

// As many blocks on a multiprocessor as registers allow without spilling.
constexpr int blocks_of(Precision p, int n) { return p == Precision::float32 || n == 8 ? 3 : 4; }

template <Precision P, int N>
__global__ void __launch_bounds__(kProductThreads, blocks_of(P, N)) chain_product_kernel(Product p) {
  using T = Tile<P, N>;
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  const Shared base = shared_address(memory);
  const int64_t row_tiles = (p.rows + T::rows - 1) / T::rows, tile = blockIdx.x;
  const int64_t first_row = tile % row_tiles * T::rows, first_column = tile / row_tiles * T::columns;
  if (p.done) {  // a tile has no more images than the block has threads
    const int64_t image = first_row / p.pixels + threadIdx.x;
    const bool idle = image * p.pixels >= min(first_row + T::rows, p.rows) || p.done[image];
    if (__syncthreads_and(idle)) return;
  }
  const int64_t begin = blockIdx.y * p.piece, end = begin + p.piece < p.depth ? begin + p.piece : p.depth;
  Loader<T> load(p, base, first_row, first_column, begin, end);
  Sums<T> sums = {};
  const int count = int((end - begin + T::depth - 1) / T::depth);
#pragma unroll
  for (int i = 0; i < T::stages - 1; ++i) load.next(i);
  for (int i = 0, stage = 0; i < count; ++i, stage = stage + 1 == T::stages ? 0 : stage + 1) {
    copy_async_wait<T::stages - 2>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the stage before
    load.next(stage == 0 ? T::stages - 1 : stage - 1);
    const Shared a = base + Shared(stage * T::stage);
    sums.add(a, a + T::planes * T::a_plane);
  }
  copy_async_wait<0>();

  Finish f = p.finish;
  const int lane = int(lane_id());
  if (gridDim.y > 1) f.out.hi = static_cast<float*>(f.out.hi) + blockIdx.y * p.rows * p.columns;
#pragma unroll
  for (int n = 0; n < T::n; ++n) {
    const int64_t column = first_column + 8 * n + lane % 4 * 2;
    if (column >= p.columns) break;  // whole groups: the same for all lanes
    const float x = p.bias ? p.bias[column] : 0.f, y = p.bias ? p.bias[column + 1] : 0.f;
#pragma unroll
    for (int i = 0; i < 2 * T::m; ++i) {
      const int64_t row = first_row + (warp_id() * T::m * 2 + i) * 8 + lane / 4;
      put_pair(f, row < p.rows, row, p.pixels, p.columns, column, sums.result(i / 2, n, i % 2 * 2) + x,
               sums.result(i / 2, n, i % 2 * 2 + 1) + y);
    }
  }
}

}  // namespace
}  // namespace tsr
