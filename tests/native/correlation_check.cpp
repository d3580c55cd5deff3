// The fused correlation (cuda/chain_correlation.cu) through the emulator, on small networks and, with the argument
// `full`, on those of the paper. Correlations are near those of the CPU's activations; moments equal, but for the
// rounding of sums, those of activations that are worked out here in float16. Buffers, exit code and EMU_ORDER: as in
// fused_check.cpp.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/chain_correlation.h"

#include "fused_network.h"

namespace {

using namespace tsr;
using namespace check;

using Maps = std::vector<std::vector<float>>;  // [record][image, channel, pixel]

Maps maps_of(const Network& net, const std::vector<float>& x, int64_t n) {
  Maps maps;
  std::vector<int64_t> at;
  std::vector<float*> out;
  for (int64_t l = 0; l + 1 < net.plan().records; ++l) at.push_back(l);
  for (const int64_t l : at) maps.emplace_back(size_t(n * net.records[size_t(l)].outputs()));
  for (auto& m : maps) out.push_back(m.data());
  const Memory room = room_of(net);
  chain_forward_cpu({net.cpu(), x.data(), at.data(), out.data(), n, int64_t(at.size()), room.get()}, 1);
  return maps;
}

float rounded(float v) { return float(_Float16(v)); }
// The same with float16 operands and float32 sums, whose order is that of the tensor cores: products by 16.
Maps half_maps_of(const Network& net, const std::vector<float>& x, int64_t n) {
  Maps maps;
  for (int64_t l = 0; l + 1 < net.plan().records; ++l) {
    const ChainRecord& r = net.records[size_t(l)];
    struct Tap {
      int64_t c, y, x, group;
    };
    std::vector<Tap> taps;
    const int64_t wide = (r.c + 7) / 8 * 8, row_groups = (3 * wide + 15) / 16;
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx)
        for (int64_t c = 0; c < r.c; ++c)
          taps.push_back({c, ky, kx, l ? ky * row_groups + (kx * wide + c) / 16 : ((ky * 3 + kx) * r.c + c) / 16});
    const std::vector<float>& in = l ? maps.back() : x;
    std::vector<float> out;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t o = 0; o < r.oc; ++o)
        for (int64_t at = 0; at < r.oh * r.ow; ++at) {
          float sum = net.weights[size_t(r.bias + o)], part = 0;
          for (size_t k = 0; k < taps.size(); ++k) {
            const Tap& t = taps[k];
            const float a = in[size_t(((i * r.c + t.c) * r.h + at / r.ow + t.y) * r.w + at % r.ow + t.x)];
            part += rounded(a) * rounded(net.weights[size_t(r.weight + ((o * r.c + t.c) * 3 + t.y) * 3 + t.x)]);
            if (k + 1 == taps.size() || taps[k + 1].group != t.group) sum += part, part = 0;
          }
          out.push_back(rounded(sum > 0 ? sum : 0));
        }
    maps.push_back(out);
  }
  return maps;
}

// Moments of a pair of records as core/channel_correlation.h has them, with sum x^2 of each channel for scale.
struct Moments {
  std::vector<double> value, square;
};
Moments moments_of(const std::vector<float>& student, const std::vector<float>& teacher, int64_t n, int64_t cs,
                   int64_t ct) {
  const int64_t pixels = int64_t(student.size()) / (n * cs), all = cs + ct;
  const auto value = [&](int64_t c, int64_t i, int64_t at) {
    return double(c < cs ? student[size_t((i * cs + c) * pixels + at)]
                         : teacher[size_t((i * ct + c - cs) * pixels + at)]);
  };
  Moments m{std::vector<double>(size_t(moments_size(cs, ct))), std::vector<double>(size_t(all))};
  const double samples = double(n * pixels);
  m.value[0] = samples;
  const auto sum = [&](auto f) {
    double v = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t at = 0; at < pixels; ++at) v += f(i, at);
    return v;
  };
  const auto mean = [&](int64_t c) -> double& { return m.value[size_t(mean_at(c))]; };
  for (int64_t c = 0; c < all; ++c) {
    mean(c) = sum([&](int64_t i, int64_t at) { return value(c, i, at); }) / samples;
    m.square[size_t(c)] = sum([&](int64_t i, int64_t at) { return value(c, i, at) * value(c, i, at); });
    m.value[size_t(m2_at(c, cs, ct))] = sum([&](int64_t i, int64_t at) {
      const double d = value(c, i, at) - mean(c);
      return d * d;
    });
  }
  for (int64_t k = 0; k < cs; ++k)
    for (int64_t j = 0; j < ct; ++j)
      m.value[size_t(cross_at(k, j, cs, ct))] = sum(
          [&](int64_t i, int64_t at) { return (value(k, i, at) - mean(k)) * (value(cs + j, i, at) - mean(cs + j)); });
  return m;
}

