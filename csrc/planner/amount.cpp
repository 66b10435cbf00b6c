// SPDX-License-Identifier: Apache-2.0
#include "amount.h"

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace eplb {

// In lanes, which do not wait for each other, and without a branch.
EPLB_KERNEL
Amount amount_of(size_t n, const double* loads) {
    constexpr size_t kLanes = 8;
    double sum[kLanes] = {}, off[kLanes] = {};  // |load| - load: zero of a valid load, NaN of infinity and NaN
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (size_t k = 0; k < kLanes; ++k) {
            sum[k] += loads[i + k];
            off[k] += std::fabs(loads[i + k]) - loads[i + k];
        }
    }
    for (; i < n; ++i) {
        sum[0] += loads[i];
        off[0] += std::fabs(loads[i]) - loads[i];
    }
    return {((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])),
            std::all_of(off, off + kLanes, [](double part) { return part == 0.0; })};
}

}  // namespace eplb
