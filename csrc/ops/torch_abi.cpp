// SPDX-License-Identifier: Apache-2.0
#include "torch_abi.h"

#include <dlfcn.h>

#include <initializer_list>

namespace eplb {

TorchAbi torch_abi;
TorchCudaAbi torch_cuda_abi;

void fail(const std::string& message) { throw std::runtime_error(message); }

namespace {

constexpr const char* kTorch = "libtorch_cpu.so";

// Looks functions up in a library that the process has loaded.
class Finder {
  public:
    explicit Finder(const char* library) : library_(dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
        if (library_ == nullptr) missing_ = std::string(library) + " is not loaded";
    }

    template <typename Function>
    void operator()(const char* name, Function& function) {
        void* const found = library_ == nullptr ? nullptr : dlsym(library_, name);
        if (found == nullptr && missing_.empty()) missing_ = std::string("torch has no ") + name;
        function = reinterpret_cast<Function>(found);
    }

    const std::string& missing() const { return missing_; }

  private:
    void* library_;  // never closed: torch stays loaded
    std::string missing_;
};

// The name among `names` whose torch function (prefix + name) returns `code`.
std::string name_of(int32_t code, const std::string& prefix, std::initializer_list<const char*> names) {
    Finder find(kTorch);
    for (const char* const name : names) {
        int32_t (*function)() = nullptr;
        find((prefix + name).c_str(), function);
        if (function != nullptr && function() == code) return name;
    }
    return "number " + std::to_string(code);
}

}  // namespace

std::string dtype_name(int32_t dtype) {
    return name_of(dtype, "aoti_torch_dtype_",
                   {"int64", "int32", "bool", "float32", "bfloat16", "float16", "float64", "int16", "int8", "uint8"});
}

std::string device_type_name(int32_t type) {
    return name_of(type, "aoti_torch_device_type_", {"cpu", "cuda", "meta", "xpu", "mps", "privateuse1"});
}

#define EPLB_FIND(member) find(#member, abi.member)

std::string find_torch() {
    Finder find(kTorch);
    TorchAbi& abi = torch_abi;
    EPLB_FIND(aoti_torch_abi_version);
    if (!find.missing().empty()) return find.missing();
    const uint64_t version = abi.aoti_torch_abi_version();
    if (version >> 56 != kBuiltFor >> 56 || version < kBuiltFor) {
        return "torch is " + std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff) +
               "; supported are 2.10 and later 2.x";
    }
    EPLB_FIND(aoti_torch_dtype_int32);
    EPLB_FIND(aoti_torch_dtype_int64);
    EPLB_FIND(aoti_torch_dtype_bool);
    EPLB_FIND(aoti_torch_library_init_impl);
    EPLB_FIND(torch_library_impl);
    EPLB_FIND(torch_call_dispatcher);
    EPLB_FIND(aoti_torch_empty_strided);
    EPLB_FIND(aoti_torch_new_tensor_handle);
    EPLB_FIND(aoti_torch_delete_tensor_object);
    EPLB_FIND(aoti_torch_get_dtype);
    EPLB_FIND(aoti_torch_get_device_type);
    EPLB_FIND(aoti_torch_get_device_index);
    EPLB_FIND(aoti_torch_get_dim);
    EPLB_FIND(aoti_torch_get_numel);
    EPLB_FIND(aoti_torch_get_sizes);
    EPLB_FIND(aoti_torch_get_strides);
    EPLB_FIND(torch_get_const_data_ptr);
    EPLB_FIND(torch_get_mutable_data_ptr);
    EPLB_FIND(torch_get_num_threads);
    EPLB_FIND(torch_parallel_for);
    return find.missing();
}

std::string find_torch_cuda() {
    Finder find("libtorch_cuda.so");
    TorchCudaAbi& abi = torch_cuda_abi;
    EPLB_FIND(aoti_torch_create_cuda_guard);
    EPLB_FIND(aoti_torch_delete_cuda_guard);
    EPLB_FIND(aoti_torch_get_current_cuda_stream);
    return find.missing();
}

void register_kernel(const char* op, const char* key, Kernel kernel) {
    OpaqueLibrary* library = nullptr;  // never deleted: that would unregister the kernel
    EPLB_TORCH(aoti_torch_library_init_impl, "vllm_ascend_eplb", key, __FILE__, __LINE__, &library);
    EPLB_TORCH(torch_library_impl, library, op, kernel, kBuiltFor);
}

}  // namespace eplb
