// SPDX-License-Identifier: Apache-2.0
#include "channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "emulator.h"

namespace emulated::hccl {
namespace {

struct Hello {
    uint32_t magic = 0xE0A1BEEF;
    uint32_t rank = 0;
    uint32_t size = 0;
    char process[48] = {};
};

socklen_t address_of(const std::string& name, sockaddr_un& address) {
    std::memset(&address, 0, sizeof(address));
    address.sun_family = AF_UNIX;
    std::string path = "emulated-hccl." + name;
    if (path.size() > sizeof(address.sun_path) - 1) path.resize(sizeof(address.sun_path) - 1);
    std::memcpy(address.sun_path + 1, path.data(), path.size());  // a leading NUL: the abstract namespace
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
}

bool transfer_all(int fd, void* data, size_t bytes, bool send, Deadline deadline) {
    auto* at = static_cast<char*>(data);
    while (bytes) {
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        pollfd wait{fd, static_cast<short>(send ? POLLOUT : POLLIN), 0};
        if (left.count() <= 0 || poll(&wait, 1, static_cast<int>(left.count())) <= 0) return false;
        ssize_t done = send ? ::send(fd, at, bytes, MSG_NOSIGNAL) : ::recv(fd, at, bytes, 0);
        if (done < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (done <= 0) return false;
        at += done;
        bytes -= static_cast<size_t>(done);
    }
    return true;
}

void nonblocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

const char* kind_name(const Header& header) {
    static const char* names[] = {"?",
                                  "HcclBroadcast",
                                  "HcclAllReduce",
                                  "HcclReduce",
                                  "HcclSend",
                                  "HcclRecv",
                                  "HcclAllGather",
                                  "HcclReduceScatter",
                                  "HcclAlltoAllV",
                                  "HcclAlltoAllVC",
                                  "HcclAlltoAll",
                                  "HcclGather",
                                  "HcclScatter",
                                  "HcclBatchSendRecv",
                                  "HcclBatchPut",
                                  "HcclBatchGet",
                                  "HcclAllGatherV",
                                  "HcclReduceScatterV"};
    return header.kind < sizeof(names) / sizeof(names[0]) ? names[header.kind] : "HcclBarrier";
}

std::string describe(const Header& header) {
    std::ostringstream text;
    if (header.point_to_point) {
        text << "a send or receive of " << header.bytes << " bytes of data type " << header.type;
    } else {
        text << kind_name(header) << " (collective " << header.number << " of the communicator, data type "
             << header.type << ", reduction " << header.reduce << ", root " << header.root << ", " << header.bytes
             << " bytes)";
    }
    return text.str();
}

bool same(const Header& a, const Header& b) {
    if (a.magic != b.magic || a.point_to_point != b.point_to_point || a.type != b.type || a.bytes != b.bytes)
        return false;
    if (a.point_to_point) return true;
    return a.kind == b.kind && a.number == b.number && a.reduce == b.reduce && a.root == b.root;
}

}  // namespace

const std::string& process_id() {
    static const std::string* id = [] {
        std::random_device random;
        std::ostringstream text;
        text << getpid() << "-" << std::hex << random() << random();
        return new std::string(text.str());
    }();
    return *id;
}

Mesh::Mesh(const std::string& id, uint32_t rank, uint32_t size, Deadline deadline)
    : rank(rank), size(size), out(size, -1), in(size, -1), processes(size) {
    processes[rank] = process_id();
    if (size == 1) return;
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address;
    socklen_t length = address_of(id + "." + std::to_string(rank), address);
    if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), length) ||
        listen(listener, static_cast<int>(size))) {
        if (listener >= 0) close(listener);
        throw Error(kFailure, "rank " + std::to_string(rank) + " of communicator " + id + " exists twice");
    }
    Hello mine;
    mine.rank = rank;
    mine.size = size;
    std::strncpy(mine.process, process_id().c_str(), sizeof(mine.process) - 1);
    auto late = [&] { return std::chrono::steady_clock::now() >= deadline; };
    auto missing = [&](const std::string& who) {
        close(listener);
        return Error(kFailure, "communicator " + id + ": rank " + who + " did not come (HCCL_CONNECT_TIMEOUT)");
    };
    for (uint32_t peer = 0; peer < size; ++peer) {
        if (peer == rank) continue;
        length = address_of(id + "." + std::to_string(peer), address);
        for (;;) {
            int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (connect(fd, reinterpret_cast<sockaddr*>(&address), length) == 0) {
                out[peer] = fd;
                break;
            }
            close(fd);
            if (late()) throw missing(std::to_string(peer));
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        if (!transfer_all(out[peer], &mine, sizeof(mine), true, deadline)) throw missing(std::to_string(peer));
    }
    for (uint32_t met = 1; met < size; ++met) {
        pollfd wait{listener, POLLIN, 0};
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        if (left.count() <= 0 || poll(&wait, 1, static_cast<int>(left.count())) <= 0) throw missing("(some)");
        int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        Hello theirs;
        if (fd < 0 || !transfer_all(fd, &theirs, sizeof(theirs), false, deadline)) throw missing("(some)");
        if (theirs.magic != mine.magic || theirs.size != size || theirs.rank >= size) {
            close(listener);
            throw Error(kFailure, "communicator " + id + ": rank " + std::to_string(theirs.rank) + " has " +
                                      std::to_string(theirs.size) + " ranks, rank " + std::to_string(rank) + " has " +
                                      std::to_string(size));
        }
        in[theirs.rank] = fd;
        processes[theirs.rank] = theirs.process;
    }
    close(listener);
    for (uint32_t peer = 0; peer < size; ++peer) {
        if (peer == rank) continue;
        nonblocking(out[peer]);
        nonblocking(in[peer]);
    }
}

