// SPDX-License-Identifier: Apache-2.0
// The windows of one layer's load, from which a plan is made, and the PARs of placements in them.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace eplb {

double mean(const std::vector<double>& values);
double percentile95(std::vector<double> values);  // by nearest rank; 1 of none

class Windows {
  public:
    // loads [T] of [E], oldest first, which must outlive this object; speed [R], or null if all ranks are alike.
    Windows(Shape shape, std::vector<const double*> loads, const double* speed);

    int number() const { return static_cast<int>(loads_.size()); }
    const std::vector<const double*>& loads() const { return loads_; }

    // PARs (of load over speed) of a placement [P] (empty slots: -1 or E), one for each window that has load.
    std::vector<double> pars(const int32_t* slots) const;

  private:
    const Shape shape_;
    const std::vector<const double*> loads_;
    const double* speed_;
};

}  // namespace eplb
