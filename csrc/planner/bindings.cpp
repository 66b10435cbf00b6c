// SPDX-License-Identifier: Apache-2.0
// The Python module _planner. planning/inputs.py checks the arguments of users; the checks here raise ValueError, so
// that no argument can crash the process.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "default_policy.h"
#include "dispatch.h"
#include "forecast.h"
#include "incremental.h"
#include "random_numbers.h"
#include "random_policy.h"
#include "sums.h"
#include "windows.h"

namespace py = pybind11;

namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style>;
using Int64Array = py::array_t<int64_t, py::array::c_style>;
using DoubleArray = py::array_t<double, py::array::c_style>;

constexpr char kNotFinite[] = "load must be finite and not negative";

void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

template <typename Array>
void require_matrix(const Array& array, const char* name) {
    if (array.ndim() != 2) throw py::value_error(std::string(name) + " must have two dimensions");
}

void require_finite(const DoubleArray& load) {
    require(eplb::are_valid(static_cast<size_t>(load.size()), load.data()), kNotFinite);
}

void require_slots(const Int32Array& slots, int num_experts, int num_ranks) {
    require(num_experts > 0 && num_ranks > 0, "need at least one expert and one rank");
    require(slots.shape(1) > 0 && slots.shape(1) % num_ranks == 0, "slots must be shared evenly by the ranks");
    std::vector<char> seen(num_experts + 1);  // the last stands for "empty"
    for (py::ssize_t layer = 0; layer < slots.shape(0); ++layer) {
        std::fill(seen.begin(), seen.end(), 0);
        seen[num_experts] = 1;
        int missing = num_experts;
        for (py::ssize_t p = 0; p < slots.shape(1); ++p) {
            const int32_t e = *slots.data(layer, p);
            require(e >= -1 && e < num_experts, "a slot holds an expert that does not exist");
            char& is_seen = seen[e < 0 ? num_experts : e];
            missing -= !is_seen;  // without a branch, which would be hard to predict
            is_seen = 1;
        }
        require(missing == 0, "an expert has no copy");
    }
}

void require_speed(const DoubleArray& speed, int num_ranks) {
    require(speed.size() == 0 || (speed.ndim() == 1 && speed.shape(0) == num_ranks),
            "speed must have one entry per rank");
    for (py::ssize_t r = 0; r < speed.size(); ++r)
        require(std::isfinite(speed.data()[r]) && speed.data()[r] >= 1e-3 && speed.data()[r] <= 1024.0,
                "speed must be 0.001..1024");
}

// weight [X, n] float64, order [X, n] int64 (items by falling weight) -> position [X, n] of each item, with the packs
// one after the other.
Int32Array pack_balanced(const DoubleArray& weight, const Int64Array& order, int packs) {
    require_matrix(weight, "weight");
    require_matrix(order, "order");
    const auto rows = weight.shape(0), n = weight.shape(1);
    require(order.shape(0) == rows && order.shape(1) == n, "order and weight differ in shape");
    require(packs > 0 && n > 0 && n % packs == 0, "items cannot be shared evenly by the packs");
    for (py::ssize_t i = 0; i < order.size(); ++i)
        require(order.data()[i] >= 0 && order.data()[i] < n, "order names an item that does not exist");
    Int32Array result({rows, n});
    const auto* w = weight.data();
    const auto* o = order.data();
    auto* out = result.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<int32_t> pack(n, 0), position(n, 0);
        for (py::ssize_t row = 0; row < rows; ++row) {
            eplb::pack_balanced(w + row * n, o + row * n, static_cast<int>(n), packs, pack.data(), position.data());
            for (py::ssize_t i = 0; i < n; ++i)
                out[row * n + i] = pack[i] * static_cast<int32_t>(n / packs) + position[i];
        }
    }
    return result;
}

// weight [X, n] float64 -> (item [X, copies] of each copy, count [X, n])
py::tuple replicate(const DoubleArray& weight, int copies) {
    require_matrix(weight, "weight");
    const auto rows = weight.shape(0), n = weight.shape(1);
    require(n > 0 && copies >= n && copies <= (1 << 24), "fewer copies than items");
    require_finite(weight);
    Int32Array item({rows, static_cast<py::ssize_t>(copies)}), count({rows, n});
    const auto* w = weight.data();
    auto* items = item.mutable_data();
    auto* counts = count.mutable_data();
    {
        py::gil_scoped_release release;
        for (py::ssize_t row = 0; row < rows; ++row)
            eplb::replicate(w + row * n, static_cast<int>(n), copies, items + row * copies, counts + row * n);
    }
    return py::make_tuple(item, count);
}

