// What channel_correlation.cpp offers to chain_correlation.cpp.
#pragma once
#include "core/channel_correlation.h"

namespace tsr {

// Adds the samples of b to those of a; both have some.
void join_moments(double* a, const double* b, int64_t cs, int64_t ct);

}  // namespace tsr
