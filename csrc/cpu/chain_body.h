// The operations on chains for one instruction set; compiled once for each by chain{,_avx2,_avx512}.cpp.
//
// A thread takes up to kMostLanes images at a time and never meets another: it has its own scratch memory, and what is
// written for an image depends on that image alone.
#include <omp.h>

#include "cpu/chain_net.h"

namespace tsr {
namespace {

// The narrowest vectors that hold `images`.
template <int L>
struct Width {
  static constexpr int lanes = L;
};
template <class F>
void with_width([[maybe_unused]] int64_t images, F f) {
#if defined(__AVX512F__)
  if (images > 8) return f(Width<16>{});
#endif
#if defined(__AVX2__)
  if (images > 4) return f(Width<8>{});
  if (images < 2) return f(Width<1>{});
#endif
  f(Width<4>{});
}

// As many images to a thread as there are lanes, or fewer so that all threads have some.
inline int64_t images_each(int64_t n, int threads) {
  const int64_t share = (n + threads - 1) / threads;
  return share < kMostLanes ? share : int64_t(kMostLanes);
}

int64_t workspace(const ChainPlan& student, const ChainPlan& teacher) {
  Carve c{nullptr};
  const Room room(student, teacher, c);
  Net<4>({student, nullptr}, room, c);
  Net<4>({teacher, nullptr}, room, c);
  for (int piece = 0; piece < 4; ++piece) c.take<float>(student.inputs() * kMostLanes);  // see Attack
  for (int piece = 0; piece < 5; ++piece) c.take<float>(student.classes() * kMostLanes);
  return c.used;
}

template <class F>
void each_group(int64_t n, int threads, void* memory, int64_t bytes, F f) {
  const int64_t each = n ? images_each(n, threads) : 1, groups = (n + each - 1) / each;
#pragma omp parallel num_threads(threads) if (threads > 1 && groups > 1)
  {
    char* const own = static_cast<char*>(memory) + omp_get_thread_num() * bytes;
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * each, count = n - first < each ? n - first : each;
      with_width(count, [&](auto width) { f(width, first, count, Carve{own}); });
    }
  }
}

void forward(const ChainForward& a, int threads) {
  const ChainPlan& plan = a.net.plan;
  const int64_t inputs = plan.inputs();
  each_group(a.n, threads, a.workspace, workspace(plan, {}),
             [&](auto width, int64_t first, int64_t count, Carve memory) {
               constexpr int L = decltype(width)::lanes;
               const Room room(plan, {}, memory);
               Net<L> net(a.net, room, memory);
               Vec<L>* const in = reinterpret_cast<Vec<L>*>(memory.take<float>(inputs * L));
               const float* image[L] = {};
               for (int64_t l = 0; l < count; ++l) image[l] = a.x + (first + l) * inputs;
               to_lanes<L>(image, count, inputs, in);
               net.forward(in, [&](int64_t i, const Vec<L>* results) {
                 const int64_t units = plan.record[i].outputs();
                 for (int64_t k = 0; k < a.asked; ++k) {
                   if (a.at[k] != i) continue;
                   float* to[L] = {};
                   for (int64_t l = 0; l < count; ++l) to[l] = a.out[k] + (first + l) * units;
                   from_lanes<L>(results, count, units, to);
                 }
               });
             });
}

void gradient(const ChainGradient& a, int threads) {
  const ChainPlan& plan = a.net.plan;
  const int64_t inputs = plan.inputs(), classes = plan.classes();
  const int64_t units = a.layer < 0 ? inputs : plan.record[a.layer].outputs();
  each_group(a.n, threads, a.workspace, workspace(plan, {}),
             [&](auto width, int64_t first, int64_t count, Carve memory) {
               constexpr int L = decltype(width)::lanes;
               const Room room(plan, {}, memory);
               Net<L> net(a.net, room, memory);
               Vec<L>* const in = reinterpret_cast<Vec<L>*>(memory.take<float>(inputs * L));
               Vec<L>* const cotangent = reinterpret_cast<Vec<L>*>(memory.take<float>(classes * L));
               const float* from[L] = {};
               for (int64_t l = 0; l < count; ++l) from[l] = a.x + (first + l) * inputs;
               to_lanes<L>(from, count, inputs, in);
               net.forward(in, [](int64_t, const Vec<L>*) {});
               for (int64_t row = 0; row < a.rows; ++row) {
                 float* to[L] = {};
                 for (int64_t l = 0; l < count; ++l) {
                   from[l] = a.cotangent + ((first + l) * a.rows + row) * classes;
                   to[l] = a.out + ((first + l) * a.rows + row) * units;
                 }
                 to_lanes<L>(from, count, classes, cotangent);
                 from_lanes<L>(net.backward(cotangent, a.layer), count, units, to);
               }
             });
}

// An image under attack: a lane of its thread.
struct Slot {
  int64_t image, step;
  float best;
  bool held, adversarial;  // whether there is a best candidate, and whether it is adversarial
};

class Attack {
 public:
  Attack(const ChainPgd& a, Carve memory)
      : a_(a), memory_(memory), inputs_(a.student.plan.inputs()), classes_(a.student.plan.classes()) {
    x_ = memory_.take<float>(inputs_ * kMostLanes);
    g_ = memory_.take<float>(inputs_ * kMostLanes);
    for (auto& logits : logits_) logits = memory_.take<float>(classes_ * kMostLanes);
    for (auto& cotangent : cotangent_) cotangent = memory_.take<float>(classes_ * kMostLanes);
  }

