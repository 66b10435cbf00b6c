// SPDX-License-Identifier: Apache-2.0
// Streams, events and host synchronisation of the ACL runtime API.
#include <chrono>

#include "acl/acl.h"
#include "device.h"

namespace emulated {
Stream* new_stream(int on_device);
}

using namespace emulated;

namespace {

using Lock = std::unique_lock<std::mutex>;
using Body = std::shared_ptr<EventBody>;

Event* event_of(aclrtEvent handle) {
    if (!handle) throw Error(ACL_ERROR_RT_PARAM_INVALID, "the event is null");
    return static_cast<Event*>(handle);
}

void refuse_capture(const Stream* stream, const char* call) {
    if (stream->capture) {
        throw Error(ACL_ERROR_RT_STREAM_CAPTURED, std::string(call) + " on a stream that captures a graph");
    }
}

// Runs on a stream's thread: waits until `reached` holds or the device is broken.
template <typename Reached>
void wait_on_device(Reached reached) {
    Device& state = device();
    Lock lock(state.mutex);
    state.progress.wait(lock, [&] { return reached() || state.broken.has_value(); });
}

void complete(const Body& body, uint64_t generation) {
    Device& state = device();
    std::lock_guard<std::mutex> lock(state.mutex);
    body->completed = std::max(body->completed, generation);
    body->done_ns[generation] = now_ns();
    while (body->done_ns.size() > 4) body->done_ns.erase(body->done_ns.begin());
    state.progress.notify_all();
}

void set_flag(const Body& body, bool value) {
    Device& state = device();
    std::lock_guard<std::mutex> lock(state.mutex);
    body->flag = value;
    state.progress.notify_all();
}

// Enqueues a task without memory accesses, or adds it to the graph that the stream captures.
void push_or_capture(Stream* stream, const char* name, std::function<void()> run) {
    check_broken();
    if (stream->capture) {
        stream->capture->clocks[stream].tick(stream->actor);
        stream->capture->nodes.push_back({name, {}, std::make_shared<std::function<void()>>(std::move(run)), {}});
        return;
    }
    stream->clock.join(device().host);
    stream->clock.tick(stream->actor);
    push(stream, name, std::move(run));
}

void record(Event* event, Stream* stream) {
    Body body = event->body;
    if (event->flags & ACL_EVENT_EXTERNAL) {
        push_or_capture(stream, "record external event", [body] { set_flag(body, true); });
        body->flag_clock.join(clock_of(stream));
        return;
    }
    if (stream->capture) {
        Clock& clock = stream->capture->clocks[stream];
        clock.tick(stream->actor);
        body->capture = stream->capture;
        body->capture_clock = clock;
        return;
    }
    body->capture.reset();
    const uint64_t generation = ++body->recorded;
    push_or_capture(stream, "record event", [body, generation] { complete(body, generation); });
    body->clock = stream->clock;
}

void wait(Stream* stream, Event* event) {
    Body body = event->body;
    if (event->flags & ACL_EVENT_EXTERNAL) {
        push_or_capture(stream, "wait for external event", [body] { wait_on_device([&] { return body->flag; }); });
        clock_of(stream).join(body->flag_clock);
        return;
    }
    std::shared_ptr<Graph> captured = body->capture.lock();
    if (captured && captured->capturing) {
        if (stream->capture && stream->capture != captured) {
            throw Error(ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                        "a stream that captures one graph waits for an event of another");
        }
        stream->capture = captured;  // a fork: from here on this stream belongs to the capture
        captured->clocks[stream].join(body->capture_clock);
        captured->clocks[stream].tick(stream->actor);
        return;
    }
    if (stream->capture) {
        if (!body->recorded) return;
        throw Error(ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                    "a stream that captures waits for an event recorded outside the capture");
    }
    const uint64_t generation = body->recorded;
    if (!generation) return;
    push_or_capture(stream, "wait for event",
                    [body, generation] { wait_on_device([&] { return body->completed >= generation; }); });
    stream->clock.join(body->clock);
}

void synchronize(Event* event, int timeout_ms) {
    Device& state = device();
    Lock lock(state.mutex);
    Body body = event->body;
    const uint64_t generation = body->recorded;
    const Clock reached = body->clock;
    auto done = [&] { return body->completed >= generation || state.broken.has_value(); };
    if (timeout_ms < 0) {
        state.progress.wait(lock, done);
    } else if (!state.progress.wait_for(lock, std::chrono::milliseconds(timeout_ms), done)) {
        throw Error(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, "the event did not complete in time");
    }
    check_broken();
    state.host.join(reached);
}

void synchronize_stream(void* handle, int timeout_ms) {
    Lock lock(device().mutex);
    Stream* stream = stream_of(handle);
    refuse_capture(stream, "aclrtSynchronizeStream");
    if (!wait_stream(lock, stream, timeout_ms)) {
        throw Error(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
                    "the stream did not drain in " + std::to_string(timeout_ms) + " ms");
    }
    check_broken();
}

void synchronize_device(int timeout_ms) {
    Lock lock(device().mutex);
    std::vector<Stream*> streams(device().streams.begin(), device().streams.end());
    for (Stream* stream : streams) {
        if (!device().streams.count(stream) || stream->device != current_device()) continue;
        refuse_capture(stream, "aclrtSynchronizeDevice");
        if (!wait_stream(lock, stream, timeout_ms)) {
            throw Error(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
                        "a stream did not drain in " + std::to_string(timeout_ms) + " ms");
        }
    }
    check_broken();
}

int make_stream(aclrtStream* stream) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        if (current_device() < 0) throw Error(ACL_ERROR_RT_CONTEXT_NULL, "no device is set in this thread");
        *stream = new_stream(current_device());
    });
}

