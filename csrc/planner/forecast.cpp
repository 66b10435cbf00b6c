// SPDX-License-Identifier: Apache-2.0
#include "forecast.h"

#include <algorithm>
#include <vector>

namespace eplb {

namespace {

constexpr double kLeastForecast = 0.01;  // shared by all experts

// The sum of term(0) to term(n - 1), in four parts, which do not wait for each other.
template <typename Term>
double sum_of(int n, const Term& term) {
    double part[4] = {};
    int i = 0;
    for (; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; ++k) part[k] += term(i + k);
    for (; i < n; ++i) part[0] += term(i);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

double one_over_sum(int n, const double* load) {
    const double sum = sum_of(n, [load](int e) { return load[e]; });
    return sum > 0.0 ? 1.0 / sum : 0.0;
}

}  // namespace

void forecast_errors(const double* series, int layers, int experts, const int32_t* window, const int32_t* begin,
                     int tests, int spans, double* error) {
    const int windows = tests == 0 ? 0 : window[tests - 1];
    const double least = kLeastForecast / experts;
    std::vector<std::vector<double>> before(windows + 1, std::vector<double>(experts, 0.0));  // sums of earlier windows
    std::vector<double> buffer(experts);
    double* said = buffer.data();
    for (int l = 0; l < layers; ++l) {
        const auto row = [&](int t) { return series + (static_cast<size_t>(t) * layers + l) * experts; };
        for (int t = 0; t < windows; ++t)
            for (int e = 0; e < experts; ++e) before[t + 1][e] = before[t][e] + row(t)[e];
        for (int test = 0; test < tests; ++test) {
            const int t = window[test];
            const double* now = row(t);
            const double scale_now = one_over_sum(experts, now);
            const int32_t* first = begin + static_cast<size_t>(test) * spans;
            double* errors = error + static_cast<size_t>(test) * spans * layers + l;
            for (int span = 0; span < spans; ++span) {
                const int same = static_cast<int>(std::find(first, first + span, first[span]) - first);
                if (same < span) {
                    errors[static_cast<size_t>(span) * layers] = errors[static_cast<size_t>(same) * layers];
                    continue;
                }
                const double* from = before[first[span]].data();
                const double* to = before[t].data();
                for (int e = 0; e < experts; ++e) said[e] = to[e] - from[e];
                const double scale = one_over_sum(experts, said);
                errors[static_cast<size_t>(span) * layers] = sum_of(experts, [=](int e) {
                    const double part = said[e] * scale, off = now[e] * scale_now - part;
                    return off * off / (part + least);
                });
            }
        }
    }
}

}  // namespace eplb
