// SPDX-License-Identifier: Apache-2.0
#include "communicator.h"

#include <cstring>
#include <map>

namespace emulated::hccl {
namespace {

std::mutex registry_mutex;
std::map<void*, std::shared_ptr<Communicator>>& registry() {
    static auto* all = new std::map<void*, std::shared_ptr<Communicator>>;
    return *all;
}

// How many operations this process has issued with each other process, over all communicators.
std::map<std::string, uint64_t>& issued_with() {
    static auto* counts = new std::map<std::string, uint64_t>;
    return *counts;
}

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof(value));
        return value;
    }
    BFloat16& operator=(float value) {
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof(wide));
        // Round to nearest, ties to even; keep NaN a NaN.
        bits = value != value ? 0x7FC0 : static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
        return *this;
    }
};

template <typename T, typename Wide>
void reduce_as(void* to, const void* from, uint64_t count, HcclReduceOp op) {
    auto* a = static_cast<T*>(to);
    auto* b = static_cast<const T*>(from);
    for (uint64_t i = 0; i < count; ++i) {
        Wide x = static_cast<Wide>(a[i]), y = static_cast<Wide>(b[i]);
        switch (op) {
            case HCCL_REDUCE_SUM:
                x = static_cast<Wide>(x + y);
                break;
            case HCCL_REDUCE_PROD:
                x = static_cast<Wide>(x * y);
                break;
            case HCCL_REDUCE_MAX:
                x = std::max(x, y);
                break;
            case HCCL_REDUCE_MIN:
                x = std::min(x, y);
                break;
            default:
                throw Error(200001, "not emulated: reduction " + std::to_string(op));
        }
        if constexpr (std::is_same_v<T, BFloat16>) {
            a[i] = x;
        } else {
            a[i] = static_cast<T>(x);
        }
    }
}

}  // namespace

size_t size_of(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8:
        case HCCL_DATA_TYPE_HIF8:
        case HCCL_DATA_TYPE_FP8E4M3:
        case HCCL_DATA_TYPE_FP8E5M2:
        case HCCL_DATA_TYPE_FP8E8M0:
            return 1;
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16:
            return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_UINT32:
        case HCCL_DATA_TYPE_FP32:
            return 4;
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_UINT64:
        case HCCL_DATA_TYPE_FP64:
            return 8;
        case HCCL_DATA_TYPE_INT128:
            return 16;
        default:
            throw Error(200001, "not emulated: HCCL data type " + std::to_string(type));
    }
}

void reduce(void* to, const void* from, uint64_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
            return reduce_as<int8_t, int8_t>(to, from, count, op);
        case HCCL_DATA_TYPE_UINT8:
            return reduce_as<uint8_t, uint8_t>(to, from, count, op);
        case HCCL_DATA_TYPE_INT16:
            return reduce_as<int16_t, int16_t>(to, from, count, op);
        case HCCL_DATA_TYPE_INT32:
            return reduce_as<int32_t, int32_t>(to, from, count, op);
        case HCCL_DATA_TYPE_INT64:
            return reduce_as<int64_t, int64_t>(to, from, count, op);
        case HCCL_DATA_TYPE_UINT64:
            return reduce_as<uint64_t, uint64_t>(to, from, count, op);
        case HCCL_DATA_TYPE_FP16:
            return reduce_as<_Float16, float>(to, from, count, op);
        case HCCL_DATA_TYPE_BFP16:
            return reduce_as<BFloat16, float>(to, from, count, op);
        case HCCL_DATA_TYPE_FP32:
            return reduce_as<float, float>(to, from, count, op);
        case HCCL_DATA_TYPE_FP64:
            return reduce_as<double, double>(to, from, count, op);
        default:
            throw Error(200001, "not emulated: reduction of HCCL data type " + std::to_string(type));
    }
}

Communicator::Communicator(const std::string& id, std::string name, uint32_t rank, uint32_t size, double timeout_s,
                           Deadline connect)
    : name(std::move(name)), mesh(id, rank, size, connect), timeout_s(timeout_s) {}

Operation::Operation(Communicator& comm, Header header, std::vector<uint64_t> orders, std::string what)
    : comm_(comm), header_(header), orders_(std::move(orders)), what_(std::move(what)) {
    deadline_ =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<int64_t>(comm.timeout_s * 1000));
}

void Operation::add(uint32_t peer, bool send, void* data, uint64_t bytes, int type) {
    Transfer transfer{peer, send, header_, data, 0, Transfer::kHeader, {}, 0};
    transfer.header.bytes = bytes;
    if (type >= 0) transfer.header.type = static_cast<uint32_t>(type);
    transfer.header.order = orders_[peer];
    transfers_.push_back(transfer);
}

