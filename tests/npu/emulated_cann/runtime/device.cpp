// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>

namespace emulated {
namespace {

std::string environment(const char* name, const std::string& otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? value : otherwise;
}

Check check_from(const char* name) {
    std::string value = environment(name, "report");
    if (value == "off") return Check::kOff;
    if (value == "report") return Check::kReport;
    if (value == "error") return Check::kError;
    std::cerr << "emulated CANN: " << name << "=" << value << "; allowed are off, report, error\n";
    std::abort();
}

const Settings* read_settings() {
    auto* s = new Settings;  // never deleted, like all state here
    s->devices = std::stoi(environment("EMULATED_NPU_DEVICES", "8"));
    s->memory = std::stoull(environment("EMULATED_NPU_MEMORY_MB", "4096")) << 20;
    s->soc = environment("EMULATED_NPU_SOC", "Ascend910B3");
    s->delay_us = static_cast<unsigned>(std::stoul(environment("EMULATED_NPU_DELAY_US", "0")));
    s->seed = std::stoull(environment("EMULATED_NPU_SEED", "1"));
    s->race = check_from("EMULATED_NPU_RACE");
    s->comm_order = check_from("EMULATED_NPU_COMM_ORDER");
    s->report = environment("EMULATED_NPU_REPORT", "");
    s->poison = environment("EMULATED_NPU_POISON", "1") != "0";
    return s;
}

std::atomic<const Settings*> settings_read{nullptr};

thread_local std::string recent_message;
thread_local std::string recent_returned;
thread_local int this_device = -1;

void run_stream(Stream* stream) {
    Device& state = device();
    std::unique_lock<std::mutex> lock(state.mutex);
    for (;;) {
        stream->wake.wait(lock, [&] { return stream->stopping || !stream->queue.empty(); });
        if (stream->queue.empty()) return;
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        unsigned delay = 0;
        if (settings().delay_us) {
            // Mostly short delays, now and then a long one: both many interleavings and wide ones.
            unsigned most = stream->random() % 8 ? settings().delay_us / 8 : settings().delay_us;
            delay = most ? stream->random() % (most + 1) : 0;
        }
        bool skip = state.broken.has_value();
        lock.unlock();
        if (delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
        std::optional<Error> failure;
        if (!skip) {
            try {
                work.run();
            } catch (const Error& error) {
                failure = Error(error.code, work.name + ": " + error.what());
            } catch (const std::exception& error) {
                failure = Error(507015, work.name + ": " + error.what());
            }
        }
        work.run = nullptr;
        lock.lock();
        if (failure && !state.broken) {
            state.broken = failure;
            std::cerr << "emulated CANN: device error: " << failure->what() << std::endl;
        }
        stream->finished = work.number;
        state.progress.notify_all();
    }
}

}  // namespace

int fail(int code, const std::string& message) {
    recent_message = message;
    return code;
}

const char* take_recent_message() {
    recent_returned = recent_message;
    recent_message.clear();
    return recent_returned.c_str();
}

int current_device() { return this_device; }
void set_current_device(int id) { this_device = id; }

const Settings& settings() {
    // A forked process reads its own environment.
    static const int forgets = pthread_atfork(nullptr, nullptr, [] { settings_read = nullptr; });
    static_cast<void>(forgets);
    const Settings* values = settings_read;
    if (!values) {
        const Settings* fresh = read_settings();
        values = settings_read.compare_exchange_strong(values, fresh) ? fresh : values;
    }
    return *values;
}

Device& device() {
    static Device* state = [] {
        auto* made = new Device;  // never destroyed: stream threads outlive static destructors
        made->used.resize(settings().devices);
        return made;
    }();
    return *state;
}

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

const Block* find_block(const void* address, size_t bytes) {
    Device& state = device();
    auto at = reinterpret_cast<uintptr_t>(address);
    auto next = state.blocks.upper_bound(at);
    if (next == state.blocks.begin()) return nullptr;
    const Block& block = std::prev(next)->second;
    return at + bytes <= block.begin + block.bytes ? &block : nullptr;
}

void report(Check level, const std::string& kind, const std::string& text) {
    if (level == Check::kOff) return;
    const std::string line = kind + ": " + text;
    Device& state = device();
    state.reports.push_back(line);
    if (!settings().report.empty()) {
        std::ofstream(settings().report, std::ios::app) << "[" << getpid() << "] " << line << std::endl;
    }
    if (level == Check::kError) throw Error(507015, line);
    if (state.reports.size() <= 20) std::cerr << "emulated CANN: " << line << std::endl;
}

void raise_races(const std::vector<std::string>& races) {
    for (const std::string& race : races) report(settings().race, "race", race);
}

void check_broken() {
    if (device().broken) throw *device().broken;
}

Stream* new_stream(int on_device) {
    Device& state = device();
    auto* stream = new Stream;
    stream->actor = state.next_actor++;
    stream->device = on_device;
    stream->random.seed(settings().seed * 1000003 + on_device * 101 + stream->actor);
    state.streams.insert(stream);
    return stream;
}

Stream* stream_of(void* handle) {
    Device& state = device();
    if (!handle) {
        if (this_device < 0) throw Error(107002, "no device is set in this thread");
        auto& stream = state.default_streams[this_device];
        if (!stream) {
            stream.reset(new_stream(this_device));
            stream->is_default = true;
        }
        return stream.get();
    }
    auto* stream = static_cast<Stream*>(handle);
    if (!state.streams.count(stream)) throw Error(107003, "the stream does not exist, or no longer");
    return stream;
}

Clock& clock_of(Stream* stream) { return stream->capture ? stream->capture->clocks[stream] : stream->clock; }

void push(Stream* stream, std::string name, std::function<void()> run) {
    if (!stream->started) {
        stream->started = true;
        stream->thread = std::thread(run_stream, stream);
        stream->thread.detach();
    }
    stream->queue.push_back({std::move(name), std::move(run), ++stream->enqueued});
    stream->wake.notify_one();
}

void host_access(const std::vector<Access>& accesses, const std::string& what) {
    if (settings().race == Check::kOff) return;
    Device& state = device();
    state.host.tick(kHost);
    raise_races(state.shadow.access(kHost, state.host, accesses, what));
}

void submit_locked(Stream* stream, Task task, const std::string& site) {
    Device& state = device();
    check_broken();
    const std::string what =
        task.name + " on stream " + std::to_string(stream->actor) + (site.empty() ? "" : " at ") + site;
    if (stream->updating) {
        stream->update.push_back(std::move(task));
        return;
    }
    if (stream->capture) {
        Graph& graph = *stream->capture;
        Clock& clock = graph.clocks[stream];
        clock.tick(stream->actor);
        if (settings().race != Check::kOff) {
            raise_races(graph.shadow.access(stream->actor, clock, task.accesses, what + " (captured)"));
        }
        graph.nodes.push_back({task.name, std::move(task.accesses),
                               std::make_shared<std::function<void()>>(std::move(task.run)), std::move(task.issue)});
        return;
    }
    stream->clock.join(state.host);
    stream->clock.tick(stream->actor);
    if (settings().race != Check::kOff) {
        raise_races(state.shadow.access(stream->actor, stream->clock, task.accesses, what));
    }
    std::function<void()> run = task.issue ? task.issue() : std::move(task.run);
    push(stream, std::move(task.name), std::move(run));
}

void submit(void* handle, Task task) {
    const std::string site = settings().race == Check::kOff || task.accesses.empty() ? "" : python_site();
    std::lock_guard<std::mutex> lock(device().mutex);
    submit_locked(stream_of(handle), std::move(task), site);
}

bool wait_stream(std::unique_lock<std::mutex>& lock, Stream* stream, int timeout_ms) {
    Device& state = device();
    const uint64_t target = stream->enqueued;
    const Clock reached = stream->clock;
    auto done = [&] { return stream->finished >= target || (state.broken && stream->queue.empty()); };
    if (timeout_ms < 0) {
        state.progress.wait(lock, done);
    } else if (!state.progress.wait_for(lock, std::chrono::milliseconds(timeout_ms), done)) {
        return false;
    }
    state.host.join(reached);
    return true;
}

}  // namespace emulated

extern "C" {
// For the tests: number of reports so far, one of them, and a host access that the libraries cannot see by themselves.
EMULATED_EXPORT int emulatedReportCount() {
    std::lock_guard<std::mutex> lock(emulated::device().mutex);
    return static_cast<int>(emulated::device().reports.size());
}
EMULATED_EXPORT const char* emulatedReport(int index) {
    std::lock_guard<std::mutex> lock(emulated::device().mutex);
    return emulated::device().reports.at(index).c_str();
}
EMULATED_EXPORT int emulatedHostAccess(const void* data, size_t bytes, int write) {
    return emulated::guarded([&] {
        const std::string site = emulated::python_site();
        std::lock_guard<std::mutex> lock(emulated::device().mutex);
        emulated::host_access({write ? emulated::writes(data, bytes) : emulated::reads(data, bytes)},
                              "host at " + site);
    });
}
}
