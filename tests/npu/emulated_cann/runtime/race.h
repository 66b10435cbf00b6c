// SPDX-License-Identifier: Apache-2.0
// Happens-before over streams, events and host synchronisation, on memory ranges.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulated {

using Actor = int;  // a stream, or kHost
constexpr Actor kHost = 0;

class Clock {
  public:
    uint64_t at(Actor actor) const {
        auto found = ticks_.find(actor);
        return found == ticks_.end() ? 0 : found->second;
    }
    uint64_t tick(Actor actor) { return ++ticks_[actor]; }
    void join(const Clock& other) {
        for (auto [actor, tick] : other.ticks_) {
            auto& mine = ticks_[actor];
            if (mine < tick) mine = tick;
        }
    }

  private:
    std::map<Actor, uint64_t> ticks_;
};

struct Epoch {
    Actor actor = -1;  // -1: never
    uint64_t tick = 0;
    std::string what;  // task and call site
};

/// Last write and the reads since, per memory range.
class Shadow {
  public:
    /// Checks `accesses` of an actor whose clock is `clock` and remembers them. Returns at most one
    /// report.
    std::vector<std::string> access(Actor actor, const Clock& clock, const std::vector<Access>& accesses,
                                    const std::string& what);
    /// Conflicts of a free of [begin, end) at `clock`; forgets the range.
    std::vector<std::string> forget(uintptr_t begin, uintptr_t end, const Clock& clock, const std::string& what);

  private:
    struct Range {
        uintptr_t end;
        Epoch write;
        std::vector<Epoch> reads;
    };
    void split(uintptr_t at);
    std::map<uintptr_t, Range> ranges_;
};

}  // namespace emulated
