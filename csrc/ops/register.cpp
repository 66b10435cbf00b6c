// SPDX-License-Identifier: Apache-2.0
// Registers the kernels with the ops whose schemas load/ops.py defined. load/ops.py calls these functions through
// ctypes after it has loaded the library.
#include "cpu_ops.h"
#ifdef EPLB_CUDA
#include "cuda_ops.h"
#endif

namespace eplb {
namespace {

template <Tensor (*kMapAndRecord)(const Arguments&)>
void kernel(Word* stack, uint64_t, uint64_t) {
    const Arguments given(stack);
    stack[0] = kMapAndRecord(given).release();
}

// Runs `attempt` and returns the reason of its failure, or an empty text; the text is valid until the next call.
template <typename Register>
const char* why_not(const Register& attempt) {
    static std::string text;
    try {
        text = attempt();
    } catch (const std::exception& error) {
        text = error.what();
    }
    return text.c_str();
}

}  // namespace
}  // namespace eplb

#define EPLB_EXPORT extern "C" __attribute__((visibility("default")))

EPLB_EXPORT const char* eplb_register_cpu() {
    using namespace eplb;
    return why_not([] {
        std::string missing = find_torch();
        if (missing.empty()) register_kernel("map_and_record", "CPU", kernel<map_and_record_cpu>);
        return missing;
    });
}

EPLB_EXPORT const char* eplb_register_cuda() {
    using namespace eplb;
    return why_not([] {
#ifdef EPLB_CUDA
        std::string missing = find_torch_cuda();
        if (missing.empty()) register_kernel("map_and_record", "CUDA", kernel<map_and_record_cuda>);
        return missing;
#else
        return std::string("the package was built without nvcc");
#endif
    });
}
