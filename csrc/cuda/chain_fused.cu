// The fused attack: which networks have a kernel, its start, and the order of the packed parameters.
//
// Mapping, passes and bound: chain_fused.cuh. Instances: chain_fused_4.cu, chain_fused_5.cu, and those that are
// compiled at run time, chain_fused_loaded.cu.
#include "core/chain_fused.h"
#include "cuda/chain_fused_entry.cuh"

namespace tsr {
namespace {

using namespace fused;

__global__ void chain_fused_empty_queue_kernel(unsigned long long* queue) { *queue = 0; }

bool is_conv(const ChainRecord& r, int64_t c, int64_t side) {
  return r.kind == ChainKind::conv && r.activation == ChainActivation::relu && r.c == c && r.h == side && r.w == side &&
         r.kh == 3 && r.kw == 3 && r.sh == 1 && r.sw == 1 && r.ph == 0 && r.pw == 0;
}
std::string too_many(const std::string& what, int64_t bytes) {
  return what + " " + std::to_string(bytes) + " bytes of shared memory, a block has " + std::to_string(kMostShared);
}
// Reads a network's sizes; returns why no kernel can take it, or nothing.
std::string read(const ChainPlan& plan, Shape& s) {
  const int64_t depth = plan.records - 1;
  if (depth < 2 || depth > kMostLayers)
    return "it must have 2 to " + std::to_string(kMostLayers) + " convolutions and a linear layer, got " +
           std::to_string(plan.records) + " records";
  const int64_t image = plan.inputs() * int64_t(sizeof(float));  // first: the other sizes are int
  if (image > kMostShared) return too_many("the image alone takes", image);
  int64_t c = kColors, side = plan.record[0].h;
  for (int64_t l = 0; l < depth; ++l, side -= 2) {
    const std::string record = "record " + std::to_string(l);
    if (!is_conv(plan.record[l], c, side))
      return record + " must be a 3x3 convolution with ReLU (stride 1, no padding, " + std::to_string(c) +
             " channels in, a square map)";
    c = plan.record[l].oc;
    if (c > most_channels(int(l)))
      return record + " must have at most " + std::to_string(most_channels(int(l))) + " channels, got " +
             std::to_string(c);
    s.c[l] = int(c);
  }
  const ChainRecord& last = plan.record[depth];
  if (last.kind != ChainKind::linear || last.activation != ChainActivation::none)
    return "its last record must be a linear layer without activation";
  if (last.oc > kMostShared) return "it has " + std::to_string(last.oc) + " classes";
  s.side = int(plan.record[0].h), s.depth = int(depth), s.classes = int(last.oc);
  if (s.side % 2) return "the image's side must be even, got " + std::to_string(s.side);
  const int bytes = map_of(Shape{}, s).bytes;
  if (bytes > kMostShared) return too_many("it takes", bytes);
  if (!takes(s)) {  // the two products that must not take several passes
    const Gemm last_forward = s.forward(s.depth - 1), last_backward = s.backward(0);
    const int sums = 4 * larger(last_forward.slots() * last_forward.n_tiles, last_backward.slots());
    return "its last convolution or its image needs " + std::to_string(sums) + " registers of a thread for sums, of " +
           std::to_string(kAccumulators);
  }
  return "";
}
struct Pair {
  Shape teacher, student;  // teacher.depth 0: none
};
// Of networks that a kernel can take together; throws std::invalid_argument for others.
Pair pair_of(const ChainPlan& student, const ChainPlan& teacher) {
  const auto refuse = [](const std::string& why) {
    throw std::invalid_argument("no fused kernel can take this network: " + why);
  };
  Pair p{};
  const std::string s = read(student, p.student), t = teacher.records ? read(teacher, p.teacher) : "";
  if (!s.empty()) refuse("student: " + s);
  if (!t.empty()) refuse("teacher: " + t);
  if (p.teacher.depth && (p.teacher.side != p.student.side || p.teacher.classes != p.student.classes))
    refuse("student and teacher must have the same image and classes");
  const int bytes = map_of(p.teacher, p.student).bytes;
  if (bytes > kMostShared) refuse(too_many("student and teacher take", bytes));
  return p;
}

// In the build, or null.
const Entry* find_entry(const Pair& p) {
  for (const Entries& entries : {entries_of_4_layers(), entries_of_5_layers(),
#ifdef TSR_EMU
                                 entries_for_tests()
#endif
       })
    for (const Entry& e : entries)
      if (e.teacher == p.teacher && e.student == p.student) return &e;
  return nullptr;
}
// What an attack reads; student.depth 0: no kernel can take it.
Pair read_by(const ChainPlan& student, const ChainPlan& teacher, ChainLoss criterion) {
  const Shape s = shape_of(student), t = needs_teacher(criterion) ? shape_of(teacher) : Shape{};
  return needs_teacher(criterion) && !t.depth ? Pair{} : Pair{t, s};
}

std::string name_of(const Shape& s) {
  if (!s.depth) return "tsr::fused::NoNet";
  std::string name = "tsr::fused::Net<" + std::to_string(s.side) + ", " + std::to_string(s.classes);
  for (int l = 0; l < s.depth; ++l) name += ", " + std::to_string(s.c[l]);
  return name + ">";
}

// Where a 16 x 8 block's value (depth k, column n) is, in 16-bit values from the start of its k-step. Two n-tiles share
// a lane's 16 bytes, the last of an odd number has 8; `paired` false: all have.
int place_in_step(int k, int n, int n_tiles, bool paired) {
  const int tile = n / 8, lane = n % 8 * 4 + k % 8 / 2, word = k / 8, half = k % 2;
  constexpr int kBlock = kBlockBytes / 2;
  if (paired && tile < n_tiles / 2 * 2) return tile / 2 * 2 * kBlock + lane * 8 + tile % 2 * 4 + word * 2 + half;
  return tile * kBlock + lane * 4 + word * 2 + half;
}

// value(ky, kx, c, n): the parameter, or -1.
template <class F>
int32_t* map_stages(const Gemm& g, int32_t* to, F value) {
  for (int pass = 0; pass < g.passes(); ++pass)
    for (int ky = 0; ky < g.kernel_rows(); ++ky, to += g.row_stages() * (kStageBytes / 2))
      for (int k = 0; k < g.k_steps() * 16; ++k) {
        const int step = k / 16, j = k / 8, kx = j / g.chunks, c = j % g.chunks * 8 + k % 8;
        int32_t* const stage = to + step / g.stage_steps() * (kStageBytes / 2);
        int32_t* const at = stage + step % g.stage_steps() * g.n_tiles * (kBlockBytes / 2);
        for (int n = 0; n < 8 * g.n_tiles; ++n)
          at[place_in_step(k % 16, n, g.n_tiles, true)] = kx < 3 ? value(ky, kx, c, n) : -1;
      }
  return to;
}

int32_t* map_forward(const ChainPlan& plan, const Shape& s, int32_t* to) {
  const Gemm first = s.forward(0);
  const ChainRecord& r0 = plan.record[0];
  for (int k = 0; k < 32; ++k)  // [ky][kx][color], as pixels lie in the image
    for (int n = 0; n < 8 * first.n_tiles; ++n) {
      const bool there = k < 27 && n < s.c[0];
      int32_t* const at = to + k / 16 * first.n_tiles * (kBlockBytes / 2);
      at[place_in_step(k % 16, n, first.n_tiles, false)] =
          there ? int32_t(r0.weight) + ((n * kColors + k % kColors) * 3 + k / 9) * 3 + k % 9 / kColors : -1;
    }
  to += kStageBytes / 2;
  for (int l = 1; l < s.depth; ++l) {
    const int in = s.c[l - 1], out = s.c[l], weight = int(plan.record[l].weight);
    to = map_stages(s.forward(l), to, [=](int ky, int kx, int c, int n) {
      return c < in && n < out ? weight + ((n * in + c) * 3 + ky) * 3 + kx : -1;
    });
  }
  return to;
}
int32_t* map_backward(const ChainPlan& plan, const Shape& s, int32_t* to) {
  for (int l = s.depth - 1; l > 0; --l) {
    const int in = s.c[l - 1], out = s.c[l], weight = int(plan.record[l].weight);
    to = map_stages(s.backward(l), to, [=](int ky, int kx, int c, int n) {
      return c < out && n < in ? weight + ((c * in + n) * 3 + 2 - ky) * 3 + 2 - kx : -1;
    });
  }
  const int out = s.c[0], weight = int(plan.record[0].weight);
  return map_stages(s.backward(0), to, [=](int ky, int kx, int c, int n) {
    const int color = n % 4, row = ky - n / 4;  // columns: 4 for the upper pixel, 4 for the one below
    const bool there = color < kColors && c < out && row >= 0 && row < 3;
    return there ? weight + ((c * kColors + color) * 3 + 2 - row) * 3 + 2 - kx : -1;
  });
}
// The linear layer's weights lie on the sums of the last convolution, register by register.
void map_linear(const ChainPlan& plan, const Shape& s, int32_t* to) {
  const Gemm g = s.forward(s.depth - 1);
  const int channels = s.c[s.depth - 1], area = s.area_of(s.depth - 1), units = channels * area;
  const int weight = int(plan.record[s.depth].weight);
  constexpr int kBlock = kBlockBytes / 2;
  for (int tile = 0; tile < g.tiles(); ++tile, to += s.linear_tile_bytes() / 2)
    for (int c = 0; c < s.classes; ++c)
      for (int row = 0; row < 16; ++row)
        for (int n = 0; n < 8 * g.n_tiles; ++n) {
          const int n_tile = n / 8, lane = row % 8 * 4 + n % 8 / 2, half = row / 8, pixel = tile * 16 + row;
          const int at = n_tile < g.n_tiles / 2 * 2
                             ? (n_tile / 2 * s.classes + c) * 2 * kBlock + lane * 8 + half * 4 + n_tile % 2 * 2 + n % 2
                             : (n_tile * s.classes + c) * kBlock + lane * 4 + half * 2 + n % 2;
          to[at] = n < channels && pixel < area ? weight + c * units + n * area + pixel : -1;
        }
}

}  // namespace

Shape fused::shape_of(const ChainPlan& plan) {
  Shape s{};
  return read(plan, s).empty() ? s : Shape{};
}

ChainFusedSize chain_fused_size(const ChainPlan& plan) {
  const Shape s = shape_of(plan);
  if (!s.depth) return {0, 0};
  return {s.floats(), s.half_bytes() / 2};
}

void chain_fused_map(const ChainPlan& plan, int32_t* floats, int32_t* hi) {
  const Shape s = shape_of(plan);
  if (!s.depth) return;
  for (int l = 0; l < s.depth; ++l)
    for (int i = 0; i < s.padded(l); ++i) {
      const int64_t bias = plan.record[l].bias;
      *floats++ = i < s.c[l] && bias >= 0 ? int32_t(bias) + i : -1;
    }
  for (int c = 0; c < s.classes; ++c)
    *floats++ = plan.record[s.depth].bias >= 0 ? int32_t(plan.record[s.depth].bias) + c : -1;
  for (int i = 0; i < s.half_bytes() / 2; ++i) hi[i] = -1;
  map_linear(plan, s, map_backward(plan, s, map_forward(plan, s, hi)));
}

bool chain_fused_covers(const ChainPlan& student, const ChainPlan& teacher, ChainLoss criterion, Norm, int device) {
  const Pair p = read_by(student, teacher, criterion);
  if (!p.student.depth) return false;
  const DeviceTraits traits(device);
  return traits.capability >= kLeastCapability && traits.shared >= map_of(p.teacher, p.student).bytes &&
         (find_entry(p) || is_loaded(p.teacher, p.student, traits.capability));
}

ChainFusedKernel chain_fused_kernel_of(const ChainPlan& student, const ChainPlan& teacher) {
  const Pair p = pair_of(student, teacher);
  ChainFusedKernel k{map_of(p.teacher, p.student).bytes, {}};
  const std::string name =
      "tsr::fused::chain_fused_kernel<tsr::fused::Instance<" + name_of(p.teacher) + ", " + name_of(p.student) + ">>";
  name.copy(k.name, sizeof(k.name) - 1);
  return k;
}
bool chain_fused_ready(const ChainPlan& student, const ChainPlan& teacher, int capability) {
  const Pair p = pair_of(student, teacher);
  return capability >= kLeastCapability && (find_entry(p) || is_loaded(p.teacher, p.student, capability));
}
void chain_fused_load(const ChainPlan& student, const ChainPlan& teacher, const void* cubin, const char* symbol,
                      int device) {
  const Pair p = pair_of(student, teacher);
  const DeviceGuard guard(device);
  const DeviceTraits traits(device);
  const int bytes = map_of(p.teacher, p.student).bytes;
  if (traits.shared < bytes)
    throw std::runtime_error("tsrfast: the fused kernel takes " + std::to_string(bytes) +
                             " bytes of shared memory, a block of this GPU has " + std::to_string(traits.shared));
  load(p.teacher, p.student, traits.capability, cubin, symbol);
}

int64_t chain_fused_workspace(const ChainPlan&, const ChainPlan&, int64_t) { return sizeof(unsigned long long); }

void chain_fused_pgd(const ChainPgd& a, const ChainFusedNet& student, const ChainFusedNet& teacher, int device,
                     void* stream) {
  const Pair p = read_by(student.plan, teacher.plan, a.criterion);
  const Entry* const e = find_entry(p);
  if (!e && !is_loaded(p.teacher, p.student, kAnyCapability))
    throw std::runtime_error("tsrfast: chain_fused_pgd: there is no fused kernel for these networks");
  if (a.n == 0) return;
  const DeviceGuard guard(device);
  const DeviceTraits traits(device);
  if (traits.capability < kLeastCapability)
    throw std::runtime_error("tsrfast: the fused attack needs a GPU of compute capability 9.0 or later, this one has " +
                             std::to_string(traits.capability / 10) + "." + std::to_string(traits.capability % 10));
  const Args args{a,
                  {student.floats, static_cast<const unsigned char*>(student.hi)},
                  {teacher.floats, static_cast<const unsigned char*>(teacher.hi)},
                  static_cast<unsigned long long*>(a.workspace)};
  launch(chain_fused_empty_queue_kernel, dim3(1), dim3(1), 0, stream, args.queue);
  const auto blocks = unsigned(a.n < traits.multiprocessors ? a.n : traits.multiprocessors);
  if (e)
    e->run(args, blocks, stream);
  else
    run_loaded(args, p.teacher, p.student, traits.capability, blocks, stream);
}

}  // namespace tsr
