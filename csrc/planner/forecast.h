// SPDX-License-Identifier: Apache-2.0
// The expected load of the next window, with its variance, from the windows seen so far.
#pragma once

namespace eplb {

// series [windows, layers, experts]: oldest window first; windows may differ in length. Sets load [layers, experts], in
// tokens of a window of usual length, and variance, in the same unit squared; planning/forecast.py describes the
// method. at_rest [layers]: layers that keep their placement under every forecast; all windows are added up
// for them. Returns false if a load is negative or not finite.
bool forecast(const double* series, int windows, int layers, int experts, const bool* at_rest, double* load,
              double* variance);

}  // namespace eplb
