// SPDX-License-Identifier: Apache-2.0
// Ordered byte channels between the processes of a communicator, one per ordered pair of ranks, over Unix sockets in
// the abstract namespace (they vanish with their processes).
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace emulated::hccl {

using Deadline = std::chrono::steady_clock::time_point;

constexpr int kFailure = 507018;  // ACL_ERROR_RT_AICPU_EXCEPTION: what a failed collective looks like

/// What each side of a transfer claims to be doing.
struct Header {
    uint32_t magic = 0xE0A1CCCC;
    uint32_t kind = 0;    // HcclCMDType
    uint64_t number = 0;  // of this collective on the communicator
    uint32_t type = 0;    // HcclDataType
    uint32_t reduce = 0;
    uint32_t root = 0;
    uint32_t point_to_point = 0;
    uint64_t bytes = 0;  // of this transfer
    uint64_t order = 0;  // of this operation among all operations that sender and receiver share
};

struct Transfer {
    uint32_t peer;
    bool send;
    Header header;
    void* data;
    uint64_t filled = 0;  // bytes of the current stage that are done
    enum { kHeader, kClear, kData, kDone } stage = kHeader;
    Header theirs;
    uint8_t clear = 0;
};

/// Sockets to and from each peer.
struct Mesh {
    uint32_t rank, size;
    std::vector<int> out, in;            // by rank; -1 for this rank
    std::vector<std::string> processes;  // by rank: an id of the peer's process, unique on this machine

    /// Meets all other ranks under `id`. Throws emulated::Error when a rank is missing at the deadline or disagrees.
    Mesh(const std::string& id, uint32_t rank, uint32_t size, Deadline deadline);
    ~Mesh();
    Mesh(const Mesh&) = delete;
    Mesh& operator=(const Mesh&) = delete;

    /// Shuts every channel, so that peers in the middle of an operation learn that this rank has failed.
    void hang_up();

    /// Carries out all transfers concurrently; those on one channel in the given order. A send completes only after
    /// its receiver has posted the receive. Throws emulated::Error on mismatch, timeout and peers that have gone.
    void exchange(std::vector<Transfer>& transfers, const std::string& what, Deadline deadline, double limit_s);
};

/// An id of this process, unique on this machine.
const std::string& process_id();

}  // namespace emulated::hccl
