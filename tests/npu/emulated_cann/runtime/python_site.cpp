// SPDX-License-Identifier: Apache-2.0
// Call sites in reports: the Python stack of the calling thread, read through CPython's stable functions, which are
// looked up at run time so that the library also loads into a process without Python.
#include <dlfcn.h>

#include <cstring>
#include <sstream>

#include "emulator.h"

namespace emulated {
namespace {

struct Python {
    int (*initialized)() = nullptr;
    int (*finalizing)() = nullptr;
    void* (*this_thread_state)() = nullptr;
    int (*ensure)() = nullptr;
    void (*release)(int) = nullptr;
    void* (*current_frame)() = nullptr;
    void* (*back)(void*) = nullptr;
    void* (*code)(void*) = nullptr;
    int (*line)(void*) = nullptr;
    void* (*attribute)(void*, const char*) = nullptr;
    const char* (*utf8)(void*) = nullptr;
    void (*decref)(void*) = nullptr;
    void (*incref)(void*) = nullptr;
    bool usable = false;

    template <typename Function>
    bool load(Function& target, const char* name) {
        target = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
        return target != nullptr;
    }

    Python() {
        usable = load(initialized, "Py_IsInitialized") && load(this_thread_state, "PyGILState_GetThisThreadState") &&
                 load(ensure, "PyGILState_Ensure") && load(release, "PyGILState_Release") &&
                 load(current_frame, "PyEval_GetFrame") && load(back, "PyFrame_GetBack") &&
                 load(code, "PyFrame_GetCode") && load(line, "PyFrame_GetLineNumber") &&
                 load(attribute, "PyObject_GetAttrString") && load(utf8, "PyUnicode_AsUTF8") &&
                 load(decref, "Py_DecRef") && load(incref, "Py_IncRef");
        if (!load(finalizing, "Py_IsFinalizing")) load(finalizing, "_Py_IsFinalizing");
    }
};

}  // namespace

std::string python_site() {
    static const Python python;
    // Only threads that Python already knows: the device's own threads have no Python frames.
    if (!python.usable || !python.initialized() || (python.finalizing && python.finalizing()) ||
        !python.this_thread_state()) {
        return "";
    }
    int state = python.ensure();
    std::ostringstream site;
    void* frame = python.current_frame();  // borrowed
    if (frame) python.incref(frame);
    int shown = 0;
    for (int depth = 0; frame && depth < 40 && shown < 4; ++depth) {
        void* code = python.code(frame);
        void* name = python.attribute(code, "co_filename");
        const char* file = name ? python.utf8(name) : nullptr;
        // Frames inside torch say little about who forgot to wait; the first frame is always shown.
        bool inner = file && (std::strstr(file, "/torch/") || std::strstr(file, "/torch_npu/"));
        if (file && (!inner || depth == 0)) {
            void* function = python.attribute(code, "co_name");
            const char* in = function ? python.utf8(function) : nullptr;
            site << (shown ? " < " : "") << file << ":" << python.line(frame) << " in " << (in ? in : "?");
            if (function) python.decref(function);
            ++shown;
        }
        if (name) python.decref(name);
        python.decref(code);
        void* outer = python.back(frame);
        python.decref(frame);
        frame = outer;
    }
    if (frame) python.decref(frame);
    python.release(state);
    return site.str();
}

}  // namespace emulated
