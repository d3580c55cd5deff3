// Every kernel through the emulator against its CPU twin, at every instruction set of this CPU, on small odd shapes.
//
// Made for AddressSanitizer and UBSan (CMake target emu_check, -DTSRFAST_SANITIZE=ON): all buffers are heap blocks of
// exactly the size a kernel may use. Outputs start as NaN, so a value that was never written is seen. Exit code 1 and a
// line for each mismatch. EMU_ORDER=forward | reverse | random picks the order of threads (csrc/emu/emu.h).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <string>
#include <vector>

#include "core/channel_correlation.h"
#include "core/hyperplane_projection.h"
#include "core/pgd_step.h"
#include "core/philox_uniform.h"
#include "core/relu_gate.h"
#include "cpu/isa.h"

namespace {

using namespace tsr;

int failures = 0;
std::string where;  // names the case that runs, for messages

struct Random {
  uint64_t seed, drawn = 0;
  double uniform() { return double(philox(seed, 0, 0, uint32_t(drawn++)).v[0]) * 0x1p-32; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

template <class T>
constexpr double kEps = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
template <>
constexpr double kEps<bfloat16> = 0x1p-7;
template <>
constexpr double kEps<float16> = 0x1p-10;

// `size` values of T in a heap block of exactly that size, every byte 0xFF: NaN as float, -1 as integer.
template <class T>
std::vector<T> unwritten(int64_t size) {
  std::vector<T> v(static_cast<size_t>(size));
  if (size) std::memset(static_cast<void*>(v.data()), 0xFF, v.size() * sizeof(T));
  return v;
}
template <class T>
std::vector<T> stored(const std::vector<double>& from) {
  std::vector<T> v(from.size());
  for (size_t i = 0; i < v.size(); ++i) store(v[i], compute_t<T>(from[i]));
  return v;
}

// NaN equals NaN and nothing else; infinities equal themselves.
void same(const char* what, int64_t at, double emulated, double cpu, double allowed) {
  const bool equal = std::isnan(emulated) || std::isnan(cpu) || std::isinf(emulated) || std::isinf(cpu)
                         ? (std::isnan(emulated) && std::isnan(cpu)) || emulated == cpu
                         : std::fabs(emulated - cpu) <= allowed;
  if (equal) return;
  if (++failures <= 20)
    std::printf("%s: %s[%lld]: cuda (emulated) %.17g, cpu %.17g, allowed %.3g\n", where.c_str(), what,
                static_cast<long long>(at), emulated, cpu, allowed);
}
template <class T>
void same_all(const char* what, const std::vector<T>& emulated, const std::vector<T>& cpu, double relative) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    const double e = load(emulated[i]), c = load(cpu[i]);
    same(what, int64_t(i), e, c, relative * (1 + std::fabs(c)));
  }
}
template <class I>
void same_bits(const char* what, const std::vector<I>& emulated, const std::vector<I>& cpu) {
  for (size_t i = 0; i < cpu.size(); ++i)
    if (emulated[i] != cpu[i]) same(what, int64_t(i), double(emulated[i]), double(cpu[i]), 0);
}

// Runs f<T>(name) for every element type.
template <class F>
void each_dtype(F f) {
  f(float{}, Dtype::f32, "float32");
  f(bfloat16{}, Dtype::bf16, "bfloat16");
  f(float16{}, Dtype::f16, "float16");
  f(double{}, Dtype::f64, "float64");
}

// Sums run in different orders, in float64, so results may differ by one rounding of T; linf has no sums.
template <class T>
void pgd_step(Norm norm, Dtype dtype, int64_t n, int64_t d, bool targeted, bool in_place) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  Random r{uint64_t(n * 1000 + d)};
  std::vector<double> clean(n * d), now(n * d), gradient(n * d), radii(n), steps(n);
  for (int64_t i = 0; i < n * d; ++i) {
    clean[i] = i % 11 == 0 ? double(i % 2) : r.uniform();  // some pixels at the edge of the box
    now[i] = std::fmin(std::fmax(clean[i] + 0.02 * r.normal(), 0), 1);
    gradient[i] = i % 7 == 3 ? 0.0 : i % 29 == 17 ? nan : i % 31 == 19 ? (i % 2 ? inf : -inf) : r.normal();
  }
  const double eps[] = {0.03, 0.4, 0.9}, step[] = {0.02, 0.3, 1.1}, scale[] = {1, inf, 0};
  for (int64_t i = 0; i < n; ++i) radii[i] = eps[int(norm)] * scale[i % 3], steps[i] = step[int(norm)] * double(1 + i);
  const auto x0 = stored<T>(clean), x = stored<T>(now), g = stored<T>(gradient);
  auto emulated = in_place ? x : unwritten<T>(n * d), cpu = emulated;
  auto bad_emulated = unwritten<int64_t>(n), bad_cpu = bad_emulated;
  for (int64_t i = 0; i < n; ++i) bad_emulated[i] = bad_cpu[i] = 0;  // the operator's own contract: counts start at 0
  const bool each = n > 1;                                           // radii and steps per image
  PgdStep a{in_place ? emulated.data() : x.data(),
            x0.data(),
            g.data(),
            emulated.data(),
            bad_emulated.data(),
            each ? steps.data() : nullptr,
            each ? radii.data() : nullptr,
            step[int(norm)],
            eps[int(norm)],
            0.0,
            1.0,
            0.1,
            n,
            d,
            norm,
            dtype,
            targeted};
  pgd_step_cuda(a, 0, nullptr);
  a.x = in_place ? cpu.data() : x.data(), a.out = cpu.data(), a.bad = bad_cpu.data();
  pgd_step_cpu(a, 1);
  same_all("x", emulated, cpu, norm == Norm::linf ? 0 : kEps<T>);
  same_bits("bad", bad_emulated, bad_cpu);
}

