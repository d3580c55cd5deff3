#include "bind/chain.h"

#include "core/chain_fused.h"

namespace {

tsr::ChainForward forward_of(const tsr::ChainNet& net, Address x, const std::vector<int64_t>& asked,
                             const std::vector<float*>& out, int64_t n, Address workspace) {
  return {net,
          at<const float>(x, n, "x"),
          asked.data(),
          out.data(),
          n,
          int64_t(asked.size()),
          at<void>(workspace, n, "workspace")};
}
std::vector<float*> results_of(const std::vector<Address>& out, int64_t n) {
  std::vector<float*> to;
  for (Address address : out) to.push_back(at<float>(address, n, "out"));
  return to;
}

tsr::ChainGradient gradient_of(const tsr::ChainNet& net, Address x, Address cotangent, Address out, int64_t n,
                               int64_t rows, int64_t layer, Address workspace) {
  return {net,
          at<const float>(x, n, "x"),
          at<const float>(cotangent, n * rows, "cotangent"),
          at<float>(out, n * rows, "out"),
          n,
          rows,
          layer,
          at<void>(workspace, n, "workspace")};
}

// The arguments of chain_pgd after the networks, as Python gives them.
struct Attack {
  Address x0, start, x, labels, loss, adversarial, closeness, bad, queries, iterates, step, eps;
  double step_value, eps_value, lo, hi, sparsity;
  int64_t n, steps;
  int norm, criterion;
  bool targeted, keep_best, early_stop, judge;
  Address workspace;

