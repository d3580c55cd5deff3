// Plans and networks of chains as Python gives them.
#pragma once
#include "core/chain.h"

#include "bind/bind.h"

inline tsr::ChainPlan plan_of(Address plan, int64_t records, const char* name) {
  return {at<const tsr::ChainRecord>(plan, records, name), records};
}
inline tsr::ChainPlan checked_plan(Address plan, int64_t records, int64_t parameters, const char* name) {
  const tsr::ChainPlan p = plan_of(plan, records, name);
  tsr::check_chain(p, parameters);
  return p;
}

// A network whose packed parameters fill `values` floats; `size`: how many there must be.
inline tsr::ChainNet net_of(Address plan, int64_t records, Address packed, int64_t values,
                            int64_t (*size)(const tsr::ChainPlan&), const char* name) {
  const tsr::ChainNet net{checked_plan(plan, records, INT64_MAX, name), at<const float>(packed, values, "packed")};
  if (values != size(net.plan)) throw std::invalid_argument("packed: is not of this plan");
  return net;
}

#ifdef TSR_WITH_CUDA
inline int64_t packed_size_cuda(const tsr::ChainPlan& plan) {
  return plan.records ? tsr::chain_packed_cuda(plan).size : 0;
}
inline void* stream_of(Address stream) { return reinterpret_cast<void*>(stream); }
#endif