// Some within reach of the box, some not, one without an offset; sums in different orders (what is left over for one
// pixel in l1 is divided by its weight).
template <class T>
void hyperplane_projection(Norm norm, Dtype dtype, int64_t n, int64_t d) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  Random r{uint64_t(n * 1000 + d)};
  std::vector<double> points(n * d), normals(n * d), offsets(n);
  for (int64_t i = 0; i < n * d; ++i) {
    points[i] = i % 11 == 0 ? double(i % 2) : r.uniform();
    normals[i] = i % 7 == 3 ? 0.0 : i % 29 == 17 ? nan : i % 31 == 19 ? inf : r.normal();
  }
  const auto t = stored<T>(points), w = stored<T>(normals);
  for (int64_t i = 0; i < n; ++i) {
    double value = 0, size = 0;
    for (int64_t j = i * d; j < i * d + d; ++j)
      if (is_finite(load(w[j]))) value += double(load(w[j])) * double(load(t[j])), size += std::fabs(load(w[j]));
    offsets[i] = i % 5 == 4 ? nan : value + size * (i % 5 == 0 ? 0.1 : i % 5 == 1 ? -0.2 : i % 5 == 2 ? 2.0 : -0.01);
  }
  auto emulated = unwritten<T>(n * d), cpu = emulated;
  HyperplaneProjection a{t.data(), w.data(), offsets.data(), emulated.data(), 0.0, 1.0, n, d, norm, dtype};
  hyperplane_projection_cuda(a, 0, nullptr);
  a.out = cpu.data();
  hyperplane_projection_cpu(a, 1);
  same_all("d", emulated, cpu, std::fmax(kEps<T>, 1e-12));
}

