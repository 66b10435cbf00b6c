// SPDX-License-Identifier: Apache-2.0
// Initialisation, devices, versions and errors of the ACL runtime API.
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <iostream>

#include "acl/acl.h"
#include "device.h"

namespace emulated {
const char* take_recent_message();
void set_current_device(int id);
}  // namespace emulated

using namespace emulated;

namespace {

constexpr const char* kVersion = "8.5.0";
constexpr int kCubeCores = 20, kVectorCores = 40;

void* context_of(int on_device) { return reinterpret_cast<void*>(static_cast<intptr_t>(on_device) + 1); }

// Names of aclnn operators that torch_npu looked for and did not find: it then often tries a legacy operator of another
// name, and the error should name the one that is missing.
std::mutex missing_mutex;
std::vector<std::string>& missing() {
    static auto* names = new std::vector<std::string>;
    return *names;
}

bool initialised = false;

}  // namespace

extern "C" {

EMULATED_EXPORT aclError aclInit(const char*) {
    if (initialised) return ACL_ERROR_REPEAT_INITIALIZE;
    initialised = true;
    settings();
    return 0;
}
EMULATED_EXPORT aclError aclFinalize() {
    initialised = false;
    return 0;
}
EMULATED_EXPORT const char* aclGetRecentErrMsg() { return take_recent_message(); }

EMULATED_EXPORT const char* aclrtGetSocName() { return settings().soc.c_str(); }
EMULATED_EXPORT aclError aclrtGetDeviceCount(uint32_t* count) {
    *count = static_cast<uint32_t>(settings().devices);
    return 0;
}
EMULATED_EXPORT aclError aclrtSetDevice(int32_t id) {
    if (id < 0 || id >= settings().devices) {
        return fail(ACL_ERROR_RT_INVALID_DEVICEID, "device " + std::to_string(id) + "; allowed are 0.." +
                                                       std::to_string(settings().devices - 1) +
                                                       " (EMULATED_NPU_DEVICES sets the number)");
    }
    set_current_device(id);
    return 0;
}
EMULATED_EXPORT aclError aclrtResetDevice(int32_t) { return 0; }
EMULATED_EXPORT aclError aclrtGetDevice(int32_t* id) {
    if (current_device() < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set in this thread");
    *id = current_device();
    return 0;
}
EMULATED_EXPORT aclError aclrtGetCurrentContext(aclrtContext* context) {
    if (current_device() < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set in this thread");
    *context = context_of(current_device());
    return 0;
}
EMULATED_EXPORT aclError aclrtSetCurrentContext(aclrtContext context) {
    set_current_device(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
    return 0;
}
EMULATED_EXPORT aclError aclrtGetPrimaryCtxState(int32_t id, uint32_t* flags, int32_t* active) {
    if (flags) *flags = 0;
    *active = current_device() == id;
    return 0;
}
EMULATED_EXPORT aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
    *can = 1;
    return 0;
}
EMULATED_EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return 0; }
EMULATED_EXPORT aclError aclrtDeviceGetBareTgid(int32_t* pid) {
    *pid = getpid();
    return 0;
}
EMULATED_EXPORT aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t* const logic) {
    *logic = user;
    return 0;
}
EMULATED_EXPORT aclError aclrtDeviceGetUuid(int32_t id, aclrtUuid* uuid) {
    std::memset(uuid, id + 1, sizeof(*uuid));
    return 0;
}
EMULATED_EXPORT aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* info) {
    info->cubeUtilization = info->vectorUtilization = info->aicpuUtilization = info->memoryUtilization = 0;
    return 0;
}
EMULATED_EXPORT aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t* value) {
    switch (what) {
        case ACL_DEVICE_INFO_AI_CORE_NUM:
            *value = kCubeCores;
            break;
        case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
            *value = kVectorCores;
            break;
        case ACL_DEVICE_INFO_L2_SIZE:
            *value = int64_t{192} << 20;
            break;
        default:
            return fail(ACL_ERROR_INVALID_PARAM, "unknown device capability");
    }
    return 0;
}
EMULATED_EXPORT aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t* value) {
    *value = type == ACL_RT_DEV_RES_CUBE_CORE ? kCubeCores : kVectorCores;
    return 0;
}
EMULATED_EXPORT aclError aclrtSetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t) { return 0; }
EMULATED_EXPORT aclError aclrtResetDeviceResLimit(int32_t) { return 0; }
EMULATED_EXPORT aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) {
    return aclrtGetDeviceResLimit(0, type, value);
}
EMULATED_EXPORT aclError aclrtSetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t) { return 0; }
EMULATED_EXPORT aclError aclrtResetStreamResLimit(aclrtStream) { return 0; }
EMULATED_EXPORT aclError aclrtUseStreamResInCurrentThread(aclrtStream) { return 0; }
EMULATED_EXPORT aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) { return 0; }
EMULATED_EXPORT aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
    return aclrtGetDeviceResLimit(0, type, value);
}

