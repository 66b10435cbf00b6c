// SPDX-License-Identifier: Apache-2.0
// How an aclnn operator is written here: one line, in terms of ATen on the tensor's (host) memory.
//
//   ACLNN(aclnnAdd, [](In self, In other, Num alpha, Out out) { out = at::add(self, other, alpha); });
//
// exports aclnnAddGetWorkspaceSize and aclnnAdd with the C signature that follows from the parameters (In: const
// aclTensor*, Out: aclTensor*, Num: const aclScalar*, Ints: const aclIntArray*, ...). Signatures are not part of any
// ABI check, so every argument object carries a tag and a wrong kind is an error that names operator and position.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "acl/acl.h"
#include "emulator.h"

enum class Kind : uint32_t {
    kTensor = 0xE0A10001,
    kScalar,
    kInts,
    kFloats,
    kBools,
    kTensors,
    kScalars,
};

struct aclTensor {
    Kind kind = Kind::kTensor;
    std::vector<int64_t> sizes, strides;
    int64_t offset = 0;
    aclDataType type = ACL_FLOAT;
    aclFormat format = ACL_FORMAT_ND;
    void* data = nullptr;
    // Operators whose output size depends on data report it here; aclGetViewShape reads it after a synchronisation.
    std::shared_ptr<std::vector<int64_t>> view = std::make_shared<std::vector<int64_t>>();
};
struct aclScalar {
    Kind kind = Kind::kScalar;
    at::Scalar value;
};
struct aclIntArray {
    Kind kind = Kind::kInts;
    std::vector<int64_t> values;
};
struct aclFloatArray {
    Kind kind = Kind::kFloats;
    std::vector<float> values;
};
struct aclBoolArray {
    Kind kind = Kind::kBools;
    std::vector<bool> values;
};
struct aclTensorList {
    Kind kind = Kind::kTensors;
    std::vector<const aclTensor*> values;
};
struct aclScalarList {
    Kind kind = Kind::kScalars;
    std::vector<const aclScalar*> values;
};

struct aclOpExecutor {
    emulated::Task task;
    std::vector<std::shared_ptr<aclTensor>> keep;
};

