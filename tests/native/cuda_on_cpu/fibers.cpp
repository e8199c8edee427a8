// The fibers behind cuda_runtime.h of this folder, and a launch by name for callers that have no compiler.
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "numeric.cuh"

extern char __start_cuda_shared[] __attribute__((visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((visibility("hidden")));

namespace cuda_on_cpu {

Block current;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMostThreads = 1024;

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  bool begun, ended;
};

struct Meeting {  // of a warp's lanes or of a block's threads
  const char* what = nullptr;
  unsigned arrived = 0, ended = 0, size = 0;
  unsigned long generation = 0;
  unsigned words[2][kMostThreads];
};

const std::unique_ptr<char[]> stacks(new char[kMostThreads * kStack]);  // untouched, and so not yet in memory
std::vector<Fiber> fibers(kMostThreads);
std::vector<Meeting> warps(kMostThreads / kWarp);
Meeting whole;
jmp_buf scheduler;
const std::function<void()>* body;
std::string failure;
bool progress;
int order;  // 0: ascending, 1: descending, others: shuffled with that seed

// _setjmp and _longjmp leave the signal mask alone, which takes swapcontext two system calls a turn.
void yield() {
  if (_setjmp(fibers[current.thread.x].place) == 0) _longjmp(scheduler, 1);
  if (!failure.empty()) throw std::runtime_error("stopped");
}

const unsigned* meet(Meeting& m, const char* what, unsigned place, unsigned word) {
  if (m.arrived && std::strcmp(m.what, what) != 0)
    throw std::runtime_error(std::string(what) + " in one thread, " + m.what + " in another");
  if (m.ended) throw std::runtime_error(std::string(what) + " waits for a thread that has ended");
  m.what = what;
  const unsigned long generation = m.generation;
  unsigned* words =
      m.words[generation % 2];  // the next meeting has the other half; all have read this by the one after
  words[place] = word;
  progress = true;
  if (++m.arrived == m.size)
    m.arrived = 0, ++m.generation;
  else
    while (m.generation == generation) yield();
  return words;
}

void end(Meeting& m) {
  ++m.ended;
  if (m.arrived) throw std::runtime_error(std::string("a thread ends while others wait in ") + m.what);
}

void enter() {
  const unsigned own = current.thread.x;
  try {
    (*body)();
    end(warps[own / kWarp]);
    end(whole);
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
  fibers[own].ended = progress = true;
  _longjmp(scheduler, 1);
}

// The fiber until it waits or ends. Not inlined: no variable of the caller is touched between _setjmp and _longjmp.
__attribute__((noinline)) void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

// Each lane until it waits, in the order of the warps; returns how many have ended.
unsigned resume_warp(unsigned warp) {
  unsigned ended = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned i = warp * kWarp + (order == 1 ? kWarp - 1 - lane : lane);
    current.thread = dim3(i, 0, 0);
    if (!fibers[i].ended) resume(fibers[i]);
    ended += fibers[i].ended;
  }
  return ended;
}

// A warp goes on until all of it waits for others, which lie behind by all that it did: what it overwrites before they
// have read it, or reads before they have written it, shows.
void run_block(unsigned threads) {
  std::memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);  // NaN
  whole.arrived = whole.ended = 0, whole.size = threads;
  for (auto& warp : warps) warp.arrived = warp.ended = 0, warp.size = kWarp;
  std::vector<unsigned> turns(threads / kWarp);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  if (order > 1) std::shuffle(turns.begin(), turns.end(), std::minstd_rand(order + current.block.x));
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.begun = fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.get() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true; left;) {
    bool moved = left = false;
    for (const unsigned warp : turns) {
      do {
        progress = false;
        const unsigned ended = resume_warp(warp);
        left |= ended < kWarp;
        moved |= progress;
      } while (progress);
    }
    if (left && !moved && failure.empty()) failure = "every thread waits for another";
  }
}

}  // namespace

void wait_block() { meet(whole, "syncthreads", threadIdx.x, 0); }

const unsigned* wait_warp(const char* what, unsigned word) {
  return meet(warps[threadIdx.x / kWarp], what, threadIdx.x % kWarp, word);
}

void run(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  if (threads % kWarp || threads > kMostThreads) throw std::runtime_error("threads must be whole warps, at most 32");
  body = &kernel, failure.clear();
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && failure.empty(); ++x) {
        current.block = dim3(x, y, z);
        run_block(threads);
      }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace cuda_on_cpu

int __syncthreads_and(int predicate) {
  using namespace cuda_on_cpu;
  const unsigned* words = meet(whole, "syncthreads_and", threadIdx.x, predicate != 0);
  return std::all_of(words, words + whole.size, [](unsigned word) { return word != 0; });
}

namespace fastcss::cuda {

float to_float(f16 x) { return cuda_on_cpu::bits<_Float16>(x.bits); }
f16 to_half(float x) { return {cuda_on_cpu::bits<unsigned short>(static_cast<_Float16>(x))}; }
bf16 to_bfloat(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace fastcss::cuda

extern "C" {

// There is no device to make current, and no stream.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }

void set_order(int value) { cuda_on_cpu::order = value; }

// Does what a driver does: it finds the kernel by its name and passes its parameters as bytes. g++ has two conventions
// for a struct of more than 16 bytes, a copy on the stack and a pointer to one. Both work for a longer struct that
// begins with the same bytes.
const char* launch(const char* name, const unsigned* grid, unsigned threads, const void* params, size_t size) {
  struct Bytes {
    char at[512];
  } bytes{};
  static std::string error;
  Dl_info library;
  dladdr(reinterpret_cast<void*>(&set_order), &library);
  void* found = dlsym(dlopen(library.dli_fname, RTLD_NOW), name);
  if (!found) return "no such kernel";
  if (size > sizeof bytes.at) return "too many parameters";
  std::memcpy(bytes.at, params, size);
  try {
    cuda_on_cpu::run(dim3(grid[0], grid[1], grid[2]), threads,
                     [&] { reinterpret_cast<void (*)(Bytes)>(found)(bytes); });
  } catch (const std::exception& thrown) {
    return (error = thrown.what()).c_str();
  }
  return nullptr;
}
}