  bool empty() const { return !active_; }
  int64_t active() const { return active_; }

  void admit(int64_t image) {
    slot_[active_] = {image, 0, 0.f, false, false};
    memcpy(x(active_), a_.start + image * inputs_, size_t(inputs_) * sizeof(float));
    a_.loss[image] = a_.closeness[image] = NAN;
    a_.adversarial[image] = false;
    a_.bad[image] = a_.queries[image] = 0;
    ++active_;
  }

  // Evaluates all images of the thread, takes the steps that are due and lets go of images that are done.
  template <int L>
  void advance() {
    const bool final_look = a_.judge || a_.early_stop || a_.keep_best;
    if (!final_look) release([&](const Slot& s) { return s.step == a_.steps; });
    if (!active_) return;
    Carve memory = memory_;
    const bool pair = needs_teacher(a_.criterion), both = moves_teacher(a_.criterion);
    const Room room(a_.student.plan, a_.teacher.plan, memory);
    Net<L> student(a_.student, room, memory);
    Vec<L>* const in = reinterpret_cast<Vec<L>*>(memory.take<float>(inputs_ * L));
    Vec<L>* const back = reinterpret_cast<Vec<L>*>(memory.take<float>(inputs_ * L));
    Vec<L>* const lanes = reinterpret_cast<Vec<L>*>(memory.take<float>(classes_ * L));
    const float* images[L] = {};
    for (int64_t l = 0; l < active_; ++l) images[l] = x(l);
    to_lanes<L>(images, active_, inputs_, in);
    const auto look = [&](Net<L>& net, float* logits) {
      float* to[L] = {};
      for (int64_t l = 0; l < active_; ++l) to[l] = logits + l * classes_;
      from_lanes<L>(net.forward(in, [](int64_t, const Vec<L>*) {}), active_, classes_, to);
    };
    const auto carry = [&](Net<L>& net, const float* cotangents) {
      const float* from[L] = {};
      for (int64_t l = 0; l < active_; ++l) from[l] = cotangents + l * classes_;
      to_lanes<L>(from, active_, classes_, lanes);
      return net.backward(lanes, -1);
    };
    look(student, logits_[0]);
    if (pair) {
      Net<L> teacher(a_.teacher, room, memory);
      look(teacher, logits_[1]);
      judge();
      if (both && walking()) {
        const Vec<L>* const g = carry(teacher, cotangent_[1]);
        for (int64_t u = 0; u < inputs_; ++u) back[u] = g[u];
      }
    } else {
      judge();
    }
    if (walking()) {
      const Vec<L>* g = carry(student, cotangent_[0]);
      if (both) {
        for (int64_t u = 0; u < inputs_; ++u) back[u] += g[u];
        g = back;
      }
      float* to[L] = {};
      for (int64_t l = 0; l < active_; ++l) to[l] = g_ + l * inputs_;
      from_lanes<L>(g, active_, inputs_, to);
      for (int64_t l = 0; l < active_; ++l)
        if (!done_[l]) step(l);
    }
    int64_t l = 0;
    release([&](const Slot&) { return done_[l++]; });
  }