namespace emulated {

at::ScalarType scalar_type(aclDataType type);
inline at::ScalarType scalar_type(int64_t type) { return scalar_type(static_cast<aclDataType>(type)); }

/// The tensor's memory as an ATen tensor; undefined for nullptr.
at::Tensor view_of(const aclTensor* tensor);

/// Ranges that the tensor touches; rows of a strided view one by one, unless there are very many.
void add_accesses(const aclTensor* tensor, bool write, std::vector<Access>& accesses);

[[noreturn]] void wrong_kind(const char* name, size_t position);

// --- parameters of operator bodies ------------------------------------------------------------------------------

/// An input tensor; undefined if the caller passed none.
struct In : at::Tensor {
    using Abi = const aclTensor*;
    explicit In(at::Tensor tensor) : at::Tensor(std::move(tensor)) {}
    bool given() const { return defined(); }
};

/// An output (or in-place) tensor; assignment copies into it with type conversion and broadcasting.
struct Out {
    using Abi = aclTensor*;
    at::Tensor tensor;
    std::shared_ptr<std::vector<int64_t>> view;
    bool given() const { return tensor.defined(); }
    Out& operator=(const at::Tensor& value) {
        if (given()) tensor.copy_(value);
        return *this;
    }
    /// For outputs whose size depends on data: writes `value` into the front and reports its shape.
    void resize(const at::Tensor& value) {
        *view = value.sizes().vec();
        if (value.numel()) {
            tensor.as_strided({value.numel()}, {1}, tensor.storage_offset()).copy_(value.reshape(-1));
        }
    }
};

struct Num : at::Scalar {
    using Abi = const aclScalar*;
    bool present = false;
    Num() = default;
    explicit Num(const at::Scalar& value) : at::Scalar(value), present(true) {}
    bool given() const { return present; }
};
struct Ints : std::vector<int64_t> {
    using Abi = const aclIntArray*;
    bool present = false;
    bool given() const { return present; }
};
struct Bools : std::vector<bool> {
    using Abi = const aclBoolArray*;
    bool present = false;
};
struct Floats : std::vector<float> {
    using Abi = const aclFloatArray*;
    bool present = false;
};
struct Ins : std::vector<at::Tensor> {
    using Abi = const aclTensorList*;
};
struct Outs : std::vector<Out> {
    using Abi = aclTensorList*;
};
struct Nums : std::vector<at::Scalar> {
    using Abi = const aclScalarList*;
};
struct Text : std::string {
    using Abi = const char*;
    explicit Text(const char* text) : std::string(text ? text : "") {}
};

template <typename P>
struct Parameter {  // int64_t, bool, double, float, int8_t, ...
    using Abi = P;
    using Kept = P;
    static Kept keep(Abi value, const char*, size_t, aclOpExecutor&) { return value; }
    static P make(const Kept& kept) { return kept; }
};

template <typename T>
const T* checked(const T* value, Kind kind, const char* name, size_t position) {
    if (value && value->kind != kind) wrong_kind(name, position);
    return value;
}

// A copy that the task owns: torch_npu releases its arguments before the stream gets to the task.
std::shared_ptr<aclTensor> keep_tensor(const aclTensor* tensor, bool write, const char* name, size_t position,
                                       aclOpExecutor& executor);

template <>
struct Parameter<In> {
    using Abi = const aclTensor*;
    using Kept = std::shared_ptr<aclTensor>;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor& executor) {
        return keep_tensor(value, false, name, position, executor);
    }
    static In make(const Kept& kept) { return In(view_of(kept.get())); }
};
template <>
struct Parameter<Out> {
    using Abi = aclTensor*;
    using Kept = std::shared_ptr<aclTensor>;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor& executor) {
        return keep_tensor(value, true, name, position, executor);
    }
    static Out make(const Kept& kept) { return {view_of(kept.get()), kept ? kept->view : nullptr}; }
};
template <>
struct Parameter<Num> {
    using Abi = const aclScalar*;
    using Kept = Num;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor&) {
        return checked(value, Kind::kScalar, name, position) ? Num(value->value) : Num();
    }
    static Num make(const Kept& kept) { return kept; }
};
template <typename P, typename A, Kind kind>
struct ArrayParameter {
    using Abi = const A*;
    using Kept = P;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor&) {
        P kept;
        if (checked(value, kind, name, position)) {
            kept.assign(value->values.begin(), value->values.end());
            kept.present = true;
        }
        return kept;
    }
    static P make(const Kept& kept) { return kept; }
};
template <>
struct Parameter<Ints> : ArrayParameter<Ints, aclIntArray, Kind::kInts> {};
template <>
struct Parameter<Bools> : ArrayParameter<Bools, aclBoolArray, Kind::kBools> {};
template <>
struct Parameter<Floats> : ArrayParameter<Floats, aclFloatArray, Kind::kFloats> {};
template <>
struct Parameter<Ins> {
    using Abi = const aclTensorList*;
    using Kept = std::vector<std::shared_ptr<aclTensor>>;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor& executor) {
        Kept kept;
        if (checked(value, Kind::kTensors, name, position)) {
            for (auto* tensor : value->values) kept.push_back(keep_tensor(tensor, false, name, position, executor));
        }
        return kept;
    }
    static Ins make(const Kept& kept) {
        Ins made;
        for (auto& tensor : kept) made.push_back(view_of(tensor.get()));
        return made;
    }
};
template <>
struct Parameter<Outs> {
    using Abi = aclTensorList*;
    using Kept = std::vector<std::shared_ptr<aclTensor>>;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor& executor) {
        Kept kept;
        if (checked(static_cast<const aclTensorList*>(value), Kind::kTensors, name, position)) {
            for (auto* tensor : value->values) kept.push_back(keep_tensor(tensor, true, name, position, executor));
        }
        return kept;
    }
    static Outs make(const Kept& kept) {
        Outs made;
        for (auto& tensor : kept) made.push_back({view_of(tensor.get()), tensor->view});
        return made;
    }
};
template <>
struct Parameter<Nums> {
    using Abi = const aclScalarList*;
    using Kept = Nums;
    static Kept keep(Abi value, const char* name, size_t position, aclOpExecutor&) {
        Nums kept;
        if (checked(value, Kind::kScalars, name, position)) {
            for (auto* scalar : value->values) kept.push_back(scalar->value);
        }
        return kept;
    }
    static Nums make(const Kept& kept) { return kept; }
};
template <>
struct Parameter<Text> {
    using Abi = const char*;
    using Kept = std::string;
    static Kept keep(Abi value, const char*, size_t, aclOpExecutor&) { return value ? value : ""; }
    static Text make(const Kept& kept) { return Text(kept.c_str()); }
};

