// A chain at work on up to L images: forward, keeping gates, and backward through them.
#include "cpu/chain_conv.h"

namespace tsr {
namespace {

// Memory of a thread, cut into pieces that start at multiples of 64 bytes. With no base it only counts.
struct Carve {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(base ? base + used : nullptr);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// Vectors of scratch that a record's convolutions need, of the widest; it is enough for the others.
inline int64_t scratch_of(const ChainRecord& r) {
  constexpr int L = kMostLanes;
  static_assert(kPoints<1> <= kPoints<L> * L, "a single image needs no more than the widest vectors");
  if (r.kind != ChainKind::conv) return 0;
  if (r.winograd) return winograd_scratch<L>(most(r.c, r.oc));
  const int64_t taps_back = taps_of(r.kh, r.sh, 0) * taps_of(r.kw, r.sw, 0);
  return most(direct_scratch<L>(r.c, r.kh * r.kw), direct_scratch<L>(r.oc, taps_back));
}

// What the networks of an attack share, since one works after the other: two maps of activations, from one to the other
// and back, scratch, and bits of pixels. All sizes are those of the widest vectors, so that a thread may go on with
// narrower ones when it has fewer images left.
struct Room {
  float *map[2], *scratch;
  Gate* pixels[2];
  Room(const ChainPlan& one, const ChainPlan& other, Carve& memory) {
    int64_t units = one.inputs(), vectors = 0, area = 0;
    const auto fit = [&](const ChainPlan& plan) {
      for (int64_t i = 0; i < plan.records; ++i) {
        units = most(units, plan.record[i].outputs());
        vectors = most(vectors, scratch_of(plan.record[i]));
        area = most(area, most(plan.record[i].h * plan.record[i].w, plan.record[i].oh * plan.record[i].ow));
      }
    };
    fit(one);
    fit(other);
    for (float*& m : map) m = memory.take<float>(units * kMostLanes);
    for (Gate*& p : pixels) p = memory.take<Gate>(area);
    scratch = memory.take<float>(vectors * kMostLanes);
  }
};

template <int L>
class Net {
 public:
  Net(const ChainNet& net, const Room& room, Carve& memory) : plan_(net.plan), packed_(net.packed) {
    int64_t gates = 0, choices = 0;
    for (int64_t i = 0; i < plan_.records; ++i) {
      const ChainRecord& r = plan_.record[i];
      if (r.activation != ChainActivation::none) gates += r.outputs();
      if (r.kind == ChainKind::max_pool) choices += r.outputs();
    }
    for (int k = 0; k < 2; ++k) {
      map_[k] = reinterpret_cast<Vec<L>*>(room.map[k]);
      pixels_[k] = room.pixels[k];
    }
    scratch_ = reinterpret_cast<Vec<L>*>(room.scratch);
    gates_ = memory.take<Gate>(gates);
    choices_ = reinterpret_cast<Choice*>(memory.take<int32_t>(choices * kMostLanes));
  }

  // Activations of the last record. `see(i, a)` is shown the results of every record i.
  template <class See>
  const Vec<L>* forward(const Vec<L>* in, See see) {
    int64_t gates = 0, choices = 0, begin = 0;
    for (int64_t i = 0; i < plan_.records; ++i) {
      const ChainRecord& r = plan_.record[i];
      const Packed at(r, begin);
      Vec<L>* const out = map_[i % 2];
      const bool leaky = r.activation == ChainActivation::leaky_relu;
      const Sink<L> sink{out, gates_ + gates, leaky ? packed_[at.slope] : 0.f,
                         leaky                                   ? Sink<L>::leaky
                         : r.activation == ChainActivation::relu ? Sink<L>::relu
                                                                 : Sink<L>::plain};
      const float *const weights = packed_ + at.forward, *const bias = packed_ + at.bias;
      switch (r.kind) {
        case ChainKind::conv:
          conv_forward<L>(r, weights, bias, in, sink, scratch_, pixels_[0], pixels_[1]);
          break;
        case ChainKind::linear:
          linear<L>(r.c, r.oc, weights, bias, in, sink);
          break;
        case ChainKind::affine:
          affine(r, bias, in, sink, true);
          break;
        case ChainKind::avg_pool:
          average(r, in, sink);
          break;
        case ChainKind::max_pool:
          largest(r, in, sink, choices_ + choices);
          break;
      }
      if (r.activation != ChainActivation::none) gates += r.outputs();
      if (r.kind == ChainKind::max_pool) choices += r.outputs();
      begin = at.end;
      see(i, static_cast<const Vec<L>*>(out));
      in = out;
    }
    return in;
  }