template <class T>
void relu_gate(Dtype dtype, int64_t n, int64_t d) {
  Random r{uint64_t(n * 1000 + d)};
  std::vector<double> values(n * d), vectors(n * d);
  for (int64_t i = 0; i < n * d; ++i) {
    values[i] = i % 5 == 1 ? 0.0 : i % 37 == 8 ? std::numeric_limits<double>::quiet_NaN() : r.normal();
    vectors[i] = r.normal();
  }
  const auto z = stored<T>(values), v = stored<T>(vectors);
  auto emulated = unwritten<T>(n * d), cpu = emulated;
  auto gate_emulated = unwritten<uint32_t>(n * gate_words(d)), gate_cpu = gate_emulated;
  relu_gate_cuda({z.data(), emulated.data(), gate_emulated.data(), n, d, dtype}, 0, nullptr);
  relu_gate_cpu({z.data(), cpu.data(), gate_cpu.data(), n, d, dtype}, 1);
  same_all("a", emulated, cpu, 0);
  same_bits("gate", gate_emulated, gate_cpu);
  emulated = unwritten<T>(n * d), cpu = emulated;
  relu_gate_backward_cuda({v.data(), gate_cpu.data(), emulated.data(), n, d, dtype}, 0, nullptr);
  relu_gate_backward_cpu({v.data(), gate_cpu.data(), cpu.data(), n, d, dtype}, 1);
  same_all("v * gate", emulated, cpu, 0);
}

void philox_uniform(int64_t n, int64_t d, uint64_t seed) {
  std::vector<int64_t> index(n);
  for (int64_t i = 0; i < n; ++i) index[i] = (int64_t(1) << 40) + 3 * i;
  auto emulated = unwritten<float>(n * d), cpu = emulated;
  philox_uniform_cuda({index.data(), emulated.data(), n, d, seed, 7}, 0, nullptr);
  philox_uniform_cpu({index.data(), cpu.data(), n, d, seed, 7}, 1);
  same_all("u", emulated, cpu, 0);
}

enum class Layout { nchw, channels_last };

Activations strided(const void* values, int64_t channels, int64_t positions, Layout layout) {
  if (layout == Layout::nchw) return {values, channels, channels * positions, positions, 1};
  return {values, channels, channels * positions, 1, channels};
}

// Products are float32 (float64 for float64), relative to a mean, over tiles of different length in the two twins.
template <class T>
void channel_correlation(Dtype dtype, int64_t n, int64_t cs, int64_t ct, int64_t positions, Layout left, Layout right) {
  Random r{uint64_t(n * 1000 + cs * 100 + ct * 10 + positions)};
  std::vector<double> s(n * cs * positions), t(n * ct * positions);
  for (double& v : s) v = 2 + r.normal();  // a mean that is not 0
  for (size_t i = 0; i < t.size(); ++i) t[i] = 0.5 * s[i % s.size()] + r.normal();
  const auto student = stored<T>(s), teacher = stored<T>(t);
  ChannelCorrelation a{};
  a.student = strided(student.data(), cs, positions, left);
  a.teacher = strided(teacher.data(), ct, positions, right);
  a.images = n, a.positions = positions, a.dtype = dtype;

  const auto run = [&](int64_t bytes, auto kernel) {
    auto moments = unwritten<double>(moments_size(cs, ct));
    void* workspace = std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64);  // 64-byte aligned, as PyTorch's memory is
    std::memset(workspace, 0xFF, size_t(bytes + 63) / 64 * 64);
    a.moments = moments.data(), a.workspace = workspace;
    kernel();
    std::free(workspace);
    return moments;
  };
  const auto emulated = run(channel_correlation_workspace_cuda(a), [&] { channel_correlation_cuda(a, 0, nullptr); });
  const auto cpu = run(channel_correlation_workspace_cpu(a, 1), [&] { channel_correlation_cpu(a, 1); });

  const double relative = dtype == Dtype::f64 ? 1e-12 : 4e-6, count = double(samples(a));
  // The CUDA kernel multiplies 16-bit activations as hi + lo of 8 bits each: 2^-18 a factor, and lo lo left out.
  const double of_products = sizeof(T) == 2 ? 3 * 0x1p-18 + relative : relative;
  same("count", 0, emulated[0], count, 0);
  same("count", 0, cpu[0], count, 0);
  const auto size = [&](int64_t channel) { return std::fmax(cpu[m2_at(channel, cs, ct)], 1e-3); };
  for (int64_t c = 0; c < cs + ct; ++c) {
    same("mean", c, emulated[mean_at(c)], cpu[mean_at(c)], relative);
    same("m2", c, emulated[m2_at(c, cs, ct)], cpu[m2_at(c, cs, ct)], relative * size(c));
  }
  for (int64_t k = 0; k < cs; ++k)
    for (int64_t j = 0; j < ct; ++j) {
      const int64_t at = cross_at(k, j, cs, ct);
      same("cross", k * ct + j, emulated[at], cpu[at], of_products * std::sqrt(size(k) * size(cs + j)));
    }
}

