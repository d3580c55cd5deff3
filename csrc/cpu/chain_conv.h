// Convolutions and linear layers of a chain, forward and backward: both are products of small matrices, rows of packed
// weights times a panel of vectors, kRows x kPoints sums at a time in registers.
#include "cpu/chain_pack.h"
#include "cpu/chain_vector.h"

namespace tsr {
namespace {

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// out[i][j] = sum_k w[k][i] panel[k][j]; a row of w is `ws` long, of panel `ps`, of out `os`.
template <int L, int R, int P>
void product(int64_t depth, const float* w, int64_t ws, const Vec<L>* panel, int64_t ps, Vec<L>* out, int64_t os) {
  Vec<L> sum[R][P];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < P; ++j) sum[i][j] = Vec<L>{};
  for (int64_t k = 0; k < depth; ++k, w += ws, panel += ps) {
    Vec<L> x[P];
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) x[j] = panel[j];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec<L> weight = all<L>(w[i]);
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) sum[i][j] = Lanes<L>::fma(weight, x[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) out[i * os + j] = sum[i][j];
}

template <int L, int P>
void product_of(int rows, int64_t depth, const float* w, int64_t ws, const Vec<L>* panel, int64_t ps, Vec<L>* out,
                int64_t os) {
  switch (rows) {
    case 1:
      return product<L, 1, P>(depth, w, ws, panel, ps, out, os);
    case 2:
      return product<L, 2, P>(depth, w, ws, panel, ps, out, os);
    case 3:
      return product<L, 3, P>(depth, w, ws, panel, ps, out, os);
    case 4:
      return product<L, 4, P>(depth, w, ws, panel, ps, out, os);
#if defined(__AVX512F__)
    case 5:
      return product<L, 5, P>(depth, w, ws, panel, ps, out, os);
    case 6:
      return product<L, 6, P>(depth, w, ws, panel, ps, out, os);
    case 7:
      return product<L, 7, P>(depth, w, ws, panel, ps, out, os);
    case 8:
      return product<L, 8, P>(depth, w, ws, panel, ps, out, os);
#endif
  }
}

#if defined(__AVX2__)
// The same for one image: a vector holds a weight's outputs, `rows` of them. It reads kBlock floats whatever `rows` is.
template <int P>
void product_of_one(int64_t rows, int64_t depth, const float* w, const Vec<1>* panel, int64_t ps, Vec<1>* out,
                    int64_t os) {
  __m256 sum[P];
  for (int j = 0; j < P; ++j) sum[j] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, w += rows, panel += ps) {
    const __m256 weights = _mm256_loadu_ps(w);
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) sum[j] = _mm256_fmadd_ps(weights, _mm256_set1_ps(panel[j][0]), sum[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j)
    for (int64_t i = 0; i < rows; ++i) out[i * os + j] = Vec<1>{sum[j][i]};
}
static_assert(kBlock == 8, "a block of outputs is a vector");

template <int P>
void products_of_one(int64_t points, int64_t rows, int64_t depth, const float* w, const Vec<1>* panel, int64_t ps,
                     Vec<1>* out, int64_t os) {
  if (points == P) return product_of_one<P>(rows, depth, w, panel, ps, out, os);
  if constexpr (P > 1) products_of_one<P - 1>(points, rows, depth, w, panel, ps, out, os);
}
#endif

// A block of up to kBlock outputs times up to kPoints vectors. Rows beyond kRows take a second pass over the panel.
template <int L>
void product(int64_t rows, int64_t points, int64_t depth, const float* w, const Vec<L>* panel, int64_t ps, Vec<L>* out,
             int64_t os) {
#if defined(__AVX2__)
  if constexpr (L == 1) return products_of_one<kPoints<1>>(points, rows, depth, w, panel, ps, out, os);
#endif
  for (int64_t at = 0; at < rows; at += kRows) {
    const int some = int(rows - at < kRows ? rows - at : kRows);
    if (points == 3) product_of<L, 3>(some, depth, w + at, rows, panel, ps, out + at * os, os);
    if (points == 2) product_of<L, 2>(some, depth, w + at, rows, panel, ps, out + at * os, os);
    if (points == 1) product_of<L, 1>(some, depth, w + at, rows, panel, ps, out + at * os, os);
  }
}

// One axis of a Winograd transform: B^T d of six values, A^T m of six to four (matrices by powers of a and b).
constexpr float kA1 = float(kWinogradA), kA2 = kA1 * kA1, kA3 = kA2 * kA1;
constexpr float kB1 = float(kWinogradB), kB2 = kB1 * kB1, kB3 = kB2 * kB1;

template <int L>
void winograd_input(const Vec<L>* d, int64_t ds, Vec<L>* v, int64_t vs) {
  using T = Lanes<L>;
  const Vec<L> d0 = d[0], d1 = d[ds], d2 = d[2 * ds], d3 = d[3 * ds], d4 = d[4 * ds], d5 = d[5 * ds];
  const Vec<L> both = all<L>(kA2 * kB2), minus = all<L>(-(kA2 + kB2)), a2 = all<L>(-kA2), b2 = all<L>(-kB2);
  v[0] = T::fma(both, d0, T::fma(minus, d2, d4));
  const Vec<L> ea = T::fma(b2, d2, d4), oa = T::fma(b2, d1, d3) * kA1;
  v[vs] = ea + oa;
  v[2 * vs] = ea - oa;
  const Vec<L> eb = T::fma(a2, d2, d4), ob = T::fma(a2, d1, d3) * kB1;
  v[3 * vs] = eb + ob;
  v[4 * vs] = eb - ob;
  v[5 * vs] = T::fma(both, d1, T::fma(minus, d3, d5));
}

template <int L>
void winograd_output(const Vec<L>* m, int64_t ms, Vec<L>* y, int64_t ys) {
  using T = Lanes<L>;
  const Vec<L> ea = m[ms] + m[2 * ms], oa = m[ms] - m[2 * ms], eb = m[3 * ms] + m[4 * ms], ob = m[3 * ms] - m[4 * ms];
  y[0] = m[0] + (ea + eb);
  y[ys] = T::fma(all<L>(kA1), oa, ob * kB1);
  y[2 * ys] = T::fma(all<L>(kA2), ea, eb * kB2);
  y[3 * ys] = T::fma(all<L>(kA3), oa, T::fma(all<L>(kB3), ob, m[5 * ms]));
}

// Activations [c][h][w] as vectors, with zeros around.
template <int L>
struct Map {
  const Vec<L>* at;
  int64_t c, h, w;
};

// For every pixel of a 3x3 convolution the lanes in which its window, over all channels, holds anything but zeros.
// Elsewhere the sum is 0, not the rounding error that a Winograd tile leaves where its neighbours are not zero: a ReLU
// there stays closed, and a pixel that no open gate leads to keeps the gradient 0 and is not moved by a signed step.
// `seen`: [h][w], scratch.
template <int L>
void live_windows(const Map<L>& x, int64_t ph, int64_t pw, int64_t oh, int64_t ow, Gate* seen, Gate* live) {
  const int64_t area = x.h * x.w;
  for (int64_t p = 0; p < area; ++p) seen[p] = 0;
  for (int64_t c = 0; c < x.c; ++c)
    for (int64_t p = 0; p < area; ++p) seen[p] = Gate(seen[p] | Lanes<L>::nonzero(x.at[c * area + p]));
  for (int64_t y = 0; y < oh; ++y)
    for (int64_t z = 0; z < ow; ++z) {
      unsigned any = 0;
      for (int64_t r = most(y - ph, 0); r < x.h && r < y - ph + 3; ++r)
        for (int64_t s = most(z - pw, 0); s < x.w && s < z - pw + 3; ++s) any |= seen[r * x.w + s];
      live[y * ow + z] = Gate(any);
    }
}

// 3x3, stride 1, padding (ph, pw) on every side: y[o] = bias[o] + sum_c w[o][c] * x[c], o in [0, outputs), to
// [outputs][oh][ow]. Values outside x are zeros. `scratch`: winograd_scratch vectors. `seen`, `live`: pixels of x, of
// y.
template <int L>
constexpr int64_t winograd_scratch(int64_t channels) {
  return 36 * kPoints<L> * (channels + kBlock);
}

template <int L>
void winograd(const Map<L>& x, int64_t ph, int64_t pw, const float* w, const float* bias, int64_t outputs, int64_t oh,
              int64_t ow, const Sink<L>& sink, Vec<L>* scratch, Gate* seen, Gate* live) {
  live_windows<L>(x, ph, pw, oh, ow, seen, live);
  const int64_t across = (ow + 3) / 4, tiles = (oh + 3) / 4 * across;
  const Blocks blocks(outputs);
  Vec<L>* const v = scratch;                          // [36][c][kPoints<L>]
  Vec<L>* const m = scratch + 36 * x.c * kPoints<L>;  // [36][size][kPoints<L>]
  const int64_t step = x.c * kPoints<L>;
  for (int64_t t0 = 0; t0 < tiles; t0 += kPoints<L>) {
    const int64_t points = tiles - t0 < kPoints<L> ? tiles - t0 : kPoints<L>;
    for (int64_t p = 0; p < points; ++p) {
      const int64_t y0 = (t0 + p) / across * 4 - ph, x0 = (t0 + p) % across * 4 - pw;
      const bool inside = y0 >= 0 && x0 >= 0 && y0 + 6 <= x.h && x0 + 6 <= x.w;
      for (int64_t c = 0; c < x.c; ++c) {
        const Vec<L>* const from = x.at + (c * x.h + y0) * x.w + x0;
        Vec<L> patch[36], rows[36];
        if (inside) {
          for (int i = 0; i < 6; ++i) winograd_input<L>(from + i * x.w, 1, rows + 6 * i, 1);
        } else {
          for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) {
              const bool there = y0 + i >= 0 && y0 + i < x.h && x0 + j >= 0 && x0 + j < x.w;
              patch[6 * i + j] = there ? x.at[(c * x.h + y0 + i) * x.w + x0 + j] : Vec<L>{};
            }
          for (int i = 0; i < 6; ++i) winograd_input<L>(patch + 6 * i, 1, rows + 6 * i, 1);
        }
        Vec<L>* const to = v + c * kPoints<L> + p;
        for (int j = 0; j < 6; ++j) winograd_input<L>(rows + j, 6, to + j * step, 6 * step);
      }
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t first = blocks.first(b), size = blocks.first(b + 1) - first;
      const float* const weights = w + 36 * x.c * first;
      for (int64_t f = 0; f < 36; ++f)
        product<L>(size, points, x.c, weights + f * x.c * size, v + f * step, kPoints<L>, m + f * size * kPoints<L>,
                   kPoints<L>);
      for (int64_t i = 0; i < size; ++i)
        for (int64_t p = 0; p < points; ++p) {
          const int64_t y0 = (t0 + p) / across * 4, x0 = (t0 + p) % across * 4;
          const int64_t high = oh - y0 < 4 ? oh - y0 : 4, wide = ow - x0 < 4 ? ow - x0 : 4;
          const Vec<L>* const from = m + i * kPoints<L> + p;
          Vec<L> columns[24];
          for (int j = 0; j < 6; ++j)
            winograd_output<L>(from + j * size * kPoints<L>, 6 * size * kPoints<L>, columns + j, 6);
          const Vec<L> offset = all<L>(bias ? bias[first + i] : 0.f);
          for (int64_t r = 0; r < high; ++r) {
            Vec<L> y[4];
            winograd_output<L>(columns + 6 * r, 1, y, 1);
            const int64_t pixel = (y0 + r) * ow + x0, unit = (first + i) * oh * ow + pixel;
            for (int64_t s = 0; s < wide; ++s)
              sink.put(unit + s, Lanes<L>::select(live[pixel + s], y[s], Vec<L>{}) + offset);
          }
        }
    }
  }
}

