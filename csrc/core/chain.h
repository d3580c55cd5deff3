// Compiled ReLU networks ("chains"): plan, and the operations on it.   Twins: cpu/chain.cpp, cuda/chain.cu
//
// A plan is a list of records; each maps activations [C, H, W] to [C', H', W'] and may end in a (leaky) ReLU:
//
//   conv       z[o, y, x] = b[o] + sum_{c,r,s} w[o, c, r, s] a[c, y sh + r - ph, x sw + s - pw]      (0 outside)
//   linear     z[o] = b[o] + sum_k w[o, k] a[k],  k the flat index in C, H, W order
//   affine     z[c, y, x] = w[c] a[c, y, x] + b[c]
//   avg_pool   mean of the window (over all of it, or over the part inside, by count_pad)
//   max_pool   largest of the window's part inside; its gradient goes to the first largest
//
// gates: open where not z <= 0, so a NaN passes both ways, as in PyTorch.
//
// The attack is that of pgd_step.h, image by image: x_{t+1} = step(x_t, gradient of the loss at x_t).
#pragma once
#include "core/chain_loss.h"
#include "core/pgd_step.h"

namespace tsr {

enum class ChainKind : int64_t { conv = 0, linear = 1, affine = 2, avg_pool = 3, max_pool = 4 };
enum class ChainActivation : int64_t { none = 0, relu = 1, leaky_relu = 2 };

// A row of a plan; the columns are spoken by Python too: tsrfast/ops/chain.py.
struct ChainRecord {
  ChainKind kind;
  int64_t c, h, w, oc, oh, ow;  // linear: c and oc features, the rest 1
  int64_t kh, kw, sh, sw, ph, pw;
  ChainActivation activation;
  int64_t weight, bias, slope;  // offsets into the parameters; -1 where there is none
  int64_t winograd;             // 3x3, stride 1: by F(4x4, 3x3)
  int64_t count_pad;

  int64_t inputs() const { return c * h * w; }
  int64_t outputs() const { return oc * oh * ow; }
};
constexpr int64_t kChainColumns = sizeof(ChainRecord) / sizeof(int64_t);

struct ChainPlan {
  const ChainRecord* record;
  int64_t records;  // 0: no network
  int64_t inputs() const { return record[0].inputs(); }
  int64_t classes() const { return record[records - 1].outputs(); }
};

// Throws std::invalid_argument unless the records follow on each other and their parameters lie in [0, parameters).
void check_chain(const ChainPlan& plan, int64_t parameters);

// Parameters in the order the engine reads them: how many floats, and the packing itself.
int64_t chain_packed_size(const ChainPlan& plan);
struct ChainPack {
  ChainPlan plan;
  const float* weights;  // the parameters as the records' offsets name them
  float* packed;         // [chain_packed_size]
};

struct ChainNet {
  ChainPlan plan;
  const float* packed;
};

// Scratch memory: bytes for each thread, whatever the number of images.
int64_t chain_workspace(const ChainPlan& student, const ChainPlan& teacher);

struct ChainForward {
  ChainNet net;
  const float* x;     // [N, inputs]
  const int64_t* at;  // [asked] records, ascending
  float* const* out;  // [asked] of [N, outputs of that record]
  int64_t n, asked;
  void* workspace;  // threads x chain_workspace
};

struct ChainGradient {
  ChainNet net;
  const float* x;          // [N, inputs]
  const float* cotangent;  // [N, rows, classes]
  float* out;              // [N, rows, outputs of record `layer`, or the inputs for -1]
  int64_t n, rows, layer;
  void* workspace;
};

struct ChainPgd {
  ChainNet student, teacher;
  const float* x0;           // [N, D]
  const float* start;        // [N, D]
  float* x;                  // [N, D] result; may not be start
  const int64_t* labels;     // [N] or null
  float* loss;               // [N] of the result; NaN where it was not evaluated
  bool* adversarial;         // [N] likewise; false
  float* closeness;          // [N] |s - t| / |t| at the first evaluation, in 2-norms; NaN without one or a teacher
  int64_t *bad, *queries;    // [N] gradient entries without a direction; evaluations
  float* iterates;           // [steps + 1, N, D] or null
  const double *step, *eps;  // [N], or null: the values below
  double step_value, eps_value, lo, hi, sparsity;
  int64_t n, steps;
  Norm norm;
  ChainLoss criterion;
  bool targeted, keep_best, early_stop, judge;
  void* workspace;
};

// Arithmetic of the CUDA executors; float32 is the CPU's only one.
//
//   float32   float32 products and sums
//   split     each operand as hi + lo, two float16 (lo scaled by 2^11): three products on tensor cores, about 22 bits
//   float16   operands rounded to float16, float32 sums; cotangents scaled to a largest entry of 64. |s - t| / |t| must
//   be
//             well above 1e-3: the rounding of s and t does not cancel in their difference
enum class Precision : int { float32 = 0, split = 1, float16 = 2 };

// Packed parameters of the CUDA executors: float32 words, then float16 values (hi), then what is left of others (lo),
// each section filled up to 16 bytes. Each packed value is one parameter or 0; the map says which, so packing is one
// kernel.
struct ChainPackedCuda {
  int64_t floats, hi, lo;      // values in each section
  int64_t hi_at, lo_at, size;  // in floats from the start
};
ChainPackedCuda chain_packed_cuda(const ChainPlan& plan);
// map: [floats + hi + lo] offsets into the parameters; -1 for 0.
void chain_map_cuda(const ChainPlan& plan, int32_t* map);

// Bytes for n images; `rows` cotangents for each in chain_gradient. No teacher: a plan without records.
int64_t chain_workspace_cuda(const ChainPlan& student, const ChainPlan& teacher, int64_t n, int64_t rows,
                             Precision precision);

void chain_pack_cuda(const ChainPack& args, const int32_t* map, int device, void* stream);
void chain_forward_cuda(const ChainForward& args, Precision precision, int device, void* stream);
void chain_gradient_cuda(const ChainGradient& args, Precision precision, int device, void* stream);
void chain_pgd_cuda(const ChainPgd& args, Precision precision, int device, void* stream);

void chain_pack_cpu(const ChainPack& args);
void chain_forward_cpu(const ChainForward& args, int threads);
void chain_gradient_cpu(const ChainGradient& args, int threads);
void chain_pgd_cpu(const ChainPgd& args, int threads);

}  // namespace tsr