using AllMoments = std::vector<std::unique_ptr<double[]>>;
AllMoments correlation(const Network& student, const Network& teacher, const float* x, int64_t n,
                       bool backwards = false) {
  AllMoments moments;
  std::vector<double*> to;
  std::vector<int64_t> at;
  const int64_t depth = student.plan().records - 1;
  for (int64_t l = 0; l < depth; ++l) {
    moments.push_back(unwritten<double>(moments_size(student.records[size_t(l)].oc, teacher.records[size_t(l)].oc)));
    to.push_back(moments.back().get()), at.push_back(backwards ? depth - 1 - l : l);
  }
  ChainCorrelation a{student.cuda(), teacher.cuda(), x, at.data(), at.data(), to.data(), n, depth, nullptr};
  const auto workspace = unwritten<double>(chain_correlation_workspace_cuda(a, 0) / 8);
  a.workspace = workspace.get();
  chain_correlation_cuda(a, 0, nullptr);
  return moments;
}

// Prints and checks how far moments are from those of the same activations, and correlations from the CPU's.
void correlations(const Network& student, const Network& teacher, int64_t n) {
  Random r{99};
  std::vector<float> x;
  for (int64_t i = 0; i < n * student.inputs(); ++i) x.push_back(r.uniform());
  expect(chain_correlation_covers(student.plan(), teacher.plan(), 0), "no kernel covers this pair");
  const AllMoments got = correlation(student, teacher, x.data(), n);
  const Maps hs = half_maps_of(student, x, n), ht = half_maps_of(teacher, x, n);
  const Maps fs = maps_of(student, x, n), ft = maps_of(teacher, x, n);
  double moments = 0, rho = 0;
  for (size_t l = 0; l < got.size(); ++l) {
    const int64_t cs = student.records[l].oc, ct = teacher.records[l].oc;
    const Moments same = moments_of(hs[l], ht[l], n, cs, ct), wanted = moments_of(fs[l], ft[l], n, cs, ct);
    const auto worse = [](double& most, double v) { most = v <= most ? most : v; };  // NaN is the worst
    const auto off = [&](int64_t at, double scale) {
      worse(moments, std::fabs(got[l][at] - same.value[size_t(at)]) / scale);
    };
    expect(got[l][0] == same.value[0], "count of layer " + std::to_string(l));
    const double tiny = 1e-30;
    for (int64_t c = 0; c < cs + ct; ++c) {
      off(mean_at(c), std::sqrt(same.square[size_t(c)] / same.value[0]) + tiny);
      off(m2_at(c, cs, ct), same.square[size_t(c)] + tiny);
    }
    constexpr double kVaries = 0.1;  // mean / std at most 3: rho amplifies the rounding of activations by that
    const auto varies = [&](int64_t c) {
      return wanted.value[size_t(m2_at(c, cs, ct))] > kVaries * wanted.square[size_t(c)];
    };
    for (int64_t k = 0; k < cs; ++k)
      for (int64_t j = 0; j < ct; ++j) {
        off(cross_at(k, j, cs, ct), std::sqrt(same.square[size_t(k)] * same.square[size_t(cs + j)]) + tiny);
        if (!varies(k) || !varies(cs + j)) continue;
        const auto correlate = [&](const double* m) {
          return m[cross_at(k, j, cs, ct)] / std::sqrt(m[m2_at(k, cs, ct)] * m[m2_at(cs + j, cs, ct)]);
        };
        worse(rho, std::fabs(correlate(got[l].get()) - correlate(wanted.value.data())));
      }
  }
  std::printf("%-60s %lld images: moments off by %.1e, correlations by %.1e\n", where.c_str(),
              static_cast<long long>(n), moments, rho);
  expect(moments < 1e-6, "moments are off by " + number(moments));
  // in each layer, float16 moves weights and activations by up to 5e-4 of their size
  expect(rho < 1e-3 * double(got.size()), "correlations are off by " + number(rho));
}