// A set of pixels whose values are sums over the same taps: outputs of a convolution, or the inputs of one residue
// class modulo its stride, carried back. Pixel (i, j) of [high][wide] reads x at (i fy + by + dy[t], j fx + bx + dx[t])
// and is unit (i uy + oy) * row + j ux + ox of its channel, which has `area` units.
constexpr int64_t kMostTaps = 49;
struct Taps {
  int64_t count, dy[kMostTaps], dx[kMostTaps];
  int64_t high, wide, fy, fx, by, bx, uy, ux, oy, ox, row, area;
};

template <int L>
constexpr int64_t direct_scratch(int64_t channels, int64_t taps) {
  return kPoints<L> * (channels * taps + kBlock);
}

template <int L>
void direct(const Map<L>& x, const Taps& taps, const float* w, const float* bias, int64_t outputs, const Sink<L>& sink,
            Vec<L>* scratch) {
  const Blocks blocks(outputs);
  const int64_t depth = x.c * taps.count, pixels = taps.high * taps.wide;
  Vec<L>* const panel = scratch;                     // [depth][kPoints<L>]
  Vec<L>* const out = scratch + depth * kPoints<L>;  // [size][kPoints<L>]
  for (int64_t p0 = 0; p0 < pixels; p0 += kPoints<L>) {
    const int64_t points = pixels - p0 < kPoints<L> ? pixels - p0 : kPoints<L>;
    for (int64_t p = 0; p < points; ++p) {
      const int64_t y0 = (p0 + p) / taps.wide * taps.fy + taps.by, x0 = (p0 + p) % taps.wide * taps.fx + taps.bx;
      for (int64_t t = 0; t < taps.count; ++t) {
        const int64_t y = y0 + taps.dy[t], xx = x0 + taps.dx[t];
        const bool there = y >= 0 && y < x.h && xx >= 0 && xx < x.w;
        Vec<L>* const to = panel + t * kPoints<L> + p;
        for (int64_t c = 0; c < x.c; ++c)
          to[c * taps.count * kPoints<L>] = there ? x.at[(c * x.h + y) * x.w + xx] : Vec<L>{};
      }
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t first = blocks.first(b), size = blocks.first(b + 1) - first;
      product<L>(size, points, depth, w + depth * first, panel, kPoints<L>, out, kPoints<L>);
      for (int64_t i = 0; i < size; ++i)
        for (int64_t p = 0; p < points; ++p) {
          const int64_t y = (p0 + p) / taps.wide * taps.uy + taps.oy, xx = (p0 + p) % taps.wide * taps.ux + taps.ox;
          sink.put((first + i) * taps.area + y * taps.row + xx,
                   out[i * kPoints<L> + p] + (bias ? bias[first + i] : 0.f));
        }
    }
  }
}

