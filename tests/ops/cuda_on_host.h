// Enough of CUDA to run a kernel's own source on the host, one block after another.
//
// Each thread of a block is a fiber that runs until the next __syncthreads, where the following one takes over; so a
// missing barrier shows as a difference between ascending and descending order. A block whose threads meet different
// numbers of barriers is an error.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct Index {
  int x, y, z;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

static Index threadIdx, blockIdx;
using std::max;
using std::min;

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline int __float_as_int(float v) {
  int bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float __int_as_float(int bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
  return c;
}

inline int atomicMax(int* at, int value) {
  const int before = *at;
  *at = std::max(before, value);
  return before;
}

namespace host {

constexpr int kThreads = 256, kStack = 1 << 16;
static ucontext_t scheduler, fibers[kThreads];
static std::vector<char> stacks(static_cast<size_t>(kThreads) * kStack);
static bool finished[kThreads];
static void (*kernel)(void**);
static void** arguments;

static void fiber_main(int i) {
  kernel(arguments);
  finished[i] = true;
  swapcontext(&fibers[i], &scheduler);
}

// Runs one block. Returns false when its threads disagree about a barrier.
static bool run_block(bool descending) {
  for (int i = 0; i < kThreads; ++i) {
    finished[i] = false;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = &stacks[static_cast<size_t>(i) * kStack];
    fibers[i].uc_stack.ss_size = kStack;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], reinterpret_cast<void (*)()>(fiber_main), 1, i);
  }
  for (;;) {
    for (int n = 0; n < kThreads; ++n) {
      const int i = descending ? kThreads - 1 - n : n;
      threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i]);
    }
    const auto done = std::count(finished, finished + kThreads, true);
    if (done == kThreads) return true;
    if (done > 0) return false;
  }
}

template <class... A, size_t... I>
void spread(void (*f)(A...), void** args, std::index_sequence<I...>) {
  f(*static_cast<A*>(args[I])...);
}

template <class... A>
void call(void (*f)(A...), void** args) {
  spread(f, args, std::index_sequence_for<A...>{});
}

}  // namespace host

inline void __syncthreads() { swapcontext(&host::fibers[threadIdx.x], &host::scheduler); }

#include CUDA_SOURCE

#define KERNEL(name) \
  { #name, [](void** a) { host::call(name, a); } }

// Returns 0, 1 for an unknown kernel, 2 for threads that disagree about a barrier.
extern "C" int run_on_host(const char* name, int grid_x, int grid_y, void** arguments, int descending) {
  static const std::map<std::string, void (*)(void**)> kernels = {
      KERNEL(quantise_rows), KERNEL(gradient_rows), KERNEL(column_largest), KERNEL(gradient_columns),
      KERNEL(transpose_bytes), KERNEL(gemm_one), KERNEL(gemm_two),
  };
  const auto found = kernels.find(name);
  if (found == kernels.end()) return 1;
  host::kernel = found->second;
  host::arguments = arguments;
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) {
      blockIdx = {x, y, 0};
      if (!host::run_block(descending != 0)) return 2;
    }
  return 0;
}