  // The gradient with respect to the results of record `layer` (-1: the input), from that of the last record's results,
  // of the images of the last forward().
  const Vec<L>* backward(const Vec<L>* cotangent, int64_t layer) {
    int64_t gates = 0, choices = 0, begin = 0;
    for (int64_t i = 0; i < plan_.records; ++i) {
      const ChainRecord& r = plan_.record[i];
      if (r.activation != ChainActivation::none) gates += r.outputs();
      if (r.kind == ChainKind::max_pool) choices += r.outputs();
      begin = Packed(r, begin).end;
    }
    int64_t last = plan_.records - 1, spare = 0;
    if (last > layer && plan_.record[last].activation != ChainActivation::none) {
      const ChainRecord& r = plan_.record[last];
      const Sink<L> sink = through(r, gates - r.outputs(), begin, map_[spare]);
      for (int64_t u = 0; u < r.outputs(); ++u) sink.put(u, cotangent[u]);
      cotangent = map_[spare];
      spare = 1 - spare;
    }
    for (int64_t i = last; i > layer; --i) {
      const ChainRecord& r = plan_.record[i];
      if (r.activation != ChainActivation::none) gates -= r.outputs();
      if (r.kind == ChainKind::max_pool) choices -= r.outputs();
      begin -= Packed(r, 0).end;
      const Packed at(r, begin);
      Vec<L>* const out = map_[spare];
      // What comes out is the gradient of the results of record i - 1: through its gates, if it is to go on from there.
      Sink<L> sink{out, nullptr, 0.f, Sink<L>::plain};
      if (i - 1 > layer) {
        const ChainRecord& before = plan_.record[i - 1];
        sink = through(before, gates - before.outputs(), begin, out);
      }
      switch (r.kind) {
        case ChainKind::conv:
          conv_backward<L>(r, packed_ + at.backward, cotangent, sink, scratch_, pixels_[0], pixels_[1]);
          break;
        case ChainKind::linear:
          linear<L>(r.oc, r.c, packed_ + at.backward, nullptr, cotangent, sink);
          break;
        case ChainKind::affine:
          affine(r, packed_ + at.bias, cotangent, sink, false);
          break;
        case ChainKind::avg_pool:
          average_back(r, cotangent, sink);
          break;
        case ChainKind::max_pool:
          largest_back(r, cotangent, sink, choices_ + choices);
          break;
      }
      cotangent = out;
      spare = 1 - spare;
    }
    return cotangent;
  }

 private:
  typedef int32_t Choice __attribute__((vector_size(L * sizeof(int32_t))));

  // `end`: where the record's packed parameters end; its slope is the last of them.
  Sink<L> through(const ChainRecord& r, int64_t gates, int64_t end, Vec<L>* out) const {
    if (r.activation == ChainActivation::none) return {out, nullptr, 0.f, Sink<L>::plain};
    if (r.activation == ChainActivation::relu) return {out, gates_ + gates, 0.f, Sink<L>::gate_relu};
    return {out, gates_ + gates, packed_[end - 1], Sink<L>::gate_leaky};
  }

  static void affine(const ChainRecord& r, const float* scale, const Vec<L>* in, const Sink<L>& sink, bool shifted) {
    const float* const shift = scale + r.c;
    for (int64_t c = 0, u = 0; c < r.c; ++c)
      for (const int64_t end = u + r.h * r.w; u < end; ++u)
        sink.put(u, shifted ? Lanes<L>::fma(all<L>(scale[c]), in[u], all<L>(shift[c])) : in[u] * scale[c]);
  }

