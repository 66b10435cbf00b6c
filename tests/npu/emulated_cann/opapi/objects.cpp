// SPDX-License-Identifier: Apache-2.0
// Argument objects of aclnn operators and how operators are run.
#include <c10/core/InferenceMode.h>

#include "operator.h"

namespace emulated {

at::ScalarType scalar_type(aclDataType type) {
    switch (type) {
        case ACL_FLOAT:
            return at::kFloat;
        case ACL_FLOAT16:
            return at::kHalf;
        case ACL_BF16:
            return at::kBFloat16;
        case ACL_DOUBLE:
            return at::kDouble;
        case ACL_INT8:
            return at::kChar;
        case ACL_UINT8:
            return at::kByte;
        case ACL_INT16:
            return at::kShort;
        case ACL_UINT16:
            return at::kUInt16;
        case ACL_INT32:
            return at::kInt;
        case ACL_UINT32:
            return at::kUInt32;
        case ACL_INT64:
            return at::kLong;
        case ACL_UINT64:
            return at::kUInt64;
        case ACL_BOOL:
            return at::kBool;
        case ACL_COMPLEX64:
            return at::kComplexFloat;
        case ACL_COMPLEX128:
            return at::kComplexDouble;
        default:
            throw Error(200001, "not emulated: data type " + std::to_string(type));
    }
}

at::Tensor view_of(const aclTensor* tensor) {
    if (!tensor) return {};
    if (tensor->format != ACL_FORMAT_ND && tensor->format != ACL_FORMAT_NCHW && tensor->format != ACL_FORMAT_NCL &&
        tensor->format != ACL_FORMAT_NCDHW) {
        throw Error(200001, "not emulated: internal format " + std::to_string(tensor->format));
    }
    at::ScalarType type = scalar_type(tensor->type);
    char* begin = static_cast<char*>(tensor->data) + tensor->offset * static_cast<int64_t>(c10::elementSize(type));
    return at::from_blob(begin, tensor->sizes, tensor->strides, at::TensorOptions().dtype(type));
}

void add_accesses(const aclTensor* tensor, bool write, std::vector<Access>& accesses) {
    constexpr int64_t kMostRows = 1024;
    const int64_t item = static_cast<int64_t>(c10::elementSize(scalar_type(tensor->type)));
    for (int64_t size : tensor->sizes) {
        if (!size) return;
    }
    // Inner dimensions that are contiguous form one row.
    int64_t row = 1;
    int dim = static_cast<int>(tensor->sizes.size()) - 1;
    for (; dim >= 0 && (tensor->sizes[dim] == 1 || tensor->strides[dim] == row); --dim) row *= tensor->sizes[dim];
    int64_t rows = 1, last = row - 1;
    for (int d = dim; d >= 0; --d) {
        rows *= tensor->sizes[d];
        last += (tensor->sizes[d] - 1) * tensor->strides[d];
    }
    const auto begin = reinterpret_cast<uintptr_t>(tensor->data) + tensor->offset * item;
    if (rows > kMostRows) {
        accesses.push_back({begin, begin + (last + 1) * item, write});
        return;
    }
    std::vector<int64_t> index(dim + 1, 0);
    for (int64_t i = 0; i < rows; ++i) {
        int64_t at = 0;
        for (int d = 0; d <= dim; ++d) at += index[d] * tensor->strides[d];
        accesses.push_back({begin + at * item, begin + (at + row) * item, write});
        for (int d = dim; d >= 0 && ++index[d] == tensor->sizes[d]; --d) index[d] = 0;
    }
}

void wrong_kind(const char* name, size_t position) {
    throw Error(200001, std::string("not emulated: ") + name + " with this signature (argument " +
                            std::to_string(position + 1) + " is of another kind than expected)");
}

std::shared_ptr<aclTensor> keep_tensor(const aclTensor* tensor, bool write, const char* name, size_t position,
                                       aclOpExecutor& executor) {
    if (!checked(tensor, Kind::kTensor, name, position)) return nullptr;
    auto kept = std::make_shared<aclTensor>(*tensor);
    add_accesses(tensor, write, executor.task.accesses);
    return kept;
}

int prepare(std::unique_ptr<aclOpExecutor> made, uint64_t* workspace, aclOpExecutor** executor) {
    *workspace = 0;
    *executor = made.release();
    return 0;
}

int launch(const char* name, aclOpExecutor* executor, void* stream) {
    return guarded([&] {
        if (!executor) throw Error(100000, std::string(name) + " without an executor");
        std::unique_ptr<aclOpExecutor> owned(executor);
        submit(stream, std::move(owned->task));
    });
}

void run_body(const std::function<void()>& body) {
    c10::InferenceMode no_autograd;
    // The message without the C++ trace: it ends up in a Python exception.
    try {
        body();
    } catch (const c10::Error& error) {
        throw Error(507015, error.what_without_backtrace());
    }
}

}  // namespace emulated