template <int L>
void conv_forward(const ChainRecord& r, const float* packed, const float* bias, const Vec<L>* in, const Sink<L>& sink,
                  Vec<L>* scratch, Gate* seen, Gate* live) {
  const Map<L> x{in, r.c, r.h, r.w};
  if (r.winograd) return winograd<L>(x, r.ph, r.pw, packed, bias, r.oc, r.oh, r.ow, sink, scratch, seen, live);
  Taps taps{r.kh * r.kw, {}, {}, r.oh, r.ow, r.sh, r.sw, -r.ph, -r.pw, 1, 1, 0, 0, r.ow, r.oh * r.ow};
  for (int64_t t = 0; t < taps.count; ++t) taps.dy[t] = t / r.kw, taps.dx[t] = t % r.kw;
  direct<L>(x, taps, packed, bias, r.oc, sink, scratch);
}

template <int L>
void conv_backward(const ChainRecord& r, const float* packed, const Vec<L>* cotangent, const Sink<L>& sink,
                   Vec<L>* scratch, Gate* seen, Gate* live) {
  const Map<L> z{cotangent, r.oc, r.oh, r.ow};
  if (r.winograd) return winograd<L>(z, 2 - r.ph, 2 - r.pw, packed, nullptr, r.c, r.h, r.w, sink, scratch, seen, live);
  // Input y gets z at (y + ph - tap) / sh: for the class i = (y + ph) % sh at Y - m, Y = (y + ph - i) / sh, m = 0, 1,
  // ...
  for (int64_t i = 0; i < r.sh; ++i)
    for (int64_t j = 0; j < r.sw; ++j) {
      const int64_t y0 = ((i - r.ph) % r.sh + r.sh) % r.sh, x0 = ((j - r.pw) % r.sw + r.sw) % r.sw;
      const int64_t down = taps_of(r.kh, r.sh, i), along = taps_of(r.kw, r.sw, j);
      Taps taps{down * along,
                {},
                {},
                (r.h - y0 + r.sh - 1) / r.sh,
                (r.w - x0 + r.sw - 1) / r.sw,
                1,
                1,
                (y0 + r.ph - i) / r.sh,
                (x0 + r.pw - j) / r.sw,
                r.sh,
                r.sw,
                y0,
                x0,
                r.w,
                r.h * r.w};
      for (int64_t t = 0; t < taps.count; ++t) taps.dy[t] = -(t / along), taps.dx[t] = -(t % along);
      if (taps.high > 0 && taps.wide > 0) direct<L>(z, taps, packed, nullptr, r.c, sink, scratch);
      packed += r.oc * r.c * taps.count;
    }
}

// y[o] = bias[o] + sum_k w[k][o] x[k], in pieces: a sum of 10,000 terms one by one would lose a digit.
template <int L>
void linear(int64_t inputs, int64_t outputs, const float* packed, const float* bias, const Vec<L>* x,
            const Sink<L>& sink) {
  constexpr int64_t kPiece = 256;
  const Blocks blocks(outputs);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t first = blocks.first(b), size = blocks.first(b + 1) - first;
    const float* const w = packed + inputs * first;
    Vec<L> y[kBlock] = {}, piece[kBlock];
    for (int64_t k = 0; k < inputs; k += kPiece) {
      product<L>(size, 1, inputs - k < kPiece ? inputs - k : kPiece, w + k * size, x + k, 1, piece, 1);
      for (int64_t i = 0; i < size; ++i) y[i] += piece[i];
    }
    for (int64_t i = 0; i < size; ++i) sink.put(first + i, y[i] + (bias ? bias[first + i] : 0.f));
  }
}

}  // namespace
}  // namespace tsr
