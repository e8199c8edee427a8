// Work sharing on torch's threads, and memory that is kept from call to call.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "pack.h"

namespace fastcss::cpu {

// A fork leaves behind the threads that OpenMP keeps for this one: the child would wait for them for ever, and does
// without.
inline thread_local bool has_threads = false, lost_threads = false;
inline const int at_fork = pthread_atfork(nullptr, nullptr, [] { lost_threads = has_threads; });

// f(i) for every i < items, on torch's threads. Which thread takes which item is left open; no result depends on it.
template <class F>
void parallel(int64_t items, const F& f) {
  const int64_t workers = lost_threads ? 1 : std::min<int64_t>(items, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
  has_threads = true;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
  });
}

// f(b) for every image of a batch of images of N pixels. Large images follow each other, and `parallel` inside f shares
// out each of them; small ones are shared out themselves, and then `parallel` inside f is a loop.
template <class F>
void for_images(int64_t B, int64_t N, const F& f) {
  if (N <= 1024) return parallel(B, f);
  for (int64_t b = 0; b < B; ++b) f(b);
}

// A buffer that a thread keeps from call to call: no page faults after the first. Large ones are given back. Under
// AddressSanitizer each call gets one of its own size, or no step beyond it would show.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  float* get(int64_t floats) {
    floats += kLanes;  // pack() stores whole vectors
    if (floats > size_ || kStep == kLanes) {
      std::free(data_);
      size_ = (floats + kStep - 1) / kStep * kStep;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }
  void trim() {
    if (size_ * sizeof(float) <= kKept) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kStep = kLanes;
#else
  static constexpr int64_t kStep = 1024;
#endif
  static constexpr size_t kKept = size_t{64} << 20;
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// What one call's threads share, owned by the calling thread; and what each of them has for itself.
inline thread_local Workspace shared_workspace, local_workspace;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastcss::cpu
