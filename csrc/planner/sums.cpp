// SPDX-License-Identifier: Apache-2.0
#include "sums.h"

#include <cmath>

#include "vectors.h"

namespace eplb {

namespace {

constexpr size_t kLanes = 8;  // parts of a sum, which do not wait for each other

double added(const double* part) {
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

}  // namespace

EPLB_KERNEL
double sum_of(size_t n, const double* loads) {
    double part[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (size_t k = 0; k < kLanes; ++k) part[k] += loads[i + k];
    for (; i < n; ++i) part[0] += loads[i];
    return added(part);
}

// Without a branch: |load| - load is zero of a valid load, above zero of a negative one, and NaN of infinity and NaN.
EPLB_KERNEL
bool are_valid(size_t n, const double* loads) {
    double part[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (size_t k = 0; k < kLanes; ++k) part[k] += std::fabs(loads[i + k]) - loads[i + k];
    for (; i < n; ++i) part[0] += std::fabs(loads[i]) - loads[i];
    return added(part) == 0.0;
}

}  // namespace eplb
