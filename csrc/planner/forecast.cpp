// SPDX-License-Identifier: Apache-2.0
#include "forecast.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "sums.h"
#include "vectors.h"

namespace eplb {

namespace {

// Lengths of the latest load that may serve as forecast, in windows of usual length; all of it is tried as well.
constexpr double kSpans[] = {1.0, 2.0, 4.0};

// The spans are compared on at most this many of the last windows.
constexpr int kTestedWindows = 5;

// A span is long enough once it has this part of its tokens, because a series ends with a fragment of a window.
constexpr double kWhole = 0.75;

// A longer span is taken only if its error is below this part of the shortest span's. An average lags behind a drift,
// which the tested windows may not show yet; where windows differ by noise only, it halves the error.
constexpr double kClearlyBetter = 0.85;

// All windows are preferred to a part of them unless the errors differ by more: a smaller difference is chance.
constexpr double kAllFirst = 0.95;

constexpr double kLeastForecast = 0.01;  // shared by all experts

constexpr double kTiny = 1e-300;  // sums below it count as zero

constexpr int kLanes = 8;

EPLB_KERNEL
void add(int n, const double* __restrict values, double* __restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] += values[i];
}

EPLB_KERNEL
void add(int n, const double* __restrict one, const double* __restrict two, double* __restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] = one[i] + two[i];
}

