// Shares work among torch's threads, and keeps memory from call to call.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <utility>

#include "pack.h"

namespace fastcss::cpu {

// A fork does not copy the threads that OpenMP keeps for this one: the child would wait for them for ever, so it works
// without threads.
inline thread_local bool has_threads = false, lost_threads = false;
inline const int at_fork = pthread_atfork(nullptr, nullptr, [] { lost_threads = has_threads; });

// A thread keeps this buffer from call to call, so that there are no page faults after the first. AddressSanitizer gets
// a new buffer of the exact size for each use; it would not see a step beyond the end otherwise.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  // May be called only inside of a Call, whose end frees large buffers.
  float* get(int64_t floats);
  void trim() {
    if (size_ * sizeof(float) > kKept) release();
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kStep = kLanes;
#else
  static constexpr int64_t kStep = 1024;
#endif
  static constexpr size_t kKept = size_t{64} << 20;
  static constexpr int64_t kMost = int64_t{1} << 60;  // floats: more bytes would not fit an int64_t
  void release() {
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// The calling thread owns the first, which all threads of a call share, and the second, another of that kind for the
// maps of an op that is made of other ops. The third is each thread's own.
inline thread_local Workspace shared_workspace, map_workspace, local_workspace;

// Marks a thread's part in an op. When the outermost Call ends, also by an error, the thread frees its large
// workspaces.
class Call {
 public:
  Call() { ++depth_; }
  ~Call() {
    if (--depth_ == 0) shared_workspace.trim(), map_workspace.trim(), local_workspace.trim();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  static bool is_open() { return depth_ > 0; }

 private:
  static inline thread_local int depth_ = 0;
};

inline float* Workspace::get(int64_t floats) {
  if (!Call::is_open()) throw std::logic_error("fastcss: a workspace is used outside of an op (see FASTCSS_BOX)");
  floats += kLanes;  // pack() stores whole vectors
  if (floats > size_ || kStep == kLanes) {
    release();
    if (floats > kMost) throw std::bad_alloc();
    const int64_t size = (floats + kStep - 1) / kStep * kStep;
    data_ = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = size;  // set only once the memory is there, as the next call relies on it
  }
  return data_;
}

// Runs an op inside a Call on the thread that calls it.
template <auto OP>
struct Op;
template <class R, class... Args, R (*OP)(Args...)>
struct Op<OP> {
  static R run(Args... args) {
    const Call call;
    return OP(std::forward<Args>(args)...);
  }
};
#define FASTCSS_BOX(op) TORCH_BOX(&fastcss::cpu::Op<(op)>::run)

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
