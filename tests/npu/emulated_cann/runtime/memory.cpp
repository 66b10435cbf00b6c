// SPDX-License-Identifier: Apache-2.0
// Device memory is host memory with a limit per device; pinned memory is host memory that is known to the runtime.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "acl/acl.h"
#include "device.h"

using namespace emulated;

namespace {

constexpr size_t kAlign = 512;
constexpr size_t kPoisonLimit = size_t{256} << 20;

void require_device() {
    if (current_device() < 0) throw Error(ACL_ERROR_RT_CONTEXT_NULL, "no device is set in this thread");
}

void charge(size_t bytes) {
    Device& state = device();
    size_t& used = state.used.at(current_device());
    if (used + bytes > settings().memory) {
        throw Error(ACL_ERROR_RT_MEMORY_ALLOCATION,
                    "out of memory on emulated NPU " + std::to_string(current_device()) + ": " + std::to_string(bytes) +
                        " bytes asked for, " + std::to_string(settings().memory - used) + " of " +
                        std::to_string(settings().memory) + " free (EMULATED_NPU_MEMORY_MB sets the limit)");
    }
    used += bytes;
}

void* allocate(size_t bytes, int on_device) {
    void* address = nullptr;
    const size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    if (posix_memalign(&address, kAlign, rounded))
        throw Error(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host is out of memory");
    if (on_device >= 0 && settings().poison && rounded <= kPoisonLimit) std::memset(address, 0xFF, rounded);
    device().blocks[reinterpret_cast<uintptr_t>(address)] = {reinterpret_cast<uintptr_t>(address), rounded, on_device};
    return address;
}

// A free waits for the device, as the real one does, so that a program that frees too early is reported, not crashed.
void release(void* address, bool pinned) {
    if (!address) return;
    const std::string site = python_site();
    std::unique_lock<std::mutex> lock(device().mutex);
    Device& state = device();
    auto found = state.blocks.find(reinterpret_cast<uintptr_t>(address));
    if (found == state.blocks.end() || (found->second.device < 0) != pinned) {
        throw Error(ACL_ERROR_RT_PARAM_INVALID, "free of an address that was not allocated");
    }
    Block block = found->second;
    if (settings().race != Check::kOff) {
        raise_races(state.shadow.forget(block.begin, block.begin + block.bytes, state.host,
                                        std::string(pinned ? "aclrtFreeHost" : "aclrtFree") + " at " + site));
    }
    std::vector<Stream*> streams(state.streams.begin(), state.streams.end());
    for (Stream* stream : streams) {
        const uint64_t target = stream->enqueued;
        state.progress.wait(lock, [&] { return !state.streams.count(stream) || stream->finished >= target; });
    }
    state.blocks.erase(block.begin);
    if (block.device >= 0) state.used.at(block.device) -= block.bytes;
    lock.unlock();
    std::free(address);
}

int allocate_device(void** address, size_t bytes) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        require_device();
        check_broken();
        if (!bytes) throw Error(ACL_ERROR_RT_PARAM_INVALID, "allocation of 0 bytes");
        charge((bytes + kAlign - 1) / kAlign * kAlign);
        *address = allocate(bytes, current_device());
    });
}

int allocate_host(void** address, size_t bytes) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        *address = allocate(bytes, -1);
    });
}

struct Physical {
    size_t bytes;
    int device;
};

