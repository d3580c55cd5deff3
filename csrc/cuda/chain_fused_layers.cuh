// The layers of the fused attack: weights, products, gates.   What calls them: chain_fused.cuh; geometry:
// chain_fused_shape.h
#pragma once
#include "core/chain.h"
#include "cuda/chain_fused_shape.h"
#include "cuda/tensor.cuh"

namespace tsr {
namespace fused {

struct Pointers {
  const float* floats;
  const unsigned char* halves;
};
struct Args {
  ChainPgd attack;
  Pointers student, teacher;
  unsigned long long* queue;  // the next image; 0 when the kernel starts
};

template <int Side, int Classes, int... C>
struct Net {
  static constexpr Shape kShape{Side, Classes, int(sizeof...(C)), {C...}};
  static constexpr int kDepth = kShape.depth;
  static constexpr int kLinearAt = kShape.linear_at(), kForward = kShape.forward_stages(),
                       kBackward = kShape.backward_stages();
  static_assert(takes(kShape), "the kernel cannot take this network");
};
struct NoNet {
  static constexpr Shape kShape{0, 0, 0, {}};
  static constexpr int kDepth = 0, kForward = 0, kBackward = 0;
};

template <class Teacher_, class Student_>
struct Instance {
  using Teacher = Teacher_;
  using Student = Student_;
  using Arguments = Args;
  static constexpr bool kPair = Teacher::kDepth > 0;
  static constexpr Map kMap = map_of(Teacher::kShape, Student::kShape);
  static constexpr State kState{Student::kShape.classes};
  static constexpr int kClasses = Student::kShape.classes, kArea = Student::kShape.side * Student::kShape.side,
                       kValues = Student::kShape.values();
  // Weights of a step, in stages: forward of teacher and student, backward of student and teacher.
  static constexpr int kForward = Teacher::kForward + Student::kForward, kStudentBack = kForward + Student::kBackward,
                       kStages = kStudentBack + Teacher::kBackward;
  static constexpr int kRing = kMap.stages;
  static constexpr int kMapA = kMap.map[0], kMapB = kMap.map[1], kImage = kMap.image, kZero = kMap.zero,
                       kTeacherGates = kMap.teacher_gates, kStudentGates = kMap.student_gates,
                       kGradient = kMap.gradient, kPartial = kMap.partial, kLogits = kMap.state + kState.logits(0),
                       kCotangents = kMap.state + kState.cotangents(0), kImageIndex = kMap.state + kState.image(),
                       kDecision = kMap.state + kState.decision(), kBest = kMap.state + kState.best(),
                       kHeld = kMap.state + kState.held(), kBarriers = kMap.barriers, kRingAt = kMap.ring,
                       kBytes = kMap.bytes, kZeroWords = (kMap.teacher_gates - kMap.zero) / 4;
  static_assert(!kPair || (Teacher::kShape.side == Student::kShape.side &&
                           Teacher::kShape.classes == Student::kShape.classes),
                "both networks see the same image and name the same classes");
  static_assert(kBytes <= kMostShared, "the networks do not fit into a block's shared memory");

