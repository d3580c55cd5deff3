// The geometry of the fused attack (chain_fused.cuh): every size and offset, as constants of kernels and for the host's
// maps alike.
//
// A convolution is an implicit matrix product: out[row][n] = sum over kernel rows ky, taps kx and input channels. Rows
// are pixels of the exact output in order, in tiles of 16; n are output channels, in tiles of 8; the sum runs over
// steps of 16, which are two chunks of 8 channels. Tile t of rows belongs to warp t mod kWarps, slot t div kWarps. A
// warp keeps as many of its tiles in registers as fit; when not all do, it makes several passes over the weights.
//
// Activations: channels last, 16 bits, channels padded to a multiple of 8. From pixel to pixel an odd number of 16-byte
// chunks, so that 8 consecutive pixels lie in 8 different groups of banks; where that is the padded number of channels,
// the three taps of a kernel row are contiguous and a step may straddle two of them.
//
// Weights: in the order in which they are used, in stages of kStageBytes; within one, 16 x 8 blocks in the order of
// mma's fragments, two n-tiles to 16 bytes of a lane (an odd last one: 8 bytes).
#pragma once
#include "core/portable.h"

#ifdef __CUDACC__
#define TSR_GEOMETRY __host__ __device__ constexpr
#else
#define TSR_GEOMETRY constexpr
#endif

namespace tsr {
namespace fused {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColors = 3;
constexpr int kMostLayers = 6;
constexpr int kMostShared = 232448;  // bytes of a block on compute capability 9.0
constexpr int kBlockBytes = 256;     // of 16 x 8 weights
constexpr int kStageBytes = 5376;    // 21 of them: 3 steps of 7 n-tiles, 4 of 5, 7 of 3
constexpr int kMostStages = 3;       // of the ring in shared memory
constexpr int kAccumulators = 160;   // registers of a thread that sums may take; 255 is all there are
constexpr int kGateColumn = kThreads * 4;
constexpr int kPairsPerWord = 16;  // a word of gates: bits 15 - i and 31 - i for two neighbouring channels

TSR_GEOMETRY int ceil_div(int a, int b) { return (a + b - 1) / b; }
TSR_GEOMETRY int larger(int a, int b) { return a > b ? a : b; }
TSR_GEOMETRY int smaller(int a, int b) { return a < b ? a : b; }
TSR_GEOMETRY int round_up(int a, int to) { return ceil_div(a, to) * to; }

struct Gemm {
  int chunks;     // of 8 channels of the input
  int in_stride;  // 16-bit values from pixel to pixel
  int in_side, out_side;
  int pad;   // 2: the gradient with respect to the input, taps outside are 0
  int pair;  // 2: a row is two pixels above each other, with 4 kernel rows (for the 3 channels of the image)
  int n_tiles, out_stride;

  TSR_GEOMETRY int kernel_rows() const { return 2 + pair; }
  TSR_GEOMETRY int k_steps() const { return ceil_div(3 * chunks, 2); }
  TSR_GEOMETRY int rows() const { return out_side / pair * out_side; }
  TSR_GEOMETRY int tiles() const { return ceil_div(rows(), 16); }
  TSR_GEOMETRY int slots() const { return ceil_div(tiles(), kWarps); }
  TSR_GEOMETRY int passes() const { return ceil_div(slots(), kAccumulators / (4 * n_tiles)); }
  TSR_GEOMETRY int per_pass() const { return ceil_div(slots(), passes()); }
  TSR_GEOMETRY int last_pass() const { return slots() - (passes() - 1) * per_pass(); }
  TSR_GEOMETRY int row_stages() const { return ceil_div(k_steps(), kStageBytes / (kBlockBytes * n_tiles)); }
  TSR_GEOMETRY int stage_steps() const { return ceil_div(k_steps(), row_stages()); }
  TSR_GEOMETRY int stages() const { return kernel_rows() * row_stages() * passes(); }
};

// side: of the square image; depth convolutions with c channels, then a linear layer.
struct Shape {
  int side, classes, depth;
  int c[kMostLayers];

  // Of the activations that convolution l puts out.
  TSR_GEOMETRY int side_of(int l) const { return side - 2 * (l + 1); }
  TSR_GEOMETRY int area_of(int l) const { return side_of(l) * side_of(l); }
  TSR_GEOMETRY int padded(int l) const { return round_up(c[l], 8); }
  TSR_GEOMETRY int n_tiles(int l) const { return padded(l) / 8; }
  TSR_GEOMETRY int stride(int l) const { return n_tiles(l) % 2 ? padded(l) : padded(l) + 8; }
  TSR_GEOMETRY int values() const { return kColors * side * side; }
  // A forward product may read one chunk past its input's last pixel; its weights there are 0.
  TSR_GEOMETRY int map_bytes(int l) const { return area_of(l) * stride(l) * 2 + 16; }

  // The first one reads the float32 image; only its output is described.
  TSR_GEOMETRY Gemm forward(int l) const {
    return l == 0 ? Gemm{2, 16, side, side_of(0), 0, 1, n_tiles(0), stride(0)}
                  : Gemm{n_tiles(l - 1), stride(l - 1), side_of(l - 1), side_of(l), 0, 1, n_tiles(l), stride(l)};
  }
  // From the gradient at convolution l's results to that at its inputs.
  TSR_GEOMETRY Gemm backward(int l) const {
    return l == 0 ? Gemm{n_tiles(0), stride(0), side_of(0), side, 2, 2, 1, 8}
                  : Gemm{n_tiles(l), stride(l), side_of(l), side_of(l - 1), 2, 1, n_tiles(l - 1), stride(l - 1)};
  }