int destroy_stream(aclrtStream handle) {
    return guarded([&] {
        Lock lock(device().mutex);
        Stream* stream = stream_of(handle);
        const uint64_t target = stream->enqueued;
        device().progress.wait(lock, [&] { return stream->finished >= target; });
        device().streams.erase(stream);
        stream->stopping = true;  // the object itself stays: its thread may still be leaving
        stream->wake.notify_one();
    });
}

int make_event(aclrtEvent* event, uint32_t flags) {
    auto* made = new Event;
    made->flags = flags;
    *event = made;
    return 0;
}

std::map<void*, Clock>& value_clocks() {
    static auto* clocks = new std::map<void*, Clock>;
    return *clocks;
}

bool completed(const Event* event) { return event->body->completed >= event->body->recorded; }

}  // namespace

extern "C" {

EMULATED_EXPORT aclError aclrtCreateStream(aclrtStream* stream) { return make_stream(stream); }
EMULATED_EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
    return make_stream(stream);
}
EMULATED_EXPORT aclError aclrtDestroyStream(aclrtStream stream) { return destroy_stream(stream); }
EMULATED_EXPORT aclError aclrtDestroyStreamForce(aclrtStream stream) { return destroy_stream(stream); }
EMULATED_EXPORT aclError aclrtSynchronizeStream(aclrtStream stream) {
    return guarded([&] { synchronize_stream(stream, -1); });
}
EMULATED_EXPORT aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout_ms) {
    return guarded([&] { synchronize_stream(stream, timeout_ms); });
}
EMULATED_EXPORT aclError aclrtSynchronizeDevice() {
    return guarded([&] { synchronize_device(-1); });
}
EMULATED_EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
    return guarded([&] { synchronize_device(timeout_ms); });
}
EMULATED_EXPORT aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        refuse_capture(stream, "aclrtStreamQuery");
        check_broken();
        const bool drained = stream->finished >= stream->enqueued;
        if (drained) device().host.join(stream->clock);
        *status = drained ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    });
}
EMULATED_EXPORT aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        *id = stream_of(handle)->actor;
    });
}