  __device__ __forceinline__ static int stages(const Args& a) {
    return moves_teacher(a.attack.criterion) ? kStages : kStudentBack;
  }
  __device__ __forceinline__ static const unsigned char* stage(const Args& a, int what) {
    const unsigned char* from = a.student.halves;
    int index = what - Teacher::kForward;
    if (kPair && (what < Teacher::kForward || what >= kStudentBack)) {
      from = a.teacher.halves;
      index = what < Teacher::kForward ? what : what - Student::kForward - Student::kBackward;
    }
    return from + int64_t(index) * kStageBytes;
  }
};

// A convolution's constants: of layer l of Net N, forward or backward.
template <class N, bool Back, int L>
struct Layer {
  static constexpr Gemm kGemm = Back ? N::kShape.backward(L) : N::kShape.forward(L);
  static constexpr int kChunks = kGemm.chunks, kInStride = kGemm.in_stride, kInSide = kGemm.in_side,
                       kOutSide = kGemm.out_side, kPad = kGemm.pad, kPair = kGemm.pair, kNTiles = kGemm.n_tiles,
                       kOutStride = kGemm.out_stride, kKernelRows = kGemm.kernel_rows(), kSteps = kGemm.k_steps(),
                       kRows = kGemm.rows(), kTiles = kGemm.tiles(), kSlots = kGemm.slots(), kPasses = kGemm.passes(),
                       kPerPass = kGemm.per_pass(), kLastPass = kGemm.last_pass(), kStageSteps = kGemm.stage_steps();
  // Warps from this one on have a tile less in the last slot, some perhaps none.
  static constexpr int kShort = kTiles % kWarps ? kTiles % kWarps : kWarps;
  static constexpr bool kHollow = kShort < kWarps && kLastPass == 1;
  static_assert(kInStride == kChunks * 8 || kChunks % 2 == 0, "a step straddles taps only where they are contiguous");
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The weights of a step pass by in a ring of stages, again and again, read ahead by bulk copies: what I::stage says, of
// I::stages. There is no warp that does nothing but copy (a ninth one would cut every thread's registers from 255 to
// 168): each warp counts itself out of a stage, and the last one out starts the copy that refills it.
template <class I>
struct Ring {
  using Args = typename I::Arguments;
  const Args& a;
  const Shared base;  // of shared memory; at kBarriers the mbarriers, of 8 bytes, then the counters, of 4
  int stage, next;    // `next` is what refills the stage at hand
  uint32_t parity;

  __device__ __forceinline__ Ring(const Args& args, Shared memory)
      : a(args), base(memory), stage(0), next(I::kRing), parity(0) {}