// Nothing is left of an image in the next one's sums but what belongs there: NaN, and no images at all.
void correlations_of_special_images(const Network& student, const Network& teacher) {
  const int64_t d = student.inputs(), cs = student.records[0].oc, ct = teacher.records[0].oc;
  for (const float special : {NAN, 1e5f}) {  // infinite in 16 bits
    std::vector<float> x(size_t(3 * d), 0.5f);
    for (int64_t j = 0; j < d; ++j) x[size_t(d + j)] = special;
    const AllMoments got = correlation(student, teacher, x.data(), 3);
    int64_t finite = 0;
    for (int64_t c = 0; c < cs + ct; ++c)
      finite += std::isfinite(got[0][mean_at(c)]) && std::isfinite(got[0][m2_at(c, cs, ct)]);
    expect(finite == 0, std::to_string(finite) + " channels are finite where the image is not");
  }
  const AllMoments none = correlation(student, teacher, nullptr, 0);
  for (size_t l = 0; l < none.size(); ++l)
    for (int64_t i = 0; i < moments_size(student.records[l].oc, teacher.records[l].oc); ++i)
      expect(none[l][i] == 0, "a moment of no images is " + number(none[l][i]));
  // A channel that never changes: its variance is nothing, not what the sums round to.
  const std::vector<float> grey(size_t(2 * d), 0.3f);
  const AllMoments same = correlation(student, teacher, grey.data(), 2);
  for (int64_t c = 0; c < cs + ct; ++c) expect(same[0][m2_at(c, cs, ct)] == 0, "a constant channel varies");
  bool refused = false;
  try {
    correlation(student, teacher, grey.data(), 2, true);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "layers in another order were taken");
  expect(!chain_correlation_covers(teacher.plan(), student.plan(), 0), "the pair is covered the other way round, too");
}

// Beside a student (and a teacher) whose channels never change, however their equal squares round: of these constants,
// summed one after the other over the paper's first maps, float32 would make channels that vary.
void constant_channels(Network student, Network teacher) {
  const std::vector<float> constants{1717 / 1024.f, 1797 / 1024.f, 1883 / 1024.f, 1893 / 1024.f, 1137 / 1024.f};
  Random r{98};
  std::vector<float> x;
  for (int64_t i = 0; i < student.inputs(); ++i) x.push_back(r.uniform());
  student.make_constant(constants);
  for (const bool both : {false, true}) {
    if (both) teacher.make_constant(constants);
    const AllMoments got = correlation(student, teacher, x.data(), 1);
    for (size_t l = 0; l < got.size(); ++l) {
      const int64_t cs = student.records[l].oc, ct = teacher.records[l].oc;
      int64_t vary = 0, wrong = 0;
      for (int64_t c = 0; c < cs; ++c) wrong += got[l][m2_at(c, cs, ct)] != 0;
      for (int64_t c = cs; c < cs + ct; ++c) vary += got[l][m2_at(c, cs, ct)] != 0;
      for (int64_t i = 0; i < cs * ct; ++i) wrong += got[l][cross_at(0, 0, cs, ct) + i] != 0;
      expect(wrong == 0,
             std::to_string(wrong) + " moments of constant channels are not 0 in layer " + std::to_string(l));
      expect((vary == 0) == both, std::to_string(vary) + " channels of the teacher vary in layer " + std::to_string(l));
    }
  }
}

void small() {
  const std::pair<Network, Network> pairs[] = {// teacher, student
                                               {Network(31, 12, 10, {9, 8, 5}), Network(32, 12, 10, {17, 8, 24})},
                                               {Network(33, 14, 3, {20, 8}), Network(34, 14, 3, {7, 33})},
                                               {Network(35, 12, 7, {8, 16, 5, 24}), Network(36, 12, 4, {5, 8, 9, 7})},
                                               {Network(37, 10, 2, {45, 9}), Network(38, 10, 2, {50, 16})}};
  for (const auto& [teacher, student] : pairs)
    for (const int64_t n : {1, 5}) {  // on two blocks
      where = "correlation of side " + std::to_string(teacher.records[0].h) + ", " +
              std::to_string(teacher.records.size() - 1) + " layers";
      correlations(student, teacher, n);
    }
  where = "correlation of special images";
  correlations_of_special_images(pairs[0].second, pairs[0].first);
  where = "45-32-32-20, 50-35-35-22 correlation of constant channels";  // smaller maps' sums are too short to fail
  constant_channels(Network(22, 32, 10, {50, 35, 35, 22}), Network(21, 32, 10, {45, 32, 32, 20}));
}

void full() {
  where = "45-32-32-20, 50-35-35-22 correlation";
  correlations(Network(22, 32, 10, {50, 35, 35, 22}), Network(21, 32, 10, {45, 32, 32, 20}), 3);
  where = "45-32-32-32-20, 50-35-35-35-22 correlation";
  correlations(Network(24, 32, 10, {50, 35, 35, 35, 22}), Network(23, 32, 10, {45, 32, 32, 32, 20}), 1);
}

}  // namespace

int main(int argc, char** argv) { return run_checks(argc > 1 && std::string(argv[1]) == "full" ? full : small); }
