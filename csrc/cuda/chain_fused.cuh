// The whole attack on one or two small networks, in one kernel.   Semantics: core/chain.h (ChainPgd); host:
// chain_fused.cu
//
// Work: a block of 8 warps, one to a multiprocessor, takes one image after the other from a queue. The image, the
// activations of the layer at hand and the one before it, and the gates of all layers stay in shared memory for all
// steps; only x0, the linear layers' weights and the results are read or written in global memory.
// Bound: tensor cores and shared memory alike (within 30 % of each other in most layers), then the linear layers, whose
// weights come from L2 twice a step.
//
// A step: forward of the teacher and of the student, loss, backward of the student and, where the loss moves it, of the
// teacher; then the step itself. Phases are separated by block barriers; convolution l writes buffer l % 2.
//
// 16-bit operands, float32 sums. Gates are bits of the thread that made them: a forward layer and the backward layer
// above it have the same pixels and channels in the same registers of the same threads.
#pragma once
#include "cuda/chain_fused_layers.cuh"

namespace tsr {
namespace fused {

constexpr unsigned kWalk = 1, kKeep = 2;         // decisions: take a step; the image is the best, or the last
constexpr unsigned kHeld = 1, kAdversarial = 2;  // of the best image so far

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A block at work on an image.
template <class I>
struct Attack {
  const Args& args;
  const ChainPgd& a;
  const Shared base;
  const int warp;
  Ring<I> ring;

  __device__ __forceinline__ Attack(const Args& all, Shared memory)
      : args(all), a(all.attack), base(memory), warp(warp_id()), ring(all, memory) {
    if (threadIdx.x == 0) ring.start();
    for (int i = threadIdx.x; i < I::kZeroWords; i += kThreads) store_u32(base + I::kZero + 4 * i, 0);
  }

  // Value j of an image in the order of global memory: where it is in shared memory, from pixel to pixel 3 values.
  __device__ __forceinline__ static uint32_t place(int j) {
    const int color = j / I::kArea;
    return uint32_t(((j - color * I::kArea) * kColors + color) * 4);
  }
  __device__ __forceinline__ float x(int j) const { return load_f32(base + I::kImage + place(j)); }
  __device__ __forceinline__ void set_x(int j, float v) const { store_f32(base + I::kImage + place(j), v); }
  __device__ __forceinline__ void copy_out(float* to) const {
    for (int j = threadIdx.x; j < I::kValues; j += kThreads) to[j] = x(j);
  }
  __device__ __forceinline__ float* result() const { return a.x + image() * I::kValues; }
  __device__ __forceinline__ void record(int64_t step) const {
    if (a.iterates) copy_out(a.iterates + (step * a.n + image()) * I::kValues);
  }

  // False when there are none left. The number stays in shared memory: registers are dear.
  __device__ __forceinline__ bool next_image() const {
    if (threadIdx.x == 0) {
      const unsigned long long image = atomicAdd(args.queue, 1ull);
      store_u32(base + I::kImageIndex, uint32_t(image));
      store_u32(base + I::kImageIndex + 4, uint32_t(image >> 32));
    }
    __syncthreads();
    return image() < a.n;
  }
  __device__ __forceinline__ int64_t image() const {
    return int64_t(load_u32(base + I::kImageIndex)) | int64_t(load_u32(base + I::kImageIndex + 4)) << 32;
  }
  __device__ __forceinline__ void admit() const {
    const int64_t image = this->image();
    for (int j = threadIdx.x; j < I::kValues; j += kThreads) set_x(j, a.start[image * I::kValues + j]);
    if (threadIdx.x == 0) {
      store_f32(base + I::kBest, 0.f);
      store_u32(base + I::kHeld, 0);
      a.loss[image] = a.closeness[image] = NAN;
      a.adversarial[image] = false;
      a.bad[image] = 0;
    }
    __syncthreads();
  }

