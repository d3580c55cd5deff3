#include "core/chain.h"

#include "bind/bind.h"

namespace {

tsr::ChainPlan plan_of(Address plan, int64_t records, const char* name) {
  return {at<const tsr::ChainRecord>(plan, records, name), records};
}

// A network whose packed parameters fill `values` floats.
tsr::ChainNet net_of(Address plan, int64_t records, Address packed, int64_t values, const char* name) {
  const tsr::ChainNet net{plan_of(plan, records, name), at<const float>(packed, values, "packed")};
  tsr::check_chain(net.plan, INT64_MAX);
  if (values != tsr::chain_packed_size(net.plan)) throw std::invalid_argument("packed: is not of this plan");
  return net;
}

}  // namespace

void bind_chain(py::module_& cpu, py::module_&) {
  cpu.attr("chain_columns") = tsr::kChainColumns;
  cpu.def("chain_packed_size", [](Address plan, int64_t records, int64_t parameters) {
    const tsr::ChainPlan p = plan_of(plan, records, "plan");
    tsr::check_chain(p, parameters);
    return tsr::chain_packed_size(p);
  });
  cpu.def("chain_workspace", [](Address student, int64_t student_records, Address teacher, int64_t teacher_records) {
    const tsr::ChainPlan one = plan_of(student, student_records, "student");
    const tsr::ChainPlan other = plan_of(teacher, teacher_records, "teacher");
    tsr::check_chain(one, INT64_MAX);
    tsr::check_chain(other, INT64_MAX);
    return tsr::chain_workspace(one, other);
  });
  cpu.def(
      "chain_pack",
      [](Address plan, int64_t records, Address weights, int64_t parameters, Address packed, int) {
        const tsr::ChainPlan p = plan_of(plan, records, "plan");
        tsr::check_chain(p, parameters);
        const int64_t values = tsr::chain_packed_size(p);
        tsr::chain_pack_cpu({p, at<const float>(weights, parameters, "weights"), at<float>(packed, values, "packed")});
      },
      release_gil());
  cpu.def(
      "chain_forward",
      [](Address plan, int64_t records, Address packed, int64_t values, Address x, const std::vector<int64_t>& asked,
         const std::vector<Address>& out, int64_t n, Address workspace, int threads) {
        const tsr::ChainNet net = net_of(plan, records, packed, values, "plan");
        std::vector<float*> to;
        for (Address address : out) to.push_back(at<float>(address, n, "out"));
        tsr::chain_forward_cpu({net, at<const float>(x, n, "x"), asked.data(), to.data(), n, int64_t(asked.size()),
                                at<void>(workspace, n, "workspace")},
                               threads);
      },
      release_gil());
  cpu.def(
      "chain_gradient",
      [](Address plan, int64_t records, Address packed, int64_t values, Address x, Address cotangent, Address out,
         int64_t n, int64_t rows, int64_t layer, Address workspace, int threads) {
        tsr::chain_gradient_cpu({net_of(plan, records, packed, values, "plan"), at<const float>(x, n, "x"),
                                 at<const float>(cotangent, n * rows, "cotangent"), at<float>(out, n * rows, "out"), n,
                                 rows, layer, at<void>(workspace, n, "workspace")},
                                threads);
      },
      release_gil());
  cpu.def(
      "chain_pgd",
      [](Address plan, int64_t records, Address packed, int64_t values, Address teacher_plan, int64_t teacher_records,
         Address teacher_packed, int64_t teacher_values, Address x0, Address start, Address x, Address labels,
         Address loss, Address adversarial, Address bad, Address queries, Address iterates, Address step, Address eps,
         double step_value, double eps_value, double lo, double hi, double sparsity, int64_t n, int64_t steps, int norm,
         int criterion, bool targeted, bool keep_best, bool early_stop, bool judge, Address workspace, int threads) {
        tsr::chain_pgd_cpu({net_of(plan, records, packed, values, "student"),
                            net_of(teacher_plan, teacher_records, teacher_packed, teacher_values, "teacher"),
                            at<const float>(x0, n, "x0"),
                            at<const float>(start, n, "start"),
                            at<float>(x, n, "x"),
                            at<const int64_t>(labels, 0, "labels"),
                            at<float>(loss, n, "loss"),
                            at<bool>(adversarial, n, "adversarial"),
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
                            at<void>(workspace, n, "workspace")},
                           threads);
      },
      release_gil());
}