  __device__ __forceinline__ Shared barrier(int at) const { return base + I::kBarriers + uint32_t(8 * at); }
  __device__ __forceinline__ Shared counter(int at) const {
    return base + I::kBarriers + uint32_t(8 * I::kRing + 4 * at);
  }
  __device__ __forceinline__ Shared place(int at) const { return base + I::kRingAt + uint32_t(at * kStageBytes); }
  __device__ __forceinline__ void start() const {  // by one thread, before a block barrier
    for (int i = 0; i < I::kRing; ++i) {
      barrier_init(barrier(i), 1);
      store_u32(counter(i), 0);
    }
    fence_before_copy();
    for (int i = 0; i < I::kRing; ++i) refill(i, i);
  }
  __device__ __forceinline__ void refill(int at, int what) const {
    const unsigned char* const from = I::stage(a, what);
    barrier_arrive_expect(barrier(at), kStageBytes);
    copy_bulk(place(at), from, kStageBytes, barrier(at));
  }
  __device__ __forceinline__ void advance() {
    if (++next == I::stages(a)) next = 0;
    if (++stage == I::kRing) stage = 0, parity ^= 1;
  }
  // Lanes may leave a wait one by one: before the next matrix is loaded, by a whole warp, comes a __syncwarp. It is the
  // caller's: right behind the wait in acquire it makes the compiler spill, behind the first weights it costs nothing.
  __device__ __forceinline__ Shared acquire() const {
    barrier_wait(barrier(stage), parity);
    return place(stage);
  }
  __device__ __forceinline__ Shared peek() const {  // the stage after the one at hand
    const bool wraps = stage + 1 == I::kRing;
    const int after = wraps ? 0 : stage + 1;
    barrier_wait(barrier(after), wraps ? parity ^ 1 : parity);
    __syncwarp();
    return place(after);
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (lane_id() == 0 && count_up(counter(stage), kWarps - 1) == kWarps - 1) {
      fence_before_copy();
      refill(stage, next);
    }
    advance();
  }
  // Forgets what was read ahead and starts the step anew.
  __device__ __forceinline__ void restart() {
    next = 0;
#pragma unroll 1
    for (int i = 0; i < I::kRing; ++i) {
      acquire();
      release();
    }
  }
  __device__ __forceinline__ void drain() {  // no copy may outlive its block
#pragma unroll 1
    for (int i = 0; i < I::kRing; ++i) {
      acquire();
      advance();
    }
  }
};

template <class L, int Tiles>
using Sums = float[Tiles][L::kNTiles][4];

// Fragments of activations are fetched kAhead tiles ahead, those of weights one step ahead where registers allow it:
// left to itself the compiler puts every load right before its use.
template <class L, int Tiles, class R>
__device__ __forceinline__ void multiply(Sums<L, Tiles>& sums, Shared in, Shared zero, int warp, int slot0, R& ring) {
  constexpr int kAhead = L::kNTiles >= 5   ? 1
                         : L::kNTiles >= 3 ? 2
                                           : smaller(4, Tiles),
                kKept = kAhead + 1, kAll = L::kSteps * Tiles;
  constexpr int kDouble = Tiles * L::kNTiles * 4 > 128 ? 1 : 2;  // sets of weight fragments
  const uint32_t lane = lane_id(), row = lane & 15u, upper = lane >> 4;
  uint32_t base[Tiles], taps[Tiles];  // taps: bits 0..2 whether column kx is inside; from 8 on the output row
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
    const uint32_t m = min(uint32_t(((slot0 + i) * kWarps + warp) * 16) + row, uint32_t(L::kRows - 1));
    const uint32_t line = m / uint32_t(L::kOutSide), x = m - line * uint32_t(L::kOutSide),
                   y = line * uint32_t(L::kPair);
    base[i] = in + ((y - L::kPad) * uint32_t(L::kInSide) + (x - L::kPad)) * uint32_t(L::kInStride * 2) + upper * 16u;
    taps[i] = y << 8;
    if (L::kPad) {
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) taps[i] |= x - uint32_t(L::kPad - kx) < uint32_t(L::kInSide) ? 1u << kx : 0u;
    }
  }
#pragma unroll 1
  for (int ky = 0; ky < L::kKernelRows; ++ky) {
    uint32_t inside[Tiles], a[kKept][4], b[kDouble][L::kNTiles][2];
    if (L::kPad) {
#pragma unroll
      for (int i = 0; i < Tiles; ++i)
        inside[i] = (taps[i] >> 8) + uint32_t(ky) - uint32_t(L::kPad) < uint32_t(L::kInSide) ? taps[i] & 255u : 0u;
    }
    const auto load_a = [&](int i) {
      const int j = 2 * (i / Tiles), t = i % Tiles, kx = j / L::kChunks, c = j % L::kChunks,
                next = (j + 1) / L::kChunks;
      Shared at = base[t] + uint32_t(kx * L::kInStride * 2);
      if (L::kPad && !((kx == next ? inside[t] : inside[t] >> upper) & (1u << kx))) at = zero;
      ldmatrix_x4(a[i % kKept], at + uint32_t(c * 16));
    };
    const auto load_b = [&](int k, Shared stage) {
      uint32_t (&to)[L::kNTiles][2] = b[k % kDouble];
      const Shared at = stage + uint32_t(k % L::kStageSteps * L::kNTiles * kBlockBytes);
#pragma unroll
      for (int p = 0; p < L::kNTiles / 2; ++p)
        load_u32x4(to[2 * p][0], to[2 * p][1], to[2 * p + 1][0], to[2 * p + 1][1],
                   at + lane * 16u + uint32_t(p * 2 * kBlockBytes));
      if (L::kNTiles % 2)
        load_u32x2(to[L::kNTiles - 1][0], to[L::kNTiles - 1][1],
                   at + lane * 8u + uint32_t((L::kNTiles - 1) * kBlockBytes));
    };
    Shared stage = ring.acquire();
    if (kDouble == 2) load_b(0, stage);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAhead && i < kAll; ++i) load_a(i);
#pragma unroll
    for (int k = 0; k < L::kSteps; ++k) {
      if (kDouble == 1) {
        if (k && k % L::kStageSteps == 0) stage = ring.acquire();
        load_b(k, stage);
        __syncwarp();
      }
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const int i = k * Tiles + t;
        if (i + kAhead < kAll) load_a(i + kAhead);
        if (kDouble == 2 && t == 0 && k + 1 < L::kSteps) {
          if ((k + 1) % L::kStageSteps == 0) stage = ring.peek();
          load_b(k + 1, stage);
        }
#pragma unroll
        for (int n = 0; n < L::kNTiles; ++n)
          mma_f16_k16(sums[t][n], a[i % kKept], b[k % kDouble][n][0], b[k % kDouble][n][1]);
      }
      if (k % L::kStageSteps == L::kStageSteps - 1 || k == L::kSteps - 1) ring.release();
    }
#pragma unroll
    for (int t = 0; t < Tiles; ++t) base[t] += uint32_t(L::kInSide * L::kInStride * 2);
  }
}

