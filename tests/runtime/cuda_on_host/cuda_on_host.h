// Runs a CUDA kernel on the host, one block after another: each thread of a block is a fiber of its own stack, which
// gives way where it waits for its warp or its block. Enough of the language for the kernels that hold no matrix product;
// slow, and with the arithmetic of the host's compiler. It finds wrong indices, wrong orders and missing barriers that
// a single block shows, and nothing of what blocks do to each other at the same time.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define alignas(bytes) __attribute__((aligned(bytes)))

struct Dim {
  unsigned x, y, z;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class State { ready, at_warp, at_block, done };
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  State state;
  bool begun;
  std::vector<char> stack;
};
static std::vector<Fiber> fibers;
static std::vector<uint64_t> slots;  // what lanes show each other
static unsigned current;
static jmp_buf scheduler;
static std::function<void()> kernel;

static void give_way(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}
static void enter() {
  kernel();
  give_way(State::done);
}
static void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
static bool release(unsigned first, unsigned end, State waiting) {  // those that wait, where all others are done
  bool some = false;
  for (unsigned i = first; i < end; i++) {
    if (fibers[i].state != waiting && fibers[i].state != State::done) return false;
    some |= fibers[i].state == waiting;
  }
  for (unsigned i = first; some && i < end; i++)
    if (fibers[i].state == waiting) fibers[i].state = State::ready;
  return some;
}
static void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready;
    fiber.begun = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  bool going = true;
  while (going) {
    going = false;
    for (unsigned first = 0; first < threads; first += 32) {
      const unsigned end = first + 32 < threads ? first + 32 : threads;
      do {
        for (unsigned i = first; i < end; i++)
          if (fibers[i].state == State::ready) resume(i);
      } while (release(first, end, State::at_warp));
    }
    going = release(0, threads, State::at_block);
  }
  for (unsigned i = 0; i < threads; i++)
    if (fibers[i].state != State::done) {
      std::fprintf(stderr, "thread %u waits for threads that went another way\n", i);
      std::abort();
    }
}
static void launch(Dim grid, unsigned threads, std::function<void()> call) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(64 << 10);
  slots.assign(threads, 0);
  kernel = std::move(call);
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        run_block(threads);
      }
}
// What lane `from` of the warp shows, all lanes showing something.
template <class T, class From> static T shown(T value, const From& from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  slots[threadIdx.x] = bits;
  give_way(State::at_warp);
  const uint64_t other = slots[threadIdx.x / 32 * 32 + from(threadIdx.x % 32)];
  give_way(State::at_warp);
  T result;
  std::memcpy(&result, &other, sizeof result);
  return result;
}

}  // namespace host

static inline void __syncthreads() { host::give_way(host::State::at_block); }
static inline void __syncwarp() { host::give_way(host::State::at_warp); }
static inline int __syncthreads_count(bool holds) {
  host::slots[threadIdx.x] = holds;
  __syncthreads();
  int count = 0;
  for (unsigned i = 0; i < blockDim.x; i++) count += (int)host::slots[i];
  __syncthreads();
  return count;
}
static inline void __threadfence() {}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return host::shown(value, [=](unsigned lane) { return lane ^ mask; });
}
template <class T> static inline T __shfl_up_sync(unsigned, T value, unsigned by) {
  return host::shown(value, [=](unsigned lane) { return lane < by ? lane : lane - by; });
}
template <class T> static inline T __shfl_sync(unsigned, T value, int from) {
  return host::shown(value, [=](unsigned) { return (unsigned)from % 32; });
}
static inline unsigned __ballot_sync(unsigned, bool holds) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; lane++) all |= (unsigned)__shfl_sync(~0u, (int)holds, lane) << lane;
  return all;
}
template <class T> static inline T __ldcg(const T* place) { return *place; }
template <class T> static inline T __ldg(const T* place) { return *place; }
template <class T, class U> static inline T atomicAdd(T* place, U value) { const T old = *place; *place += value; return old; }
static inline int atomicMax(int* place, int value) { const int old = *place; if (value > old) *place = value; return old; }
template <class T> static inline T atomicMin(T* place, T value) { const T old = *place; if (value < old) *place = value; return old; }
template <class To, class From> static inline To same_bits(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From), "size");
  std::memcpy(&result, &value, sizeof result);
  return result;
}
static inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static inline float __int_as_float(int x) { return same_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }
