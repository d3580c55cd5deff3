// Moments of two small networks' channels, layer by layer, without a trip of the activations through memory.   Meaning:
// core/chain_correlation.h; host: chain_correlation.cu; layers and weights: chain_fused_layers.cuh
//
// Work: a block of 8 warps, one to a multiprocessor; image i is block i mod grid's, so that the same sums are added in
// the same order in every run. Each network has one map in shared memory, of its largest layer, and works in it in
// place: convolution l of the teacher, convolution l of the student, the sums of that pair of layers, and on to l + 1.
// Passes over memory: the images once; for every image the weights once, from L2; for every image the block's own sums
// (8 bytes for each moment: 44 KB for the paper's networks of 4 layers, 54 KB of 5) once there and back, in L2.
// Bound: tensor cores in the convolutions, as in the attack's forward passes. The sums issue 10 % more products, in 12,
// 6, 6 and 4 blocks for 8 warps: there, loads from shared memory.
//
// Sums of products: 16 x 16 of them, teacher's channels x student's, belong to a warp that goes through all pixels, so
// no two warps meet in a sum. Both operands come from [pixel][channel] maps by transposing loads.
//
// Error of the sums: products of float16 values are exact; an image's sums of at most 900 of them are float32, which
// costs up to 4e-7 of Q = sum x^2 where threads add up (all values equal), and about 2e-6 of sum x y, always towards 0,
// on tensor cores, if they cut instead of rounding. Images are added in float64. There is no shift, so rho is off by
// about 4e-6 (1 + (mean / std)^2); behind a ReLU mean / std is seldom above 3. float16 itself has moved each
// activation by up to 5e-4 of its size.
#pragma once
#include "core/channel_correlation.h"
#include "cuda/chain_fused_layers.cuh"

namespace tsr {
namespace fused {

struct CorrelationArgs {
  const float* x;  // [N, values]
  Pointers student, teacher;
  double* sums;  // [blocks][block_sums]
  int64_t block_sums, n;
};

// A block's sums, layer after layer: so many come before those of `layer`. A layer's are where its moments will be: sum
// x for mean, sum x^2 for m2, sum x y for cross; the first is not used.
TSR_HD int64_t sums_before(const Shape& teacher, const Shape& student, int layer) {
  int64_t n = 0;
  for (int l = 0; l < layer; ++l) n += moments_size(student.c[l], teacher.c[l]);
  return n;
}

// Shared memory. What threads tell each other of their sums lies over the image: it is not needed any more then.
struct CorrelationMap {
  static constexpr int kSumsBytes = kThreads * 16;  // sum x and sum x^2 of two channels
  int teacher, student, image, barriers, ring, stages, bytes;

  TSR_GEOMETRY CorrelationMap(const Shape& t, const Shape& s, int ring_stages)
      : teacher(0),
        student(larger(t.buffer_bytes(0), t.buffer_bytes(1))),
        image(student + larger(s.buffer_bytes(0), s.buffer_bytes(1))),
        barriers(image + larger(s.values() * 4, 2 * kSumsBytes)),
        ring(round_up(barriers + 12 * ring_stages, 128)),
        stages(ring_stages),
        bytes(ring + ring_stages * kStageBytes) {}
};

TSR_GEOMETRY bool in_place(const Shape& s) {
  bool fits = true;
  for (int l = 1; l < s.depth; ++l) fits = fits && s.forward(l).passes() == 1;
  return fits;
}

template <class Teacher_, class Student_>
struct Correlation {
  using Teacher = Teacher_;
  using Student = Student_;
  using Arguments = CorrelationArgs;
  static constexpr CorrelationMap kMap = with_ring<CorrelationMap>(Teacher::kShape, Student::kShape);
  static constexpr int kDepth = Student::kDepth, kArea = Student::kShape.side * Student::kShape.side,
                       kValues = Student::kShape.values(), kStages = Teacher::kForward + Student::kForward;
  static constexpr int kRing = kMap.stages, kBarriers = kMap.barriers, kRingAt = kMap.ring, kImage = kMap.image,
                       kTeacherMap = kMap.teacher, kStudentMap = kMap.student, kBytes = kMap.bytes;
  static_assert(Teacher::kDepth == kDepth && Teacher::kShape.side == Student::kShape.side,
                "layers are compared in pairs of maps of the same size");
  static_assert(in_place(Teacher::kShape) && in_place(Student::kShape),
                "a layer's results wait in registers until its input has been read");
  static_assert(kBytes <= kMostShared, "the networks do not fit into a block's shared memory");