// Which side of a copy must be device memory, and which must not.
void check_copy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
    if (bytes > room) {
        throw Error(ACL_ERROR_RT_PARAM_INVALID,
                    "copy of " + std::to_string(bytes) + " bytes into " + std::to_string(room) + " bytes");
    }
    auto on_device = [](const void* address, size_t size) {
        const Block* block = find_block(address, size);
        return block && block->device >= 0;
    };
    const bool to_device = on_device(to, bytes), from_device = on_device(from, bytes);
    auto demand = [&](bool want_to, bool want_from) {
        if (to_device != want_to || from_device != want_from) {
            throw Error(ACL_ERROR_RT_PARAM_INVALID,
                        std::string("copy kind ") + std::to_string(kind) + " but the target is " +
                            (to_device ? "device" : "host") + " memory and the source is " +
                            (from_device ? "device" : "host") + " memory (or a range leaves its allocation)");
        }
    };
    if (kind == ACL_MEMCPY_HOST_TO_DEVICE) demand(true, false);
    if (kind == ACL_MEMCPY_DEVICE_TO_HOST) demand(false, true);
    if (kind == ACL_MEMCPY_DEVICE_TO_DEVICE) demand(true, true);
}

// Pageable host memory comes and goes without notice, so only known allocations take part in race detection.
std::vector<Access> copy_accesses(void* to, const void* from, size_t bytes) {
    std::vector<Access> accesses;
    if (find_block(from, bytes)) accesses.push_back(reads(from, bytes));
    if (find_block(to, bytes)) accesses.push_back(writes(to, bytes));
    return accesses;
}

const char* copy_name(aclrtMemcpyKind kind) {
    switch (kind) {
        case ACL_MEMCPY_HOST_TO_DEVICE:
            return "copy host to device";
        case ACL_MEMCPY_DEVICE_TO_HOST:
            return "copy device to host";
        case ACL_MEMCPY_DEVICE_TO_DEVICE:
            return "copy device to device";
        default:
            return "copy";
    }
}

}  // namespace

extern "C" {

EMULATED_EXPORT aclError aclrtMalloc(void** address, size_t bytes, aclrtMemMallocPolicy) {
    return allocate_device(address, bytes);
}
EMULATED_EXPORT aclError aclrtMallocAlign32(void** address, size_t bytes, aclrtMemMallocPolicy) {
    return allocate_device(address, bytes);
}
EMULATED_EXPORT aclError aclrtFree(void* address) {
    return guarded([&] { release(address, false); });
}
EMULATED_EXPORT aclError aclrtMallocHost(void** address, size_t bytes) { return allocate_host(address, bytes); }
EMULATED_EXPORT aclError aclrtFreeHost(void* address) {
    return guarded([&] { release(address, true); });
}
EMULATED_EXPORT aclError aclrtHostRegister(void* address, uint64_t bytes, aclrtHostRegisterType, void** on_device) {
    std::lock_guard<std::mutex> lock(device().mutex);
    device().blocks[reinterpret_cast<uintptr_t>(address)] = {reinterpret_cast<uintptr_t>(address), bytes, -1};
    if (on_device) *on_device = address;
    return 0;
}
EMULATED_EXPORT aclError aclrtHostUnregister(void* address) {
    std::lock_guard<std::mutex> lock(device().mutex);
    device().blocks.erase(reinterpret_cast<uintptr_t>(address));
    return 0;
}
EMULATED_EXPORT aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
    std::lock_guard<std::mutex> lock(device().mutex);
    const Block* block = find_block(address, 1);
    std::memset(attributes, 0, sizeof(*attributes));
    attributes->location.id = block && block->device >= 0 ? block->device : 0;
    attributes->location.type = !block               ? ACL_MEM_LOCATION_TYPE_UNREGISTERED
                                : block->device >= 0 ? ACL_MEM_LOCATION_TYPE_DEVICE
                                                     : ACL_MEM_LOCATION_TYPE_HOST;
    return 0;
}

// --- virtual memory: addresses reserved first, physical memory mapped later -------------------------------------

