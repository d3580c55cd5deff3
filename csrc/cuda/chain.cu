// Chains, layer by layer, for every plan and precision.   Formulas and shapes: core/chain.h
//
// A kernel a layer and direction: products on tensor cores or by FMA (chain_gemm.cuh), the rest elementwise
// (chain_layers.cuh). Bias, activation and gates are part of the kernel that makes the values. Images go in chunks
// whose activations stay in the L2 cache; memory does not grow with the number of images beyond a chunk. An attack's
// step, about 30 launches for two networks of 5 layers, is captured once as a graph and replayed, chunk after chunk.
//
// Every activation and every cotangent is written once and read once for each tap that hits the cache, 2 (float16) or 4
// bytes; the multiply-accumulates are the bound: see chain_gemm.cuh.
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/chain_fused.h"
#include "cuda/chain_attack.cuh"
#include "cuda/chain_gemm.cuh"

namespace tsr {
namespace {

#ifdef TSR_EMU
constexpr int64_t kLiveBytes = 256 << 10;  // small, so that tests have several chunks
#else
constexpr int64_t kLiveBytes =
    36 << 20;  // of a chunk's activations: L2 caches have 40 MB (A100) and 50 MB (H100, H200)
#endif
constexpr double kCotangent = 32;  // entries in [1, 2) become entries below 64

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

unsigned grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::invalid_argument("plan: a single image has more units than a grid has blocks");
  return unsigned(blocks);
}

// ---- Plans
// -----------------------------------------------------------------------------------------------------------

enum class Kind { product, affine, average, largest, move };

// A record as it is computed; where a record takes another shape than the one before gives, a move comes between.
// Offsets: weights into the packed weights of any precision; the others into the packed vectors.
struct Layer {
  Kind kind;
  int64_t record;
  ChainRecord r;
  Shape in, out;
  int64_t forward, backward, bias, scale, slope;

  bool gated() const { return kind != Kind::move && r.activation != ChainActivation::none; }
  int64_t gate_bytes() const { return gated() ? out.groups() : 0; }
  int64_t choices() const { return kind == Kind::largest ? out.values() : 0; }
  bool linear() const { return r.kind == ChainKind::linear; }
};

struct Layers {
  std::vector<Layer> layer;
  int64_t weights = 0, vectors = 0;  // packed values

  explicit Layers(const ChainPlan& plan) {
    for (int64_t i = 0; i < plan.records; ++i) {
      const ChainRecord& r = plan.record[i];
      Shape in{r.c, r.h, r.w};
      if (i && !(before() == in)) {
        if (r.kind == ChainKind::linear)
          in = before();  // its weights are packed in the order of that map
        else
          layer.push_back({Kind::move, i, r, before(), in, 0, 0, 0, 0, 0});
      }
      add(i, r, in);
    }
  }
  int64_t widest() const {  // values of the largest map
    int64_t values = 0;
    for (const Layer& l : layer) values = most(values, most(l.in.values(), l.out.values()));
    return values;
  }
  template <class F>
  int64_t sum(F f) const {
    int64_t all = 0;
    for (const Layer& l : layer) all += f(l);
    return all;
  }