  // Weights: teacher's and student's first convolution, then their second ones, and so on.
  __device__ __forceinline__ static int stages(const CorrelationArgs&) { return kStages; }
  template <int L = 0>
  __device__ __forceinline__ static const unsigned char* stage(const CorrelationArgs& a, int what) {
    constexpr int kTeacherNext = Teacher::kShape.first_stage(L + 1), kStudentNow = Student::kShape.first_stage(L),
                  kStudentNext = Student::kShape.first_stage(L + 1);
    if (what < kTeacherNext + kStudentNow) return a.teacher.halves + (what - kStudentNow) * kStageBytes;
    if constexpr (L + 1 < kDepth) {
      if (what >= kTeacherNext + kStudentNext) return stage<L + 1>(a, what);
    }
    return a.student.halves + (what - kTeacherNext) * kStageBytes;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Adds to a sum in global memory that this thread alone ever touches; a block's first image begins it.
TSR_DEVICE double added(const double* to, double v, bool first) { return first ? v : *to + v; }

// Sum x and sum x^2 of each channel: a thread takes two neighbouring ones, and every kRanges-th pixel.
template <class L>
struct ChannelSums {
  static constexpr int kWords = L::kNTiles * 4, kRanges = kThreads / kWords;

  __device__ __forceinline__ static void take(Shared map, Shared to) {
    const int word = int(threadIdx.x) % kWords, range = int(threadIdx.x) / kWords;
    if (range >= kRanges) return;
    // Four sums, each of 25 values of the paper's first maps: of equal values, whose rounding adds up, one is too
    // rough.
    constexpr int kParts = 4;
    float sum[kParts][2] = {}, square[kParts][2] = {};
    const Shared at = map + uint32_t(range * L::kOutStride * 2 + word * 4);
#pragma unroll 1
    for (int pixel = range; pixel < L::kRows; pixel += kParts * kRanges)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int here = pixel + part * kRanges;
        if (here >= L::kRows) break;
        float v[2];
        unpack_f16(load_u32(at + uint32_t((here - range) * L::kOutStride * 2)), v[0], v[1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[part][i] += v[i], square[part][i] = fmaf(v[i], v[i], square[part][i]);
      }
    const auto all = [](const float (&parts)[kParts][2], int i) {
      double s = 0;
      for (int part = 0; part < kParts; ++part) s += double(parts[part][i]);
      return float(s);
    };
    to += threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) store_f32(to + 4 * i, all(sum, i)), store_f32(to + 8 + 4 * i, all(square, i));
  }
  // A thread has a channel, and goes through the ranges in order. `mean` and `m2`: this network's first.
  __device__ __forceinline__ static void add(Shared from, int channels, double* mean, double* m2, bool first) {
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      const Shared at = from + uint32_t(c / 2 * 16 + c % 2 * 4);
      double sum = 0, square = 0;
#pragma unroll 1
      for (int range = 0; range < kRanges; ++range) {
        sum += double(load_f32(at + uint32_t(range * kWords * 16)));
        square += double(load_f32(at + uint32_t(range * kWords * 16 + 8)));
      }
      mean[c] = added(mean + c, sum, first), m2[c] = added(m2 + c, square, first);
    }
  }
};

// Of 16 channels, pair `pair` of a map's chunks, what a lane names in a transposing load of 16 pixels: 0 and 2 of the
// four matrices have the even chunk, of 8 pixels each. Where there is no odd chunk, the next pixel's first one is read
// instead, for sums that nobody keeps.
template <class L>
__device__ __forceinline__ Shared block_at(Shared map, int pair) {
  const uint32_t lane = lane_id(), pixel = (lane & 7u) + (lane >> 4) * 8u,
                 chunk = uint32_t(2 * pair) + (lane >> 3 & 1u);
  return map + pixel * uint32_t(L::kOutStride * 2) + chunk * 16u;
}
// Pixels 16 k to 16 k + 15; behind the last pixel there is a chunk of zeros, which stands for all that are not there.
template <class L>
__device__ __forceinline__ void load_block(uint32_t (&r)[4], Shared map, Shared at, int k) {
  const Shared end = map + uint32_t(L::kRows * L::kOutStride * 2);
  ldmatrix_x4_trans(r, min(at + uint32_t(k * 16 * L::kOutStride * 2), end));
}

// Sum x y of a pair of layers: blocks of 16 x 16 channels, block q by warp q mod kWarps.
template <class I, int L>
__device__ __forceinline__ void sum_products(Shared teacher, Shared student, double* sums, bool first, int warp) {
  using T = Layer<typename I::Teacher, false, L>;
  using S = Layer<typename I::Student, false, L>;
  constexpr int kT = I::Teacher::kShape.c[L], kS = I::Student::kShape.c[L], kColumns = ceil_div(S::kNTiles, 2),
                kBlocks = ceil_div(T::kNTiles, 2) * kColumns;
  constexpr int kTogether = 4;  // steps whose loads come before all their products: an ldmatrix takes about 30 cycles
  const uint32_t g = lane_id() >> 2, t2 = (lane_id() & 3u) * 2u;
#pragma unroll 1
  for (int block = warp; block < kBlocks; block += kWarps) {
    const int row = block / kColumns, column = block - row * kColumns;
    const Shared at_t = block_at<T>(teacher, row), at_s = block_at<S>(student, column);
    float d[2][2][4] = {};  // odd steps apart: else each product waits for the one before
    __syncwarp();           // lanes come from conditions of their own
#pragma unroll 1
    for (int k = 0; k < T::kTiles; k += kTogether) {  // steps past the end are zeros
      uint32_t a[kTogether][4], b[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        load_block<T>(a[i], teacher, at_t, k + i), load_block<S>(b[i], student, at_s, k + i);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_f16_k16(d[i % 2][n], a[i], b[i][n], b[i][n + 2]);
    }
    double sum[2][4] = {};
    const auto each = [&](auto f) {  // f(n, i, where the sum is), of channels that are there
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = row * 16 + int(g) + i / 2 * 8, k = column * 16 + n * 8 + int(t2) + i % 2;
          if (j < kT && k < kS) f(n, i, sums + cross_at(k, j, kS, kT));
        }
    };
    each(
        [&](int n, int i, const double* at) { sum[n][i] = added(at, double(d[0][n][i]) + double(d[1][n][i]), first); });
    each([&](int n, int i, double* at) { *at = sum[n][i]; });
  }
}

// A block at work on its images.
template <class I>
struct Correlator {
  using Teacher = typename I::Teacher;
  using Student = typename I::Student;
  const CorrelationArgs& args;
  const Shared base;
  const int warp;
  Ring<I> ring;

