// Activations of chains in device memory, and the layers that are no products: pools, affine maps, changes of layout.
//
// A map is [image][y][x][channels, filled up to groups of 8]; what fills up is 0. A thread takes a group at a time: 16
// or 32 bytes, and a byte of gates. Every kernel here reads each value about once and writes it once: bound by the L2
// cache, in which a chunk of images stays.
#pragma once
#include "core/chain.h"
#include "cuda/reduce.cuh"
#include "cuda/tensor.cuh"

namespace tsr {
namespace {

constexpr int kGroup = 8, kLayerThreads = 256;
constexpr float kLowUnit = 0x1p-11f, kLowScale = 0x1p11f;  // of the lower parts of split values

__host__ __device__ inline int64_t groups_of(int64_t channels) { return (channels + kGroup - 1) / kGroup; }

struct Shape {
  int64_t c, h, w;
  __host__ __device__ int64_t pixels() const { return h * w; }
  __host__ __device__ int64_t units() const { return c * h * w; }
  __host__ __device__ int64_t channels() const { return groups_of(c) * kGroup; }
  __host__ __device__ int64_t groups() const { return h * w * groups_of(c); }
  __host__ __device__ int64_t values() const { return groups() * kGroup; }
  bool operator==(const Shape& o) const { return c == o.c && h == o.h && w == o.w; }
};

// float32: floats at hi. float16: 16-bit values at hi. split: hi + lo 2^-11, both 16-bit values.
struct Map {
  void *hi, *lo;
  Precision as;
};

TSR_DEVICE void unpack_group(const void* from, int64_t group, float (&v)[kGroup]) {
  const uint4 w = static_cast<const uint4*>(from)[group];
  unpack_f16(w.x, v[0], v[1]);
  unpack_f16(w.y, v[2], v[3]);
  unpack_f16(w.z, v[4], v[5]);
  unpack_f16(w.w, v[6], v[7]);
}
TSR_DEVICE void pack_group(void* to, int64_t group, const float (&v)[kGroup]) {
  static_cast<uint4*>(to)[group] =
      uint4{pack_f16(v[0], v[1]), pack_f16(v[2], v[3]), pack_f16(v[4], v[5]), pack_f16(v[6], v[7])};
}
// What is left of v by its rounded value: infinite or NaN where that is infinite, so that it shows.
TSR_DEVICE float low_part(float v) { return (v - half_bits_to_float(float_to_half_bits(v))) * kLowScale; }

TSR_DEVICE void load_group(const Map& m, int64_t group, float (&v)[kGroup]) {
  if (m.as == Precision::float32) {
    const float4* const from = static_cast<const float4*>(m.hi) + 2 * group;
    const float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  unpack_group(m.hi, group, v);
  if (m.as == Precision::float16) return;
  float low[kGroup];
  unpack_group(m.lo, group, low);
  for (int j = 0; j < kGroup; ++j) v[j] += low[j] * kLowUnit;
}
TSR_DEVICE void store_group(const Map& m, int64_t group, const float (&v)[kGroup]) {
  if (m.as == Precision::float32) {
    float4* const to = static_cast<float4*>(m.hi) + 2 * group;
    to[0] = float4{v[0], v[1], v[2], v[3]};
    to[1] = float4{v[4], v[5], v[6], v[7]};
    return;
  }
  pack_group(m.hi, group, v);
  if (m.as == Precision::float16) return;
  float low[kGroup];
  for (int j = 0; j < kGroup; ++j) low[j] = low_part(v[j]);
  pack_group(m.lo, group, low);
}
TSR_DEVICE float load_value(const Map& m, int64_t at) {
  if (m.as == Precision::float32) return static_cast<const float*>(m.hi)[at];
  const float v = half_bits_to_float(static_cast<const uint16_t*>(m.hi)[at]);
  return m.as == Precision::float16 ? v : v + half_bits_to_float(static_cast<const uint16_t*>(m.lo)[at]) * kLowUnit;
}
TSR_DEVICE void store_pair(const Map& m, int64_t at, float x, float y) {  // `at` is even
  if (m.as == Precision::float32) {
    static_cast<float2*>(m.hi)[at / 2] = float2{x, y};
    return;
  }
  static_cast<uint32_t*>(m.hi)[at / 2] = pack_f16(x, y);
  if (m.as == Precision::split) static_cast<uint32_t*>(m.lo)[at / 2] = pack_f16(low_part(x), low_part(y));
}

// Where results go. Forward: through the activation, whose gates are kept, a byte for a group. Backward: through the
// gates of the layer before. `sharing` images (cotangents of one image) have the same gates.
struct Finish {
  Map out;
  uint8_t* gates;      // null: results go out as they are
  const float* slope;  // null: ReLU
  int64_t sharing;
  bool opens;  // the gates are made here
};

TSR_DEVICE bool is_open(float z) { return !(z <= 0); }  // NaN is
TSR_DEVICE float gated(const Finish& f, bool open, float z) { return open ? z : f.slope ? *f.slope * z : 0.f; }

// `groups`: of an image; `at`: of them.
TSR_DEVICE void put_group(const Finish& f, int64_t image, int64_t groups, int64_t at, float (&v)[kGroup]) {
  if (f.gates) {
    uint8_t* const byte = f.gates + image / f.sharing * groups + at;
    uint32_t open = 0;
    if (f.opens) {
      for (int j = 0; j < kGroup; ++j) open |= (is_open(v[j]) ? 1u : 0u) << j;
      *byte = uint8_t(open);
    } else {
      open = *byte;
    }
    for (int j = 0; j < kGroup; ++j) v[j] = gated(f, open >> j & 1, v[j]);
  }
  store_group(f.out, image * groups + at, v);
}

TSR_DEVICE int64_t first_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
TSR_DEVICE int64_t index_step() { return int64_t(gridDim.x) * blockDim.x; }

// A group of a map.
struct Place {
  int64_t image, group, y, x, c;  // group: in the image; c: the first of its channels
};
TSR_DEVICE Place place_of(const Shape& s, int64_t i) {
  const int64_t groups = s.groups(), deep = groups_of(s.c);
  Place p;
  p.image = i / groups, p.group = i % groups;
  const int64_t pixel = p.group / deep;
  p.c = p.group % deep * kGroup, p.y = pixel / s.w, p.x = pixel % s.w;
  return p;
}

// x [image][c][y][x] as a map.
__global__ void __launch_bounds__(kLayerThreads) chain_import_kernel(const float* x, Map out, Shape s, int64_t images) {
  const int64_t plane = s.pixels();
  for (int64_t i = first_index(); i < images * s.groups(); i += index_step()) {
    const Place p = place_of(s, i);
    const float* const from = x + p.image * s.units() + p.y * s.w + p.x;
    float v[kGroup];
    for (int j = 0; j < kGroup; ++j) v[j] = p.c + j < s.c ? from[(p.c + j) * plane] : 0.f;
    store_group(out, i, v);
  }
}

// A map as [image][c][y][x], times its image's factor where there are factors; of the sum of two maps where there are
// two.
__global__ void __launch_bounds__(kLayerThreads)
    chain_export_kernel(Map a, Map b, const double* factor, float* out, Shape s, int64_t images) {
  const int64_t plane = s.pixels(), units = s.units();
  for (int64_t i = first_index(); i < images * units; i += index_step()) {
    const int64_t image = i / units, u = i % units, at = image * s.values() + u % plane * s.channels() + u / plane;
    float v = load_value(a, at);
    if (b.hi) v += load_value(b, at);
    out[i] = factor ? float(double(v) * factor[image]) : v;
  }
}

// The same units in another shape: unit u of [c][h][w] stays unit u.
__global__ void __launch_bounds__(kLayerThreads)
    chain_move_kernel(Map in, Shape from, Shape to, int64_t images, Finish f) {
  for (int64_t i = first_index(); i < images * to.groups(); i += index_step()) {
    const Place p = place_of(to, i);
    float v[kGroup];
    for (int j = 0; j < kGroup; ++j) {
      const int64_t u = ((p.c + j) * to.h + p.y) * to.w + p.x;
      const int64_t at = p.image * from.values() + u % from.pixels() * from.channels() + u / from.pixels();
      v[j] = p.c + j < to.c ? load_value(in, at) : 0.f;
    }
    put_group(f, p.image, to.groups(), p.group, v);
  }
}

// scale[c] in[c] + shift[c]; both are filled up with 0. Backward: no shift.
__global__ void __launch_bounds__(kLayerThreads)
    chain_affine_kernel(Map in, const float* scale, const float* shift, Shape s, int64_t images, Finish f) {
  for (int64_t i = first_index(); i < images * s.groups(); i += index_step()) {
    const Place p = place_of(s, i);
    float v[kGroup];
    load_group(in, i, v);
    for (int j = 0; j < kGroup; ++j) v[j] = scale[p.c + j] * v[j] + (shift ? shift[p.c + j] : 0.f);
    put_group(f, p.image, s.groups(), p.group, v);
  }
}

struct Pool {
  Shape in, out;
  int64_t kh, kw, sh, sw, ph, pw;
  bool count_pad;
};
struct Range {
  int64_t first, end;
};
// The part of window `at` inside the map.
TSR_DEVICE Range window_of(int64_t at, int64_t stride, int64_t pad, int64_t kernel, int64_t size) {
  const int64_t first = at * stride - pad, end = first + kernel;
  return {first > 0 ? first : 0, end < size ? end : size};
}
// The windows that hold `at`.
TSR_DEVICE Range windows_with(int64_t at, int64_t stride, int64_t pad, int64_t kernel, int64_t count) {
  const int64_t first = at + pad < kernel ? 0 : (at + pad - kernel) / stride + 1, end = (at + pad) / stride + 1;
  return {first, end < count ? end : count};
}
TSR_DEVICE float share_of(const Pool& q, Range y, Range x) {
  return 1.f / float(q.count_pad ? q.kh * q.kw : (y.end - y.first) * (x.end - x.first));
}

__global__ void __launch_bounds__(kLayerThreads) chain_average_kernel(Map in, Pool q, int64_t images, Finish f) {
  const int64_t deep = groups_of(q.in.c);
  for (int64_t i = first_index(); i < images * q.out.groups(); i += index_step()) {
    const Place p = place_of(q.out, i);
    const Range ys = window_of(p.y, q.sh, q.ph, q.kh, q.in.h), xs = window_of(p.x, q.sw, q.pw, q.kw, q.in.w);
    float sum[kGroup] = {}, v[kGroup];
    for (int64_t y = ys.first; y < ys.end; ++y)
      for (int64_t x = xs.first; x < xs.end; ++x) {
        load_group(in, p.image * q.in.groups() + (y * q.in.w + x) * deep + p.c / kGroup, v);
        for (int j = 0; j < kGroup; ++j) sum[j] += v[j];
      }
    const float share = share_of(q, ys, xs);
    for (float& s : sum) s *= share;
    put_group(f, p.image, q.out.groups(), p.group, sum);
  }
}

// choice: [image][unit of the output map], the pixel of the first largest.
__global__ void __launch_bounds__(kLayerThreads)
    chain_largest_kernel(Map in, Pool q, int32_t* choice, int64_t images, Finish f) {
  const int64_t deep = groups_of(q.in.c);
  for (int64_t i = first_index(); i < images * q.out.groups(); i += index_step()) {
    const Place p = place_of(q.out, i);
    const Range ys = window_of(p.y, q.sh, q.ph, q.kh, q.in.h), xs = window_of(p.x, q.sw, q.pw, q.kw, q.in.w);
    float best[kGroup], v[kGroup];
    int32_t at[kGroup];
    for (int j = 0; j < kGroup; ++j) best[j] = -INFINITY, at[j] = int32_t(ys.first * q.in.w + xs.first);
    for (int64_t y = ys.first; y < ys.end; ++y)
      for (int64_t x = xs.first; x < xs.end; ++x) {
        load_group(in, p.image * q.in.groups() + (y * q.in.w + x) * deep + p.c / kGroup, v);
        for (int j = 0; j < kGroup; ++j)
          if (v[j] > best[j] || v[j] != v[j]) best[j] = v[j], at[j] = int32_t(y * q.in.w + x);  // NaN wins
      }
    for (int j = 0; j < kGroup; ++j) choice[i * kGroup + j] = at[j];
    put_group(f, p.image, q.out.groups(), p.group, best);
  }
}

// A pixel gathers from the windows that hold it: equal shares, or all where it was their choice.
__global__ void __launch_bounds__(kLayerThreads)
    chain_pool_back_kernel(Map cotangent, Pool q, const int32_t* choice, int64_t images, Finish f) {
  const int64_t deep = groups_of(q.in.c);
  for (int64_t i = first_index(); i < images * q.in.groups(); i += index_step()) {
    const Place p = place_of(q.in, i);
    const Range ys = windows_with(p.y, q.sh, q.ph, q.kh, q.out.h), xs = windows_with(p.x, q.sw, q.pw, q.kw, q.out.w);
    const int32_t me = int32_t(p.y * q.in.w + p.x);
    float sum[kGroup] = {}, v[kGroup];
    for (int64_t y = ys.first; y < ys.end; ++y)
      for (int64_t x = xs.first; x < xs.end; ++x) {
        const int64_t group = (y * q.out.w + x) * deep + p.c / kGroup;
        load_group(cotangent, p.image * q.out.groups() + group, v);
        if (choice) {
          const int32_t* const chosen = choice + (p.image / f.sharing * q.out.groups() + group) * kGroup;
          for (int j = 0; j < kGroup; ++j) sum[j] += chosen[j] == me ? v[j] : 0.f;
        } else {
          const float share =
              share_of(q, window_of(y, q.sh, q.ph, q.kh, q.in.h), window_of(x, q.sw, q.pw, q.kw, q.in.w));
          for (int j = 0; j < kGroup; ++j) sum[j] += v[j] * share;
        }
      }
    put_group(f, p.image, q.in.groups(), p.group, sum);
  }
}

// Cotangents [row][c][y][x] as a map, times a power of two that keeps them in the range of float16: `scale`, and where
// `undo` is wanted also what brings the row's largest entry into [1, 2). A block takes a row.
__global__ void __launch_bounds__(kLayerThreads)
    chain_seed_kernel(const float* cotangent, Shape s, double scale, double* undo, Finish f) {
  TSR_DYNAMIC_SHARED(double, part);
  const int64_t row = blockIdx.x, units = s.units(), plane = s.pixels();
  const float* const from = cotangent + row * units;
  if (undo) {
    double most = 0;
    for (int64_t u = threadIdx.x; u < units; u += kLayerThreads) most = Max{}(double(fabsf(from[u])), most);
    scale *= chain_scale(block_reduce(most, 0.0, Max{}, part));
    if (threadIdx.x == 0) undo[row] = 1 / scale;
  }
  for (int64_t i = threadIdx.x; i < s.groups(); i += kLayerThreads) {
    const Place p = place_of(s, i);
    float v[kGroup];
    for (int j = 0; j < kGroup; ++j)
      v[j] = p.c + j < s.c ? float(scale * double(from[(p.c + j) * plane + p.y * s.w + p.x])) : 0.f;
    put_group(f, row, s.groups(), i, v);
  }
}

// The sum of a product's pieces [piece][row][column], in their order.
__global__ void __launch_bounds__(kLayerThreads)
    chain_pieces_kernel(const float* partial, int64_t pieces, const float* bias, int64_t columns, int64_t rows,
                        Finish f) {
  const int64_t groups = columns / kGroup;
  for (int64_t i = first_index(); i < rows * groups; i += index_step()) {
    const int64_t at = i % groups;
    float sum[kGroup] = {};
    for (int64_t k = 0; k < pieces; ++k)
      for (int j = 0; j < kGroup; ++j) sum[j] += partial[(k * rows * groups + i) * kGroup + j];
    for (int j = 0; bias && j < kGroup; ++j) sum[j] += bias[at * kGroup + j];
    put_group(f, i / groups, groups, at, sum);
  }
}

}  // namespace
}  // namespace tsr
