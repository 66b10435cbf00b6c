// SPDX-License-Identifier: Apache-2.0
// The HCCL API. One file, because every function of the API checks its arguments in the same way.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "communicator.h"
#include "hccl/hccl.h"

using namespace emulated;
using namespace emulated::hccl;

namespace {

double seconds_from(const char* name, double otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? std::atof(value) : otherwise;
}

Deadline in_seconds(double seconds) {
    return std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

HcclResult status(int code) { return code ? HCCL_E_INTERNAL : HCCL_SUCCESS; }

std::vector<uint32_t> everybody(const Communicator& comm) {
    std::vector<uint32_t> ranks(comm.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    return ranks;
}

Header header_of(HcclCMDType kind, HcclDataType type, HcclReduceOp reduction = HCCL_REDUCE_SUM, uint32_t root = 0) {
    Header header;
    header.kind = kind;
    header.type = type;
    header.reduce = reduction;
    header.root = root;
    return header;
}

char* at(void* data, uint64_t bytes) { return static_cast<char*>(data) + bytes; }
const char* at(const void* data, uint64_t bytes) { return static_cast<const char*>(data) + bytes; }

// Everybody's block of `bytes`, in rank order.
std::vector<char> gather_all(Operation& op, const void* mine, uint64_t bytes) {
    std::vector<char> all(bytes * op.size());
    std::memcpy(at(all.data(), bytes * op.rank()), mine, bytes);
    for (uint32_t peer = 0; peer < op.size(); ++peer) {
        if (peer == op.rank()) continue;
        op.send(peer, mine, bytes);
        op.receive(peer, at(all.data(), bytes * peer), bytes);
    }
    op.exchange();
    return all;
}

// Sums (or ...) in rank order, so that all ranks get the same bits.
void reduce_blocks(void* to, const std::vector<char>& all, uint64_t stride, uint64_t offset, uint64_t count,
                   uint32_t ranks, HcclDataType type, HcclReduceOp reduction) {
    const uint64_t bytes = count * size_of(type);
    std::vector<char> sum(all.begin() + static_cast<int64_t>(offset),
                          all.begin() + static_cast<int64_t>(offset + bytes));
    for (uint32_t rank = 1; rank < ranks; ++rank) {
        reduce(sum.data(), all.data() + stride * rank + offset, count, type, reduction);
    }
    std::memcpy(to, sum.data(), bytes);
}

struct Item {
    bool send;
    void* data;
    uint64_t bytes;
    HcclDataType type;
    uint32_t peer;
};

void batch(const std::shared_ptr<Communicator>& comm, std::vector<Item> items, HcclCMDType kind, aclrtStream stream) {
    std::vector<Access> accesses;
    std::vector<uint32_t> peers;
    for (const Item& item : items) {
        accesses.push_back(item.send ? reads(item.data, item.bytes) : writes(item.data, item.bytes));
        peers.push_back(item.peer);
    }
    Header header = header_of(kind, HCCL_DATA_TYPE_INT8);
    header.point_to_point = 1;
    enqueue(comm, stream, header, peers, accesses, [items](Operation& op) {
        std::vector<const Item*> to_self;
        for (const Item& item : items) {
            if (item.peer == op.rank()) {
                to_self.push_back(&item);
            } else if (item.send) {
                op.send(item.peer, item.data, item.bytes, item.type);
            } else {
                op.receive(item.peer, item.data, item.bytes, item.type);
            }
        }
        std::vector<const Item*> sends, receives;
        for (const Item* item : to_self) (item->send ? sends : receives).push_back(item);
        if (sends.size() != receives.size()) throw Error(kFailure, "a rank sends to itself without receiving");
        for (size_t i = 0; i < sends.size(); ++i) std::memmove(receives[i]->data, sends[i]->data, sends[i]->bytes);
        op.exchange();
    });
}

struct Group {
    int depth = 0;
    std::vector<std::pair<std::pair<HcclComm, aclrtStream>, Item>> items;
};
thread_local Group group;

int single(HcclComm handle, Item item, HcclCMDType kind, aclrtStream stream) {
    return guarded([&] {
        if (group.depth) {
            group.items.push_back({{handle, stream}, item});
            return;
        }
        batch(communicator_of(handle), {item}, kind, stream);
    });
}

HcclResult init(uint32_t ranks, const HcclRootInfo* root, uint32_t rank, const HcclCommConfig* config, HcclComm* comm) {
    return status(guarded([&] {
        if (rank >= ranks) throw Error(100000, "rank " + std::to_string(rank) + " of " + std::to_string(ranks));
        const std::string id(root->internal, strnlen(root->internal, 64));
        const std::string name = config && config->hcclCommName[0] ? config->hcclCommName : id;
        *comm = add_communicator(std::make_shared<Communicator>(id, name, rank, ranks,
                                                                seconds_from("HCCL_EXEC_TIMEOUT", 1836),
                                                                in_seconds(seconds_from("HCCL_CONNECT_TIMEOUT", 120))));
    }));
}

uint64_t table(const void* values, uint32_t index) { return static_cast<const uint64_t*>(values)[index]; }

}  // namespace

extern "C" {

EMULATED_EXPORT HcclResult HcclGetRootInfo(HcclRootInfo* root) {
    static std::atomic<int> made{0};
    std::memset(root, 0, sizeof(*root));
    const std::string id = process_id() + "." + std::to_string(made++);
    std::memcpy(root->internal, id.data(), id.size());
    return HCCL_SUCCESS;
}
EMULATED_EXPORT HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* root, uint32_t rank,
                                                HcclComm* comm) {
    return init(ranks, root, rank, nullptr, comm);
}
EMULATED_EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* root, uint32_t rank,
                                                      const HcclCommConfig* config, HcclComm* comm) {
    return init(ranks, root, rank, config, comm);
}
EMULATED_EXPORT HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t ranks, uint32_t*, uint64_t id,
                                                   uint32_t rank, HcclCommConfig* config, HcclComm* comm) {
    return status(guarded([&] {
        const std::string key = communicator_of(*parent)->name + "/" + std::to_string(id);
        const std::string name = config && config->hcclCommName[0] ? config->hcclCommName : key;
        *comm = add_communicator(std::make_shared<Communicator>(key, name, rank, ranks,
                                                                seconds_from("HCCL_EXEC_TIMEOUT", 1836),
                                                                in_seconds(seconds_from("HCCL_CONNECT_TIMEOUT", 120))));
    }));
}
EMULATED_EXPORT HcclResult HcclCommDestroy(HcclComm comm) {
    remove_communicator(comm);
    return HCCL_SUCCESS;
}
EMULATED_EXPORT HcclResult HcclGetCommName(HcclComm comm, char* name) {
    return status(guarded([&] { std::strcpy(name, communicator_of(comm)->name.c_str()); }));
}
EMULATED_EXPORT HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
    return status(guarded([&] { *size = communicator_of(comm)->size(); }));
}
EMULATED_EXPORT HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
    return status(guarded([&] { *rank = communicator_of(comm)->rank(); }));
}
EMULATED_EXPORT HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* result) {
    return status(guarded([&] {
        auto found = communicator_of(comm);
        std::lock_guard<std::mutex> lock(found->mutex);
        *result = found->failed ? HCCL_E_REMOTE : HCCL_SUCCESS;
    }));
}
EMULATED_EXPORT const char* HcclGetErrorString(HcclResult code) { return code ? "HCCL error" : "no error"; }
EMULATED_EXPORT uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_EXEC_TIMEOUT; }
EMULATED_EXPORT HcclResult HcclCommResume(HcclComm) { return HCCL_SUCCESS; }
EMULATED_EXPORT HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

