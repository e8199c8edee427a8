// Shares work among torch's threads.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "workspace.h"

namespace fastcss::cpu {

// A fork does not copy the threads that OpenMP keeps for this one: the child would wait for them for ever, so it works
// without threads.
inline thread_local bool has_threads = false, lost_threads = false;
inline const int at_fork = pthread_atfork(nullptr, nullptr, [] { lost_threads = has_threads; });

// Calls f(i) for every i < items, on torch's threads. Which thread takes which item is left open; no result depends on
// it. If any thread lacks memory, the calling thread throws, as it would without threads.
template <class F>
void parallel(int64_t items, const F& f) {
  const int64_t workers = lost_threads ? 1 : std::min<int64_t>(items, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
  has_threads = true;
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    const Call call;
    try {
      for (; first < last; ++first)
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
    } catch (const std::bad_alloc&) {
      no_memory = true;
      next = items;
    }
  });
  if (no_memory) throw std::bad_alloc();
}

// Calls f(b) for every image of a batch of images of N pixels. Large images follow each other, and `parallel` inside f
// shares out each of them. Small images are shared out themselves, and `parallel` inside f is a plain loop then.
template <class F>
void for_images(int64_t B, int64_t N, const F& f) {
  if (N <= 1024) return parallel(B, f);
  for (int64_t b = 0; b < B; ++b) f(b);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastcss::cpu