  template <class N>
  __device__ __forceinline__ void forward(const Pointers& net, Shared gates, Shared partial) {
    const Shared map[2] = {base + I::kMapA, base + I::kMapB};
    constexpr int kLast = N::kDepth - 1, kGates = N::kShape.gates_at(kLast), kBias = N::kShape.bias_at(kLast);
    forward_first<N, Gates::by_slot>(base + I::kImage, map[0], gates, net.floats, warp, ring);
    __syncthreads();
    forward_middle<N, 1>(map, gates, net.floats, warp, ring);
    forward_last<N>(map[(kLast + 1) % 2], gates + kGates, partial, net.floats + kBias, net.halves + N::kLinearAt, warp,
                    ring);
    __syncthreads();
  }
  template <class N, bool add>
  __device__ __forceinline__ void backward(const Pointers& net, Shared gates, Shared cotangent) {
    const Shared map[2] = {base + I::kMapA, base + I::kMapB};
    constexpr int kLast = N::kDepth - 1, kGates = N::kShape.gates_at(kLast);
    backward_linear<N>(map[kLast % 2], gates + kGates, cotangent, net.halves + N::kLinearAt, warp);
    __syncthreads();
    backward_middle<N, kLast>(map, base + I::kZero, gates, warp, ring);
    backward_first<N, add>(map[0], base + I::kZero, base + I::kGradient, warp, ring);
  }

  // Both forward passes come before any backward pass: the cotangents depend on both.
  __device__ __forceinline__ void evaluate() {
    if constexpr (I::kPair)
      forward<typename I::Teacher>(args.teacher, base + I::kTeacherGates,
                                   base + I::kPartial + kWarps * I::kClasses * 4);
    forward<typename I::Student>(args.student, base + I::kStudentGates, base + I::kPartial);
  }
  __device__ __forceinline__ void climb() {
    backward<typename I::Student, false>(args.student, base + I::kStudentGates, base + I::kCotangents);
    if constexpr (I::kPair) {
      if (moves_teacher(a.criterion)) {
        if (I::Teacher::kDepth % 2) __syncthreads();  // its linear layer writes what the student's first one reads
        backward<typename I::Teacher, true>(args.teacher, base + I::kTeacherGates,
                                            base + I::kCotangents + 4 * I::kClasses);
      }
    }
    __syncthreads();
  }

  // The logits, by the first warp; then the loss and what follows from it, by its first lane. All learn the decision.
  __device__ __forceinline__ uint32_t judge(int64_t step) const {
    if (warp == 0) {
      constexpr int kNets = I::kPair ? 2 : 1;
      for (int k = int(lane_id()); k < kNets * I::kClasses; k += 32) {
        const int net = k / I::kClasses, c = k - net * I::kClasses;
        float z = __ldg(bias(net) + c);
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          z += load_f32(base + I::kPartial + uint32_t(((net * kWarps + w) * I::kClasses + c) * 4));
        store_f32(base + I::kLogits + uint32_t(4 * k), z);
      }
      __syncwarp();
      if (lane_id() == 0) store_u32(base + I::kDecision, decide(image(), step));
    }
    __syncthreads();
    return load_u32(base + I::kDecision);
  }
  __device__ __forceinline__ const float* bias(int net) const {  // of the linear layer
    constexpr int kStudent = I::Student::kShape.floats() - I::kClasses,
                  kTeacher = I::kPair ? I::Teacher::kShape.floats() - I::kClasses : 0;
    return net ? args.teacher.floats + kTeacher : args.student.floats + kStudent;
  }
  __device__ __forceinline__ uint32_t decide(int64_t image, int64_t step) const {
    // to a largest entry in [32, 64): chain_loss gives one in [1, 2), and gradients shrink on their way back
    constexpr float kScale = 32.f;
    constexpr int kClasses = I::kClasses;
    float s[kClasses], t[kClasses] = {}, ds[kClasses], dt[kClasses];
    for (int c = 0; c < kClasses; ++c) {
      s[c] = load_f32(base + I::kLogits + uint32_t(4 * c));
      if (I::kPair) t[c] = load_f32(base + I::kLogits + uint32_t(4 * (kClasses + c)));
    }
    const ChainLossValue at =
        chain_loss(a.criterion, s, t, a.labels ? a.labels[image] : 0, kClasses, a.targeted, ds, dt);
    if (I::kPair && step == 0) a.closeness[image] = chain_closeness(s, t, kClasses);
    for (int c = 0; c < kClasses; ++c) {
      store_f32(base + I::kCotangents + uint32_t(4 * c), kScale * ds[c]);
      if (I::kPair && moves_teacher(a.criterion))
        store_f32(base + I::kCotangents + uint32_t(4 * (kClasses + c)), kScale * dt[c]);
    }
    const bool done = step == a.steps || (a.early_stop && at.adversarial);
    // adversarial before not, then the better loss; a NaN loss is the worst
    const float value = float(at.value), signed_value = a.targeted ? -value : value;
    const float score = signed_value == signed_value ? signed_value : -INFINITY;
    const uint32_t held = load_u32(base + I::kHeld);
    const bool was = held & kAdversarial, first = !(held & kHeld);
    const bool better =
        first || (at.adversarial && !was) || (at.adversarial == was && score > load_f32(base + I::kBest));
    const bool keep = a.keep_best ? better : done;
    if (keep) {
      store_f32(base + I::kBest, score);
      store_u32(base + I::kHeld, kHeld | (at.adversarial ? kAdversarial : 0));
      a.loss[image] = value;
      a.adversarial[image] = at.adversarial;
    }
    return (done ? 0 : kWalk) | (keep ? kKeep : 0);
  }

