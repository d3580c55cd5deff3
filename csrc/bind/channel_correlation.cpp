#include "core/channel_correlation.h"

#include "bind/bind.h"

namespace {

tsr::ChannelCorrelation shapes(int64_t images, int64_t cs, int64_t ct, int64_t positions, int dtype) {
  tsr::ChannelCorrelation a{};
  a.student.channels = cs, a.teacher.channels = ct;
  a.images = images, a.positions = positions, a.dtype = tsr::Dtype(dtype);
  return a;
}

// Strides are of image, channel, position. `need` is what the backend's workspace function asks for.
template <class Need>
tsr::ChannelCorrelation arguments(Address student, Address teacher, const int64_t (&s)[3], const int64_t (&t)[3],
                                  Address moments, Address workspace, int64_t workspace_bytes,
                                  tsr::ChannelCorrelation a, Need need) {
  const int64_t cs = a.student.channels, ct = a.teacher.channels, required = need(a);
  a.student = {at<const void>(student, tsr::samples(a) * cs, "student"), cs, s[0], s[1], s[2]};
  a.teacher = {at<const void>(teacher, tsr::samples(a) * ct, "teacher"), ct, t[0], t[1], t[2]};
  a.moments = at<double>(moments, 1, "moments");
  a.workspace = at<void>(workspace, required, "workspace");
  if (workspace_bytes < required)
    throw std::invalid_argument("workspace: needs " + std::to_string(required) + " bytes, got " +
                                std::to_string(workspace_bytes));
  return a;
}

}  // namespace

void bind_channel_correlation(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  // The size of the workspace goes into an int64 at `bytes`, as LAPACK's workspace queries do.
  cpu.def("channel_correlation_workspace",
          [](Address bytes, int64_t images, int64_t cs, int64_t ct, int64_t positions, int dtype, int threads) {
            *at<int64_t>(bytes, 1, "bytes") =
                tsr::channel_correlation_workspace_cpu(shapes(images, cs, ct, positions, dtype), threads);
          });
  cpu.def(
      "channel_correlation",
      [](Address student, Address teacher, int64_t s0, int64_t s1, int64_t s2, int64_t t0, int64_t t1, int64_t t2,
         Address moments, Address workspace, int64_t workspace_bytes, int64_t images, int64_t cs, int64_t ct,
         int64_t positions, int dtype, int threads) {
        tsr::channel_correlation_cpu(
            arguments(student, teacher, {s0, s1, s2}, {t0, t1, t2}, moments, workspace, workspace_bytes,
                      shapes(images, cs, ct, positions, dtype),
                      [&](const auto& a) { return tsr::channel_correlation_workspace_cpu(a, threads); }),
            threads);
      },
      release_gil());
#ifdef TSR_WITH_CUDA
  cuda.def("channel_correlation_workspace", [](Address bytes, int64_t images, int64_t cs, int64_t ct, int64_t positions,
                                               int dtype, int, Address) {
    *at<int64_t>(bytes, 1, "bytes") = tsr::channel_correlation_workspace_cuda(shapes(images, cs, ct, positions, dtype));
  });
  cuda.def(
      "channel_correlation",
      [](Address student, Address teacher, int64_t s0, int64_t s1, int64_t s2, int64_t t0, int64_t t1, int64_t t2,
         Address moments, Address workspace, int64_t workspace_bytes, int64_t images, int64_t cs, int64_t ct,
         int64_t positions, int dtype, int device, Address stream) {
        tsr::channel_correlation_cuda(
            arguments(student, teacher, {s0, s1, s2}, {t0, t1, t2}, moments, workspace, workspace_bytes,
                      shapes(images, cs, ct, positions, dtype),
                      [](const auto& a) { return tsr::channel_correlation_workspace_cuda(a); }),
            device, reinterpret_cast<void*>(stream));
      },
      release_gil());
#endif
}
