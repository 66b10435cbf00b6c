// SPDX-License-Identifier: Apache-2.0
// The sum of loads, and whether loads are what the planner can work with.
#pragma once

#include <cstddef>

namespace eplb {

struct Amount {
    double sum;
    bool is_valid;  // all are finite and none is negative
};

Amount amount_of(size_t n, const double* loads);

}  // namespace eplb