 private:
  Shape before() const { return layer.back().out; }
  void add(int64_t i, const ChainRecord& r, Shape in) {
    static constexpr Kind kinds[] = {Kind::product, Kind::product, Kind::affine, Kind::average, Kind::largest};
    Layer l{kinds[int(r.kind)], i, r, in, {r.oc, r.oh, r.ow}, 0, 0, 0, 0, 0};
    const auto take = [](int64_t& from, int64_t count) {
      from += count;
      return from - count;
    };
    if (l.kind == Kind::product) {
      const int64_t taps = l.linear() ? 1 : r.kh * r.kw, deep = l.linear() ? in.values() : in.channels();
      l.forward = take(weights, taps * deep * l.out.channels());
      l.backward = take(weights, taps * deep * l.out.channels());
    }
    if (l.kind == Kind::affine) l.scale = take(vectors, l.out.channels());
    if (l.kind == Kind::product || l.kind == Kind::affine) l.bias = take(vectors, l.out.channels());
    if (r.activation == ChainActivation::leaky_relu) l.slope = take(vectors, kGroup);
    layer.push_back(l);
  }
};

// Fills the maps of one layer's weights: f(row of the depth, column) for what is not filling.
void map_product(const Layer& l, int32_t* weights) {
  const ChainRecord& r = l.r;
  const int64_t ic = l.in.channels(), oc = l.out.channels();
  int32_t *const forward = weights + l.forward, *const backward = weights + l.backward;
  if (l.linear()) {
    const int64_t deep = l.in.values();
    for (int64_t u = 0; u < l.in.units(); ++u) {
      const int64_t at = u % l.in.pixels() * ic + u / l.in.pixels();
      for (int64_t o = 0; o < r.oc; ++o)
        forward[at * oc + o] = backward[o * deep + at] = int32_t(r.weight + o * r.c + u);
    }
    return;
  }
  const int64_t taps = r.kh * r.kw;
  for (int64_t o = 0; o < r.oc; ++o)
    for (int64_t c = 0; c < r.c; ++c)
      for (int64_t t = 0; t < taps; ++t)
        forward[(t * ic + c) * oc + o] = backward[(t * oc + o) * ic + c] = int32_t(r.weight + (o * r.c + c) * taps + t);
}

void map_vectors(const Layer& l, int32_t* vectors) {
  const auto put = [&](int64_t at, int64_t from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) vectors[at + i] = int32_t(from + i);
  };
  if (l.kind == Kind::move) return;
  if (l.kind == Kind::affine) put(l.scale, l.r.weight, l.r.c);
  if (l.kind == Kind::product || l.kind == Kind::affine) put(l.bias, l.r.bias, l.r.oc);
  if (l.r.activation == ChainActivation::leaky_relu) put(l.slope, l.r.slope, 1);
}

void check_offsets(const ChainPlan& plan) {
  for (int64_t i = 0; i < plan.records; ++i) {
    const ChainRecord& r = plan.record[i];
    const int64_t weights = r.kind == ChainKind::affine ? r.c : r.oc * r.c * most(1, r.kh * r.kw);
    if (most(r.weight + weights, most(r.bias + r.oc, r.slope)) > INT32_MAX)
      throw std::invalid_argument("plan: must have fewer than 2^31 parameters");
  }
}

__global__ void __launch_bounds__(kLayerThreads)
    chain_pack_kernel(const float* weights, const int32_t* map, ChainPackedCuda p, float* packed) {
  uint16_t *const hi = reinterpret_cast<uint16_t*>(packed + p.hi_at), *const lo =
                                                                          reinterpret_cast<uint16_t*>(packed + p.lo_at);
  for (int64_t i = first_index(); i < p.floats + p.hi + p.lo; i += index_step()) {
    const float v = map[i] < 0 ? 0.f : weights[map[i]];
    if (i < p.floats)
      packed[i] = v;
    else if (i < p.floats + p.hi)
      hi[i - p.floats] = float_to_half_bits(v);
    else
      lo[i - p.floats - p.hi] = float_to_half_bits(low_part(v));
  }
}

// ---- Launches
// --------------------------------------------------------------------------------------------------------

template <class... P, class... A>
void launch_each(void (*kernel)(P...), int64_t count, void* stream, A... args) {
  const int64_t blocks = (count + kLayerThreads - 1) / kLayerThreads;
  launch(kernel, dim3(grid_limit(blocks)), dim3(kLayerThreads), 0, stream, args...);
}

// A linear layer with few outputs has too few rows and columns to fill a GPU: its depth is cut into pieces. How,
// depends on the plan alone.
int64_t piece_of(int64_t depth, int64_t columns) {
  constexpr int64_t kPiece = 512, kMostPieces = 1024, kFew = 64;
  if (columns > kFew || depth <= 2 * kPiece) return round_up(depth, kPiece);
  return round_up(most(kPiece, depth / kMostPieces), kPiece);
}
int64_t pieces_of(int64_t depth, int64_t columns) {
  return (depth + piece_of(depth, columns) - 1) / piece_of(depth, columns);
}

