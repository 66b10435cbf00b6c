// SPDX-License-Identifier: Apache-2.0
// State of the emulated devices. One mutex guards all of it; tasks run outside the mutex, one thread per stream.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <list>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <thread>

#include "race.h"

namespace emulated {

struct Graph;

/// A task in a graph, with what a task-group update may replace.
struct Node {
    std::string name;
    std::vector<Access> accesses;
    std::shared_ptr<std::function<void()>> run;
    std::function<std::function<void()>()> issue;
};

struct TaskGroup {
    std::shared_ptr<Graph> graph;
    size_t begin = 0, end = 0;
};

/// Streams, events and memory that a capture has seen, and the tasks it has recorded.
struct Graph {
    uint32_t id = 0;
    Stream* origin = nullptr;
    bool capturing = true;
    std::vector<Node> nodes;
    std::vector<std::unique_ptr<TaskGroup>> groups;
    // During capture: a race detector of the graph's own, so that missing waits inside a graph are seen.
    Shadow shadow;
    std::map<Stream*, Clock> clocks;
};

struct Work {
    std::string name;
    std::function<void()> run;
    uint64_t number;
};

struct Stream {
    Actor actor;
    int device;
    bool is_default = false;
    std::deque<Work> queue;
    uint64_t enqueued = 0, finished = 0;
    std::condition_variable wake;
    std::thread thread;
    bool started = false, stopping = false;
    Clock clock;
    std::shared_ptr<Graph> capture;  // non-null while the stream captures
    size_t group_begin = 0;          // of the open task group
    bool group_open = false;
    TaskGroup* updating = nullptr;  // non-null between TaskUpdateBegin and TaskUpdateEnd
    std::vector<Task> update;
    std::mt19937_64 random;
};

struct EventBody {
    uint64_t recorded = 0, completed = 0;  // generations: of the last record enqueued, of the last one reached
    std::map<uint64_t, int64_t> done_ns;   // completion time of the last few generations
    Clock clock;                           // of the last record
    bool flag = false;                     // events with ACL_EVENT_EXTERNAL: set by a record, cleared by a reset
    Clock flag_clock;
    std::weak_ptr<Graph> capture;  // the graph whose stream recorded it last, while that captures
    Clock capture_clock;
};

struct Event {
    uint32_t flags = 0;
    std::shared_ptr<EventBody> body = std::make_shared<EventBody>();
};

struct Device {
    std::mutex mutex;
    std::condition_variable progress;   // a task finished or an event completed
    std::map<uintptr_t, Block> blocks;  // live allocations, by address
    std::vector<size_t> used;           // bytes per device
    std::map<int, std::unique_ptr<Stream>> default_streams;
    std::set<Stream*> streams;
    Actor next_actor = 1;
    uint32_t next_graph = 1;
    Clock host;  // all host threads are one actor: what one has waited for, all may know
    Shadow shadow;
    std::optional<Error> broken;  // the sticky device error
    std::vector<std::string> reports;
};

Device& device();

/// The stream behind a handle; nullptr is the current device's default stream. Call with the mutex held.
Stream* stream_of(void* handle);

/// Accesses by a host thread now (synchronous copies). Call with the mutex held.
void host_access(const std::vector<Access>& accesses, const std::string& what);

/// Waits until `stream` has finished everything enqueued so far; false after `timeout_ms` (negative: no limit).
bool wait_stream(std::unique_lock<std::mutex>& lock, Stream* stream, int timeout_ms);

/// Enqueues without race bookkeeping. Call with the mutex held.
void push(Stream* stream, std::string name, std::function<void()> run);

/// Throws the sticky error, if there is one. Call with the mutex held.
void check_broken();

/// The clock a stream's next task has, in its capture or on the device. Call with the mutex held.
Clock& clock_of(Stream* stream);

void submit_locked(Stream* stream, Task task, const std::string& site);
void raise_races(const std::vector<std::string>& races);

int64_t now_ns();

}  // namespace emulated
