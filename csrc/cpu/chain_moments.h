// Moments of two chains' channels over one group of images, for one instruction set (see core/chain_correlation.h).
//
// An image is a lane of the activations, so a channel's samples are its positions, and the lanes of each: one piece of
// memory where every lane has an image. They go to channel_correlation's loops of the same instruction set, which find
// them in the cache: the teacher's where they were computed, the student's where they were kept until then.
#include "core/chain_correlation.h"
#include "cpu/chain_body.h"

namespace tsr {
namespace {

// channel_correlation_{chunk,scratch} of this instruction set
struct MomentsOf {
  void (*chunk)(const ChannelCorrelation&, int64_t first, int64_t last, double* moments, void* memory);
  int64_t (*scratch)(const ChannelCorrelation&);
};

ChannelCorrelation channels_of(const ChainCorrelation& a, int64_t pair) {
  ChannelCorrelation c{};
  c.student.channels = a.student.plan.record[a.at_student[pair]].oc;
  c.teacher.channels = a.teacher.plan.record[a.at_teacher[pair]].oc;
  c.dtype = Dtype::f32;
  return c;
}

// The network as far as it is looked at.
ChainNet head_of(const ChainNet& net, const int64_t* at, int64_t pairs) {
  int64_t last = 0;
  for (int64_t p = 0; p < pairs; ++p) last = most(last, at[p]);
  return {{net.plan.record, last + 1}, net.packed};
}

// A thread's memory, sized for the widest vectors.
struct GroupRoom {
  ChainNet student, teacher;
  Room shared;
  float *in, **kept;  // the images; [pairs] student's results
  void* scratch;
  GroupRoom(const ChainCorrelation& a, const MomentsOf& of, Carve& memory)
      : student(head_of(a.student, a.at_student, a.pairs)),
        teacher(head_of(a.teacher, a.at_teacher, a.pairs)),
        shared(student.plan, teacher.plan, memory),
        in(memory.take<float>(student.plan.inputs() * kMostLanes)),
        kept(memory.take<float*>(a.pairs)) {
    int64_t bytes = 0;
    for (int64_t p = 0; p < a.pairs; ++p) {
      float* const results = memory.take<float>(a.student.plan.record[a.at_student[p]].outputs() * kMostLanes);
      if (kept) kept[p] = results;
      bytes = most(bytes, of.scratch(channels_of(a, p)));
    }
    scratch = memory.take<char>(bytes);
  }
};

int64_t group_scratch(const ChainCorrelation& a, const MomentsOf& of) {
  Carve memory{nullptr};
  const GroupRoom room(a, of, memory);
  Net<4>(room.student, room.shared, memory);
  Net<4>(room.teacher, room.shared, memory);
  return memory.used;
}

// Lanes without an image are no samples.
template <int L>
ChannelCorrelation samples_of(const ChainCorrelation& a, int64_t pair, const float* student, const float* teacher,
                              int64_t count) {
  const ChainRecord& r = a.student.plan.record[a.at_student[pair]];
  const int64_t positions = r.oh * r.ow;
  ChannelCorrelation c = channels_of(a, pair);
  c.student = {student, c.student.channels, L, positions * L, 1};
  c.teacher = {teacher, c.teacher.channels, L, positions * L, 1};
  c.images = count == L ? 1 : positions;
  c.positions = count == L ? positions * L : count;
  return c;
}

template <int L>
void group_moments_in(const ChainCorrelation& a, int64_t first, int64_t count, const MomentsOf& of, double* moments,
                      Carve memory) {
  const GroupRoom room(a, of, memory);
  Vec<L>* const in = reinterpret_cast<Vec<L>*>(room.in);
  const int64_t inputs = a.student.plan.inputs();
  const float* image[L] = {};
  for (int64_t l = 0; l < count; ++l) image[l] = a.x + (first + l) * inputs;
  to_lanes<L>(image, count, inputs, in);
  Net<L>(room.student, room.shared, memory).forward(in, [&](int64_t i, const Vec<L>* results) {
    const size_t bytes = size_t(a.student.plan.record[i].outputs()) * sizeof(Vec<L>);
    for (int64_t p = 0; p < a.pairs; ++p)
      if (a.at_student[p] == i) memcpy(room.kept[p], results, bytes);
  });
  Net<L>(room.teacher, room.shared, memory).forward(in, [&](int64_t i, const Vec<L>* results) {
    double* to = moments;
    for (int64_t p = 0; p < a.pairs; ++p) {
      if (a.at_teacher[p] == i) {
        const auto s = samples_of<L>(a, p, room.kept[p], reinterpret_cast<const float*>(results), count);
        of.chunk(s, 0, samples(s), to, room.scratch);
      }
      const ChannelCorrelation c = channels_of(a, p);
      to += moments_size(c.student.channels, c.teacher.channels);
    }
  });
}

// Of images [first, first + count), at most kMostLanes; the pairs' moments one after the other.
void group_moments(const ChainCorrelation& a, int64_t first, int64_t count, const MomentsOf& of, double* moments,
                   void* memory) {
  with_width(count, [&](auto width) {
    group_moments_in<decltype(width)::lanes>(a, first, count, of, moments, Carve{static_cast<char*>(memory)});
  });
}

}  // namespace
}  // namespace tsr