template <Precision P, int N>
void launch_tiles(const Product& p, int64_t pieces, void* stream) {
  using T = Tile<P, N>;
  const int64_t tiles = (p.rows + T::rows - 1) / T::rows * ((p.columns + T::columns - 1) / T::columns);
  launch(chain_product_kernel<P, N>, dim3(grid_of(tiles), unsigned(pieces)), dim3(kProductThreads),
         T::stages * T::stage, stream, p);
}
// Tiles of equal width, up to 64 columns, that leave the fewest empty.
template <Precision P>
void launch_columns(const Product& p, int64_t pieces, void* stream) {
  const int64_t tiles = (p.columns + 63) / 64, pairs = (p.columns + 16 * tiles - 1) / (16 * tiles);
  constexpr void (*by_pairs[])(const Product&, int64_t, void*) = {launch_tiles<P, 2>, launch_tiles<P, 4>,
                                                                  launch_tiles<P, 6>, launch_tiles<P, 8>};
  by_pairs[pairs - 1](p, pieces, stream);
}
void launch_product(Product p, float* partial, void* stream) {
  const Finish finish = p.finish;
  const float* const bias = p.bias;
  const int64_t pieces = (p.depth + p.piece - 1) / p.piece;
  if (pieces > 1) p.finish = {{partial, nullptr, Precision::float32}, nullptr, nullptr, 1, false}, p.bias = nullptr;
  switch (p.a.as) {
    case Precision::float32:
      launch_columns<Precision::float32>(p, pieces, stream);
      break;
    case Precision::split:
      launch_columns<Precision::split>(p, pieces, stream);
      break;
    case Precision::float16:
      launch_columns<Precision::float16>(p, pieces, stream);
      break;
  }
  if (pieces > 1)
    launch_each(chain_pieces_kernel, p.rows * p.columns / kGroup, stream, static_cast<const float*>(partial), pieces,
                bias, p.columns, p.rows, finish);
}

// ---- Memory
// ----------------------------------------------------------------------------------------------------------

// Pieces that start at multiples of 256 bytes. With no base it only counts.
struct Carve {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(base ? base + used : nullptr);
    used += round_up(count * int64_t(sizeof(T)), 256);
    return piece;
  }
  Map map(int64_t values, Precision as) {
    if (as == Precision::float32) return {take<float>(values), nullptr, as};
    void* const hi = take<uint16_t>(values);
    return {hi, as == Precision::split ? take<uint16_t>(values) : nullptr, as};
  }
};

// Where the two networks of a call work: the maps in turns, since one network works after the other.
struct Room {
  int64_t images;          // in a chunk
  Map map[2];              // from one to the other and back
  Map logits[2], ends[2];  // of each network, float32: what comes out forward, and backward
  uint8_t* gates[2];
  int32_t* choices[2];
  float* partial;
  double* undo;
  Chunk chunk;
  int64_t bytes;

  Room(const ChainPlan& student, const ChainPlan& teacher, int64_t n, int64_t rows, Precision precision, void* memory) {
    const Layers nets[2] = {Layers(student), Layers(teacher)};
    const int64_t widest = most(nets[0].widest(), nets[1].widest()), inputs = student.inputs();
    const int64_t classes = student.classes();
    rows = most(rows, 1);
    int64_t live = 2 * widest * rows * (precision == Precision::float16 ? 2 : 4) + 3 * inputs * int64_t(sizeof(float));
    for (const Layers& net : nets)
      live += net.sum([](const Layer& l) { return l.gate_bytes() + l.choices() * int64_t(sizeof(int32_t)); });
    images = most(1, n < kLiveBytes / live ? n : kLiveBytes / live);

    Carve c{static_cast<char*>(memory)};
    for (Map& m : map) m = c.map(widest * rows * images, precision);
    int64_t pieces = 1;
    for (int k = 0; k < 2; ++k) {
      const Layers& net = nets[k];
      const bool some = !net.layer.empty(), pair = !nets[1].layer.empty();
      logits[k] = c.map(some ? net.layer.back().out.values() * images : 0, Precision::float32);
      ends[k] = c.map(some ? (pair ? net.layer.front().in.values() : widest * rows) * images : 0, Precision::float32);
      gates[k] = c.take<uint8_t>(net.sum([](const Layer& l) { return l.gate_bytes(); }) * images);
      choices[k] = c.take<int32_t>(net.sum([](const Layer& l) { return l.choices(); }) * images);
      for (const Layer& l : net.layer) {
        if (!l.linear()) continue;
        const int64_t in = l.in.values(), out = l.out.channels();
        if (pieces_of(in, out) > 1) pieces = most(pieces, pieces_of(in, out) * out);
        if (pieces_of(out, in) > 1) pieces = most(pieces, pieces_of(out, in) * in * rows);
      }
    }
    partial = c.take<float>(pieces * images);
    undo = c.take<double>(rows * images);
    chunk.walk = c.take<Walk>(images);
    chunk.done = c.take<bool>(images);
    for (float** v : {&chunk.x, &chunk.x0, &chunk.g}) *v = c.take<float>(inputs * images);
    for (double** v : {&chunk.step, &chunk.eps}) *v = c.take<double>(images);
    chunk.bad = c.take<int64_t>(images);
    for (int k = 0; k < 2; ++k) {
      chunk.logits[k] = logits[k];
      chunk.shape[k] = nets[k].layer.empty() ? Shape{} : nets[k].layer.back().out;
      chunk.z[k] = c.take<float>(classes * images);
      chunk.cotangent[k] = c.take<float>(classes * images);
    }
    chunk.inputs = inputs, chunk.classes = classes;
    bytes = c.used;
  }
};