Int32Array preserve_slots(const Int32Array& slots, const Int32Array& old, int num_ranks) {
    require_matrix(slots, "slots");
    require_matrix(old, "old");
    require(slots.shape(0) == old.shape(0) && slots.shape(1) == old.shape(1), "placements differ in shape");
    require(num_ranks > 0 && slots.shape(1) % num_ranks == 0, "slots must be shared evenly by the ranks");
    const auto rows = slots.shape(0), n = slots.shape(1);
    Int32Array result({rows, n});
    std::copy_n(slots.data(), slots.size(), result.mutable_data());
    for (py::ssize_t row = 0; row < rows; ++row)
        eplb::preserve_slots(result.mutable_data() + row * n, old.data() + row * n, static_cast<int>(n), num_ranks);
    return result;
}

Int32Array draw_placement(uint64_t seed, int num_layers, int num_experts, int num_slots, int num_ranks) {
    require(num_layers > 0 && num_experts > 0 && num_ranks > 0, "need at least one layer, expert and rank");
    require(num_slots >= num_experts && num_slots % num_ranks == 0, "slots must hold all experts, evenly by rank");
    Int32Array result({num_layers, num_slots});
    eplb::Random seeds(seed);
    for (int layer = 0; layer < num_layers; ++layer)
        eplb::draw_placement(seeds.next(), num_experts, num_slots, num_ranks, result.mutable_data(layer, 0));
    return result;
}

// PAR [L] of each layer: the busiest rank's load over the mean, loads [L, E] split evenly over copies; 1 without load.
// With `speed` [R] (mean 1) a rank's load is divided by its speed.
py::array_t<double> peak_to_average(const DoubleArray& load, const int32_t* slots, int num_slots, int num_ranks,
                                    const double* speed = nullptr) {
    const auto layers = load.shape(0), num_experts = load.shape(1);
    py::array_t<double> result(layers);
    std::vector<int32_t> count(num_experts);
    for (py::ssize_t layer = 0; layer < layers; ++layer) {
        const double* loads = load.data(layer, 0);
        const int32_t* row = slots + layer * num_slots;
        std::fill(count.begin(), count.end(), 0);
        for (int p = 0; p < num_slots; ++p)
            if (row[p] >= 0) ++count[row[p]];
        double most = 0.0, total = 0.0;
        for (int p = 0, r = 0; r < num_ranks; ++r) {
            double sum = 0.0;
            for (; p < (r + 1) * (num_slots / num_ranks); ++p)
                if (row[p] >= 0) sum += loads[row[p]] / count[row[p]];
            most = std::max(most, speed == nullptr ? sum : sum / speed[r]);
            total += sum;
        }
        result.mutable_at(layer) = total > 0.0 ? most / (total / num_ranks) : 1.0;
    }
    return result;
}