template <class L, int Tiles>
__device__ __forceinline__ void begin(Sums<L, Tiles>& sums, const float* bias) {  // [padded], or null: 0
  const uint32_t column = (lane_id() & 3u) * 2u;
#pragma unroll
  for (int n = 0; n < L::kNTiles; ++n) {
    const float b0 = bias ? __ldg(bias + n * 8 + column) : 0.f, b1 = bias ? __ldg(bias + n * 8 + column + 1) : 0.f;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) sums[t][n][0] = sums[t][n][2] = b0, sums[t][n][1] = sums[t][n][3] = b1;
  }
}

// A bit each for the two halves of p that are not 0 or -0: NaN is open.
TSR_DEVICE uint32_t open_gates(uint32_t p) { return ((p & 0x7fff7fffu) + 0x7fff7fffu) & 0x80008000u; }
// The halves of p whose gate is open: pair number `pair` of the `pairs` that share the word.
TSR_DEVICE uint32_t gated(uint32_t p, uint32_t word, int pair, int pairs) {
  return p & sign_masks(word << (pairs - 1 - pair));
}
TSR_DEVICE Shared gate_word(Shared gates, int word, int warp) {
  return gates + uint32_t(word * kGateColumn + warp * 128) + lane_id() * 4u;
}

// Of a pass over `Tiles` slots: where a pair of channels is in the thread's gate words.
template <class L, int Tiles, bool BySlot>
struct GatePlace {
  static constexpr int kPairs = (BySlot ? 1 : Tiles) * 2 * L::kNTiles, kWords = ceil_div(kPairs, kPairsPerWord);
  int word, pair, pairs;
  bool last;
  __device__ __forceinline__ GatePlace(int slot0, int t, int n, int half) {
    const int q = ((BySlot ? 0 : t) * L::kNTiles + n) * 2 + half;
    word = (BySlot ? (slot0 + t) * kWords : 0) + q / kPairsPerWord;
    pair = q % kPairsPerWord;
    pairs = smaller(kPairsPerWord, kPairs - q / kPairsPerWord * kPairsPerWord);
    last = pair == pairs - 1;
  }
};

// Where a layer's words of gates start anew.
enum class Gates { none, by_pass, by_slot };
// A pass's results, as 16 bits: forward their ReLU, whose gates are written (or not), backward what the gates let by.
template <class L, int Tiles, Gates kGates, bool Back>
__device__ __forceinline__ void store(Sums<L, Tiles>& sums, Shared out, Shared gates, int warp, int slot0) {
  if (L::kHollow && slot0 * kWarps + warp >= L::kTiles) return;
  const uint32_t g = lane_id() >> 2, t4 = (lane_id() & 3u) * 4u;
  uint32_t word = 0;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const uint32_t row = uint32_t(((slot0 + t) * kWarps + warp) * 16) + g;
    const Shared at = out + row * uint32_t(L::kOutStride * 2) + t4;
#pragma unroll
    for (int n = 0; n < L::kNTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const GatePlace<L, Tiles, kGates == Gates::by_slot> place(slot0, t, n, h);
        const float s0 = sums[t][n][2 * h], s1 = sums[t][n][2 * h + 1];
        if (Back && place.pair == 0) word = load_u32(gate_word(gates, place.word, warp));
        const uint32_t p = Back ? gated(pack_f16(s0, s1), word, place.pair, place.pairs) : pack_f16_relu(s0, s1);
        if (row + uint32_t(8 * h) < uint32_t(L::kRows)) store_u32(at + uint32_t(h * 16 * L::kOutStride + n * 16), p);
        if (Back || kGates == Gates::none) continue;
        word = word >> 1 | open_gates(p);
        if (place.last) store_u32(gate_word(gates, place.word, warp), word), word = 0;
      }
  }
}
// The chunk after the last pixel, which may be read: it must not be NaN.
template <class L>
__device__ __forceinline__ void clear_tail(Shared map) {
  if (threadIdx.x < 4) store_u32(map + L::kRows * L::kOutStride * 2 + 4 * threadIdx.x, 0);
}