  tsr::ChainPgd on(const tsr::ChainNet& student, const tsr::ChainNet& teacher) const {
    return {student,
            teacher,
            at<const float>(x0, n, "x0"),
            at<const float>(start, n, "start"),
            at<float>(x, n, "x"),
            at<const int64_t>(labels, 0, "labels"),
            at<float>(loss, n, "loss"),
            at<bool>(adversarial, n, "adversarial"),
            at<float>(closeness, n, "closeness"),
            at<int64_t>(bad, n, "bad"),
            at<int64_t>(queries, n, "queries"),
            at<float>(iterates, 0, "iterates"),
            at<const double>(step, 0, "step"),
            at<const double>(eps, 0, "eps"),
            step_value,
            eps_value,
            lo,
            hi,
            sparsity,
            n,
            steps,
            tsr::Norm(norm),
            tsr::ChainLoss(criterion),
            targeted,
            keep_best,
            early_stop,
            judge,
            at<void>(workspace, n, "workspace")};
  }
};

#define TSR_ATTACK_PARAMETERS                                                                                         \
  Address x0, Address start, Address x, Address labels, Address loss, Address adversarial, Address closeness,         \
      Address bad, Address queries, Address iterates, Address step, Address eps, double step_value, double eps_value, \
      double lo, double hi, double sparsity, int64_t n, int64_t steps, int norm, int criterion, bool targeted,        \
      bool keep_best, bool early_stop, bool judge, Address workspace
#define TSR_ATTACK                                                                                                    \
  Attack {                                                                                                            \
    x0, start, x, labels, loss, adversarial, closeness, bad, queries, iterates, step, eps, step_value, eps_value, lo, \
        hi, sparsity, n, steps, norm, criterion, targeted, keep_best, early_stop, judge, workspace                    \
  }

void bind_cpu(py::module_& cpu) {
  cpu.def("chain_packed_size", [](Address plan, int64_t records, int64_t parameters) {
    return tsr::chain_packed_size(checked_plan(plan, records, parameters, "plan"));
  });
  cpu.def("chain_workspace", [](Address student, int64_t student_records, Address teacher, int64_t teacher_records) {
    return tsr::chain_workspace(checked_plan(student, student_records, INT64_MAX, "student"),
                                checked_plan(teacher, teacher_records, INT64_MAX, "teacher"));
  });
  cpu.def(
      "chain_pack",
      [](Address plan, int64_t records, Address weights, int64_t parameters, Address packed, int) {
        const tsr::ChainPlan p = checked_plan(plan, records, parameters, "plan");
        const int64_t values = tsr::chain_packed_size(p);
        tsr::chain_pack_cpu({p, at<const float>(weights, parameters, "weights"), at<float>(packed, values, "packed")});
      },
      release_gil());
  cpu.def(
      "chain_forward",
      [](Address plan, int64_t records, Address packed, int64_t values, Address x, const std::vector<int64_t>& asked,
         const std::vector<Address>& out, int64_t n, Address workspace, int threads) {
        const auto net = net_of(plan, records, packed, values, tsr::chain_packed_size, "plan");
        const auto to = results_of(out, n);
        tsr::chain_forward_cpu(forward_of(net, x, asked, to, n, workspace), threads);
      },
      release_gil());
  cpu.def(
      "chain_gradient",
      [](Address plan, int64_t records, Address packed, int64_t values, Address x, Address cotangent, Address out,
         int64_t n, int64_t rows, int64_t layer, Address workspace, int threads) {
        const auto net = net_of(plan, records, packed, values, tsr::chain_packed_size, "plan");
        tsr::chain_gradient_cpu(gradient_of(net, x, cotangent, out, n, rows, layer, workspace), threads);
      },
      release_gil());
  cpu.def(
      "chain_pgd",
      [](Address plan, int64_t records, Address packed, int64_t values, Address teacher_plan, int64_t teacher_records,
         Address teacher_packed, int64_t teacher_values, TSR_ATTACK_PARAMETERS, int threads) {
        const auto size = tsr::chain_packed_size;
        const auto student = net_of(plan, records, packed, values, size, "student");
        const auto teacher = net_of(teacher_plan, teacher_records, teacher_packed, teacher_values, size, "teacher");
        tsr::chain_pgd_cpu(TSR_ATTACK.on(student, teacher), threads);
      },
      release_gil());
}

#ifdef TSR_WITH_CUDA
int64_t map_size(const tsr::ChainPlan& plan) {
  const tsr::ChainPackedCuda p = tsr::chain_packed_cuda(plan);
  return p.floats + p.hi + p.lo;
}

// For networks without a kernel in the build: what to compile, and taking what was compiled.
void bind_fused(py::module_& cuda) {
  cuda.def("chain_fused_kernel",
           [](Address student, int64_t student_records, Address teacher, int64_t teacher_records) {
             const auto k = tsr::chain_fused_kernel_of(checked_plan(student, student_records, INT64_MAX, "student"),
                                                       checked_plan(teacher, teacher_records, INT64_MAX, "teacher"));
             return py::make_tuple(k.name, k.bytes);
           });
  cuda.def("chain_fused_ready",
           [](Address student, int64_t student_records, Address teacher, int64_t teacher_records, int capability) {
             return tsr::chain_fused_ready(checked_plan(student, student_records, INT64_MAX, "student"),
                                           checked_plan(teacher, teacher_records, INT64_MAX, "teacher"), capability);
           });
  cuda.def("chain_fused_load", [](Address student, int64_t student_records, Address teacher, int64_t teacher_records,
                                  const py::bytes& cubin, const std::string& symbol, int device) {
    tsr::chain_fused_load(checked_plan(student, student_records, INT64_MAX, "student"),
                          checked_plan(teacher, teacher_records, INT64_MAX, "teacher"), std::string_view(cubin).data(),
                          symbol.c_str(), device);
  });
  cuda.def("chain_fused_headers", [] {
    py::dict headers;
    for (const tsr::ChainFusedHeader* h = tsr::chain_fused_headers; h->name; ++h) headers[h->name] = h->text;
    return headers;
  });
}

void bind_cuda(py::module_& cuda) {
  cuda.def("chain_packed_size", [](Address plan, int64_t records, int64_t parameters) {
    return packed_size_cuda(checked_plan(plan, records, parameters, "plan"));
  });
  cuda.def("chain_map_size", [](Address plan, int64_t records, int64_t parameters) {
    return map_size(checked_plan(plan, records, parameters, "plan"));
  });
  cuda.def("chain_map", [](Address plan, int64_t records, int64_t parameters, Address map, int64_t values) {
    const tsr::ChainPlan p = checked_plan(plan, records, parameters, "plan");
    if (values != map_size(p)) throw std::invalid_argument("map: is not of this plan");
    tsr::chain_map_cuda(p, at<int32_t>(map, values, "map"));
  });
  cuda.def("chain_fused_covers", [](Address student, int64_t student_records, Address teacher, int64_t teacher_records,
                                    int criterion, int norm, int device) {
    return tsr::chain_fused_covers(checked_plan(student, student_records, INT64_MAX, "student"),
                                   checked_plan(teacher, teacher_records, INT64_MAX, "teacher"),
                                   tsr::ChainLoss(criterion), tsr::Norm(norm), device);
  });
  bind_fused(cuda);
  cuda.def("chain_workspace", [](Address student, int64_t student_records, Address teacher, int64_t teacher_records,
                                 int64_t n, int64_t rows, int precision) {
    return tsr::chain_workspace_cuda(checked_plan(student, student_records, INT64_MAX, "student"),
                                     checked_plan(teacher, teacher_records, INT64_MAX, "teacher"), n, rows,
                                     tsr::Precision(precision));
  });
  cuda.def(
      "chain_pack",
      [](Address plan, int64_t records, Address weights, int64_t parameters, Address packed, Address map,
         int64_t values, int device, Address stream) {
        const tsr::ChainPlan p = checked_plan(plan, records, parameters, "plan");
        if (values != map_size(p)) throw std::invalid_argument("map: is not of this plan");
        tsr::chain_pack_cuda(
            {p, at<const float>(weights, parameters, "weights"), at<float>(packed, packed_size_cuda(p), "packed")},
            at<const int32_t>(map, values, "map"), device, stream_of(stream));
      },
      release_gil());
  cuda.def(
      "chain_forward",
      [](Address plan, int64_t records, Address packed, int64_t values, Address x, const std::vector<int64_t>& asked,
         const std::vector<Address>& out, int64_t n, Address workspace, int precision, int device, Address stream) {
        const auto net = net_of(plan, records, packed, values, packed_size_cuda, "plan");
        const auto to = results_of(out, n);
        tsr::chain_forward_cuda(forward_of(net, x, asked, to, n, workspace), tsr::Precision(precision), device,
                                stream_of(stream));
      },
      release_gil());
  cuda.def(
      "chain_gradient",
      [](Address plan, int64_t records, Address packed, int64_t values, Address x, Address cotangent, Address out,
         int64_t n, int64_t rows, int64_t layer, Address workspace, int precision, int device, Address stream) {
        const auto net = net_of(plan, records, packed, values, packed_size_cuda, "plan");
        tsr::chain_gradient_cuda(gradient_of(net, x, cotangent, out, n, rows, layer, workspace),
                                 tsr::Precision(precision), device, stream_of(stream));
      },
      release_gil());
  cuda.def(
      "chain_pgd",
      [](Address plan, int64_t records, Address packed, int64_t values, Address teacher_plan, int64_t teacher_records,
         Address teacher_packed, int64_t teacher_values, TSR_ATTACK_PARAMETERS, int precision, int device,
         Address stream) {
        const auto size = packed_size_cuda;
        const auto student = net_of(plan, records, packed, values, size, "student");
        const auto teacher = net_of(teacher_plan, teacher_records, teacher_packed, teacher_values, size, "teacher");
        tsr::chain_pgd_cuda(TSR_ATTACK.on(student, teacher), tsr::Precision(precision), device, stream_of(stream));
      },
      release_gil());
}
#endif

}  // namespace

void bind_chain(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  cpu.attr("chain_columns") = tsr::kChainColumns;
  bind_cpu(cpu);
#ifdef TSR_WITH_CUDA
  bind_cuda(cuda);
#endif
}