int prepare(std::unique_ptr<aclOpExecutor> made, uint64_t* workspace, aclOpExecutor** executor);
int launch(const char* name, aclOpExecutor* executor, void* stream);
void run_body(const std::function<void()>& body);

template <typename Body, typename Call>
struct Operator;
template <typename Body, typename... P>
struct Operator<Body, void (Body::*)(P...) const> {
    static inline const char* name = nullptr;
    static inline const Body* body = nullptr;

    static int get_workspace_size(typename Parameter<P>::Abi... values, uint64_t* workspace, aclOpExecutor** executor) {
        return guarded([&] {
            auto made = std::make_unique<aclOpExecutor>();
            made->task.name = name;
            size_t position = 0;
            // Braces keep the order of the arguments.
            std::tuple<typename Parameter<P>::Kept...> kept{Parameter<P>::keep(values, name, position++, *made)...};
            made->task.run = [kept = std::move(kept)] {
                run_body([&] { std::apply([](const auto&... each) { (*body)(Parameter<P>::make(each)...); }, kept); });
            };
            prepare(std::move(made), workspace, executor);
        });
    }
    static int execute(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
        return launch(name, executor, stream);
    }
};

}  // namespace emulated

// The exported symbols are indirect functions: their resolvers pick the template instances above.
#define ACLNN(NAME, ...)                                                                                              \
    static const auto NAME##_body = __VA_ARGS__;                                                                      \
    using NAME##_operator =                                                                                           \
        emulated::Operator<std::remove_const_t<decltype(NAME##_body)>, decltype(&decltype(NAME##_body)::operator())>; \
    static const bool NAME##_known = (NAME##_operator::name = #NAME, NAME##_operator::body = &NAME##_body, true);     \
    extern "C" {                                                                                                      \
    static void* NAME##_find_prepare() { return reinterpret_cast<void*>(&NAME##_operator::get_workspace_size); }      \
    static void* NAME##_find_execute() { return reinterpret_cast<void*>(&NAME##_operator::execute); }                 \
    EMULATED_EXPORT void NAME##GetWorkspaceSize() __attribute__((ifunc(#NAME "_find_prepare")));                      \
    EMULATED_EXPORT void NAME() __attribute__((ifunc(#NAME "_find_execute")));                                        \
    }                                                                                                                 \
    static_assert(true)

// Operators whose arguments change between replays are asked for the workspace of the largest; ours need none.
#define ACLNN_MAX_WORKSPACE(NAME)                                                                   \
    extern "C" {                                                                                    \
    EMULATED_EXPORT void NAME##GetMaxWorkspaceSize() __attribute__((ifunc(#NAME "_find_prepare"))); \
    }                                                                                               \
    static_assert(true)

using emulated::Bools;
using emulated::Floats;
using emulated::In;
using emulated::Ins;
using emulated::Ints;
using emulated::Num;
using emulated::Nums;
using emulated::Out;
using emulated::Outs;
using emulated::Text;