template <int n>
struct Count {
  static constexpr int value = n;
};
// f(Count) for the number of slots that a warp has in a pass: one less in the last, if its tiles do not go round.
template <class L, class F>
__device__ __forceinline__ void with_slots(int pass, int warp, F f) {
  const bool last = pass == L::kPasses - 1;
  if (L::kShort < kWarps && last && warp >= L::kShort)
    f(Count<larger(L::kLastPass - 1, 1)>{});
  else if (L::kLastPass < L::kPerPass && last)
    f(Count<L::kLastPass>{});
  else
    f(Count<L::kPerPass>{});
}

template <class N, int L, class R>
__device__ __forceinline__ void forward_layer(Shared in, Shared out, Shared gates, const float* bias, int warp,
                                              R& ring) {
  using Conv = Layer<N, false, L>;
  constexpr Gates kGates = N::kShape.gates_by_slot(L) ? Gates::by_slot : Gates::by_pass;
#pragma unroll 1
  for (int pass = 0; pass < Conv::kPasses; ++pass)
    with_slots<Conv>(pass, warp, [&](auto slots) {
      constexpr int kTiles = decltype(slots)::value;
      const int slot0 = pass * Conv::kPerPass;
      Sums<Conv, kTiles> sums;
      begin<Conv, kTiles>(sums, bias);
      multiply<Conv, kTiles>(sums, in, 0, warp, slot0, ring);
      store<Conv, kTiles, kGates, false>(sums, out, gates, warp, slot0);
    });
  if (Conv::kNTiles % 2) clear_tail<Conv>(out);  // the next layer reads it, with weights of 0
}
// The same without gates and with one map for both: no warp stores before all have read. Those with a tile less
// come to the barrier on a way of their own.
template <class N, int L, class R>
__device__ __forceinline__ void forward_in_place(Shared map, const float* bias, int warp, R& ring) {
  using Conv = Layer<N, false, L>;
  static_assert(Conv::kPasses == 1, "all results wait in registers for the barrier");
  with_slots<Conv>(0, warp, [&](auto slots) {
    constexpr int kTiles = decltype(slots)::value;
    Sums<Conv, kTiles> sums;
    begin<Conv, kTiles>(sums, bias);
    multiply<Conv, kTiles>(sums, map, 0, warp, 0, ring);
    block_barrier();
    store<Conv, kTiles, Gates::none, false>(sums, map, 0, warp, 0);
  });
  clear_tail<Conv>(map);
}
template <class N, int L, class R>
__device__ __forceinline__ void backward_layer(Shared in, Shared out, Shared zero, Shared gates, int warp, R& ring) {
  using Conv = Layer<N, true, L>;
  constexpr Gates kGates = N::kShape.gates_by_slot(L - 1) ? Gates::by_slot : Gates::by_pass;
#pragma unroll 1
  for (int pass = 0; pass < Conv::kPasses; ++pass)
    with_slots<Conv>(pass, warp, [&](auto slots) {
      constexpr int kTiles = decltype(slots)::value;
      const int slot0 = pass * Conv::kPerPass;
      Sums<Conv, kTiles> sums;
      begin<Conv, kTiles>(sums, nullptr);
      multiply<Conv, kTiles>(sums, in, zero, warp, slot0, ring);
      store<Conv, kTiles, kGates, true>(sums, out, gates, warp, slot0);
    });
}

