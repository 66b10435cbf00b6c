// SPDX-License-Identifier: Apache-2.0
#include "race.h"

#include <sstream>

namespace emulated {
namespace {

std::string conflict(const Epoch& before, bool before_writes, const std::string& now, bool now_writes, uintptr_t begin,
                     uintptr_t end) {
    std::ostringstream text;
    text << "data race on [0x" << std::hex << begin << ", 0x" << end << std::dec << "): a "
         << (now_writes ? "write" : "read") << " is not ordered after an earlier " << (before_writes ? "write" : "read")
         << "\n  now:     " << now << "\n  earlier: " << before.what;
    return text.str();
}

}  // namespace

void Shadow::split(uintptr_t at) {
    auto next = ranges_.upper_bound(at);
    if (next == ranges_.begin()) return;
    auto range = std::prev(next);
    if (range->first == at || range->second.end <= at) return;
    ranges_.emplace_hint(next, at, range->second);
    range->second.end = at;
}

std::vector<std::string> Shadow::access(Actor actor, const Clock& clock, const std::vector<Access>& accesses,
                                        const std::string& what) {
    std::vector<std::string> reports;  // one per task is enough
    const uint64_t tick = clock.at(actor);
    for (const Access& access : accesses) {
        if (access.begin >= access.end) continue;
        split(access.begin);
        split(access.end);
        uintptr_t at = access.begin;
        auto range = ranges_.lower_bound(at);
        while (at < access.end) {
            if (range == ranges_.end() || range->first > at) {
                uintptr_t gap_end = range == ranges_.end() ? access.end : std::min(access.end, range->first);
                range = ranges_.emplace_hint(range, at, Range{gap_end, {}, {}});
            }
            Range& now = range->second;
            auto ordered = [&](const Epoch& before) {
                return before.actor < 0 || clock.at(before.actor) >= before.tick;
            };
            if (reports.empty() && !ordered(now.write)) {
                reports.push_back(conflict(now.write, true, what, access.write, range->first, now.end));
            }
            if (access.write) {
                for (const Epoch& before : now.reads) {
                    if (reports.empty() && !ordered(before)) {
                        reports.push_back(conflict(before, false, what, true, range->first, now.end));
                    }
                }
                now.reads.clear();
                now.write = {actor, tick, what};
            } else {
                bool known = false;
                for (Epoch& before : now.reads) {
                    if (before.actor == actor) {
                        before = {actor, tick, what};
                        known = true;
                    }
                }
                if (!known) now.reads.push_back({actor, tick, what});
            }
            at = now.end;
            ++range;
        }
    }
    return reports;
}

std::vector<std::string> Shadow::forget(uintptr_t begin, uintptr_t end, const Clock& clock, const std::string& what) {
    std::vector<std::string> reports;
    split(begin);
    split(end);
    auto first = ranges_.lower_bound(begin);
    auto last = ranges_.lower_bound(end);
    for (auto range = first; range != last && reports.empty(); ++range) {
        auto ordered = [&](const Epoch& before) { return before.actor < 0 || clock.at(before.actor) >= before.tick; };
        if (!ordered(range->second.write)) {
            reports.push_back(conflict(range->second.write, true, what, true, range->first, range->second.end));
        }
        for (const Epoch& before : range->second.reads) {
            if (reports.empty() && !ordered(before)) {
                reports.push_back(conflict(before, false, what, true, range->first, range->second.end));
            }
        }
    }
    ranges_.erase(first, last);
    return reports;
}

}  // namespace emulated
