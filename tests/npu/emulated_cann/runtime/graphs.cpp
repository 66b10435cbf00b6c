// SPDX-License-Identifier: Apache-2.0
// Captured graphs: recorded tasks, replayed in capture order as one task of the replaying stream. Task groups can be
// given new arguments between replays; the exchange takes place when the updating stream gets there, as on the device.
#include "acl/acl.h"
#include "device.h"

using namespace emulated;

namespace {

std::map<void*, std::shared_ptr<Graph>>& graphs() {
    static auto* live = new std::map<void*, std::shared_ptr<Graph>>;
    return *live;
}

std::shared_ptr<Graph> graph_of(aclmdlRI handle) {
    auto found = graphs().find(handle);
    if (found == graphs().end()) throw Error(ACL_ERROR_RT_INVALID_HANDLE, "the graph does not exist, or no longer");
    return found->second;
}

Stream* capturing(aclrtStream handle, const char* call) {
    Stream* stream = stream_of(handle);
    if (!stream->capture)
        throw Error(ACL_ERROR_RT_STREAM_NOT_CAPTURED, std::string(call) + ": the stream does not capture");
    return stream;
}

void replay(const std::shared_ptr<Graph>& graph, Stream* stream, const std::string& site) {
    if (graph->capturing) throw Error(ACL_ERROR_RT_MODEL_CAPTURED, "the graph is still being captured");
    Task task;
    task.name = "replay of graph " + std::to_string(graph->id);
    std::vector<std::shared_ptr<std::function<void()>>> steps;
    for (Node& node : graph->nodes) {
        task.accesses.insert(task.accesses.end(), node.accesses.begin(), node.accesses.end());
        // Tickets are drawn now, in host order; everything else is looked up when its turn comes, so that an update
        // that the graph waits for is seen.
        steps.push_back(node.issue ? std::make_shared<std::function<void()>>(node.issue()) : nullptr);
    }
    task.run = [graph, steps] {
        for (size_t i = 0; i < steps.size(); ++i) {
            std::function<void()> run;
            {
                std::lock_guard<std::mutex> lock(device().mutex);
                run = steps[i] ? *steps[i] : *graph->nodes[i].run;
            }
            if (run) run();
        }
    };
    submit_locked(stream, std::move(task), site);
}

}  // namespace

extern "C" {

EMULATED_EXPORT aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        check_broken();
        if (stream->capture) throw Error(ACL_ERROR_RT_STREAM_CAPTURED, "the stream captures already");
        if (stream->is_default) throw Error(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot capture");
        auto graph = std::make_shared<Graph>();
        graph->id = device().next_graph++;
        graph->origin = stream;
        graphs()[graph.get()] = graph;
        stream->capture = graph;
    });
}
EMULATED_EXPORT aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        *status = stream->capture ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
        if (graph) *graph = stream->capture.get();
    });
}
EMULATED_EXPORT aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* result) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = capturing(handle, "aclmdlRICaptureEnd");
        std::shared_ptr<Graph> graph = stream->capture;
        if (graph->origin != stream) {
            throw Error(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture was not begun on this stream");
        }
        graph->capturing = false;
        std::string unjoined;
        for (Stream* other : device().streams) {
            if (other->capture != graph) continue;
            if (graph->clocks[stream].at(other->actor) < graph->clocks[other].at(other->actor)) {
                unjoined += " " + std::to_string(other->actor);
            }
            other->capture.reset();
        }
        if (!unjoined.empty()) {
            graphs().erase(graph.get());
            throw Error(ACL_ERROR_RT_STREAM_UNJOINED, "streams left the capture without being waited for:" + unjoined);
        }
        *result = graph.get();
    });
}
EMULATED_EXPORT aclError aclmdlRIGetId(aclmdlRI handle, uint32_t* id) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        *id = graph_of(handle)->id;
    });
}
EMULATED_EXPORT aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
    return guarded([&] {
        const std::string site = settings().race == Check::kOff ? "" : python_site();
        std::lock_guard<std::mutex> lock(device().mutex);
        replay(graph_of(handle), stream_of(stream), site);
    });
}
EMULATED_EXPORT aclError aclmdlRIDestroy(aclmdlRI handle) {
    std::lock_guard<std::mutex> lock(device().mutex);
    graphs().erase(handle);  // replays under way hold the graph
    return 0;
}
EMULATED_EXPORT aclError aclmdlRIDebugPrint(aclmdlRI) { return 0; }
EMULATED_EXPORT aclError aclmdlRIDebugJsonPrint(aclmdlRI, const char*, uint32_t) { return 0; }
EMULATED_EXPORT aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode*) { return 0; }

EMULATED_EXPORT aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = capturing(handle, "aclmdlRICaptureTaskGrpBegin");
        if (stream->group_open) throw Error(ACL_ERROR_RT_PARAM_INVALID, "a task group is open already");
        stream->group_open = true;
        stream->group_begin = stream->capture->nodes.size();
    });
}
EMULATED_EXPORT aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* group) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = capturing(handle, "aclmdlRICaptureTaskGrpEnd");
        if (!stream->group_open) throw Error(ACL_ERROR_RT_PARAM_INVALID, "no task group is open");
        stream->group_open = false;
        auto made = std::make_unique<TaskGroup>();
        made->graph = stream->capture;
        made->begin = stream->group_begin;
        made->end = stream->capture->nodes.size();
        *group = made.get();
        stream->capture->groups.push_back(std::move(made));
    });
}
EMULATED_EXPORT aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        if (stream->updating) throw Error(ACL_ERROR_RT_PARAM_INVALID, "the stream updates a task group already");
        stream->updating = static_cast<TaskGroup*>(group);
        stream->update.clear();
    });
}
EMULATED_EXPORT aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        Stream* stream = stream_of(handle);
        if (!stream->updating) throw Error(ACL_ERROR_RT_PARAM_INVALID, "the stream updates no task group");
        TaskGroup group = *stream->updating;
        stream->updating = nullptr;
        std::vector<Task> update = std::move(stream->update);
        stream->update.clear();
        if (update.size() != group.end - group.begin) {
            throw Error(ACL_ERROR_RT_MODEL_UPDATE_FAILED, "the update has " + std::to_string(update.size()) +
                                                              " tasks, the task group " +
                                                              std::to_string(group.end - group.begin));
        }
        std::vector<std::shared_ptr<std::function<void()>>> runs;
        for (size_t i = 0; i < update.size(); ++i) {
            Node& node = group.graph->nodes[group.begin + i];
            if (update[i].name != node.name || update[i].issue) {
                throw Error(ACL_ERROR_RT_FEATURE_NOT_SUPPORT_UPDATE_OP,
                            "the update puts " + update[i].name + " in the place of " + node.name);
            }
            node.accesses = update[i].accesses;
            runs.push_back(std::make_shared<std::function<void()>>(std::move(update[i].run)));
        }
        stream->clock.join(device().host);
        stream->clock.tick(stream->actor);
        push(stream, "task group update", [group, runs] {
            std::lock_guard<std::mutex> lock(device().mutex);
            for (size_t i = 0; i < runs.size(); ++i) group.graph->nodes[group.begin + i].run = runs[i];
        });
    });
}
}