// ---- A network at work on a chunk
// ------------------------------------------------------------------------------------

class Net {
 public:
  // `which`: of the two networks that share the room.
  Net(const ChainNet& net, const Room& room, int which)
      : layers_(net.plan), room_(room), which_(which), packed_(net.packed), size_(chain_packed_cuda(net.plan)) {}

  // x: [images][inputs]. `see(record, map, shape)` is shown every record's results; the last ones stay in the room.
  // done: [images], or null: what comes out for images that are done means nothing.
  template <class See>
  void forward(const float* x, int64_t images, const bool* done, void* stream, See see) const {
    const std::vector<Layer>& layers = layers_.layer;
    Map in = room_.map[0];
    launch_each(chain_import_kernel, images * layers[0].in.groups(), stream, x, in, layers[0].in, images);
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& l = layers[i];
      const Map out = i + 1 == layers.size() ? room_.logits[which_] : room_.map[(i + 1) % 2];
      run(i, in, images, done, finish(i, out, 1, true), true, stream);
      if (l.kind != Kind::move) see(l.record, out, l.out);
      in = out;
    }
  }

  // From cotangents [images][sharing][classes] to those of the results of `record` (-1: the input; not the last), of
  // the images of the last forward(). They end up in the room, times what `undo` brings back; returns their shape.
  Shape backward(const float* cotangents, int64_t images, int64_t sharing, int64_t record, double* undo,
                 const bool* done, void* stream) const {
    const std::vector<Layer>& layers = layers_.layer;
    size_t i = layers.size();
    Map in = room_.map[0];
    launch(chain_seed_kernel, dim3(grid_of(images * sharing)), dim3(kLayerThreads), 32 * sizeof(double), stream,
           cotangents, layers.back().out, kCotangent, undo, finish(i - 1, in, sharing, false));
    while (i-- > 0) {
      const bool last = i == 0 || layers[i - 1].record == record;
      const Map out = last ? room_.ends[which_] : in.hi == room_.map[0].hi ? room_.map[1] : room_.map[0];
      const Finish through = last ? Finish{out, nullptr, nullptr, sharing, false} : finish(i - 1, out, sharing, false);
      run(i, in, images * sharing, done, through, false, stream);
      if (last) break;
      in = out;
    }
    return layers[i].in;
  }

  const Map& end() const { return room_.ends[which_]; }

 private:
  const float* vectors() const { return packed_ + layers_.weights; }

  // Through the activation of layer i, or its gates.
  Finish finish(size_t i, const Map& out, int64_t sharing, bool opens) const {
    const Layer& l = layers_.layer[i];
    if (!l.gated()) return {out, nullptr, nullptr, sharing, opens};
    const float* const slope = l.r.activation == ChainActivation::leaky_relu ? vectors() + l.slope : nullptr;
    return {out, room_.gates[which_] + room_.images * before(i, &Layer::gate_bytes), slope, sharing, opens};
  }
  int64_t before(size_t i, int64_t (Layer::*size)() const) const {
    int64_t all = 0;
    for (size_t k = 0; k < i; ++k) all += (layers_.layer[k].*size)();
    return all;
  }

  void run(size_t i, const Map& in, int64_t images, const bool* done, const Finish& f, bool forward,
           void* stream) const {
    const Layer& l = layers_.layer[i];
    int32_t* const choice = room_.choices[which_] + room_.images * before(i, &Layer::choices);
    const Shape& made = forward ? l.out : l.in;
    const int64_t groups = images * made.groups();
    switch (l.kind) {
      case Kind::product:
        launch_product(product(l, in, images, done, f, forward), room_.partial, stream);
        break;
      case Kind::affine:
        launch_each(chain_affine_kernel, groups, stream, in, vectors() + l.scale,
                    forward ? vectors() + l.bias : nullptr, made, images, f);
        break;
      case Kind::average:
        if (forward)
          launch_each(chain_average_kernel, groups, stream, in, pool(l), images, f);
        else
          launch_each(chain_pool_back_kernel, groups, stream, in, pool(l), static_cast<const int32_t*>(nullptr), images,
                      f);
        break;
      case Kind::largest:
        if (forward)
          launch_each(chain_largest_kernel, groups, stream, in, pool(l), choice, images, f);
        else
          launch_each(chain_pool_back_kernel, groups, stream, in, pool(l), static_cast<const int32_t*>(choice), images,
                      f);
        break;
      case Kind::move:
        launch_each(chain_move_kernel, groups, stream, in, forward ? l.in : l.out, made, images, f);
        break;
    }
  }
  static Pool pool(const Layer& l) {
    const ChainRecord& r = l.r;
    return {l.in, l.out, r.kh, r.kw, r.sh, r.sw, r.ph, r.pw, r.count_pad != 0};
  }

  Product product(const Layer& l, const Map& in, int64_t images, const bool* done, const Finish& f,
                  bool forward) const {
    const ChainRecord& r = l.r;
    Product p{};
    p.a = in, p.done = done;
    const int64_t weights = forward ? l.forward : l.backward;
    if (in.as == Precision::float32) {
      p.b_hi = packed_ + weights;
    } else {
      p.b_hi = reinterpret_cast<const uint16_t*>(packed_ + size_.hi_at) + weights;
      p.b_lo = reinterpret_cast<const uint16_t*>(packed_ + size_.lo_at) + weights;
    }
    p.bias = forward ? vectors() + l.bias : nullptr;
    p.finish = f;
    p.direction = forward ? 1 : -1;
    p.step_y = p.step_x = p.every_y = p.every_x = p.taps_w = p.width = p.source_h = p.source_w = 1;
    if (l.linear()) {  // one pixel that has the whole map for channels
      const int64_t deep = l.in.values(), out = l.out.channels();
      p.rows = images, p.pixels = 1;
      p.columns = forward ? out : deep;
      p.depth = p.channels = forward ? deep : out;
      p.piece = piece_of(p.depth, p.columns);
      return p;
    }
    const Shape &from = forward ? l.in : l.out, &to = forward ? l.out : l.in;
    p.rows = images * to.pixels(), p.pixels = to.pixels(), p.columns = to.channels();
    p.channels = from.channels(), p.depth = r.kh * r.kw * p.channels;
    p.piece = round_up(p.depth, 32);  // in one: it has rows enough, and no room for pieces
    p.width = int(to.w), p.taps_w = int(r.kw), p.source_h = int(from.h), p.source_w = int(from.w);
    p.first_y = int(forward ? -r.ph : r.ph), p.first_x = int(forward ? -r.pw : r.pw);
    (forward ? p.step_y : p.every_y) = int(r.sh);
    (forward ? p.step_x : p.every_x) = int(r.sw);
    return p;
  }

  Layers layers_;
  const Room& room_;
  int which_;
  const float* packed_;
  ChainPackedCuda size_;
};

