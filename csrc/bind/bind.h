// The Python module: integers in, no torch. Addresses come from Tensor.data_ptr(), streams from Stream.cuda_stream.
//
// Every operator has bind/<op>.cpp with one function `bind_<op>(cpu, cuda)`; the two sub-modules take the same
// arguments, followed by `threads` (cpu) or `device, stream` (cuda).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "core/dtype.h"

namespace py = pybind11;
using Address = std::uintptr_t;

// A null address means a FakeTensor or a meta tensor reached native code: stop here, not with a segmentation fault.
template <class T>
T* at(Address address, int64_t count, const char* name) {
  if (!address && count) throw std::invalid_argument(std::string(name) + ": null address");
  return reinterpret_cast<T*>(address);
}

using release_gil = py::call_guard<py::gil_scoped_release>;

void bind_chain(py::module_& cpu, py::module_& cuda);
void bind_chain_correlation(py::module_& cpu, py::module_& cuda);
void bind_channel_correlation(py::module_& cpu, py::module_& cuda);
void bind_hyperplane_projection(py::module_& cpu, py::module_& cuda);
void bind_pgd_step(py::module_& cpu, py::module_& cuda);
void bind_philox_uniform(py::module_& cpu, py::module_& cuda);
void bind_relu_gate(py::module_& cpu, py::module_& cuda);