// Whether a forecast was right: the squared error of the distribution over experts, over the forecast with `least`
// added. The forecast is `to - from`; the scales make distributions of it and of `now`.
EPLB_KERNEL
double error_of(int n, const double* from, const double* to, double scale, const double* now, double scale_now,
                double least) {
    double part[kLanes / 2] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        double square[kLanes], said[kLanes];
        for (int k = 0; k < kLanes; ++k) {
            said[k] = (to[i + k] - from[i + k]) * scale;
            const double off = now[i + k] * scale_now - said[k];
            square[k] = off * off;
            said[k] += least;
        }
        for (int k = 0; k < kLanes / 2; ++k) {  // one division for two fractions
            const int j = k + kLanes / 2;
            part[k] += (square[k] * said[j] + square[j] * said[k]) / (said[k] * said[j]);
        }
    }
    for (; i < n; ++i) {
        const double said = (to[i] - from[i]) * scale, off = now[i] * scale_now - said;
        part[0] += off * off / (said + least);
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

// sum += tokens * (now / tokens - said / total)^2. With quotients, which are equal where `now` is a multiple of `said`,
// so that the variance of proportional windows is zero.
EPLB_KERNEL
void add_square(int n, const double* __restrict said, double total, const double* __restrict now, double tokens,
                double* __restrict sum) {
    for (int i = 0; i < n; ++i) {
        const double off = now[i] / tokens - said[i] / total;
        sum[i] += tokens * (off * off);
    }
}

EPLB_KERNEL
void multiply(int n, double factor, double* values) {
    for (int i = 0; i < n; ++i) values[i] *= factor;
}

double one_over(double sum) { return sum > kTiny ? 1.0 / sum : 0.0; }

class Forecast {
  public:
    Forecast(const double* series, int windows, int layers, int experts, const bool* at_rest)
        : series_(series), windows_(windows), layers_(layers), experts_(experts) {
        for (int l = 0; l < layers; ++l)
            if (!at_rest[l]) open_.push_back(l);
        is_valid_ = measure();
        if (is_valid_) choose_tests();
    }

    bool is_valid() const { return is_valid_; }

    void run(double* load, double* variance) {
        const std::vector<int> best = best_spans(back_test());
        const std::vector<int> begins = begins_before(windows_);
        for (int l = 0; l < layers_; ++l) {
            double* expected = load + static_cast<size_t>(l) * experts_;
            double* spread = variance + static_cast<size_t>(l) * experts_;
            add_up(l, begins[best[l]], windows_, expected);
            multiply(experts_, usual_tokens(l) * one_over(sum_of(experts_, expected)), expected);
            std::fill(spread, spread + experts_, 0.0);
            if (best[l] > 0) vary(l, best[l], expected, spread);
        }
    }

  private:
    const double* row(int t, int l) const { return series_ + (static_cast<size_t>(t) * layers_ + l) * experts_; }
    double tokens(int t, int l) const { return tokens_[static_cast<size_t>(t) * layers_ + l]; }

    // The tokens of each window and layer, and the length of windows. Returns whether all loads are valid.
    bool measure() {
        bool is_valid = true;
        tokens_.resize(static_cast<size_t>(windows_) * layers_);
        std::vector<double> lengths;
        before_.assign(1, 0.0);
        for (int t = 0; t < windows_; ++t) {
            double* tokens = &tokens_[static_cast<size_t>(t) * layers_];
            for (int l = 0; l < layers_; ++l) {
                tokens[l] = sum_of(experts_, row(t, l));
                is_valid = is_valid && are_valid(experts_, row(t, l));
            }
            const double length = sum_of(layers_, tokens);
            before_.push_back(before_.back() + length);
            is_empty_.push_back(!(length > 0.0));
            if (length > 0.0) lengths.push_back(length);
        }
        std::sort(lengths.begin(), lengths.end());
        if (!lengths.empty()) usual_ = 0.5 * (lengths[(lengths.size() - 1) / 2] + lengths[lengths.size() / 2]);
        return is_valid;
    }

    // The first window of the shortest span before `end` with enough tokens; at least the last window, whose tokens may
    // vanish beside those of earlier windows.
    int first(int end, double span) const {
        const double from = before_[end] - kWhole * span * usual_;
        const auto after = std::upper_bound(before_.begin(), before_.begin() + end + 1, from);
        return std::clamp(static_cast<int>(after - before_.begin()) - 1, 0, end - 1);
    }

    void choose_tests() {
        for (const double span : kSpans)
            if (first(windows_, span) > 0) spans_.push_back(span);
        for (int t = std::max(1, windows_ - kTestedWindows); t < windows_; ++t)
            if (!is_empty_[t]) tested_.push_back(t);
        for (const int t : tested_) begins_.push_back(begins_before(t));
    }

    // The first window of all and of each span before `end`.
    std::vector<int> begins_before(int end) const {
        std::vector<int> begins(1, 0);
        for (const double span : spans_) begins.push_back(first(end, span));
        return begins;
    }

    size_t at(int test, int span, size_t i) const {
        return (static_cast<size_t>(test) * (1 + spans_.size()) + span) * open_.size() + i;
    }

    // [tests, all and spans, layers not at rest]: the errors, weighted by the tokens of the forecast window in windows
    // of usual length.
    std::vector<double> back_test() const {
        const int tests = static_cast<int>(tested_.size()), spans = 1 + static_cast<int>(spans_.size());
        std::vector<double> errors(static_cast<size_t>(tests) * spans * open_.size());
        if (errors.empty() || spans == 1) return errors;
        const int last = tested_.back();
        const double least = kLeastForecast / experts_;
        std::vector<double> sums(static_cast<size_t>(last + 1) * experts_, 0.0);  // of earlier windows
        const auto sum = [&](int t) { return &sums[static_cast<size_t>(t) * experts_]; };
        for (size_t i = 0; i < open_.size(); ++i) {
            const int l = open_[i];
            for (int t = 0; t < last; ++t) add(experts_, sum(t), row(t, l), sum(t + 1));
            for (int test = 0; test < tests; ++test) {
                const int t = tested_[test];
                const std::vector<int>& begins = begins_[test];
                for (int span = 0; span < spans; ++span) {
                    const int same =
                        static_cast<int>(std::find(begins.begin(), begins.end(), begins[span]) - begins.begin());
                    double& error = errors[at(test, span, i)];
                    if (same < span) {
                        error = errors[at(test, same, i)];
                        continue;
                    }
                    double said = 0.0;
                    for (int s = begins[span]; s < t; ++s) said += tokens(s, l);
                    error = tokens(t, l) / usual_ *
                            error_of(experts_, sum(begins[span]), sum(t), one_over(said), row(t, l),
                                     one_over(tokens(t, l)), least);
                }
            }
        }
        return errors;
    }

    // The span of each layer: 1, the shortest, unless a longer or all windows (0) are clearly better. A layer's own
    // error and the mean error of all layers that are not at rest decide in equal parts.
    std::vector<int> best_spans(const std::vector<double>& errors) const {
        const int tests = static_cast<int>(tested_.size()), spans = 1 + static_cast<int>(spans_.size());
        const int layers = static_cast<int>(open_.size());
        std::vector<int> best(layers_, 0);
        if (spans == 1 || layers == 0) return best;
        for (const int l : open_) best[l] = 1;
        std::vector<double> error(static_cast<size_t>(spans) * layers, 0.0);
        int telling = 0;
        for (int test = 0; test < tests; ++test) {
            if (begins_[test][1] == 0) continue;  // the shortest span is all there is: the test tells nothing
            ++telling;
            for (int span = 0; span < spans; ++span) {
                const double* of_layers = &errors[at(test, span, 0)];
                const double mean = sum_of(layers, of_layers) / layers;
                for (int i = 0; i < layers; ++i) error[static_cast<size_t>(span) * layers + i] += of_layers[i] + mean;
            }
        }
        if (telling < 2) return best;  // a single test may be chance
        for (int i = 0; i < layers; ++i) {
            const auto of = [&](int span) { return error[static_cast<size_t>(span) * layers + i]; };
            double least = kAllFirst * of(0);
            int chosen = 0;
            for (int span = 2; span < spans; ++span) {
                if (of(span) >= least) continue;
                least = of(span);
                chosen = span;
            }
            if (least < kClearlyBetter * of(1)) best[open_[i]] = chosen;
        }
        return best;
    }

    // sum [E]: of a layer's windows from `first` to the one before `last`.
    void add_up(int l, int first, int last, double* sum) const {
        std::copy(row(first, l), row(first, l) + experts_, sum);
        for (int t = first + 1; t < last; ++t) add(experts_, row(t, l), sum);
    }

    // A layer's tokens in a window of usual length.
    double usual_tokens(int l) const {
        std::vector<double> of_windows;
        for (int t = 0; t < windows_; ++t) of_windows.push_back(tokens(t, l));
        const auto middle = of_windows.begin() + windows_ / 2;
        std::nth_element(of_windows.begin(), middle, of_windows.end());
        return *middle > 0.0 ? *middle : sum_of(windows_, of_windows.data()) / windows_;
    }

    // The variance of a layer's experts: half of an expert's own mean squared error in the back-test, and half of the
    // layer's, in proportion to the squared load.
    void vary(int l, int span, const double* expected, double* variance) {
        std::vector<double> said(experts_);
        double weight = 0.0;
        for (size_t test = 0; test < tested_.size(); ++test) {
            const int t = tested_[test];
            if (!(tokens(t, l) > kTiny)) continue;
            weight += tokens(t, l);
            add_up(l, begins_[test][span], t, said.data());
            add_square(experts_, said.data(), std::max(sum_of(experts_, said.data()), kTiny), row(t, l), tokens(t, l),
                       variance);
        }
        const double usual = usual_tokens(l), own = 0.5 * usual * usual * one_over(weight);
        double square = 0.0;
        for (int e = 0; e < experts_; ++e) square += expected[e] * expected[e];
        const double shared = own * sum_of(experts_, variance) * one_over(square);
        for (int e = 0; e < experts_; ++e) variance[e] = own * variance[e] + shared * expected[e] * expected[e];
    }

    const double* series_;
    const int windows_, layers_, experts_;
    bool is_valid_ = false;
    std::vector<int> open_;                 // layers that are not at rest
    std::vector<double> tokens_;            // [T, L]
    std::vector<double> before_;            // [T + 1] tokens of earlier windows
    std::vector<char> is_empty_;            // [T]
    double usual_ = 1.0;                    // tokens of a window of usual length
    std::vector<double> spans_;             // those shorter than the series
    std::vector<int> tested_;               // windows
    std::vector<std::vector<int>> begins_;  // [tests, all and spans]
};

}  // namespace

bool forecast(const double* series, int windows, int layers, int experts, const bool* at_rest, double* load,
              double* variance) {
    Forecast forecast(series, windows, layers, experts, at_rest);
    if (forecast.is_valid()) forecast.run(load, variance);
    return forecast.is_valid();
}

}  // namespace eplb