// f(first image, images) for every chunk.
template <class F>
void each_chunk(int64_t n, int64_t images, F f) {
  for (int64_t first = 0; first < n; first += images) f(first, n - first < images ? n - first : images);
}

void export_map(const Map& a, const Map& b, const double* factor, float* out, const Shape& s, int64_t images,
                void* stream) {
  launch_each(chain_export_kernel, images * s.units(), stream, a, b, factor, out, s, images);
}

__global__ void __launch_bounds__(kLayerThreads) chain_copy_kernel(float* to, const float* from, int64_t count) {
  for (int64_t i = first_index(); i < count; i += index_step()) to[i] = from[i];
}

// ---- The attack
// ------------------------------------------------------------------------------------------------------

class Attack {
 public:
  Attack(const ChainPgd& a, Precision precision, int device)
      : a_(a),
        room_(a.student.plan, a.teacher.plan, a.n, 1, precision, a.workspace),
        student_(a.student, room_, 0),
        pair_(needs_teacher(a.criterion)),
        both_(moves_teacher(a.criterion)),
        device_(device) {
    if (pair_) teacher_ = std::make_unique<Net>(a.teacher, room_, 1);
  }

  void operator()(void* stream) {
    each_chunk(a_.n, room_.images, [&](int64_t first, int64_t images) {
      launch(chain_admit_kernel, dim3(grid_of(images)), dim3(kAttackThreads), 0, stream, a_, room_.chunk, first);
      walk(images, stream);
      if (a_.judge || a_.early_stop || a_.keep_best)
        look(images, stream);
      else
        launch(chain_leave_kernel, dim3(grid_of(images)), dim3(kAttackThreads), 0, stream, a_, room_.chunk);
    });
  }

