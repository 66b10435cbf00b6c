// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace eplb {

// Calls work(i) for 0 <= i < items on up to `threads` threads, the caller's included, and rethrows the first exception.
// Any thread may take any item, so work(i) may change only data of item i.
template <typename Work>
void for_each_item(int items, int threads, const Work& work) {
    std::atomic<int> next{0};
    std::exception_ptr failure;
    std::mutex failure_lock;
    const auto loop = [&] {
        try {
            for (int i = next++; i < items; i = next++) work(i);
        } catch (...) {
            const std::lock_guard<std::mutex> guard(failure_lock);
            if (!failure) failure = std::current_exception();
            next = items;
        }
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < std::min(threads, items); ++i) {
        try {
            helpers.emplace_back(loop);
        } catch (...) {
            break;  // no further thread can be started: the running ones do the work
        }
    }
    loop();
    for (std::thread& helper : helpers) helper.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace eplb