EMULATED_EXPORT HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                                         aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = count * size_of(type);
        const bool sends = comm->rank() == root;
        enqueue(comm, stream, header_of(HCCL_CMD_BROADCAST, type, HCCL_REDUCE_SUM, root), everybody(*comm),
                {sends ? reads(data, bytes) : writes(data, bytes)}, [=](Operation& op) {
                    if (sends) {
                        for (uint32_t peer = 0; peer < op.size(); ++peer) {
                            if (peer != root) op.send(peer, data, bytes);
                        }
                    } else {
                        op.receive(root, data, bytes);
                    }
                    op.exchange();
                });
    }));
}
EMULATED_EXPORT HcclResult HcclAllReduce(void* in, void* out, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                                         HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = count * size_of(type);
        enqueue(comm, stream, header_of(HCCL_CMD_ALLREDUCE, type, reduction), everybody(*comm),
                {reads(in, bytes), writes(out, bytes)}, [=](Operation& op) {
                    auto all = gather_all(op, in, bytes);
                    reduce_blocks(out, all, bytes, 0, count, op.size(), type, reduction);
                });
    }));
}
EMULATED_EXPORT HcclResult HcclReduce(void* in, void* out, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                                      uint32_t root, HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = count * size_of(type);
        std::vector<Access> accesses{reads(in, bytes)};
        if (comm->rank() == root) accesses.push_back(writes(out, bytes));
        enqueue(comm, stream, header_of(HCCL_CMD_REDUCE, type, reduction, root), everybody(*comm), accesses,
                [=](Operation& op) {
                    auto all = gather_all(op, in, bytes);
                    if (op.rank() == root) reduce_blocks(out, all, bytes, 0, count, op.size(), type, reduction);
                });
    }));
}
EMULATED_EXPORT HcclResult HcclReduceScatter(void* in, void* out, uint64_t count, HcclDataType type,
                                             HcclReduceOp reduction, HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = count * size_of(type);
        enqueue(comm, stream, header_of(HCCL_CMD_REDUCE_SCATTER, type, reduction), everybody(*comm),
                {reads(in, bytes * comm->size()), writes(out, bytes)}, [=](Operation& op) {
                    auto all = gather_all(op, in, bytes * op.size());
                    reduce_blocks(out, all, bytes * op.size(), bytes * op.rank(), count, op.size(), type, reduction);
                });
    }));
}
EMULATED_EXPORT HcclResult HcclReduceScatterV(void* in, const void* counts, const void* offsets, void* out,
                                              uint64_t count, HcclDataType type, HcclReduceOp reduction,
                                              HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t item = size_of(type);
        uint64_t total = 0;
        for (uint32_t rank = 0; rank < comm->size(); ++rank) {
            total = std::max(total, table(offsets, rank) + table(counts, rank));
        }
        const uint64_t mine = table(offsets, comm->rank());
        enqueue(comm, stream, header_of(HCCL_CMD_REDUCE_SCATTER_V, type, reduction), everybody(*comm),
                {reads(in, total * item), writes(out, count * item)}, [=](Operation& op) {
                    auto all = gather_all(op, in, total * item);
                    reduce_blocks(out, all, total * item, mine * item, count, op.size(), type, reduction);
                });
    }));
}
EMULATED_EXPORT HcclResult HcclAllGather(void* in, void* out, uint64_t count, HcclDataType type, HcclComm handle,
                                         aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = count * size_of(type);
        enqueue(comm, stream, header_of(HCCL_CMD_ALLGATHER, type), everybody(*comm),
                {reads(in, bytes), writes(out, bytes * comm->size())}, [=](Operation& op) {
                    auto all = gather_all(op, in, bytes);
                    std::memcpy(out, all.data(), all.size());
                });
    }));
}
EMULATED_EXPORT HcclResult HcclAllGatherV(void* in, uint64_t count, void* out, const void* counts, const void* offsets,
                                          HcclDataType type, HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t item = size_of(type);
        std::vector<uint64_t> bytes, places;
        std::vector<Access> accesses{reads(in, count * item)};
        for (uint32_t rank = 0; rank < comm->size(); ++rank) {
            bytes.push_back(table(counts, rank) * item);
            places.push_back(table(offsets, rank) * item);
            accesses.push_back(writes(at(out, places[rank]), bytes[rank]));
        }
        enqueue(comm, stream, header_of(HCCL_CMD_ALLGATHER_V, type), everybody(*comm), accesses, [=](Operation& op) {
            std::memmove(at(out, places[op.rank()]), in, bytes[op.rank()]);
            for (uint32_t peer = 0; peer < op.size(); ++peer) {
                if (peer == op.rank()) continue;
                op.send(peer, in, count * item);
                op.receive(peer, at(out, places[peer]), bytes[peer]);
            }
            op.exchange();
        });
    }));
}
EMULATED_EXPORT HcclResult HcclScatter(void* in, void* out, uint64_t count, HcclDataType type, uint32_t root,
                                       HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = count * size_of(type);
        std::vector<Access> accesses{writes(out, bytes)};
        if (comm->rank() == root) accesses.push_back(reads(in, bytes * comm->size()));
        enqueue(comm, stream, header_of(HCCL_CMD_SCATTER, type, HCCL_REDUCE_SUM, root), everybody(*comm), accesses,
                [=](Operation& op) {
                    if (op.rank() == root) {
                        std::memmove(out, at(in, bytes * root), bytes);
                        for (uint32_t peer = 0; peer < op.size(); ++peer) {
                            if (peer != root) op.send(peer, at(in, bytes * peer), bytes);
                        }
                    } else {
                        op.receive(root, out, bytes);
                    }
                    op.exchange();
                });
    }));
}
EMULATED_EXPORT HcclResult HcclAlltoAllV(const void* in, const void* send_counts, const void* send_offsets,
                                         HcclDataType send_type, const void* out, const void* receive_counts,
                                         const void* receive_offsets, HcclDataType receive_type, HcclComm handle,
                                         aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t send_item = size_of(send_type), receive_item = size_of(receive_type);
        struct Part {
            uint64_t send_at, send_bytes, receive_at, receive_bytes;
        };
        std::vector<Part> parts;
        std::vector<Access> accesses;
        for (uint32_t rank = 0; rank < comm->size(); ++rank) {
            parts.push_back({table(send_offsets, rank) * send_item, table(send_counts, rank) * send_item,
                             table(receive_offsets, rank) * receive_item, table(receive_counts, rank) * receive_item});
            accesses.push_back(reads(at(in, parts[rank].send_at), parts[rank].send_bytes));
            accesses.push_back(writes(at(out, parts[rank].receive_at), parts[rank].receive_bytes));
        }
        void* target = const_cast<void*>(out);
        enqueue(comm, stream, header_of(HCCL_CMD_ALLTOALLV, send_type), everybody(*comm), accesses, [=](Operation& op) {
            const Part& mine = parts[op.rank()];
            std::memmove(at(target, mine.receive_at), at(in, mine.send_at),
                         std::min(mine.send_bytes, mine.receive_bytes));
            for (uint32_t peer = 0; peer < op.size(); ++peer) {
                if (peer == op.rank()) continue;
                op.send(peer, at(in, parts[peer].send_at), parts[peer].send_bytes);
                op.receive(peer, at(target, parts[peer].receive_at), parts[peer].receive_bytes);
            }
            op.exchange();
        });
    }));
}
EMULATED_EXPORT HcclResult HcclAlltoAll(const void* in, uint64_t send_count, HcclDataType send_type, const void* out,
                                        uint64_t receive_count, HcclDataType receive_type, HcclComm handle,
                                        aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        const uint64_t bytes = send_count * size_of(send_type);
        if (bytes != receive_count * size_of(receive_type)) throw Error(100000, "HcclAlltoAll with unequal counts");
        void* target = const_cast<void*>(out);
        enqueue(comm, stream, header_of(HCCL_CMD_ALLTOALL, send_type), everybody(*comm),
                {reads(in, bytes * comm->size()), writes(out, bytes * comm->size())}, [=](Operation& op) {
                    std::memmove(at(target, bytes * op.rank()), at(in, bytes * op.rank()), bytes);
                    for (uint32_t peer = 0; peer < op.size(); ++peer) {
                        if (peer == op.rank()) continue;
                        op.send(peer, at(in, bytes * peer), bytes);
                        op.receive(peer, at(target, bytes * peer), bytes);
                    }
                    op.exchange();
                });
    }));
}
EMULATED_EXPORT HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
    return status(guarded([&] {
        auto comm = communicator_of(handle);
        enqueue(comm, stream, header_of(HCCL_CMD_BARRIER, HCCL_DATA_TYPE_INT8), everybody(*comm), {},
                [](Operation& op) { gather_all(op, "", 1); });
    }));
}