// target [L]; variance [L, E], series [T, L, E] and pars [2, L] (see pars_of_windows) or of size 0
// -> (slots [L, P] after all moves, moves [M, 4], PAR before [L], PAR after [L]; with a series also the 95th percentile
// of its windows' PARs after [L])
py::tuple plan_incremental(const DoubleArray& load, const Int32Array& slots, const DoubleArray& variance,
                           const DoubleArray& target, int num_ranks, int num_nodes, bool thorough, int rounds,
                           double seconds, uint64_t seed, int threads, int64_t max_moves, int64_t max_moves_per_rank,
                           int64_t max_moves_between_nodes, double far_cost, bool stay_near, const DoubleArray& speed,
                           const DoubleArray& series, const DoubleArray& pars) {
    require_matrix(load, "load");
    require_matrix(slots, "slots");
    require(load.shape(0) == slots.shape(0), "load and slots differ in the number of layers");
    require(num_ranks > 0 && num_ranks <= 1024, "ranks must be 1..1024");
    require(slots.shape(1) <= 65535, "slots per layer must be at most 65535");
    require_finite(load);
    const bool has_variance = variance.size() > 0;
    require(!has_variance ||
                (variance.ndim() == 2 && variance.shape(0) == load.shape(0) && variance.shape(1) == load.shape(1)),
            "variance and load differ in shape");
    require_finite(variance);
    require(target.ndim() == 1 && target.shape(0) == load.shape(0), "target must have one entry per layer");
    require_finite(target);
    require(num_nodes > 0 && num_ranks % num_nodes == 0, "nodes must share the ranks evenly");
    require_speed(speed, num_ranks);
    require(far_cost >= 1.0 && far_cost <= 1000.0, "far_cost must be 1..1000");
    const auto layers = slots.shape(0), num_slots = slots.shape(1), num_experts = load.shape(1);
    require_slots(slots, static_cast<int>(num_experts), num_ranks);
    const bool has_series = series.size() > 0;
    require(!has_series || (series.ndim() == 3 && series.shape(1) == load.shape(0) && series.shape(2) == load.shape(1)),
            "series and load differ in shape");
    require_finite(series);
    require(!has_series || (pars.ndim() == 2 && pars.shape(0) == 2 && pars.shape(1) == load.shape(0)),
            "pars must be those of the series' windows");
    eplb::Goal goal;
    goal.p95 = has_series ? pars.data(0, 0) : nullptr;
    goal.highest = has_series ? pars.data(1, 0) : nullptr;
    goal.series = has_series ? series.data() : nullptr;
    goal.windows = has_series ? static_cast<int>(series.shape(0)) : 0;
    goal.target = target.data();
    goal.speed = speed.size() > 0 ? speed.data() : nullptr;
    goal.nodes = num_nodes;
    goal.far_cost = far_cost;
    goal.stay_near = stay_near || max_moves_between_nodes == 0;
    goal.thorough = thorough;
    goal.rounds = rounds;
    goal.seconds = seconds;
    goal.seed = seed;
    goal.threads = threads;
    goal.max_moves = max_moves;
    goal.max_moves_per_rank = max_moves_per_rank;
    goal.max_moves_between_nodes = max_moves_between_nodes;
    eplb::LayeredPlan plan;
    {
        py::gil_scoped_release release;
        plan = eplb::plan_incremental(load.data(), has_variance ? variance.data() : nullptr, slots.data(),
                                      static_cast<int>(layers),
                                      {static_cast<int>(num_experts), static_cast<int>(num_slots), num_ranks}, goal);
    }
    Int32Array after({layers, num_slots}), moves({static_cast<py::ssize_t>(plan.moves.size() / 4), py::ssize_t{4}});
    std::copy(plan.slots.begin(), plan.slots.end(), after.mutable_data());
    std::copy(plan.moves.begin(), plan.moves.end(), moves.mutable_data());
    const int P = static_cast<int>(num_slots);
    auto before_par = peak_to_average(load, slots.data(), P, num_ranks, goal.speed);
    auto after_par = peak_to_average(load, after.data(), P, num_ranks, goal.speed);
    for (py::ssize_t l = 0; l < layers; ++l) {
        if (plan.par_of_windows[2 * l] == 0.0) continue;
        before_par.mutable_at(l) = plan.par_of_windows[2 * l];
        after_par.mutable_at(l) = plan.par_of_windows[2 * l + 1];
    }
    if (!has_series) return py::make_tuple(after, moves, before_par, after_par);
    py::array_t<double> after_p95(layers, plan.p95_of_windows.data());
    return py::make_tuple(after, moves, before_par, after_par, after_p95);
}

// load [L, E], slots [L, P] -> PAR [L]
py::array_t<double> par(const DoubleArray& load, const Int32Array& slots, int num_ranks) {
    require_matrix(load, "load");
    require_matrix(slots, "slots");
    require(load.shape(0) == slots.shape(0), "load and slots differ in the number of layers");
    require_slots(slots, static_cast<int>(load.shape(1)), num_ranks);
    return peak_to_average(load, slots.data(), static_cast<int>(slots.shape(1)), num_ranks);
}

// Whether slots [L, P] are a valid placement.
bool is_valid(const Int32Array& slots, int num_experts, int num_ranks) {
    if (slots.ndim() != 2 || slots.size() == 0) return false;
    try {
        require_slots(slots, num_experts, num_ranks);
    } catch (const py::value_error&) {
        return false;
    }
    return true;
}

// load [L, E], slots [L, P] -> share [L, P]
DoubleArray dispatch_shares(const DoubleArray& load, const Int32Array& slots, int num_ranks, double tolerance) {
    require_matrix(load, "load");
    require_matrix(slots, "slots");
    require(load.shape(0) == slots.shape(0), "load and slots differ in the number of layers");
    require(tolerance > 0.0, "tolerance must be above zero");
    require_finite(load);
    const auto layers = slots.shape(0), num_slots = slots.shape(1), num_experts = load.shape(1);
    require_slots(slots, static_cast<int>(num_experts), num_ranks);
    DoubleArray result({layers, num_slots});
    double* share = result.mutable_data();
    {
        py::gil_scoped_release release;
        eplb::Dispatch dispatch({static_cast<int>(num_experts), static_cast<int>(num_slots), num_ranks});
        for (py::ssize_t layer = 0; layer < layers; ++layer)
            dispatch.share(load.data() + layer * num_experts, slots.data() + layer * num_slots, tolerance,
                           share + layer * num_slots);
    }
    return result;
}