EMULATED_EXPORT aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
    std::memset(version, 0, sizeof(*version));
    std::strncpy(version->version, kVersion, sizeof(version->version) - 1);
    return 0;
}
EMULATED_EXPORT aclError aclsysGetVersionStr(char*, char* version) {
    std::strcpy(version, kVersion);
    return 0;
}

EMULATED_EXPORT aclError aclrtPeekAtLastError(aclrtLastErrLevel) {
    std::lock_guard<std::mutex> lock(device().mutex);
    return device().broken ? device().broken->code : 0;
}
EMULATED_EXPORT aclError aclrtGetLastError(aclrtLastErrLevel level) { return aclrtPeekAtLastError(level); }

// Accepted and without effect: the emulator has no saturation modes, core limits, timeouts of its own or overflow
// flags.
EMULATED_EXPORT aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return 0; }
EMULATED_EXPORT aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return 0; }
EMULATED_EXPORT aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return 0; }
EMULATED_EXPORT aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
    *flag = 0;
    return 0;
}
EMULATED_EXPORT aclError aclrtSetOpWaitTimeout(uint32_t) { return 0; }
EMULATED_EXPORT aclError aclrtSetOpExecuteTimeOut(uint32_t) { return 0; }
EMULATED_EXPORT aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
    *actual = timeout;
    return 0;
}
EMULATED_EXPORT aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return 0; }
EMULATED_EXPORT aclError aclrtCmoAsync(void*, size_t, aclrtCmoType, aclrtStream) { return 0; }
EMULATED_EXPORT aclError aclmdlInitDump() { return 0; }
EMULATED_EXPORT aclError aclmdlSetDump(const char*) { return 0; }
EMULATED_EXPORT aclError aclmdlFinalizeDump() { return 0; }

EMULATED_EXPORT void aclAppLog(aclLogLevel level, const char*, const char*, uint32_t, const char* format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    char name[256], library[256];
    if (std::sscanf(line, "%*[^d]dlsym %255s from %255s failed", name, library) == 2 ||
        std::sscanf(line, "dlsym %255s from %255s failed", name, library) == 2) {
        std::string text = name;
        if (text.rfind("aclnn", 0) == 0 && std::string(library) == "libopapi.so" &&
            text.find("GetWorkspaceSize") == std::string::npos) {
            std::lock_guard<std::mutex> lock(missing_mutex);
            missing().push_back(text);
        }
        return;
    }
    if (level >= ACL_ERROR) std::cerr << "torch_npu: " << line << std::endl;
}
}

namespace emulated {
EMULATED_EXPORT std::string missing_operators() {
    std::lock_guard<std::mutex> lock(missing_mutex);
    std::string text;
    const auto& names = missing();
    for (size_t i = names.size() > 4 ? names.size() - 4 : 0; i < names.size(); ++i) text += " " + names[i];
    return text;
}
}  // namespace emulated
