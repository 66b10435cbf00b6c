// SPDX-License-Identifier: Apache-2.0
// libatb by name: torch_npu's ATB extension links against these and vllm-ascend loads it at start. None is carried out.
#include <cstdint>
#include <string>

#include "emulator.h"

namespace atb {

class Context;
class Operation;
struct Tensor;

namespace infer {
struct LinearParam;
struct ElewiseParam;
struct RmsNormParam;
struct GroupTopkParam;
struct SelfAttentionParam;
struct PagedAttentionParam;
struct ReshapeAndCacheParam;
struct RopeParam;
}  // namespace infer

EMULATED_EXPORT int CreateContext(Context** context) {
    *context = reinterpret_cast<Context*>(16);
    return 0;
}
EMULATED_EXPORT int DestroyContext(Context*) { return 0; }
EMULATED_EXPORT int DestroyOperation(Operation*) { return 0; }

template <typename Param>
int CreateOperation(const Param&, Operation**);
#define NOT_EMULATED(NAME)                                                              \
    template <>                                                                         \
    EMULATED_EXPORT int CreateOperation(const infer::NAME&, Operation**) {              \
        return emulated::fail(200001, "not emulated: atb::CreateOperation<" #NAME ">"); \
    }
NOT_EMULATED(LinearParam)
NOT_EMULATED(ElewiseParam)
NOT_EMULATED(RmsNormParam)
NOT_EMULATED(GroupTopkParam)
NOT_EMULATED(SelfAttentionParam)
NOT_EMULATED(PagedAttentionParam)
NOT_EMULATED(ReshapeAndCacheParam)
NOT_EMULATED(RopeParam)

class Utils {
  public:
    EMULATED_EXPORT static uint64_t GetTensorSize(const Tensor&);
};
uint64_t Utils::GetTensorSize(const Tensor&) { return 0; }

}  // namespace atb