 private:
  // All steps of a chunk. The first of a call is launched as it is, which also loads the kernels; a graph repeats it.
  void walk(int64_t images, void* stream) {
    int64_t left = a_.steps;
    if (left && images != captured_) {
      step(images, stream);
      --left;
    }
    if (left && images != captured_) {
      replay_ = std::make_unique<Replay>([this, images](void* to) { step(images, to); }, stream);
      captured_ = images;
    }
    for (; left; --left) (*replay_)(stream);
  }

  const bool* done() const { return a_.early_stop ? room_.chunk.done : nullptr; }

  void look(int64_t images, void* stream) const {
    const auto nothing = [](int64_t, const Map&, const Shape&) {};
    student_.forward(room_.chunk.x, images, done(), stream, nothing);
    if (pair_) teacher_->forward(room_.chunk.x, images, done(), stream, nothing);
    launch(chain_judge_kernel, dim3(grid_of(images)), dim3(kAttackThreads), sizeof(int), stream, a_, room_.chunk);
  }

  void step(int64_t images, void* stream) const {
    const Chunk& c = room_.chunk;
    look(images, stream);
    if (both_) teacher_->backward(c.cotangent[1], images, 1, -1, nullptr, done(), stream);
    const Shape s = student_.backward(c.cotangent[0], images, 1, -1, nullptr, done(), stream);
    export_map(student_.end(), both_ ? teacher_->end() : Map{}, nullptr, c.g, s, images, stream);
    pgd_step_cuda({c.x, c.x0, c.g, c.x, c.bad, c.step, c.eps, 0, 0, a_.lo, a_.hi, a_.sparsity, images, c.inputs,
                   a_.norm, Dtype::f32, a_.targeted},
                  device_, stream);
  }

  const ChainPgd& a_;
  Room room_;
  Net student_;
  std::unique_ptr<Net> teacher_;
  bool pair_, both_;
  int device_;
  std::unique_ptr<Replay> replay_;
  int64_t captured_ = 0;  // images that the graph is for
};

bool fusible(const ChainPlan& plan) { return !plan.records || chain_fused_size(plan).hi > 0; }

}  // namespace

ChainPackedCuda chain_packed_cuda(const ChainPlan& plan) {
  const Layers layers(plan);
  const ChainFusedSize fused = chain_fused_size(plan);
  ChainPackedCuda p{};
  p.floats = round_up(layers.weights + layers.vectors + fused.floats, 4);
  p.hi = round_up(layers.weights + fused.hi, 8);
  p.lo = layers.weights;  // a multiple of 8, as every matrix is
  p.hi_at = p.floats;
  p.lo_at = p.hi_at + p.hi / 2;
  p.size = p.lo_at + p.lo / 2;
  return p;
}