EMULATED_EXPORT HcclResult HcclSend(void* data, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm,
                                    aclrtStream stream) {
    return status(single(comm, {true, data, count * size_of(type), type, peer}, HCCL_CMD_SEND, stream));
}
EMULATED_EXPORT HcclResult HcclRecv(void* data, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm,
                                    aclrtStream stream) {
    return status(single(comm, {false, data, count * size_of(type), type, peer}, HCCL_CMD_RECEIVE, stream));
}
EMULATED_EXPORT HcclResult HcclBatchSendRecv(HcclSendRecvItem* list, uint32_t count, HcclComm comm,
                                             aclrtStream stream) {
    return status(guarded([&] {
        std::vector<Item> items;
        for (uint32_t i = 0; i < count; ++i) {
            items.push_back({list[i].sendRecvType == HCCL_SEND, list[i].buf, list[i].count * size_of(list[i].dataType),
                             list[i].dataType, list[i].remoteRank});
        }
        batch(communicator_of(comm), items, HCCL_CMD_BATCH_SEND_RECV, stream);
    }));
}
EMULATED_EXPORT HcclResult HcclGroupStart() {
    ++group.depth;
    return HCCL_SUCCESS;
}
EMULATED_EXPORT HcclResult HcclGroupEnd() {
    return status(guarded([&] {
        if (--group.depth) return;
        auto items = std::move(group.items);
        group.items.clear();
        while (!items.empty()) {
            auto key = items.front().first;
            std::vector<Item> together;
            std::vector<std::pair<std::pair<HcclComm, aclrtStream>, Item>> others;
            for (auto& item : items) {
                if (item.first == key) {
                    together.push_back(item.second);
                } else {
                    others.push_back(item);
                }
            }
            batch(communicator_of(key.first), together, HCCL_CMD_BATCH_SEND_RECV, key.second);
            items = std::move(others);
        }
    }));
}
}