Mesh::~Mesh() {
    for (int fd : out) {
        if (fd >= 0) close(fd);
    }
    for (int fd : in) {
        if (fd >= 0) close(fd);
    }
}

void Mesh::hang_up() {
    for (int fd : out) {
        if (fd >= 0) shutdown(fd, SHUT_RDWR);
    }
    for (int fd : in) {
        if (fd >= 0) shutdown(fd, SHUT_RDWR);
    }
}

void Mesh::exchange(std::vector<Transfer>& transfers, const std::string& what, Deadline deadline, double limit_s) {
    std::map<int, std::deque<Transfer*>> queues;  // by socket
    for (Transfer& transfer : transfers) {
        queues[transfer.send ? out[transfer.peer] : in[transfer.peer]].push_back(&transfer);
    }
    auto gone = [&](const Transfer& transfer) {
        return Error(kFailure, "rank " + std::to_string(transfer.peer) +
                                   " has gone (its process ended, or its communicator failed or was destroyed)");
    };
    // Moves bytes of the current stage; true when the stage is complete.
    auto move = [&](Transfer& transfer, int fd, void* data, uint64_t bytes, bool write) {
        while (transfer.filled < bytes) {
            char* at = static_cast<char*>(data) + transfer.filled;
            ssize_t done = write ? ::send(fd, at, bytes - transfer.filled, MSG_NOSIGNAL)
                                 : ::recv(fd, at, bytes - transfer.filled, 0);
            if (done < 0 && (errno == EAGAIN || errno == EINTR)) return false;
            if (done <= 0) throw gone(transfer);
            transfer.filled += static_cast<uint64_t>(done);
        }
        transfer.filled = 0;
        return true;
    };
    auto advance = [&](Transfer& transfer, int fd) {
        for (;;) {
            switch (transfer.stage) {
                case Transfer::kHeader:
                    if (!move(transfer, fd, transfer.send ? &transfer.header : &transfer.theirs, sizeof(Header),
                              transfer.send)) {
                        return;
                    }
                    if (!transfer.send) transfer.clear = same(transfer.header, transfer.theirs) ? 1 : 2;
                    transfer.stage = Transfer::kClear;
                    break;
                case Transfer::kClear:
                    if (!move(transfer, fd, &transfer.clear, 1, !transfer.send)) return;
                    if (transfer.clear != 1) {
                        throw Error(kFailure,
                                    "mismatch: rank " + std::to_string(rank) + " is in " + describe(transfer.header) +
                                        ", rank " + std::to_string(transfer.peer) +
                                        (transfer.send ? " in something else" : " in " + describe(transfer.theirs)));
                    }
                    if (!transfer.send && transfer.theirs.order != transfer.header.order) {
                        report(settings().comm_order, "order",
                               what + ": among the operations that ranks " + std::to_string(rank) + " and " +
                                   std::to_string(transfer.peer) + " share over all communicators this is number " +
                                   std::to_string(transfer.header.order) + " here and number " +
                                   std::to_string(transfer.theirs.order) + " there");
                    }
                    transfer.stage = Transfer::kData;
                    break;
                case Transfer::kData:
                    if (!move(transfer, fd, transfer.data, transfer.header.bytes, transfer.send)) return;
                    transfer.stage = Transfer::kDone;
                    return;
                case Transfer::kDone:
                    return;
            }
        }
    };
    while (!queues.empty()) {
        std::vector<pollfd> waits;
        for (auto queue = queues.begin(); queue != queues.end();) {
            while (!queue->second.empty()) {
                advance(*queue->second.front(), queue->first);
                if (queue->second.front()->stage != Transfer::kDone) break;
                queue->second.pop_front();
            }
            if (queue->second.empty()) {
                queue = queues.erase(queue);
                continue;
            }
            const Transfer& next = *queue->second.front();
            const bool writes = next.stage == Transfer::kClear ? !next.send : next.send;
            waits.push_back({queue->first, static_cast<short>(writes ? POLLOUT : POLLIN), 0});
            ++queue;
        }
        if (waits.empty()) return;
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        if (left.count() <= 0) {
            std::string peers;
            for (auto& [fd, queue] : queues) {
                peers += " " + std::to_string(queue.front()->peer);
            }
            throw Error(kFailure, "timeout after " + std::to_string(limit_s) +
                                      " s (HCCL_EXEC_TIMEOUT) while waiting for rank" + peers);
        }
        poll(waits.data(), waits.size(), static_cast<int>(std::min<long long>(left.count(), 1000)));
    }
}

}  // namespace emulated::hccl
