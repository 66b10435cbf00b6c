// SPDX-License-Identifier: Apache-2.0
// Sums of loads, and whether loads are what the planner can work with.
#pragma once

#include <cstddef>

namespace eplb {

double sum_of(size_t n, const double* loads);

// Whether all loads are finite and none is negative.
bool are_valid(size_t n, const double* loads);

}  // namespace eplb
