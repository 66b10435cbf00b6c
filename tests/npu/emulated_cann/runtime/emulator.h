// SPDX-License-Identifier: Apache-2.0
// The emulated device as its libraries see it: memory, streams, events, captured graphs, race detector.
// libascendcl owns all state; libhccl and libopapi only submit tasks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define EMULATED_EXPORT __attribute__((visibility("default")))

namespace emulated {

/// A failure that the device or a library reports: an aclError and a message for aclGetRecentErrMsg.
struct Error : std::runtime_error {
    Error(int code, const std::string& message) : std::runtime_error(message), code(code) {}
    int code;
};

/// Stores the message for aclGetRecentErrMsg of this thread and returns `code`.
EMULATED_EXPORT int fail(int code, const std::string& message);

/// Runs `body`, turning an Error into its code (and any other exception into ACL_ERROR_INTERNAL_ERROR).
template <typename Body>
int guarded(Body&& body) {
    try {
        body();
        return 0;
    } catch (const Error& error) {
        return fail(error.code, error.what());
    } catch (const std::exception& error) {
        return fail(500000, error.what());
    }
}

// --- settings (environment variables, read once in every process) ---------------------------------------------

enum class Check { kOff, kReport, kError };

struct Settings {
    int devices;         // EMULATED_NPU_DEVICES, default 8
    size_t memory;       // EMULATED_NPU_MEMORY_MB, bytes per device, default 4096 MB
    std::string soc;     // EMULATED_NPU_SOC, default Ascend910B3
    unsigned delay_us;   // EMULATED_NPU_DELAY_US, longest random delay before a task, default 0
    uint64_t seed;       // EMULATED_NPU_SEED
    Check race;          // EMULATED_NPU_RACE = off | report | error, default report
    Check comm_order;    // EMULATED_NPU_COMM_ORDER = off | report | error, default report
    std::string report;  // EMULATED_NPU_REPORT, a file that reports are appended to
    bool poison;         // EMULATED_NPU_POISON, fill fresh memory with 0xFF (NaN), default 1
};
EMULATED_EXPORT const Settings& settings();

// --- memory --------------------------------------------------------------------------------------------------

struct Block {
    uintptr_t begin = 0;
    size_t bytes = 0;
    int device = -1;  // -1: pinned host memory
    bool mapped = false;
};

/// The live allocation that holds [address, address + bytes), or nullptr if there is none.
EMULATED_EXPORT const Block* find_block(const void* address, size_t bytes);

// --- tasks ---------------------------------------------------------------------------------------------------

/// Memory that a task reads or writes, as half-open address ranges.
struct Access {
    uintptr_t begin;
    uintptr_t end;
    bool write;
};

struct Task {
    std::string name;
    std::vector<Access> accesses;
    std::function<void()> run;  // on the stream's thread; throws Error
    // Where set, called once per issue (submission or graph replay) in host order, and its result is run: for tasks
    // that draw a ticket, such as collectives.
    std::function<std::function<void()>()> issue;
};

struct Stream;
struct Event;

/// Enqueues a task on a stream (nullptr: the device's default stream), or adds it to the graph the stream captures.
/// Throws Error: invalid stream, sticky device error, or, under race check `error`, a race.
EMULATED_EXPORT void submit(void* stream, Task task);

/// Accesses of [data, data + bytes).
inline Access reads(const void* data, size_t bytes) {
    auto begin = reinterpret_cast<uintptr_t>(data);
    return {begin, begin + bytes, false};
}
inline Access writes(const void* data, size_t bytes) {
    auto begin = reinterpret_cast<uintptr_t>(data);
    return {begin, begin + bytes, true};
}

/// Adds a line to the reports (kind "race", "order", ...); under Check::kError throws Error instead.
EMULATED_EXPORT void report(Check level, const std::string& kind, const std::string& text);

/// The Python lines, innermost first, that led to this call; empty without Python.
EMULATED_EXPORT std::string python_site();

/// The rank's current device of this thread, or -1.
EMULATED_EXPORT int current_device();

}  // namespace emulated