// The first layer has a depth of 27, filled up to 32, gathered straight from the float32 image [y][x][3].
template <class N, Gates kGates, class R>
__device__ __forceinline__ void forward_first(Shared image, Shared out, Shared gates, const float* bias, int warp,
                                              R& ring) {
  using Conv = Layer<N, false, 0>;
  constexpr uint32_t kLine = kColors * Conv::kInSide, kTap = 3 * kColors, kDepth = 3 * kTap;
  const uint32_t lane = lane_id(), g = lane >> 2, t = lane & 3u;
  uint32_t offset[2][4];  // in bytes, of depth 16 s + 2 t + {0, 1, 8, 9}
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t k = t * 2u + uint32_t(16 * s + (i & 1) + 8 * (i >> 1)), ky = k / kTap;
      offset[s][i] = k < kDepth ? (ky * kLine + (k - ky * kTap)) * 4u : 0u;
    }
  const Shared weights = ring.acquire() + lane * 8u;
  uint32_t b[2][Conv::kNTiles][2];
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int n = 0; n < Conv::kNTiles; ++n)
      load_u32x2(b[s][n][0], b[s][n][1], weights + uint32_t((s * Conv::kNTiles + n) * kBlockBytes));
  ring.release();
#pragma unroll 1
  for (int slot = 0; slot < Conv::kSlots; ++slot) {
    if (slot * kWarps + warp >= Conv::kTiles) break;
    Sums<Conv, 1> sums;
    begin<Conv, 1>(sums, bias);
    Shared pixel[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t m = min(uint32_t((slot * kWarps + warp) * 16 + 8 * h) + g, uint32_t(Conv::kRows - 1));
      const uint32_t y = m / uint32_t(Conv::kOutSide), x = m - y * uint32_t(Conv::kOutSide);
      pixel[h] = image + (y * kLine + x * kColors) * 4u;
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        a[q] = pack_f16(load_f32(pixel[q & 1] + offset[s][(q >> 1) * 2]),
                        load_f32(pixel[q & 1] + offset[s][(q >> 1) * 2 + 1]));
#pragma unroll
      for (int n = 0; n < Conv::kNTiles; ++n) mma_f16_k16(sums[0][n], a, b[s][n][0], b[s][n][1]);
    }
    store<Conv, 1, kGates, false>(sums, out, gates, warp, slot);
  }
  if (Conv::kNTiles % 2 || kGates == Gates::none) clear_tail<Conv>(out);
}