  // Gates of convolution l: one column of a word for each thread; where a user needs several passes, words start anew
  // with every slot.
  TSR_GEOMETRY bool gates_by_slot(int l) const {
    return l == 0 || (l + 1 < depth && (forward(l).passes() > 1 || backward(l + 1).passes() > 1));
  }
  TSR_GEOMETRY int gate_words(int l) const {
    const int pairs = 2 * n_tiles(l), slots = forward(l).slots();
    return gates_by_slot(l) ? slots * ceil_div(pairs, kPairsPerWord) : ceil_div(slots * pairs, kPairsPerWord);
  }
  TSR_GEOMETRY int gates_at(int l) const {
    int words = 0;
    for (int i = 0; i < l; ++i) words += gate_words(i);
    return words * kGateColumn;
  }

  TSR_GEOMETRY int first_stage(int l) const {  // of convolution l, forward
    int n = l ? 1 : 0;
    for (int i = 1; i < l; ++i) n += forward(i).stages();
    return n;
  }
  TSR_GEOMETRY int forward_stages() const { return first_stage(depth); }
  TSR_GEOMETRY int backward_stages() const {
    int n = 0;
    for (int l = 0; l < depth; ++l) n += backward(l).stages();
    return n;
  }
  // Packed: 16-bit stages, forward then backward, then the linear layer; float32 biases, padded, then the linear ones.
  TSR_GEOMETRY int linear_tile_bytes() const { return n_tiles(depth - 1) * classes * kBlockBytes; }
  TSR_GEOMETRY int linear_at() const { return (forward_stages() + backward_stages()) * kStageBytes; }
  TSR_GEOMETRY int half_bytes() const { return linear_at() + forward(depth - 1).tiles() * linear_tile_bytes(); }
  TSR_GEOMETRY int bias_at(int l) const {
    int at = 0;
    for (int i = 0; i < l; ++i) at += padded(i);
    return at;
  }
  TSR_GEOMETRY int floats() const { return bias_at(depth) + classes; }

  TSR_GEOMETRY int buffer_bytes(int parity) const {
    int bytes = 0;
    for (int l = parity; l < depth; l += 2) bytes = larger(bytes, map_bytes(l));
    return bytes;
  }
  TSR_GEOMETRY int zero_bytes() const {
    int chunks = 0;
    for (int l = 0; l < depth; ++l) chunks = larger(chunks, backward(l).chunks);
    return 16 * (chunks + 1);
  }

  TSR_GEOMETRY bool operator==(const Shape& o) const {
    bool same = side == o.side && classes == o.classes && depth == o.depth;
    for (int l = 0; same && l < depth; ++l) same = c[l] == o.c[l];
    return same;
  }
};

// Of convolution l: a step of the sum, for the first one both of its steps, lie in one stage.
TSR_GEOMETRY int most_channels(int l) { return kStageBytes / kBlockBytes / (l == 0 ? 2 : 1) * 8; }
// What the kernel asks of a network, beyond fitting into shared memory.
TSR_GEOMETRY bool takes(const Shape& s) {
  bool fine = s.depth >= 2 && s.depth <= kMostLayers && s.side % 2 == 0 && s.side_of(s.depth - 1) >= 1;
  for (int l = 0; fine && l < s.depth; ++l) fine = s.c[l] <= most_channels(l);
  fine = fine && s.forward(s.depth - 1).passes() == 1;  // its results wait in registers for the linear layer
  return fine && s.backward(0).passes() == 1;
}

// Small things that threads tell each other, in bytes from Map::state.
struct State {
  int classes;
  TSR_GEOMETRY int image() const { return 0; }     // int64
  TSR_GEOMETRY int decision() const { return 8; }  // kWalk, kKeep
  TSR_GEOMETRY int best() const { return 12; }     // float
  TSR_GEOMETRY int held() const { return 16; }     // kHeld, kAdversarial
  TSR_GEOMETRY int logits(int net) const { return 20 + 4 * classes * net; }
  TSR_GEOMETRY int cotangents(int net) const { return logits(2) + 4 * classes * net; }
  TSR_GEOMETRY int bytes() const { return cotangents(2); }
};

// Shared memory. The student's gates and, after them, the gradient share their place. `teacher` of depth 0: none.
struct Map {
  int map[2], image, zero, teacher_gates, student_gates, gradient, partial, state, barriers, ring, stages, bytes;

  TSR_GEOMETRY Map(const Shape& teacher, const Shape& student, int ring_stages)
      : map{0, larger(teacher.buffer_bytes(0), student.buffer_bytes(0))},
        image(map[1] + larger(teacher.buffer_bytes(1), student.buffer_bytes(1))),
        zero(image + student.values() * 4),
        teacher_gates(zero + larger(teacher.zero_bytes(), student.zero_bytes())),
        student_gates(teacher_gates + teacher.gates_at(teacher.depth)),
        gradient(student_gates),
        partial(student_gates + larger(student.gates_at(student.depth), student.values() * 4)),
        state(partial + larger(2 * kWarps * student.classes * 4, kWarps * 8)),
        barriers(round_up(state + State{student.classes}.bytes(), 8)),
        ring(round_up(barriers + 12 * ring_stages, 128)),
        stages(ring_stages),
        bytes(ring + ring_stages * kStageBytes) {}
};
// As many stages as there is room for; two at least, since a warp looks one ahead.
template <class M>
TSR_GEOMETRY M with_ring(const Shape& teacher, const Shape& student) {
  return M(teacher, student, kMostStages).bytes <= kMostShared ? M(teacher, student, kMostStages)
                                                               : M(teacher, student, 2);
}
TSR_GEOMETRY Map map_of(const Shape& teacher, const Shape& student) { return with_ring<Map>(teacher, student); }

}  // namespace fused
}  // namespace tsr
