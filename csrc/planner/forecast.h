// SPDX-License-Identifier: Apache-2.0
// Back-test of forecasts: how far sums of earlier windows are from a window.
#pragma once

#include <cstdint>

namespace eplb {

// For each of `tests` windows and each of `spans` first windows, how far the sum of the windows from begin[test, span]
// to the one before window[test] is from that window: of each layer's distribution over experts, the squared error
// over the forecast. The forecast has 0.01 / E added, so that it is never zero. series [T, L, E], not negative;
// window [tests] rising; begin [tests, spans], each at most its window; error [tests, spans, L].
void forecast_errors(const double* series, int layers, int experts, const int32_t* window, const int32_t* begin,
                     int tests, int spans, double* error);

}  // namespace eplb