  __device__ __forceinline__ Correlator(const CorrelationArgs& a, Shared memory)
      : args(a), base(memory), warp(warp_id()), ring(a, memory) {
    if (threadIdx.x == 0) ring.start();
  }

  // From [color][y][x] to [y][x][color]; some loads at a time, or each would wait for the one before.
  __device__ __forceinline__ void load_image(const float* from) const {
    constexpr int kTogether = 4;
#pragma unroll 1
    for (int first = threadIdx.x; first < I::kValues; first += kTogether * kThreads) {
      float v[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i * kThreads < I::kValues) v[i] = __ldg(from + first + i * kThreads);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int j = first + i * kThreads, color = j / I::kArea;
        if (j < I::kValues)
          store_f32(base + I::kImage + uint32_t(((j - color * I::kArea) * kColors + color) * 4), v[i]);
      }
    }
  }

  template <class N, int L>
  __device__ __forceinline__ void convolve(const Pointers& net, Shared map) {
    constexpr int kBias = N::kShape.bias_at(L);
    if constexpr (L == 0)
      forward_first<N, Gates::none>(base + I::kImage, map, 0, net.floats, warp, ring);
    else
      forward_in_place<N, L>(map, net.floats + kBias, warp, ring);
  }
  template <int L>
  __device__ __forceinline__ void sum_up(double* sums, bool first) const {
    using T = ChannelSums<Layer<Teacher, false, L>>;
    using S = ChannelSums<Layer<Student, false, L>>;
    constexpr int kT = Teacher::kShape.c[L], kS = Student::kShape.c[L];
    const Shared scratch = base + I::kImage, other = scratch + uint32_t(CorrelationMap::kSumsBytes);
    T::take(base + I::kTeacherMap, scratch);
    S::take(base + I::kStudentMap, other);
    sum_products<I, L>(base + I::kTeacherMap, base + I::kStudentMap, sums, first, warp);
    __syncthreads();
    T::add(scratch, kT, sums + mean_at(kS), sums + m2_at(kS, kS, kT), first);
    S::add(other, kS, sums + mean_at(0), sums + m2_at(0, kS, kT), first);
  }
  template <int L>
  __device__ __forceinline__ void layers(double* sums, bool first) {
    if constexpr (L < I::kDepth) {
      convolve<Teacher, L>(args.teacher, base + I::kTeacherMap);
      convolve<Student, L>(args.student, base + I::kStudentMap);
      __syncthreads();
      sum_up<L>(sums, first);
      constexpr int kT = Teacher::kShape.c[L], kS = Student::kShape.c[L];
      layers<L + 1>(sums + moments_size(kS, kT), first);
    }
  }

  __device__ __forceinline__ void run() {
    double* const sums = args.sums + blockIdx.x * args.block_sums;
#pragma unroll 1
    for (int64_t image = blockIdx.x; image < args.n; image += gridDim.x) {
      load_image(args.x + image * I::kValues);
      __syncthreads();
      layers<0>(sums, image == int64_t(blockIdx.x));
      __syncthreads();  // the next image comes where threads have read each other's sums
    }
    ring.drain();
  }
};

#endif

template <class I>
__global__ void __launch_bounds__(kThreads, 1) chain_correlation_kernel(const __grid_constant__ CorrelationArgs a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  Correlator<I>(a, shared_address(memory)).run();
#else
  __trap();  // a build for older GPUs only, brought to a new one by the driver: no results rather than wrong ones
#endif
}

}  // namespace fused
}  // namespace tsr