// The last convolution; its results go from registers into the linear layer: logit_c = sum over pixels m and channels n
// of a[m][n] W_c[m][n], the trace of a W_c^T. For a block of 16 pixels and 16 channels, two products (of the upper and
// of the lower 8 pixels), of whose 16 x 8 results only the diagonal is used: A's fragments are the packed sums
// themselves, and a sixteenth of the tensor cores' work is still less than unpacking and adding up would be. Weights of
// a tile: [pair of n-tiles][class][lane][pixel half][n-tile], an odd last n-tile [class][lane][pixel half]. A warp's
// share of the logits goes to partial[warp][class].
template <class N, class R>
__device__ __forceinline__ void forward_last(Shared in, Shared gates, Shared partial, const float* bias,
                                             const unsigned char* weights, int warp, R& ring) {
  using Conv = Layer<N, false, N::kDepth - 1>;
  constexpr int kClasses = N::kShape.classes, kTileBytes = N::kShape.linear_tile_bytes(), kOdd = Conv::kNTiles % 2;
  with_slots<Conv>(0, warp, [&](auto slots) {
    constexpr int kTiles = decltype(slots)::value;
    const uint32_t lane = lane_id();
    Sums<Conv, kTiles> sums;
    begin<Conv, kTiles>(sums, bias);
    multiply<Conv, kTiles>(sums, in, 0, warp, 0, ring);
    float trace[kClasses][4];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) trace[c][0] = trace[c][1] = trace[c][2] = trace[c][3] = 0.f;
    uint32_t word = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile = t * kWarps + warp;
      if (Conv::kHollow && tile >= Conv::kTiles) break;
      uint32_t a[Conv::kNTiles][2];
#pragma unroll
      for (int n = 0; n < Conv::kNTiles; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[n][h] = pack_f16_relu(sums[t][n][2 * h], sums[t][n][2 * h + 1]);
          word = word >> 1 | open_gates(a[n][h]);
          const GatePlace<Conv, kTiles, false> place(0, t, n, h);
          if (place.last) store_u32(gate_word(gates, place.word, warp), word), word = 0;
        }
      const unsigned char* const from = weights + tile * kTileBytes;
#pragma unroll
      for (int p = 0; p < Conv::kNTiles / 2; ++p)
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const uint4 b = __ldg(reinterpret_cast<const uint4*>(from + (p * kClasses + c) * 2 * kBlockBytes) + lane);
          const uint32_t above[4] = {a[2 * p][0], 0, a[2 * p + 1][0], 0},
                         below[4] = {0, a[2 * p][1], 0, a[2 * p + 1][1]};
          mma_f16_k16(trace[c], above, b.x, b.y);
          mma_f16_k16(trace[c], below, b.z, b.w);
        }
      if (kOdd) {
        const unsigned char* const odd = from + (Conv::kNTiles - 1) * kClasses * kBlockBytes;
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const uint2 b = __ldg(reinterpret_cast<const uint2*>(odd + c * kBlockBytes) + lane);
          mma_f16_k8(trace[c], a[Conv::kNTiles - 1][0], 0, b.x);
          mma_f16_k8(trace[c], 0, a[Conv::kNTiles - 1][1], b.y);
        }
      }
    }
    const uint32_t g = lane >> 2, t = lane & 3u;  // columns 2 t and 2 t + 1 of rows g and g + 8
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const float even = trace[c][0] + trace[c][2], odd = trace[c][1] + trace[c][3];
      float sum = g >> 1 != t ? 0.f : g & 1u ? odd : even;
#pragma unroll
      for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
      if (lane == 0) store_f32(partial + uint32_t((warp * kClasses + c) * 4), sum);
    }
  });
}

// From the logits' cotangents to those of the last convolution's sums.
template <class N>
__device__ __forceinline__ void backward_linear(Shared out, Shared gates, Shared cotangent,
                                                const unsigned char* weights, int warp) {
  using Conv = Layer<N, false, N::kDepth - 1>;
  constexpr int kClasses = N::kShape.classes, kTileBytes = N::kShape.linear_tile_bytes(), kOdd = Conv::kNTiles % 2;
  const uint32_t lane = lane_id(), g = lane >> 2, t4 = (lane & 3u) * 4u;
  const int slots = warp < Conv::kShort ? Conv::kSlots : Conv::kSlots - 1, pairs = slots * 2 * Conv::kNTiles;
  float d[kClasses];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) d[c] = load_f32(cotangent + uint32_t(4 * c));
#pragma unroll 1
  for (int slot = 0; slot < slots; ++slot) {
    const int tile = slot * kWarps + warp;
    const uint32_t row = uint32_t(tile * 16) + g;
    const Shared at = out + row * uint32_t(Conv::kOutStride * 2) + t4;
    const unsigned char* const from = weights + tile * kTileBytes;
    Sums<Conv, 1> sums;
    begin<Conv, 1>(sums, nullptr);
    const auto add = [&](int n, int h, uint32_t two, float by) {
      float w0, w1;
      unpack_f16(two, w0, w1);
      sums[0][n][2 * h] = fmaf(by, w0, sums[0][n][2 * h]);
      sums[0][n][2 * h + 1] = fmaf(by, w1, sums[0][n][2 * h + 1]);
    };
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
#pragma unroll
      for (int p = 0; p < Conv::kNTiles / 2; ++p) {
        const uint4 b = __ldg(reinterpret_cast<const uint4*>(from + (p * kClasses + c) * 2 * kBlockBytes) + lane);
        add(2 * p, 0, b.x, d[c]), add(2 * p + 1, 0, b.y, d[c]), add(2 * p, 1, b.z, d[c]), add(2 * p + 1, 1, b.w, d[c]);
      }
      if (kOdd) {
        const unsigned char* const odd = from + (Conv::kNTiles - 1) * kClasses * kBlockBytes;
        const uint2 b = __ldg(reinterpret_cast<const uint2*>(odd + c * kBlockBytes) + lane);
        add(Conv::kNTiles - 1, 0, b.x, d[c]), add(Conv::kNTiles - 1, 1, b.y, d[c]);
      }
    }
