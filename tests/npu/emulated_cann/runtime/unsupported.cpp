// SPDX-License-Identifier: Apache-2.0
// Entry points that libtorch_npu.so is linked against or looks up at start, and that the emulator does not carry out:
// profiling and descriptors do nothing, everything else says "not emulated: NAME".
#include <cstdint>
#include <cstring>
#include <string>

#include "emulator.h"

namespace emulated {
EMULATED_EXPORT std::string missing_operators();
}

#define NOT_EMULATED(name) \
    EMULATED_EXPORT int name() { return emulated::fail(200001, "not emulated: " #name); }
#define NOTHING(name) \
    EMULATED_EXPORT intptr_t name() { return 0; }
// A handle that is never dereferenced; must differ from nullptr.
#define HANDLE(name) \
    EMULATED_EXPORT void* name() { return reinterpret_cast<void*>(16); }

extern "C" {
NOTHING(MsprofGetHashId)
NOTHING(MsprofRegisterCallback)
NOTHING(MsprofReportAdditionalInfo)
NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo)
NOTHING(MsprofSysCycleTime)

HANDLE(aclCreateDataBuffer)
HANDLE(aclCreateTensorDesc)
HANDLE(aclopCreateAttr)
NOTHING(aclDestroyDataBuffer)
NOTHING(aclDestroyTensorDesc)
NOTHING(aclopDestroyAttr)
NOTHING(aclGetTensorDescFormat)
NOTHING(aclGetTensorDescNumDims)
NOTHING(aclGetTensorDescType)
NOTHING(aclGetTensorDescDimV2)
NOTHING(aclSetTensorDescName)
NOTHING(aclSetTensorFormat)
NOTHING(aclSetTensorPlaceMent)
NOTHING(aclSetTensorShape)
NOTHING(aclSetTensorConst)
NOTHING(aclopSetAttrBool)
NOTHING(aclopSetAttrDataType)
NOTHING(aclopSetAttrFloat)
NOTHING(aclopSetAttrInt)
NOTHING(aclopSetAttrListBool)
NOTHING(aclopSetAttrListFloat)
NOTHING(aclopSetAttrListInt)
NOTHING(aclopSetAttrListListInt)
NOTHING(aclopSetAttrString)

// Legacy operators: torch_npu falls back to them where libopapi lacks an aclnn operator.
static int legacy(const char* name) {
    return emulated::fail(200001, std::string("not emulated: ") + name +
                                      " (a legacy operator); aclnn operators looked up and missing lately:" +
                                      emulated::missing_operators());
}
EMULATED_EXPORT int aclopCompileAndExecute(const char* name) { return legacy(name); }
EMULATED_EXPORT int aclopCompileAndExecuteV2(const char* name) { return legacy(name); }
NOTHING(aclSetCompileopt)
NOTHING(aclrtCtxSetSysParamOpt)
NOTHING(aclrtSetSysParamOpt)
EMULATED_EXPORT size_t aclGetCompileoptSize(int) { return 16; }
EMULATED_EXPORT int aclGetCompileopt(int, char* value, size_t length) {
    std::strncpy(value, "disable", length);  // just-in-time compilation: aclnn operators, not legacy ones
    return 0;
}
EMULATED_EXPORT int aclrtGetSysParamOpt(int, int64_t* value) {
    *value = 0;
    return 0;
}

NOT_EMULATED(aclrtBinaryGetFunction)
NOT_EMULATED(aclrtBinaryLoadFromData)
NOT_EMULATED(aclrtGetFunctionAddr)
NOT_EMULATED(aclrtMemExportToShareableHandle)
NOT_EMULATED(aclrtMemImportFromShareableHandle)
NOT_EMULATED(aclrtMemSetPidToShareableHandle)
NOT_EMULATED(rtDevBinaryRegister)
NOT_EMULATED(rtFunctionRegister)
NOT_EMULATED(rtGetC2cCtrlAddr)
NOT_EMULATED(rtKernelLaunch)
}
