// SPDX-License-Identifier: Apache-2.0
// A tensor of torch.
#pragma once

#include <utility>

#include "torch_abi.h"

namespace eplb {

struct Device {
    int32_t type;
    int32_t index;

    bool operator==(const Device& other) const { return type == other.type && index == other.index; }
    bool operator!=(const Device& other) const { return !(*this == other); }
};

// Owns a handle. Shape, strides, dtype and device are read once, at construction.
class Tensor {
  public:
    explicit Tensor(TensorHandle handle) : handle_(handle) {
        try {
            EPLB_TORCH(aoti_torch_get_dtype, handle, &dtype_);
            EPLB_TORCH(aoti_torch_get_device_type, handle, &device_.type);
            EPLB_TORCH(aoti_torch_get_device_index, handle, &device_.index);
            EPLB_TORCH(aoti_torch_get_dim, handle, &dims_);
            EPLB_TORCH(aoti_torch_get_numel, handle, &numel_);
            EPLB_TORCH(aoti_torch_get_sizes, handle, &sizes_);
            EPLB_TORCH(aoti_torch_get_strides, handle, &strides_);
        } catch (...) {
            torch_abi.aoti_torch_delete_tensor_object(handle_);
            throw;
        }
    }
    Tensor(Tensor&& from) noexcept
        : handle_(std::exchange(from.handle_, nullptr)),
          dtype_(from.dtype_),
          device_(from.device_),
          dims_(from.dims_),
          numel_(from.numel_),
          sizes_(from.sizes_),
          strides_(from.strides_) {}
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    ~Tensor() {
        if (handle_ != nullptr) torch_abi.aoti_torch_delete_tensor_object(handle_);
    }

    // A new, contiguous tensor of the same shape, dtype and device, with undefined contents.
    Tensor empty_like() const {
        int64_t strides[2] = {1, 1};
        if (dims_ > 2) fail("empty_like is for tensors of at most two dimensions");
        if (dims_ == 2) strides[0] = sizes_[1] > 1 ? sizes_[1] : 1;
        TensorHandle made = nullptr;
        EPLB_TORCH(aoti_torch_empty_strided, dims_, sizes_, strides, dtype_, device_.type, device_.index, &made);
        return Tensor(made);
    }

    // A contiguous copy, made by torch on the tensor's device (on CUDA: on the current stream).
    Tensor copy() const {
        Tensor to = empty_like();
        Word stack[3] = {word(to.another_handle()), word(another_handle()), 0};  // self, src, non_blocking
        EPLB_TORCH(torch_call_dispatcher, "aten::copy_", "", stack, kBuiltFor);
        Tensor(reinterpret_cast<TensorHandle>(stack[0]));  // frees the handle of the result, which is `to` again
        return to;
    }

    bool is_contiguous() const {
        int64_t expected = 1;
        for (int64_t d = dims_ - 1; d >= 0; --d) {
            if (sizes_[d] > 1 && strides_[d] != expected) return numel_ == 0;
            expected *= sizes_[d];
        }
        return true;
    }

    int32_t dtype() const { return dtype_; }
    bool is_int64() const { return dtype_ == torch_abi.aoti_torch_dtype_int64(); }
    bool is_int32() const { return dtype_ == torch_abi.aoti_torch_dtype_int32(); }
    bool is_bool() const { return dtype_ == torch_abi.aoti_torch_dtype_bool(); }
    const Device& device() const { return device_; }
    int64_t dim() const { return dims_; }
    int64_t numel() const { return numel_; }
    int64_t size(int64_t d) const { return sizes_[d]; }
    int64_t stride(int64_t d) const { return strides_[d]; }

    template <typename T = void>
    const T* data() const {
        const void* at = nullptr;
        EPLB_TORCH(torch_get_const_data_ptr, handle_, &at);
        return static_cast<const T*>(at);
    }
    template <typename T = void>
    T* mutable_data() const {
        void* at = nullptr;
        EPLB_TORCH(torch_get_mutable_data_ptr, handle_, &at);
        return static_cast<T*>(at);
    }

    // Gives up the handle, as the result of a kernel.
    Word release() && { return word(std::exchange(handle_, nullptr)); }

  private:
    static Word word(TensorHandle handle) { return static_cast<Word>(reinterpret_cast<uintptr_t>(handle)); }
    TensorHandle another_handle() const {
        TensorHandle made = nullptr;
        EPLB_TORCH(aoti_torch_new_tensor_handle, handle_, &made);
        return made;
    }

    TensorHandle handle_;
    int32_t dtype_ = 0;
    Device device_{};
    int64_t dims_ = 0;
    int64_t numel_ = 0;
    int64_t* sizes_ = nullptr;
    int64_t* strides_ = nullptr;
};

}  // namespace eplb