#pragma unroll
    for (int n = 0; n < Conv::kNTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int q = (slot * Conv::kNTiles + n) * 2 + h, left = pairs - q / kPairsPerWord * kPairsPerWord;
        const uint32_t word = load_u32(gate_word(gates, q / kPairsPerWord, warp));
        const uint32_t p = gated(pack_f16(sums[0][n][2 * h], sums[0][n][2 * h + 1]), word, q % kPairsPerWord,
                                 left < kPairsPerWord ? left : kPairsPerWord);
        if (row + uint32_t(8 * h) < uint32_t(Conv::kRows))
          store_u32(at + uint32_t(h * 16 * Conv::kOutStride + n * 16), p);
      }
  }
}

// The gradient at the image, [y][x][3] like it; `add`: to what this very thread put there for the other network.
template <class N, bool add, class R>
__device__ __forceinline__ void backward_first(Shared in, Shared zero, Shared gradient, int warp, R& ring) {
  using Conv = Layer<N, true, 0>;
  with_slots<Conv>(0, warp, [&](auto slots) {
    constexpr int kTiles = decltype(slots)::value;
    Sums<Conv, kTiles> sums;
    begin<Conv, kTiles>(sums, nullptr);
    multiply<Conv, kTiles>(sums, in, zero, warp, 0, ring);
    const uint32_t g = lane_id() >> 2, t = lane_id() & 3u, color0 = (t & 1u) * 2u;  // columns: 4 of each pixel
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t row = uint32_t((i * kWarps + warp) * 16 + 8 * h) + g, line = row / uint32_t(Conv::kOutSide);
        const uint32_t y = line * 2u + (t >> 1), x = row - line * uint32_t(Conv::kOutSide);
        const Shared at = gradient + ((y * uint32_t(Conv::kOutSide) + x) * kColors + color0) * 4u;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (row < uint32_t(Conv::kRows) && color0 + uint32_t(j) < uint32_t(kColors))
            store_f32(at + uint32_t(4 * j), sums[i][0][2 * h + j] + (add ? load_f32(at + uint32_t(4 * j)) : 0.f));
      }
  });
}

// Layers l = 1 .. depth - 2, and back.
template <class N, int L, class R>
__device__ __forceinline__ void forward_middle(const Shared (&map)[2], Shared gates, const float* floats, int warp,
                                               R& ring) {
  if constexpr (L < N::kDepth - 1) {
    constexpr int kGates = N::kShape.gates_at(L), kBias = N::kShape.bias_at(L);
    forward_layer<N, L>(map[(L + 1) % 2], map[L % 2], gates + kGates, floats + kBias, warp, ring);
    __syncthreads();
    forward_middle<N, L + 1>(map, gates, floats, warp, ring);
  }
}
template <class N, int L, class R>
__device__ __forceinline__ void backward_middle(const Shared (&map)[2], Shared zero, Shared gates, int warp, R& ring) {
  if constexpr (L > 0) {
    constexpr int kGates = N::kShape.gates_at(L - 1);
    backward_layer<N, L>(map[L % 2], map[(L + 1) % 2], zero, gates + kGates, warp, ring);
    __syncthreads();
    backward_middle<N, L - 1>(map, zero, gates, warp, ring);
  }
}

#endif

}  // namespace fused
}  // namespace tsr