// The fused kernels' share of the packed parameters.
ChainFusedNet chain_fused_net(const ChainNet& net) {
  if (!net.plan.records) return {net.plan, nullptr, nullptr};
  const Layers layers(net.plan);
  const float* const hi = net.packed + chain_packed_cuda(net.plan).hi_at;
  return {net.plan, net.packed + layers.weights + layers.vectors,
          reinterpret_cast<const uint16_t*>(hi) + layers.weights};
}

void chain_map_cuda(const ChainPlan& plan, int32_t* map) {
  check_offsets(plan);
  const Layers layers(plan);
  const ChainPackedCuda size = chain_packed_cuda(plan);
  int32_t *const hi = map + size.floats, *const lo = hi + size.hi;
  for (int32_t* at = map; at != lo + size.lo; ++at) *at = -1;
  for (const Layer& l : layers.layer) {
    if (l.kind == Kind::product) map_product(l, map);
    map_vectors(l, map + layers.weights);
  }
  for (int64_t i = 0; i < layers.weights; ++i) hi[i] = lo[i] = map[i];
  chain_fused_map(plan, map + layers.weights + layers.vectors, hi + layers.weights);
}

int64_t chain_workspace_cuda(const ChainPlan& student, const ChainPlan& teacher, int64_t n, int64_t rows,
                             Precision precision) {
  const int64_t own = Room(student, teacher, n, rows, precision, nullptr).bytes;
  if (precision != Precision::float16 || !fusible(student) || !fusible(teacher)) return own;
  return most(own, chain_fused_workspace(student, teacher, n));
}

void chain_pack_cuda(const ChainPack& a, const int32_t* map, int device, void* stream) {
  DeviceGuard guard(device);
  const ChainPackedCuda size = chain_packed_cuda(a.plan);
  launch_each(chain_pack_kernel, size.floats + size.hi + size.lo, stream, a.weights, map, size, a.packed);
}

void chain_forward_cuda(const ChainForward& a, Precision precision, int device, void* stream) {
  if (a.n == 0) return;
  DeviceGuard guard(device);
  const Room room(a.net.plan, {}, a.n, 1, precision, a.workspace);
  const Net net(a.net, room, 0);
  each_chunk(a.n, room.images, [&](int64_t first, int64_t images) {
    net.forward(a.x + first * a.net.plan.inputs(), images, nullptr, stream,
                [&](int64_t i, const Map& map, const Shape& s) {
                  for (int64_t k = 0; k < a.asked; ++k)
                    if (a.at[k] == i) export_map(map, {}, nullptr, a.out[k] + first * s.units(), s, images, stream);
                });
  });
}

void chain_gradient_cuda(const ChainGradient& a, Precision precision, int device, void* stream) {
  if (a.n == 0 || a.rows == 0) return;
  DeviceGuard guard(device);
  const ChainPlan& plan = a.net.plan;
  const int64_t classes = plan.classes();
  if (a.layer == plan.records - 1) {
    launch_each(chain_copy_kernel, a.n * a.rows * classes, stream, a.out, a.cotangent, a.n * a.rows * classes);
    return;
  }
  const Room room(plan, {}, a.n, a.rows, precision, a.workspace);
  const Net net(a.net, room, 0);
  each_chunk(a.n, room.images, [&](int64_t first, int64_t images) {
    net.forward(a.x + first * plan.inputs(), images, nullptr, stream, [](int64_t, const Map&, const Shape&) {});
    const Shape s =
        net.backward(a.cotangent + first * a.rows * classes, images, a.rows, a.layer, room.undo, nullptr, stream);
    export_map(net.end(), {}, room.undo, a.out + first * a.rows * s.units(), s, images * a.rows, stream);
  });
}

void chain_pgd_cuda(const ChainPgd& a, Precision precision, int device, void* stream) {
  if (a.n == 0) return;
  DeviceGuard guard(device);
  const ChainPlan &student = a.student.plan, &teacher = a.teacher.plan;
  if (precision == Precision::float16 && fusible(student) && fusible(teacher) &&
      chain_fused_covers(student, teacher, a.criterion, a.norm, device))
    return chain_fused_pgd(a, chain_fused_net(a.student), chain_fused_net(a.teacher), device, stream);
  Attack(a, precision, device)(stream);
}

}  // namespace tsr
