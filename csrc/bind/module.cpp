#include "bind/bind.h"
#include "cpu/isa.h"

PYBIND11_MODULE(TSR_MODULE, m) {
  m.attr("version") = TSR_VERSION;
  m.attr("cuda_note") = TSR_CUDA_NOTE;
#ifdef TSR_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def("isa", &tsr::isa_name);
  m.def("isa_levels", &tsr::isa_levels);
  m.def("set_isa", &tsr::set_isa);
  auto cpu = m.def_submodule("cpu");
  auto cuda = m.def_submodule("cuda");  // empty without CUDA
  bind_chain(cpu, cuda);
  bind_chain_correlation(cpu, cuda);
  bind_channel_correlation(cpu, cuda);
  bind_hyperplane_projection(cpu, cuda);
  bind_pgd_step(cpu, cuda);
  bind_philox_uniform(cpu, cuda);
  bind_relu_gate(cpu, cuda);
}