  // f(output unit, first input unit of its channel, window [y0, y1) x [x0, x1) inside the map, cells of the whole
  // window)
  template <class F>
  static void windows(const ChainRecord& r, F f) {
    for (int64_t c = 0, u = 0; c < r.c; ++c)
      for (int64_t y = 0; y < r.oh; ++y)
        for (int64_t x = 0; x < r.ow; ++x, ++u) {
          const int64_t y0 = y * r.sh - r.ph, x0 = x * r.sw - r.pw;
          const int64_t y1 = y0 + r.kh < r.h ? y0 + r.kh : r.h, x1 = x0 + r.kw < r.w ? x0 + r.kw : r.w;
          f(u, c * r.h * r.w, most(y0, 0), y1, most(x0, 0), x1);
        }
  }
  static float share(const ChainRecord& r, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    return 1.f / float(r.count_pad ? r.kh * r.kw : (y1 - y0) * (x1 - x0));
  }

  static void average(const ChainRecord& r, const Vec<L>* in, const Sink<L>& sink) {
    windows(r, [&](int64_t u, int64_t base, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      Vec<L> sum{};
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) sum += in[base + y * r.w + x];
      sink.put(u, sum * share(r, y0, y1, x0, x1));
    });
  }
  static void average_back(const ChainRecord& r, const Vec<L>* cotangent, const Sink<L>& sink) {
    for (int64_t u = 0; u < r.inputs(); ++u) sink.out[u] = Vec<L>{};
    windows(r, [&](int64_t u, int64_t base, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      const Vec<L> part = cotangent[u] * share(r, y0, y1, x0, x1);
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) sink.out[base + y * r.w + x] += part;
    });
    for (int64_t u = 0; u < r.inputs(); ++u) sink.put(u, sink.out[u]);
  }

  static void largest(const ChainRecord& r, const Vec<L>* in, const Sink<L>& sink, Choice* choice) {
    windows(r, [&](int64_t u, int64_t base, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      Vec<L> best = all<L>(-INFINITY);
      Choice at = Choice{} + int32_t(y0 * r.w + x0);
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) {
          const Vec<L> v = in[base + y * r.w + x];
          const Choice better = (v > best) | (v != v);  // NaN wins, as in PyTorch
          best = better ? v : best;
          at = better ? Choice{} + int32_t(y * r.w + x) : at;
        }
      choice[u] = at;
      sink.put(u, best);
    });
  }
  static void largest_back(const ChainRecord& r, const Vec<L>* cotangent, const Sink<L>& sink, const Choice* choice) {
    for (int64_t u = 0; u < r.inputs(); ++u) sink.out[u] = Vec<L>{};
    windows(r, [&](int64_t u, int64_t base, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) {
          Vec<L>& to = sink.out[base + y * r.w + x];
          to = choice[u] == int32_t(y * r.w + x) ? to + cotangent[u] : to;
        }
    });
    for (int64_t u = 0; u < r.inputs(); ++u) sink.put(u, sink.out[u]);
  }

  ChainPlan plan_;
  const float* packed_;
  Vec<L>* map_[2];
  Vec<L>* scratch_;
  Gate *pixels_[2], *gates_;
  Choice* choices_;
};

// Images [count][units], anywhere, to lanes and back. Lanes without an image repeat the first.
template <int L>
void to_lanes(const float* const* image, int64_t count, int64_t units, Vec<L>* lanes) {
  float* const to = reinterpret_cast<float*>(lanes);
  for (int64_t u0 = 0; u0 < units; u0 += 16) {
    const int64_t u1 = u0 + 16 < units ? u0 + 16 : units;
    for (int64_t l = 0; l < L; ++l) {
      const float* const from = image[l < count ? l : 0];
      for (int64_t u = u0; u < u1; ++u) to[u * L + l] = from[u];
    }
  }
}
template <int L>
void from_lanes(const Vec<L>* lanes, int64_t count, int64_t units, float* const* image) {
  const float* const from = reinterpret_cast<const float*>(lanes);
  for (int64_t u0 = 0; u0 < units; u0 += 16) {
    const int64_t u1 = u0 + 16 < units ? u0 + 16 : units;
    for (int64_t l = 0; l < count; ++l)
      for (int64_t u = u0; u < u1; ++u) image[l][u] = from[u * L + l];
  }
}

}  // namespace
}  // namespace tsr
