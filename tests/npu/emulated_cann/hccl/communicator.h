// SPDX-License-Identifier: Apache-2.0
// A communicator: operations enter in host order and run in that order, each as one task of the caller's stream.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "channel.h"
#include "emulator.h"
#include "hccl/hccl_types.h"

namespace emulated::hccl {

size_t size_of(HcclDataType type);

/// to[i] = to[i] op from[i]
void reduce(void* to, const void* from, uint64_t count, HcclDataType type, HcclReduceOp op);

struct Communicator {
    std::string name;
    Mesh mesh;
    double timeout_s;
    std::mutex mutex;
    std::condition_variable next;
    uint64_t issued = 0, turn = 0, collectives = 0;
    bool failed = false;

    Communicator(const std::string& id, std::string name, uint32_t rank, uint32_t size, double timeout_s,
                 Deadline connect);

    uint32_t rank() const { return mesh.rank; }
    uint32_t size() const { return mesh.size; }
};

/// One operation while it runs: transfers that are exchanged together, any number of times.
class Operation {
  public:
    Operation(Communicator& comm, Header header, std::vector<uint64_t> orders, std::string what);
    void send(uint32_t peer, const void* data, uint64_t bytes, int type = -1);
    void receive(uint32_t peer, void* data, uint64_t bytes, int type = -1);
    /// Carries out what send and receive have queued. Every queued pair must be queued on both sides.
    void exchange();
    uint32_t rank() const { return comm_.rank(); }
    uint32_t size() const { return comm_.size(); }

  private:
    void add(uint32_t peer, bool send, void* data, uint64_t bytes, int type);
    Communicator& comm_;
    Header header_;
    std::vector<uint64_t> orders_;
    std::string what_;
    Deadline deadline_;
    std::vector<Transfer> transfers_;
};

/// Enqueues an operation on `stream`. `peers`: the ranks that take part besides this one (all, for a collective).
void enqueue(const std::shared_ptr<Communicator>& comm, void* stream, Header header, std::vector<uint32_t> peers,
             std::vector<Access> accesses, std::function<void(Operation&)> body);

/// A communicator by the name that HcclGetCommName gives; throws if there is none.
EMULATED_EXPORT std::shared_ptr<Communicator> find_communicator(const std::string& name);
std::shared_ptr<Communicator> communicator_of(void* handle);
void* add_communicator(std::shared_ptr<Communicator> comm);
void remove_communicator(void* handle);

}  // namespace emulated::hccl
