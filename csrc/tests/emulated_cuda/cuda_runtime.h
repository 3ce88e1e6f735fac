// Enough of the CUDA runtime to run a kernel's logic on the CPU, for the C++ tests. Each CUDA
// thread is a fiber; a block's fibers take turns at __syncthreads, blocks run one after another. It
// shows wrong results, wrong indices and missing writes (the sanitizers see every access); it
// cannot show races or speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int __ffsll(long long value) { return __builtin_ffsll(value); }

template <class T>
T atomicAdd(T* to, T value) {
  return std::exchange(*to, *to + value);
}

namespace emulated {

class Block {
 public:
  Block(dim3 threads, std::function<void()> body)
      : threads_(threads), body_(std::move(body)), fibers_(threads.x * threads.y * threads.z) {
    while (stacks().size() < fibers_.size()) stacks().emplace_back(new char[kStackBytes]);
  }

  // Runs all threads from one __syncthreads to the next, until all have returned.
  void run(dim3 block) {
    current_ = this;
    blockIdx = block;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks()[i].get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (size_t left = fibers_.size(); left > 0;) {
      for (size_t i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i].done) continue;
        active_ = i;
        threadIdx = dim3(i % threads_.x, i / threads_.x % threads_.y, i / threads_.x / threads_.y);
        swapcontext(&scheduler_, &fibers_[i].context);
        left -= fibers_[i].done;
      }
    }
  }

  static void wait() {
    swapcontext(&current_->fibers_[current_->active_].context, &current_->scheduler_);
  }

 private:
  static constexpr size_t kStackBytes = 1 << 16;

  struct Fiber {
    ucontext_t context;
    bool done = false;
  };

  // Kept between launches: a large block's stacks take long to allocate.
  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static std::vector<std::unique_ptr<char[]>> all;
    return all;
  }

  static void enter() {
    current_->body_();
    current_->fibers_[current_->active_].done = true;
  }

  inline static Block* current_ = nullptr;
  dim3 threads_;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  size_t active_ = 0;
};

// What `kernel<<<grid, threads, shared_bytes, stream>>>(...)` becomes.
inline void launch(dim3 grid, dim3 threads, std::function<void()> body) {
  blockDim = threads;
  gridDim = grid;
  Block block(threads, std::move(body));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) block.run(dim3(x, y, z));
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::wait(); }