 private:
  float* x(int64_t l) const { return x_ + l * inputs_; }
  bool walking() const {
    for (int64_t l = 0; l < active_; ++l)
      if (!done_[l]) return true;
    return false;
  }
  void record(int64_t l) const {
    if (a_.iterates)
      memcpy(a_.iterates + (slot_[l].step * a_.n + slot_[l].image) * inputs_, x(l), size_t(inputs_) * sizeof(float));
  }

  // Losses, best candidates, early stops.
  void judge() {
    for (int64_t l = 0; l < active_; ++l) {
      Slot& s = slot_[l];
      record(l);
      const ChainLossValue at = chain_loss(a_.criterion, logits_[0] + l * classes_, logits_[1] + l * classes_,
                                           a_.labels ? a_.labels[s.image] : 0, classes_, a_.targeted,
                                           cotangent_[0] + l * classes_, cotangent_[1] + l * classes_);
      if (a_.queries[s.image]++ == 0 && needs_teacher(a_.criterion))
        a_.closeness[s.image] = chain_closeness(logits_[0] + l * classes_, logits_[1] + l * classes_, classes_);
      const bool last = s.step == a_.steps, stop = a_.early_stop && at.adversarial;
      done_[l] = last || stop;
      // adversarial before not, then the better loss; a NaN loss is the worst
      const float value = float(at.value), signed_value = a_.targeted ? -value : value;
      const float score = signed_value == signed_value ? signed_value : -INFINITY;
      const bool better =
          !s.held || (at.adversarial && !s.adversarial) || (at.adversarial == s.adversarial && score > s.best);
      if (a_.keep_best ? better : done_[l]) {
        s.held = true;
        s.best = score;
        s.adversarial = at.adversarial;
        a_.loss[s.image] = value;
        a_.adversarial[s.image] = at.adversarial;
        write(l);
      }
    }
  }
  void write(int64_t l) const { memcpy(a_.x + slot_[l].image * inputs_, x(l), size_t(inputs_) * sizeof(float)); }

  void step(int64_t l) {
    Slot& s = slot_[l];
    const int64_t i = s.image;
    int64_t bad = 0;
    const PgdStep one{x(l),
                      a_.x0 + i * inputs_,
                      g_ + l * inputs_,
                      x(l),
                      &bad,
                      a_.step ? a_.step + i : nullptr,
                      a_.eps ? a_.eps + i : nullptr,
                      a_.step_value,
                      a_.eps_value,
                      a_.lo,
                      a_.hi,
                      a_.sparsity,
                      1,
                      inputs_,
                      a_.norm,
                      Dtype::f32,
                      a_.targeted};
    pgd_step_cpu(one, 1);
    a_.bad[i] += bad;
    ++s.step;
  }

  template <class Done>
  void release(Done done) {
    int64_t kept = 0;
    for (int64_t l = 0; l < active_; ++l) {
      if (done(slot_[l])) {
        leave(l);
        continue;
      }
      if (kept != l) {
        slot_[kept] = slot_[l];
        memcpy(x(kept), x(l), size_t(inputs_) * sizeof(float));
      }
      ++kept;
    }
    active_ = kept;
  }
  void leave(int64_t l) {
    Slot& s = slot_[l];
    if (!s.held) write(l);  // never evaluated
    for (; a_.iterates && s.step <= a_.steps; ++s.step) record(l);
  }

  const ChainPgd& a_;
  Carve memory_;
  int64_t inputs_, classes_, active_ = 0;
  float *x_, *g_, *logits_[2], *cotangent_[2];
  Slot slot_[kMostLanes];
  bool done_[kMostLanes];
};

void pgd(const ChainPgd& a, int threads) {
  const int64_t bytes = workspace(a.student.plan, a.teacher.plan), each = a.n ? images_each(a.n, threads) : 1;
  int64_t next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && a.n > 1)
  {
    Attack attack(a, Carve{static_cast<char*>(a.workspace) + omp_get_thread_num() * bytes});
    for (bool more = true; more || !attack.empty();) {
      while (more && attack.active() < each) {
        int64_t image;
#pragma omp atomic capture
        image = next++;
        more = image < a.n;
        if (more) attack.admit(image);
      }
      with_width(attack.active(), [&](auto width) { attack.template advance<decltype(width)::lanes>(); });
    }
  }
}

}  // namespace
}  // namespace tsr