void all(const std::string& level) {
  const auto at = [&](const char* op, const char* dtype, std::initializer_list<int64_t> shape) {
    where = level + " " + op + " " + dtype;
    for (int64_t v : shape) where += " " + std::to_string(v);
  };
  each_dtype([&](auto t, Dtype dtype, const char* name) {
    using T = decltype(t);
    const char* const norms[] = {"pgd_step linf", "pgd_step l2", "pgd_step l1"};
    for (int norm = 0; norm < 3; ++norm)
      for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 1}, {3, 31}, {1, 257}, {0, 5}}) {
        const bool targeted = d == 31, in_place = d == 257;
        at(norms[norm], name, {n, d});
        pgd_step<T>(Norm(norm), dtype, n, d, targeted, in_place);
      }
    const char* const nearest[] = {"hyperplane_projection linf", "hyperplane_projection l2",
                                   "hyperplane_projection l1"};
    for (int norm = 0; norm < 3; ++norm)
      for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 1}, {5, 31}, {2, 257}, {0, 5}}) {
        at(nearest[norm], name, {n, d});
        hyperplane_projection<T>(Norm(norm), dtype, n, d);
      }
    at("pgd_step linf", name, {2, 1030});  // more than one block an image
    pgd_step<T>(Norm::linf, dtype, 2, 1030, false, false);
    for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 1}, {3, 31}, {2, 32}, {5, 33}, {3, 300}, {0, 40}}) {
      at("relu_gate", name, {n, d});
      relu_gate<T>(dtype, n, d);
    }
    struct Shape {
      int64_t n, cs, ct, positions;
    };
    // The last but one has more tiles than the GPU has chunks: a block then takes several tiles.
    for (const Shape& s : {Shape{1, 1, 1, 1},
                           {7, 3, 34, 1},
                           {3, 5, 2, 35},
                           {2, 17, 33, 67},
                           {3, 2, 3, 5633},
                           {2, 33, 17, 6},
                           {0, 2, 3, 4}}) {
      at("channel_correlation", name, {s.n, s.cs, s.ct, s.positions});
      channel_correlation<T>(dtype, s.n, s.cs, s.ct, s.positions, Layout::nchw, Layout::nchw);
      channel_correlation<T>(dtype, s.n, s.cs, s.ct, s.positions, Layout::channels_last, Layout::nchw);
      channel_correlation<T>(dtype, s.n, s.cs, s.ct, s.positions, Layout::channels_last, Layout::channels_last);
    }
  });
  for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {2, 130}, {1, 515}, {0, 4}}) {
    at("philox_uniform", "", {n, d});
    philox_uniform(n, d, 0x123456789abcdefull + uint64_t(d));
  }
}

}  // namespace

int main() {
  try {
    for (const std::string& level : isa_levels()) {
      set_isa(level);
      all(level);
    }
  } catch (const std::exception& e) {
    std::printf("%s: %s\n", where.c_str(), e.what());
    return 1;
  }
  std::printf(failures ? "%d mismatches\n" : "all equal\n", failures);
  return failures != 0;
}
