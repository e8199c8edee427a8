// Keeps memory from call to call, and gives large pieces of it back when an op ends.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <utility>

#include "vectors.h"

namespace fastcss::cpu {

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

}  // namespace fastcss::cpu