void require_series(const DoubleArray& series) {
    require(series.ndim() == 3 && series.size() > 0, "series must have three dimensions, none of them zero");
}

// series [T, L, E], at_rest [L] -> (load [L, E] expected in the next window, variance [L, E])
py::tuple forecast(const DoubleArray& series, const py::array_t<bool, py::array::c_style>& at_rest) {
    require_series(series);
    const auto windows = series.shape(0), layers = series.shape(1), num_experts = series.shape(2);
    require(at_rest.ndim() == 1 && at_rest.shape(0) == layers, "at_rest must have one entry per layer");
    DoubleArray load({layers, num_experts}), variance({layers, num_experts});
    double *loads = load.mutable_data(), *variances = variance.mutable_data();
    bool done = false;
    {
        py::gil_scoped_release release;
        done = eplb::forecast(series.data(), static_cast<int>(windows), static_cast<int>(layers),
                              static_cast<int>(num_experts), at_rest.data(), loads, variances);
    }
    require(done, kNotFinite);
    return py::make_tuple(load, variance);
}

// series [T, L, E], slots [L, P], speed [R] or of size 0 -> [2, L]: the 95th percentile of the windows' PARs, and the
// highest
DoubleArray pars_of_windows(const DoubleArray& series, const Int32Array& slots, int num_ranks,
                            const DoubleArray& speed) {
    require_series(series);
    require_finite(series);
    require_matrix(slots, "slots");
    const auto layers = slots.shape(0), num_slots = slots.shape(1), num_experts = series.shape(2);
    require(series.shape(1) == layers, "series and slots differ in the number of layers");
    require_slots(slots, static_cast<int>(num_experts), num_ranks);
    require_speed(speed, num_ranks);
    const eplb::Shape shape = {static_cast<int>(num_experts), static_cast<int>(num_slots), num_ranks};
    DoubleArray result({py::ssize_t{2}, layers});
    for (py::ssize_t l = 0; l < layers; ++l) {
        std::vector<const double*> loads;
        for (py::ssize_t t = 0; t < series.shape(0); ++t) loads.push_back(series.data(t, l, 0));
        const eplb::Windows windows(shape, std::move(loads), speed.size() > 0 ? speed.data() : nullptr);
        const std::vector<double> pars = windows.pars(slots.data(l, 0));
        result.mutable_at(0, l) = eplb::percentile95(pars);
        result.mutable_at(1, l) = pars.empty() ? 1.0 : *std::max_element(pars.begin(), pars.end());
    }
    return result;
}

}  // namespace

PYBIND11_MODULE(_planner, module) {
    module.doc() = "C++ core of vllm_ascend_eplb.planning";
    module.attr("SEARCH_ROUNDING") = eplb::kSearchRounding;
    module.def("pack_balanced", &pack_balanced, py::arg("weight"), py::arg("order"), py::arg("packs"));
    module.def("replicate", &replicate, py::arg("weight"), py::arg("copies"));
    module.def("preserve_slots", &preserve_slots, py::arg("slots"), py::arg("old"), py::arg("num_ranks"));
    module.def("draw_placement", &draw_placement, py::arg("seed"), py::arg("num_layers"), py::arg("num_experts"),
               py::arg("num_slots"), py::arg("num_ranks"));
    module.def("par", &par, py::arg("load"), py::arg("slots"), py::arg("num_ranks"));
    module.def("is_valid", &is_valid, py::arg("slots"), py::arg("num_experts"), py::arg("num_ranks"));
    module.def("dispatch_shares", &dispatch_shares, py::arg("load"), py::arg("slots"), py::arg("num_ranks"),
               py::arg("tolerance"));
    module.def("forecast", &forecast, py::arg("series"), py::arg("at_rest"));
    module.def("pars_of_windows", &pars_of_windows, py::arg("series"), py::arg("slots"), py::arg("num_ranks"),
               py::arg("speed"));
    module.def("plan_incremental", &plan_incremental, py::arg("load"), py::arg("slots"), py::arg("variance"),
               py::arg("target"), py::kw_only(), py::arg("num_ranks"), py::arg("num_nodes"), py::arg("thorough"),
               py::arg("rounds"), py::arg("seconds"), py::arg("seed"), py::arg("threads"), py::arg("max_moves"),
               py::arg("max_moves_per_rank"), py::arg("max_moves_between_nodes"), py::arg("far_cost"),
               py::arg("stay_near"), py::arg("speed"), py::arg("series"), py::arg("pars"));
}
