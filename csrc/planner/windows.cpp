// SPDX-License-Identifier: Apache-2.0
#include "windows.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "vectors.h"

namespace eplb {

namespace {

constexpr int kLanes = 4;  // windows that are looked at together

// Copies of experts, [n] -> the share of a copy in the expert's load
EPLB_KERNEL
void invert(int n, const int32_t* count, double* __restrict share) {
    for (int i = 0; i < n; ++i) share[i] = 1.0 / count[i];
}

struct Peaks {
    double most[kLanes] = {}, total[kLanes] = {};
};

// Of the ranks in four windows: slots [R, S], the share [R, S] of each in the expert's load, speed [R] or null.
EPLB_KERNEL
Peaks peaks_of(int ranks, int per_rank, const int32_t* slots, const double* share, const double* const* loads,
               const double* speed) {
    Peaks peaks;
    const double *first = loads[0], *second = loads[1], *third = loads[2], *fourth = loads[3];
    for (int r = 0, p = 0; r < ranks; ++r) {
        double sum[kLanes] = {};
        for (const int end = p + per_rank; p < end; ++p) {
            const int e = slots[p];
            sum[0] += first[e] * share[p];
            sum[1] += second[e] * share[p];
            sum[2] += third[e] * share[p];
            sum[3] += fourth[e] * share[p];
        }
        const double pace = speed == nullptr ? 1.0 : speed[r];
        for (int k = 0; k < kLanes; ++k) {
            const double time = sum[k] / pace;
            peaks.total[k] += sum[k];
            peaks.most[k] = peaks.most[k] < time ? time : peaks.most[k];
        }
    }
    return peaks;
}

}  // namespace

double mean(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double percentile95(std::vector<double> values) {
    if (values.empty()) return 1.0;
    const auto place = values.begin() + static_cast<std::ptrdiff_t>((values.size() * 95 + 99) / 100 - 1);
    std::nth_element(values.begin(), place, values.end());
    return *place;
}

Windows::Windows(Shape shape, std::vector<const double*> loads, const double* speed)
    : shape_(shape), loads_(std::move(loads)), speed_(speed) {}

std::vector<double> Windows::pars(const int32_t* slots) const {
    std::vector<double> result;
    if (number() == 0) return result;
    const int E = shape_.experts, P = shape_.slots;
    std::vector<int32_t> held(P), count(E + 1, 0);
    for (int p = 0; p < P; ++p) ++count[slots[p] < 0 ? E : slots[p]];
    std::vector<double> part(E + 1), share(P);
    invert(E, count.data(), part.data());
    for (int p = 0; p < P; ++p) {
        const int e = slots[p] < 0 ? E : slots[p];
        held[p] = e == E ? 0 : e;  // an empty slot has no share of any expert
        share[p] = part[e];
    }
    for (int t = 0; t < number(); t += kLanes) {
        const double* loads[kLanes];
        for (int k = 0; k < kLanes; ++k) loads[k] = loads_[std::min(t + k, number() - 1)];
        const Peaks peaks = peaks_of(shape_.ranks, shape_.per_rank(), held.data(), share.data(), loads, speed_);
        for (int k = 0; k < std::min(kLanes, number() - t); ++k)
            if (peaks.total[k] > 0.0) result.push_back(peaks.most[k] / (peaks.total[k] / shape_.ranks));
    }
    return result;
}

}  // namespace eplb