EMULATED_EXPORT aclError aclrtReserveMemAddress(void** address, size_t bytes, size_t, void*, uint64_t) {
    void* mapped = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no address range left");
    *address = mapped;
    return 0;
}
EMULATED_EXPORT aclError aclrtReleaseMemAddress(void*) { return 0; }
EMULATED_EXPORT aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp*,
                                             uint64_t) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        require_device();
        charge(bytes);
        *handle = reinterpret_cast<aclrtDrvMemHandle>(new Physical{bytes, current_device()});
    });
}
EMULATED_EXPORT aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    auto* physical = reinterpret_cast<Physical*>(handle);
    std::lock_guard<std::mutex> lock(device().mutex);
    device().used.at(physical->device) -= physical->bytes;
    delete physical;
    return 0;
}
EMULATED_EXPORT aclError aclrtMapMem(void* address, size_t bytes, size_t, aclrtDrvMemHandle handle, uint64_t) {
    if (mprotect(address, bytes, PROT_READ | PROT_WRITE)) {
        return fail(ACL_ERROR_RT_PARAM_INVALID, "mapping outside a reserved range");
    }
    if (settings().poison && bytes <= kPoisonLimit) std::memset(address, 0xFF, bytes);
    std::lock_guard<std::mutex> lock(device().mutex);
    // Neighbouring mappings are one allocation to the copies that cross them.
    auto begin = reinterpret_cast<uintptr_t>(address);
    Block block{begin, bytes, reinterpret_cast<Physical*>(handle)->device, true};
    auto& blocks = device().blocks;
    auto next = blocks.find(begin + bytes);
    if (next != blocks.end() && next->second.mapped) {
        block.bytes += next->second.bytes;
        blocks.erase(next);
    }
    auto before = blocks.lower_bound(begin);
    if (before != blocks.begin()) {
        --before;
        if (before->second.mapped && before->second.begin + before->second.bytes == begin) {
            before->second.bytes += block.bytes;
            return 0;
        }
    }
    blocks[begin] = block;
    return 0;
}
EMULATED_EXPORT aclError aclrtUnmapMem(void*) {
    // The size is not told; the pages stay until the process ends. The limit is kept by aclrtFreePhysical.
    return 0;
}
EMULATED_EXPORT aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp*, aclrtMemGranularityOptions,
                                                          size_t* granularity) {
    *granularity = size_t{2} << 20;
    return 0;
}

EMULATED_EXPORT aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(device().mutex);
        require_device();
        *total = settings().memory;
        *free = settings().memory - device().used.at(current_device());
    });
}

// --- copies --------------------------------------------------------------------------------------------------

EMULATED_EXPORT aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
    if (!bytes) return 0;
    return guarded([&] {
        const std::string site = settings().race == Check::kOff ? "" : python_site();
        {
            std::lock_guard<std::mutex> lock(device().mutex);
            check_broken();
            check_copy(to, room, from, bytes, kind);
            host_access(copy_accesses(to, from, bytes), std::string("synchronous ") + copy_name(kind) + " at " + site);
        }
        std::memmove(to, from, bytes);
    });
}
EMULATED_EXPORT aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                                          aclrtStream stream) {
    if (!bytes) return 0;
    return guarded([&] {
        Task task{copy_name(kind), {}, [=] { std::memmove(to, from, bytes); }, {}};
        {
            std::lock_guard<std::mutex> lock(device().mutex);
            check_copy(to, room, from, bytes, kind);
            task.accesses = copy_accesses(to, from, bytes);
        }
        submit(stream, std::move(task));
    });
}
EMULATED_EXPORT aclError aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
    if (!bytes) return 0;
    return guarded([&] {
        const std::string site = settings().race == Check::kOff ? "" : python_site();
        if (bytes > room) throw Error(ACL_ERROR_RT_PARAM_INVALID, "memset beyond the buffer");
        {
            std::lock_guard<std::mutex> lock(device().mutex);
            host_access({writes(to, bytes)}, "synchronous memset at " + site);
        }
        std::memset(to, value, bytes);
    });
}
EMULATED_EXPORT aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
    if (!bytes) return 0;
    return guarded([&] {
        if (bytes > room) throw Error(ACL_ERROR_RT_PARAM_INVALID, "memset beyond the buffer");
        submit(stream, {"memset", {writes(to, bytes)}, [=] { std::memset(to, value, bytes); }, {}});
    });
}
}