void Operation::send(uint32_t peer, const void* data, uint64_t bytes, int type) {
    add(peer, true, const_cast<void*>(data), bytes, type);
}
void Operation::receive(uint32_t peer, void* data, uint64_t bytes, int type) { add(peer, false, data, bytes, type); }

void Operation::exchange() {
    comm_.mesh.exchange(transfers_, what_, deadline_, comm_.timeout_s);
    transfers_.clear();
}

void enqueue(const std::shared_ptr<Communicator>& comm, void* stream, Header header, std::vector<uint32_t> peers,
             std::vector<Access> accesses, std::function<void(Operation&)> body) {
    for (uint32_t peer : peers) {
        if (peer >= comm->size()) {
            throw Error(100000,
                        "rank " + std::to_string(peer) + " of a communicator of " + std::to_string(comm->size()));
        }
    }
    static const std::map<uint32_t, const char*> names = {{HCCL_CMD_BROADCAST, "HcclBroadcast"},
                                                          {HCCL_CMD_ALLREDUCE, "HcclAllReduce"},
                                                          {HCCL_CMD_REDUCE, "HcclReduce"},
                                                          {HCCL_CMD_SEND, "HcclSend"},
                                                          {HCCL_CMD_RECEIVE, "HcclRecv"},
                                                          {HCCL_CMD_ALLGATHER, "HcclAllGather"},
                                                          {HCCL_CMD_REDUCE_SCATTER, "HcclReduceScatter"},
                                                          {HCCL_CMD_ALLTOALLV, "HcclAlltoAllV"},
                                                          {HCCL_CMD_ALLTOALL, "HcclAlltoAll"},
                                                          {HCCL_CMD_SCATTER, "HcclScatter"},
                                                          {HCCL_CMD_BATCH_SEND_RECV, "HcclBatchSendRecv"},
                                                          {HCCL_CMD_ALLGATHER_V, "HcclAllGatherV"},
                                                          {HCCL_CMD_REDUCE_SCATTER_V, "HcclReduceScatterV"},
                                                          {HCCL_CMD_BARRIER, "HcclBarrier"}};
    auto known = names.find(header.kind);
    const std::string what = std::string(known == names.end() ? "collective" : known->second) + " on " + comm->name;
    Task task;
    task.name = what;
    task.accesses = std::move(accesses);
    task.issue = [comm, header, peers, body, what]() mutable -> std::function<void()> {
        std::vector<uint64_t> orders(comm->size(), 0);
        uint64_t ticket;
        Header numbered = header;
        {
            std::lock_guard<std::mutex> lock(registry_mutex);
            for (uint32_t peer : peers) {
                if (peer != comm->rank() && !orders[peer]) orders[peer] = ++issued_with()[comm->mesh.processes[peer]];
            }
        }
        {
            std::lock_guard<std::mutex> lock(comm->mutex);
            ticket = comm->issued++;
            if (!header.point_to_point) numbered.number = ++comm->collectives;
        }
        return [comm, numbered, orders, ticket, body, what] {
            {
                std::unique_lock<std::mutex> lock(comm->mutex);
                comm->next.wait(lock, [&] { return comm->turn == ticket || comm->failed; });
                if (comm->failed) throw Error(kFailure, what + ": the communicator has failed before");
            }
            auto leave = [&](bool failed) {
                std::lock_guard<std::mutex> lock(comm->mutex);
                comm->turn = ticket + 1;
                comm->failed |= failed;
                comm->next.notify_all();
            };
            try {
                Operation operation(*comm, numbered, orders, what);
                body(operation);
            } catch (...) {
                leave(true);
                comm->mesh.hang_up();
                throw;
            }
            leave(false);
        };
    };
    submit(stream, std::move(task));
}

std::shared_ptr<Communicator> find_communicator(const std::string& name) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    for (auto& [handle, comm] : registry()) {
        if (comm->name == name) return comm;
    }
    throw Error(100000, "no communicator has the name " + name);
}

std::shared_ptr<Communicator> communicator_of(void* handle) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    auto found = registry().find(handle);
    if (found == registry().end()) throw Error(100000, "the communicator does not exist, or no longer");
    return found->second;
}

void* add_communicator(std::shared_ptr<Communicator> comm) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    void* handle = comm.get();
    registry()[handle] = std::move(comm);
    return handle;
}

void remove_communicator(void* handle) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    registry().erase(handle);  // operations under way hold it
}

}  // namespace emulated::hccl
