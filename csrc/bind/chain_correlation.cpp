#include "core/chain_correlation.h"

#include "bind/chain.h"

namespace {

// The networks, their paired records and the number of images: all that the workspace's size depends on.
struct Question {
  tsr::ChainNet student, teacher;
  const std::vector<int64_t>&at_student, &at_teacher;
  int64_t n;

  tsr::ChainCorrelation on(const float* x, double* const* moments, void* workspace) const {
    return {student,  teacher, x, at_student.data(), at_teacher.data(), moments, n, int64_t(at_student.size()),
            workspace};
  }
  void check() const {
    if (at_student.empty() || at_student.size() != at_teacher.size())
      throw std::invalid_argument("layers: must be as many of the teacher as of the student, at least one");
    for (size_t p = 0; p < at_student.size(); ++p) {
      const auto record = [&](const tsr::ChainPlan& plan, int64_t i) {
        if (i < 0 || i >= plan.records) throw std::invalid_argument("layers: must be records of the plans");
        return plan.record[i];
      };
      const tsr::ChainRecord s = record(student.plan, at_student[p]), t = record(teacher.plan, at_teacher[p]);
      if (s.oh != t.oh || s.ow != t.ow) throw std::invalid_argument("layers: must have the same height and width");
    }
    if (student.plan.inputs() != teacher.plan.inputs())
      throw std::invalid_argument("teacher: must take the student's images");
  }
};

tsr::ChainNet without_parameters(Address plan, int64_t records, const char* name) {
  return {checked_plan(plan, records, INT64_MAX, name), nullptr};
}

// Checked arguments, and the vector that holds the addresses of the moments.
struct Arguments {
  std::vector<double*> moments;
  tsr::ChainCorrelation args;
};

template <class Need>
Arguments arguments(const Question& question, Address x, const std::vector<Address>& moments, Address workspace,
                    int64_t workspace_bytes, Need need) {
  question.check();
  if (moments.size() != question.at_student.size()) throw std::invalid_argument("moments: must be one for each pair");
  Arguments a;
  for (Address address : moments) a.moments.push_back(at<double>(address, 1, "moments"));
  const int64_t required = need(question.on(nullptr, nullptr, nullptr));
  if (workspace_bytes < required)
    throw std::invalid_argument("workspace: needs " + std::to_string(required) + " bytes, got " +
                                std::to_string(workspace_bytes));
  a.args =
      question.on(at<const float>(x, question.n, "x"), a.moments.data(), at<void>(workspace, required, "workspace"));
  return a;
}

}  // namespace

void bind_chain_correlation(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  using Layers = const std::vector<int64_t>&;
  cpu.def("chain_correlation_workspace",
          [](Address student, int64_t student_records, Address teacher, int64_t teacher_records, Layers at_student,
             Layers at_teacher, int64_t n, int threads) {
            const Question question{without_parameters(student, student_records, "student"),
                                    without_parameters(teacher, teacher_records, "teacher"), at_student, at_teacher, n};
            question.check();
            return tsr::chain_correlation_workspace_cpu(question.on(nullptr, nullptr, nullptr), threads);
          });
  cpu.def(
      "chain_correlation",
      [](Address student, int64_t student_records, Address student_packed, int64_t student_values, Address teacher,
         int64_t teacher_records, Address teacher_packed, int64_t teacher_values, Address x, Layers at_student,
         Layers at_teacher, const std::vector<Address>& moments, int64_t n, Address workspace, int64_t workspace_bytes,
         int threads) {
        const auto size = tsr::chain_packed_size;
        const Question question{net_of(student, student_records, student_packed, student_values, size, "student"),
                                net_of(teacher, teacher_records, teacher_packed, teacher_values, size, "teacher"),
                                at_student, at_teacher, n};
        const auto need = [&](const auto& a) { return tsr::chain_correlation_workspace_cpu(a, threads); };
        tsr::chain_correlation_cpu(arguments(question, x, moments, workspace, workspace_bytes, need).args, threads);
      },
      release_gil());
#ifdef TSR_WITH_CUDA
  cuda.def("chain_correlation_covers",
           [](Address student, int64_t student_records, Address teacher, int64_t teacher_records, int device) {
             return tsr::chain_correlation_covers(checked_plan(student, student_records, INT64_MAX, "student"),
                                                  checked_plan(teacher, teacher_records, INT64_MAX, "teacher"), device);
           });
  cuda.def("chain_correlation_workspace", [](Address student, int64_t student_records, Address teacher,
                                             int64_t teacher_records, Layers at_student, Layers at_teacher, int64_t n,
                                             int device) {
    const Question question{without_parameters(student, student_records, "student"),
                            without_parameters(teacher, teacher_records, "teacher"), at_student, at_teacher, n};
    question.check();
    return tsr::chain_correlation_workspace_cuda(question.on(nullptr, nullptr, nullptr), device);
  });
  cuda.def(
      "chain_correlation",
      [](Address student, int64_t student_records, Address student_packed, int64_t student_values, Address teacher,
         int64_t teacher_records, Address teacher_packed, int64_t teacher_values, Address x, Layers at_student,
         Layers at_teacher, const std::vector<Address>& moments, int64_t n, Address workspace, int64_t workspace_bytes,
         int device, Address stream) {
        const auto size = packed_size_cuda;
        const Question question{net_of(student, student_records, student_packed, student_values, size, "student"),
                                net_of(teacher, teacher_records, teacher_packed, teacher_values, size, "teacher"),
                                at_student, at_teacher, n};
        const auto need = [&](const auto& a) { return tsr::chain_correlation_workspace_cuda(a, device); };
        tsr::chain_correlation_cuda(arguments(question, x, moments, workspace, workspace_bytes, need).args, device,
                                    stream_of(stream));
      },
      release_gil());
#endif
}
