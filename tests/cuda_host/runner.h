// Runs CUDA kernels on the host, one block after the other: a block's threads are fibers that take turns, switching at
// every barrier and warp shuffle. g++ -include puts this before a .cu file, where it stands in for the launch, the
// thread numbers, shared memory and the shuffles, and for nothing else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
inline unsigned cuda_host_launches = 0;  // of kernels
}

namespace cuda_host {

constexpr size_t kStack = 64 << 10;
constexpr int kLanes = 32;

// Where a fiber goes on. ucontext makes the first entry; later ones jump, which spares a system call each, but which
// the address sanitizer does not follow.
struct Context {
  ucontext_t start;
  jmp_buf point;
  bool entered = false;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool running = false;
  unsigned shuffles = 0;
  char offered[2][8];  // to shuffles, in turn: a lane may offer its next value before all have read this one
};

inline std::deque<Fiber> fibers;  // grows to the largest block; fibers live on from block to block
inline Context scheduler;
inline int n_threads, current;
inline unsigned arrived, barriers;  // at this barrier; barriers passed
inline std::function<void()> body;
inline uint3 block_index;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_host: %s (block %u %u, thread %d)\n", what, block_index.x, block_index.y, current);
  abort();
}

// Address sanitizer has to know which stack is in use.
inline void swap(Context& from, Context& to, const void* stack, size_t size, const void** old, size_t* old_size) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack, size);
  swapcontext(&from.start, &to.start);
  __sanitizer_finish_switch_fiber(fake_stack, old, old_size);
#else
  (void)stack, (void)size, (void)old, (void)old_size;
  if (_setjmp(from.point) != 0) return;
  from.entered = true;
  if (to.entered) _longjmp(to.point, 1);
  setcontext(&to.start);
#endif
}

inline const void* scheduler_stack;
inline size_t scheduler_stack_size;

inline void yield() {
  swap(fibers[current].context, scheduler, scheduler_stack, scheduler_stack_size, &scheduler_stack,
       &scheduler_stack_size);
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    body();
    fibers[current].running = false;
    yield();
  }
}

inline void run_block() {
  while ((int)fibers.size() < n_threads) {
    Fiber& fiber = fibers.emplace_back();
    ucontext_t& start = fiber.context.start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.get();
    start.uc_stack.ss_size = kStack;
    makecontext(&start, fiber_main, 0);
  }
  for (int i = 0; i < n_threads; ++i) fibers[i].running = true;
  arrived = 0;
  // Each round takes every thread to its next switching point, so the lanes of a warp stay together.
  for (int left = n_threads; left > 0;) {
    left = 0;
    for (current = 0; current < n_threads; ++current) {
      Fiber& fiber = fibers[current];
      if (!fiber.running) continue;
      swap(scheduler, fiber.context, fiber.stack.get(), kStack, nullptr, nullptr);
      left += fiber.running;
    }
    if (left > 0 && left < n_threads && arrived == (unsigned)left) fail("a barrier that not all threads reach");
  }
}

inline void barrier() {
  const unsigned passed = barriers;
  if (++arrived == (unsigned)n_threads) {
    arrived = 0;
    ++barriers;
  }
  do yield();
  while (barriers == passed);
}

template <class X>
X shuffle_xor(X x, int mask) {
  static_assert(sizeof(X) <= 8, "a register or two");
  Fiber& mine = fibers[current];
  Fiber& other = fibers[current / kLanes * kLanes + ((current % kLanes) ^ mask)];
  const unsigned turn = mine.shuffles++ % 2;
  memcpy(mine.offered[turn], &x, sizeof x);
  yield();
  if (other.shuffles - mine.shuffles > 1) fail("a shuffle that not all lanes reach");
  memcpy(&x, other.offered[turn], sizeof x);
  return x;
}

template <class Kernel, class... Args>
int launch(Kernel* kernel, dim3 blocks, int threads, void*, Args... args) {
  ++cuda_host_launches;
  n_threads = threads;
  body = [=] { kernel(args...); };
  for (block_index.y = 0; block_index.y < blocks.y; ++block_index.y)
    for (block_index.x = 0; block_index.x < blocks.x; ++block_index.x) run_block();
  return 0;
}

inline uint3 thread_index() { return uint3{(unsigned)current, 0, 0}; }

}  // namespace cuda_host

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx cuda_host::thread_index()
#define blockIdx cuda_host::block_index
#define __syncthreads cuda_host::barrier
#define __shfl_xor_sync(lanes, x, mask) cuda_host::shuffle_xor(x, mask)
#define DPO_FAST_LAUNCH(...) cuda_host::launch(__VA_ARGS__)