EMULATED_EXPORT aclError aclrtCreateEvent(aclrtEvent* event) { return make_event(event, 0); }
EMULATED_EXPORT aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flags) {
    return make_event(event, flags);
}
EMULATED_EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flags) {
    return make_event(event, flags);
}
EMULATED_EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
    delete static_cast<Event*>(event);  // pending tasks hold the body
    return 0;
}
EMULATED_EXPORT aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        record(event_of(event), stream_of(stream));
    });
}
EMULATED_EXPORT aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Body body = event_of(event)->body;
        push_or_capture(stream_of(stream), "reset event", [body] { set_flag(body, false); });
    });
}
EMULATED_EXPORT aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        wait(stream_of(stream), event_of(event));
    });
}
EMULATED_EXPORT aclError aclrtSynchronizeEvent(aclrtEvent event) {
    return guarded([&] { synchronize(event_of(event), -1); });
}
EMULATED_EXPORT aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout_ms) {
    return guarded([&] { synchronize(event_of(event), timeout_ms); });
}
EMULATED_EXPORT aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Event* event = event_of(handle);
        check_broken();
        if (completed(event)) device().host.join(event->body->clock);
        *status = completed(event) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    });
}
EMULATED_EXPORT aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Event* event = event_of(handle);
        if (completed(event)) device().host.join(event->body->clock);
        *status = completed(event) ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    });
}
EMULATED_EXPORT aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        auto time_of = [](aclrtEvent handle) {
            const EventBody& body = *event_of(handle)->body;
            if (body.done_ns.empty()) throw Error(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "the event was not recorded");
            return body.done_ns.rbegin()->second;
        };
        *ms = static_cast<float>(time_of(end) - time_of(start)) * 1e-6f;
    });
}
EMULATED_EXPORT aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t* microseconds) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        const EventBody& body = *event_of(handle)->body;
        *microseconds = body.done_ns.empty() ? 0 : static_cast<uint64_t>(body.done_ns.rbegin()->second / 1000);
    });
}

// A word of device memory as a flag between streams; torch_npu's external events are made of it. The order that it
// makes is known to the race detector outside of captures.
EMULATED_EXPORT aclError aclrtValueWrite(void* address, uint64_t value, uint32_t, aclrtStream handle) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        push_or_capture(stream, "write value", [=] {
            std::lock_guard<std::mutex> inner(device().mutex);
            *static_cast<uint64_t*>(address) = value;
            device().progress.notify_all();
        });
        if (!stream->capture) value_clocks()[address].join(stream->clock);
    });
}
EMULATED_EXPORT aclError aclrtValueWait(void* address, uint64_t value, uint32_t flag, aclrtStream handle) {
    return guarded([&] {
        if (flag != ACL_STREAM_WAIT_VALUE_EQ && flag != ACL_STREAM_WAIT_VALUE_GEQ) {
            throw Error(ACL_ERROR_API_NOT_SUPPORT, "not emulated: aclrtValueWait with flag " + std::to_string(flag));
        }
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        push_or_capture(stream, "wait for value", [=] {
            wait_on_device([&] {
                const uint64_t now = *static_cast<uint64_t*>(address);
                return flag == ACL_STREAM_WAIT_VALUE_EQ ? now == value : now >= value;
            });
        });
        if (!stream->capture) stream->clock.join(value_clocks()[address]);
    });
}

EMULATED_EXPORT aclError aclrtLaunchHostFunc(aclrtStream stream, void (*function)(void*), void* argument) {
    return guarded([&] { submit(stream, {"host function", {}, [=] { function(argument); }, {}}); });
}
EMULATED_EXPORT aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType,
                                             aclrtStream stream) {
    return guarded([&] { submit(stream, {"callback", {}, [=] { function(argument); }, {}}); });
}
// Callbacks run on the stream's own thread, so there is nothing to subscribe to and nothing to process.
EMULATED_EXPORT aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return 0; }
EMULATED_EXPORT aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return 0; }
EMULATED_EXPORT aclError aclrtProcessReport(int32_t timeout_ms) {
    std::this_thread::sleep_for(std::chrono::milliseconds(std::max(0, timeout_ms)));
    return 0;
}
}
