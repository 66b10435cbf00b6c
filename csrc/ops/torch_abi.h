// SPDX-License-Identifier: Apache-2.0
// The functions of torch's stable C interface that the kernels call, found at run time in the torch that the process
// has loaded.
//
// The library is built without torch, so `pip install .` builds it in isolation. One library serves every torch from
// 2.10 on, because torch keeps these functions and their calling convention across versions.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace eplb {

// One argument or result of an op: a number, a tensor's handle, or a pointer to such a word (null: no value).
using Word = uint64_t;

struct OpaqueTensor;
using TensorHandle = OpaqueTensor*;
struct OpaqueLibrary;
struct OpaqueGuard;

// An op's kernel: takes ownership of the arguments on `stack`, and puts the results there.
using Kernel = void (*)(Word* stack, uint64_t num_arguments, uint64_t num_results);

// Torch's functions, under their own names. A returned status is 0 on success.
struct TorchAbi {
    uint64_t (*aoti_torch_abi_version)();
    int32_t (*aoti_torch_dtype_int32)();
    int32_t (*aoti_torch_dtype_int64)();
    int32_t (*aoti_torch_dtype_bool)();
    int32_t (*aoti_torch_library_init_impl)(const char* space, const char* key, const char* file, uint32_t line,
                                            OpaqueLibrary** library);
    int32_t (*torch_library_impl)(OpaqueLibrary* library, const char* op, Kernel kernel, uint64_t built_for);
    int32_t (*torch_call_dispatcher)(const char* op, const char* overload, Word* stack, uint64_t built_for);
    int32_t (*aoti_torch_empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, TensorHandle* made);
    int32_t (*aoti_torch_new_tensor_handle)(TensorHandle tensor, TensorHandle* made);
    int32_t (*aoti_torch_delete_tensor_object)(TensorHandle tensor);
    int32_t (*aoti_torch_get_dtype)(TensorHandle tensor, int32_t* dtype);
    int32_t (*aoti_torch_get_device_type)(TensorHandle tensor, int32_t* type);
    int32_t (*aoti_torch_get_device_index)(TensorHandle tensor, int32_t* index);
    int32_t (*aoti_torch_get_dim)(TensorHandle tensor, int64_t* dims);
    int32_t (*aoti_torch_get_numel)(TensorHandle tensor, int64_t* elements);
    int32_t (*aoti_torch_get_sizes)(TensorHandle tensor, int64_t** sizes);
    int32_t (*aoti_torch_get_strides)(TensorHandle tensor, int64_t** strides);
    int32_t (*torch_get_const_data_ptr)(TensorHandle tensor, const void** data);
    int32_t (*torch_get_mutable_data_ptr)(TensorHandle tensor, void** data);
    int32_t (*torch_get_num_threads)(uint32_t* threads);
    int32_t (*torch_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                  void* context);
};

// Functions of a torch for CUDA.
struct TorchCudaAbi {
    int32_t (*aoti_torch_create_cuda_guard)(int32_t device_index, OpaqueGuard** guard);
    int32_t (*aoti_torch_delete_cuda_guard)(OpaqueGuard* guard);
    int32_t (*aoti_torch_get_current_cuda_stream)(int32_t device_index, void** stream);
};

extern TorchAbi torch_abi;
extern TorchCudaAbi torch_cuda_abi;

constexpr uint64_t kBuiltFor = (uint64_t{2} << 56) | (uint64_t{10} << 48);  // torch 2.10, as torch writes versions

[[noreturn]] void fail(const std::string& message);

inline void succeed(int32_t status, const char* function) {
    if (status != 0) fail(std::string(function) + " of torch failed");
}
#define EPLB_TORCH(function, ...) ::eplb::succeed(::eplb::torch_abi.function(__VA_ARGS__), #function)
#define EPLB_TORCH_CUDA(function, ...) ::eplb::succeed(::eplb::torch_cuda_abi.function(__VA_ARGS__), #function)

// Finds the functions; returns what is missing, or an empty text. find_torch_cuda() is for a torch for CUDA.
std::string find_torch();
std::string find_torch_cuda();

// Names for messages: "int64", "cuda".
std::string dtype_name(int32_t dtype);
std::string device_type_name(int32_t type);

// Registers the kernel of an op of this package for a dispatch key, until the process ends.
void register_kernel(const char* op, const char* key, Kernel kernel);

}  // namespace eplb