using emulated::scalar_type;

extern "C" {

EMULATED_EXPORT aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dims, aclDataType type,
                                           const int64_t* strides, int64_t offset, aclFormat format, const int64_t*,
                                           uint64_t, void* data) {
    auto* made = new aclTensor;
    made->sizes.assign(sizes, sizes + dims);
    if (strides) {
        made->strides.assign(strides, strides + dims);
    } else {
        made->strides.assign(dims, 1);
        for (int d = static_cast<int>(dims) - 2; d >= 0; --d) made->strides[d] = made->strides[d + 1] * sizes[d + 1];
    }
    made->offset = offset;
    made->type = type;
    made->format = format;
    made->data = data;
    return made;
}
EMULATED_EXPORT aclScalar* aclCreateScalar(void* value, aclDataType type) {
    auto* made = new aclScalar;
    switch (type) {
        case ACL_FLOAT:
            made->value = *static_cast<float*>(value);
            break;
        case ACL_DOUBLE:
            made->value = *static_cast<double*>(value);
            break;
        case ACL_INT32:
            made->value = *static_cast<int32_t*>(value);
            break;
        case ACL_INT64:
            made->value = *static_cast<int64_t*>(value);
            break;
        case ACL_BOOL:
            made->value = *static_cast<bool*>(value);
            break;
        case ACL_FLOAT16:
            made->value = static_cast<float>(*static_cast<at::Half*>(value));
            break;
        case ACL_BF16:
            made->value = static_cast<float>(*static_cast<at::BFloat16*>(value));
            break;
        case ACL_COMPLEX128:
            made->value = *static_cast<c10::complex<double>*>(value);
            break;
        default:
            made->value = *static_cast<int64_t*>(value);
            break;
    }
    return made;
}
EMULATED_EXPORT aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
    auto* made = new aclIntArray;
    made->values.assign(values, values + size);
    return made;
}
EMULATED_EXPORT aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) {
    auto* made = new aclFloatArray;
    made->values.assign(values, values + size);
    return made;
}
EMULATED_EXPORT aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
    auto* made = new aclBoolArray;
    made->values.assign(values, values + size);
    return made;
}
EMULATED_EXPORT aclTensorList* aclCreateTensorList(const aclTensor* const* values, uint64_t size) {
    auto* made = new aclTensorList;
    made->values.assign(values, values + size);
    return made;
}
EMULATED_EXPORT aclScalarList* aclCreateScalarList(const aclScalar* const* values, uint64_t size) {
    auto* made = new aclScalarList;
    made->values.assign(values, values + size);
    return made;
}
EMULATED_EXPORT int aclDestroyTensor(const aclTensor* value) { return delete value, 0; }
EMULATED_EXPORT int aclDestroyScalar(const aclScalar* value) { return delete value, 0; }
EMULATED_EXPORT int aclDestroyIntArray(const aclIntArray* value) { return delete value, 0; }
EMULATED_EXPORT int aclDestroyFloatArray(const aclFloatArray* value) { return delete value, 0; }
EMULATED_EXPORT int aclDestroyBoolArray(const aclBoolArray* value) { return delete value, 0; }
EMULATED_EXPORT int aclDestroyTensorList(const aclTensorList* value) {
    if (value) {
        for (const aclTensor* tensor : value->values) delete tensor;
    }
    return delete value, 0;
}
EMULATED_EXPORT int aclDestroyScalarList(const aclScalarList* value) {
    if (value) {
        for (const aclScalar* scalar : value->values) delete scalar;
    }
    return delete value, 0;
}
// Of an operator that was asked for its workspace only; a launch consumes the executor.
EMULATED_EXPORT int aclDestroyAclOpExecutor(aclOpExecutor* executor) { return delete executor, 0; }
EMULATED_EXPORT int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* dims) {
    const auto& shape = tensor->view->empty() ? tensor->sizes : *tensor->view;
    *dims = shape.size();
    *sizes = new int64_t[shape.size()];  // the caller deletes it
    std::copy(shape.begin(), shape.end(), *sizes);
    return 0;
}
EMULATED_EXPORT int aclInitTensor(aclTensor* tensor, const int64_t* sizes, uint64_t dims, aclDataType type,
                                  const int64_t* strides, int64_t offset, aclFormat format, const int64_t* storage,
                                  uint64_t storage_dims, void* data) {
    std::unique_ptr<aclTensor> made(
        aclCreateTensor(sizes, dims, type, strides, offset, format, storage, storage_dims, data));
    *tensor = *made;
    return 0;
}
}