  // Sums and maxima over the block, the same in all threads; warps in order.
  template <class Op>
  __device__ __forceinline__ double reduce(double v, Op op) const {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = op(v, __shfl_xor_sync(0xffffffffu, v, o));
    if (lane_id() == 0) store_f64(base + I::kPartial + uint32_t(8 * warp), v);
    __syncthreads();
    v = load_f64(base + I::kPartial);
    for (int w = 1; w < kWarps; ++w) v = op(v, load_f64(base + I::kPartial + uint32_t(8 * w)));
    __syncthreads();
    return v;
  }
  __device__ __forceinline__ double sum(double v) const {
    return reduce(v, [](double p, double q) { return p + q; });
  }
  __device__ __forceinline__ double largest(double v) const {
    return reduce(v, [](double p, double q) { return p > q ? p : q; });
  }

  // Formulas and their arguments: core/pgd_step.h. f(j) for the values of this thread.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll 1
    for (int j = threadIdx.x; j < I::kValues; j += kThreads) f(j);
  }
  __device__ __forceinline__ float gradient(int j) const {
    const float g = load_f32(base + I::kGradient + place(j));
    return a.targeted ? -g : g;
  }
  __device__ __forceinline__ void step() const {
    const int64_t image = this->image();
    const float* const x0 = a.x0 + image * I::kValues;
    const double step = a.step ? a.step[image] : a.step_value, eps = a.eps ? a.eps[image] : a.eps_value;
    int bad = 0;
    if (a.norm == Norm::linf)
      bad = linf(x0, float(step), float(eps));
    else if (a.norm == Norm::l2)
      bad = l2(x0, step, eps);
    else
      bad = l1(x0, step, eps);
    if (__syncthreads_or(bad)) {  // rare
      const double all = sum(double(bad));
      if (threadIdx.x == 0) a.bad[image] += int64_t(all);
    }
  }
  __device__ __forceinline__ int linf(const float* x0, float step, float eps) const {
    const float lo = float(a.lo), hi = float(a.hi);
    int bad = 0;
    each([&](int j) {
      const float g = gradient(j);
      bad += g != g;
      set_x(j, linf_step(x(j), __ldg(x0 + j), g, step, eps, lo, hi));
    });
    return bad;
  }
  __device__ __forceinline__ int l2(const float* x0, double step, double eps) const {
    double gg = 0, dd = 0;
    int bad = 0;
    each([&](int j) {
      const double g = double(gradient(j));
      gg += is_finite(g) ? g * g : 0.0;
      bad += !is_finite(g);
    });
    gg = sum(gg);
    const double scale = gg > 0 ? step / sqrt(gg) : 0.0;
    each([&](int j) {
      const double v = double(l2_offset(x(j), __ldg(x0 + j), gradient(j), scale));
      dd += v * v;
    });
    const double length = sqrt(sum(dd));
    const float shrink = length > eps ? float(eps / length) : 1.f;
    each([&](int j) {
      const float clean = __ldg(x0 + j);
      set_x(j, clamp(clean + l2_offset(x(j), clean, gradient(j), scale) * shrink, float(a.lo), float(a.hi)));
    });
    return bad;
  }
  __device__ __forceinline__ int l1(const float* x0, double step, double eps) const {
    const float lo = float(a.lo), hi = float(a.hi);
    const auto at_least = [&](uint32_t key) {
      int n = 0;
      each([&](int j) {
        const float g = gradient(j);
        n += l1_candidate(x(j), g, lo, hi) && magnitude_key(g) >= key;
      });
      return sum(double(n));
    };
    const double wanted = double(l1_moved(a.sparsity, I::kValues));
    uint32_t threshold = 0;
#pragma unroll 1
    for (uint32_t bit = 1u << 30; bit; bit >>= 1)
      if (at_least(threshold | bit) >= wanted) threshold |= bit;
    const double moved = at_least(threshold);
    const float each_step = moved > 0 ? float(step / moved) : 0.f;
    const auto offset = [&](int j) {
      return l1_offset(x(j), __ldg(x0 + j), gradient(j), each_step, threshold, lo, hi);
    };
    // lambda with kept(lambda) = eps, or 0 where even that is inside the ball
    L1Search search = l1_search(0);
#pragma unroll 1
    for (bool first = true;; first = false) {
      double kept = 0, slope = 0;
      each([&](int j) {
        const auto o = offset(j);
        kept += l1_keep(o.size, o.room, search.lambda);
        slope += o.size > search.lambda && o.size - search.lambda < o.room ? 1.0 : 0.0;
      });
      kept = sum(kept);
      slope = sum(slope);
      if (first) {
        if (!(kept > eps)) break;
        double most = 0;
        each([&](int j) {
          const double size = offset(j).size;
          most = most > size ? most : size;
        });
        search = l1_search(largest(most));
      }
      if (!l1_refine(search, kept, int64_t(slope), eps)) break;
    }
    int bad = 0;
    each([&](int j) {
      bad += !is_finite(gradient(j));
      const auto o = offset(j);
      set_x(j, clamp(float(double(__ldg(x0 + j)) + o.sign * l1_keep(o.size, o.room, search.lambda)), lo, hi));
    });
    return bad;
  }

  __device__ __forceinline__ void attack() {
    const bool final_look = a.judge || a.early_stop || a.keep_best;
    int64_t at = 0;
#pragma unroll 1
    for (;; ++at) {
      if (!final_look && at == a.steps) {  // never evaluated
        copy_out(result());
        break;
      }
      record(at);
      evaluate();
      const uint32_t decision = judge(at);
      if (decision & kKeep) copy_out(result());
      if (!(decision & kWalk)) {
        ring.restart();
        break;
      }
      climb();
      step();
    }
    if (threadIdx.x == 0) a.queries[image()] = final_look ? at + 1 : at;
    for (; a.iterates && at <= a.steps; ++at) record(at);
  }
  __device__ __forceinline__ void run() {
#pragma unroll 1
    while (next_image()) {
      admit();
      attack();
      __syncthreads();
    }
    ring.drain();
  }
};

#endif

template <class I>
__global__ void __launch_bounds__(kThreads, 1) chain_fused_kernel(const __grid_constant__ Args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  Attack<I>(a, shared_address(memory)).run();
#else
  __trap();  // a build for older GPUs only, brought to a new one by the driver: no results rather than wrong ones
#endif
}

}  // namespace fused
}  // namespace tsr
