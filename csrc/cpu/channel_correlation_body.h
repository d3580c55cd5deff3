// The loops of channel_correlation for one instruction set; compiled once for each by
// channel_correlation{,_avx2,_avx512}.cpp.
//
// A tile of kTile samples is packed as rows [channel][sample], which is NCHW's own order, less a shift: the mean of the
// tile before (where the mean jumps, the jump itself is variance, so nothing is lost). Pairs of channels are inner
// products of rows, kRows x kCols of them at a time in registers: the lanes are samples, so a float32 sum is kTile /
// lanes long, 32 to 64, before it is folded into float64.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "core/channel_correlation.h"

namespace tsr {
namespace {

#if defined(__AVX2__)
inline float lane_sum(__m256 v) {
  const __m128 four = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}
inline double lane_sum(__m256d v) {
  const __m128d two = _mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1);
  return two[0] + two[1];
}
#endif

#if defined(__AVX512F__)
constexpr int64_t kTile = 512;
constexpr int kRows = 5, kCols = 5;  // 25 sums, 5 rows, 1 column: 31 of 32 registers
using Floats = __m512;
using Doubles = __m512d;
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
// Not _mm512_reduce_add, nor a cast: gcc 12 warns of uninitialised values inside them.
inline float lane_sum(Floats v) {
  return lane_sum(_mm512_maskz_extractf32x8_ps(255, v, 0) + _mm512_maskz_extractf32x8_ps(255, v, 1));
}
inline double lane_sum(Doubles v) {
  return lane_sum(_mm512_maskz_extractf64x4_pd(15, v, 0) + _mm512_maskz_extractf64x4_pd(15, v, 1));
}
#elif defined(__AVX2__)
constexpr int64_t kTile = 512;
constexpr int kRows = 3, kCols = 4;  // 12 sums, 3 rows, 1 column: 16 registers
using Floats = __m256;
using Doubles = __m256d;
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
#else
constexpr int64_t kTile = 128;
constexpr int kRows = 3, kCols = 3;
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
inline float lane_sum(Floats v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline double lane_sum(Doubles v) { return v[0] + v[1]; }
#endif

constexpr int64_t kRowStride = kTile + 16;  // not a power of two: rows would fight for the same cache sets

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class P>
struct vector {
  using type = Floats;
};
template <>
struct vector<double> {
  using type = Doubles;
};

// What one thread needs for one tile of type P (float, or double for float64 activations).
template <class P>
struct Scratch {
  int64_t rows, cols;                    // student and teacher channels, rounded up to whole register tiles
  P *panel, *product;                    // [rows + cols, kRowStride] centred samples; [rows, cols] sums of products
  double *shift, *sum, *square, *delta;  // [rows + cols]: subtracted; sums of what is left; mean's change

  Scratch(void* memory, int64_t cs, int64_t ct)
      : rows(round_up(cs, kRows)),
        cols(round_up(ct, kCols)),
        panel(static_cast<P*>(memory)),
        product(panel + (rows + cols) * kRowStride),
        shift(reinterpret_cast<double*>(product + round_up(rows * cols, 16))),
        sum(shift + rows + cols),
        square(sum + rows + cols),
        delta(square + rows + cols) {}
  static int64_t bytes(int64_t cs, int64_t ct) {
    const int64_t rows = round_up(cs, kRows), cols = round_up(ct, kCols);
    const int64_t values = (rows + cols) * kRowStride + round_up(rows * cols, 16);
    return round_up(values * int64_t(sizeof(P)) + 4 * (rows + cols) * int64_t(sizeof(double)), 64);
  }
};

// to = from - shift, and the sums of that and of its square, which the lanes share out.
template <class T, class P>
void centre(const T* from, P shift, P* to, int64_t n, double& sums, double& squares) {
  P sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t i = 0; i < n; ++i) {
    const P d = load(from[i]) - shift;
    to[i] = d;
    sum += d;
    square += d * d;
  }
  sums += sum;
  squares += square;
}

// channels_last and the like: the values as rows, 16 samples at a time, so that their cache lines are read once.
template <class T, class P>
void gather(const Activations& x, int64_t positions, int64_t image, int64_t position, int64_t n, P* panel) {
  constexpr int kBlock = 16;
  for (int64_t i = 0; i < n; i += kBlock) {
    const T* from[kBlock];
    for (int s = 0; s < kBlock; ++s) {
      from[s] = static_cast<const T*>(x.values) + image * x.s_image + position * x.s_position;
      if (i + s + 1 < n && ++position == positions) position = 0, ++image;
    }
    for (int64_t c = 0; c < x.channels; ++c)
      for (int s = 0; s < kBlock; ++s) panel[c * kRowStride + i + s] = load(from[s][c * x.s_channel]);
  }
}

// Samples [first, first + n) of one network into rows of the panel, less `shift`.
template <class T, class P>
void pack(const Activations& x, int64_t positions, int64_t first, int64_t n, P* panel, const double* shift, double* sum,
          double* square) {
  const T* values = static_cast<const T*>(x.values);
  const int64_t image0 = first / positions, position0 = first - image0 * positions;
  if (x.s_position != 1) gather<T, P>(x, positions, image0, position0, n, panel);
  for (int64_t c = 0; c < x.channels; ++c) {
    P* row = panel + c * kRowStride;
    const T* from = values + c * x.s_channel;
    sum[c] = square[c] = 0;
    int64_t image = image0, position = position0;
    if (x.s_position == 1) {
      for (int64_t done = 0, part; done < n; done += part, position = 0, ++image) {
        part = n - done < positions - position ? n - done : positions - position;
        centre<T, P>(from + image * x.s_image + position, P(shift[c]), row + done, part, sum[c], square[c]);
      }
    } else {
      centre<P, P>(row, P(shift[c]), row, n, sum[c], square[c]);
    }
    for (int64_t i = n; i < kTile; ++i) row[i] = 0;
  }
}

// kRows x kCols inner products of rows of length n, a multiple of the lanes.
template <class P>
void products(const P* a, const P* b, int64_t n, P* out, int64_t out_stride) {
  using V = typename vector<P>::type;
  constexpr int64_t kLanes = sizeof(V) / sizeof(P);
  V sums[kRows][kCols] = {};
  for (int64_t s = 0; s < n; s += kLanes) {
    V row[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) row[i] = *reinterpret_cast<const V*>(a + i * kRowStride + s);
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      const V col = *reinterpret_cast<const V*>(b + j * kRowStride + s);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sums[i][j] = fma(row[i], col, sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) out[i * out_stride + j] = lane_sum(sums[i][j]);
}

// Moments of samples [first, last).
template <class T>
void chunk(const ChannelCorrelation& a, int64_t first, int64_t last, double* moments, void* memory) {
  using P = compute_t<T>;
  const int64_t cs = a.student.channels, ct = a.teacher.channels;
  const Scratch<P> w(memory, cs, ct);
  P* const right = w.panel + w.rows * kRowStride;
  for (int64_t c = cs; c < w.rows; ++c)
    for (int64_t i = 0; i < kTile; ++i) w.panel[c * kRowStride + i] = 0;
  for (int64_t c = ct; c < w.cols; ++c)
    for (int64_t i = 0; i < kTile; ++i) right[c * kRowStride + i] = 0;
  for (int64_t i = 0; i < moments_size(cs, ct); ++i) moments[i] = 0;

  const auto pack_both = [&](int64_t at, int64_t n) {
    pack<T, P>(a.student, a.positions, at, n, w.panel, w.shift, w.sum, w.square);
    pack<T, P>(a.teacher, a.positions, at, n, right, w.shift + cs, w.sum + cs, w.square + cs);
  };
  const auto next_shift = [&](int64_t n) {
    for (int64_t c = 0; c < cs + ct; ++c) w.shift[c] = few_bits(P(w.shift[c] + w.sum[c] / double(n)));
  };
  for (int64_t c = 0; c < cs + ct; ++c) w.shift[c] = 0;

  for (int64_t at = first; at < last; at += kTile) {
    const int64_t n = last - at < kTile ? last - at : kTile;
    pack_both(at, n);
    if (at == first) {  // no tile before it: its own mean
      next_shift(n);
      pack_both(at, n);
    }
    for (int64_t k = 0; k < w.rows; k += kRows)
      for (int64_t j = 0; j < w.cols; j += kCols)
        products<P>(w.panel + k * kRowStride, right + j * kRowStride, round_up(n, 16), w.product + k * w.cols + j,
                    w.cols);

    const Join to = join(double(at - first), double(n));
    for (int64_t c = 0; c < cs + ct; ++c) {
      double& mean = moments[mean_at(c)];
      w.delta[c] = w.shift[c] + w.sum[c] / double(n) - mean;
      mean += w.delta[c] * to.part;
      moments[m2_at(c, cs, ct)] += w.square[c] - w.sum[c] * w.sum[c] / double(n) + w.delta[c] * w.delta[c] * to.weight;
    }
    for (int64_t k = 0; k < cs; ++k) {
      const double sum = -w.sum[k] / double(n), delta = w.delta[k] * to.weight;
      double* cross = moments + cross_at(k, 0, cs, ct);
      const P* product = w.product + k * w.cols;
      for (int64_t j = 0; j < ct; ++j) cross[j] += double(product[j]) + (sum * w.sum[cs + j] + delta * w.delta[cs + j]);
    }
    next_shift(n);
  }
  moments[0] = double(last - first);
}

template <class T>
int64_t scratch_bytes(const ChannelCorrelation& a) {
  return Scratch<compute_t<T>>::bytes(a.student.channels, a.teacher.channels);
}

}  // namespace
}  // namespace tsr
