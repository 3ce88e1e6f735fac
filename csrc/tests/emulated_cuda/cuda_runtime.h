// Enough of the CUDA runtime to run a kernel's logic on the CPU, for the C++ tests. Each CUDA
// thread is a fiber. Between two barriers the fibers of a block run in a random order, and blocks
// do, so that most missing barriers show as wrong results; a barrier that only some threads reach
// ends the program. It shows wrong indices and missing writes too (the sanitizers see every
// access); it cannot show speed.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#define DETKIT_EMULATED_CUDA
#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }

// A small device of compute capability 8.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 8;
  return 0;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <class T>
T atomicAdd(T* to, T value) {
  return std::exchange(*to, *to + value);
}

namespace emulated {

constexpr size_t kWarp = 32;

// What a lane brings to a warp's collective operation.
using Contribution = std::array<unsigned char, 64>;

inline uint32_t next_random() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

class Block {
 public:
  Block(dim3 threads, std::function<void()> body)
      : threads_(threads), body_(std::move(body)), fibers_(threads.x * threads.y * threads.z) {
    while (stacks().size() < fibers_.size()) stacks().emplace_back(new char[kStackBytes]);
  }

  // Runs all threads until they have returned.
  void run(dim3 block) {
    current_ = this;
    blockIdx = block;
    groups_.assign(1 + (fibers_.size() + kWarp - 1) / kWarp, Group());
    ready_.resize(fibers_.size());
    std::iota(ready_.begin(), ready_.end(), size_t(0));
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.copies = {};
      for (const size_t g : {size_t(0), warp_group(i)}) ++groups_[g].live;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks()[i].get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    while (!ready_.empty()) {
      std::swap(ready_[next_random() % ready_.size()], ready_.back());
      active_ = ready_.back();
      ready_.pop_back();
      const size_t i = active_;
      threadIdx = dim3(i % threads_.x, i / threads_.x % threads_.y, i / threads_.x / threads_.y);
      swapcontext(&scheduler_, &fibers_[i].context);
      if (!fibers_[i].done) continue;
      for (const size_t g : {size_t(0), warp_group(i)}) {
        --groups_[g].live;
        release(groups_[g]);
      }
    }
    if (groups_[0].live != 0) {
      std::fprintf(stderr, "emulated CUDA: %zu threads wait at a barrier that others miss\n",
                   groups_[0].live);
      std::abort();
    }
  }

  // The barrier of the block; true if `condition` holds for any of its threads.
  static bool wait_block(bool condition = false) {
    Group& group = current_->groups_[0];
    const size_t round = group.round % 2;
    group.any[round] |= condition;
    current_->wait(group);
    return group.any[round];
  }

  // The barrier of the warp; returns what each lane brought. Lanes that have returned bring zeros.
  template <class T>
  static std::array<T, kWarp> exchange(const T& mine) {
    static_assert(sizeof(T) <= sizeof(Contribution));
    Block& block = *current_;
    Group& group = block.groups_[warp_group(block.active_)];
    const size_t round = group.round % 2;
    std::memcpy(group.brought[round][block.active_ % kWarp].data(), &mine, sizeof(T));
    block.wait(group);
    std::array<T, kWarp> all{};
    for (size_t lane = 0; lane < kWarp; ++lane) {
      std::memcpy(&all[lane], group.brought[round][lane].data(), sizeof(T));
    }
    return all;
  }

  static size_t lane() { return current_->active_ % kWarp; }

  // Asynchronous copies of the running thread; nothing is written before it waits for them.
  struct Copies {
    std::vector<std::vector<std::function<void()>>> groups;
    std::vector<std::function<void()>> open;
  };
  static Copies& copies() { return current_->fibers_[current_->active_].copies; }

 private:
  static constexpr size_t kStackBytes = 1 << 16;

  struct Fiber {
    ucontext_t context;
    Copies copies;
    bool done = false;
  };

  struct Group {  // of threads that meet at a barrier; a thread is at most one round ahead
    size_t live = 0, round = 0;
    std::vector<size_t> waiting;
    std::array<bool, 2> any{};
    std::array<std::array<Contribution, kWarp>, 2> brought{};
  };

  static size_t warp_group(size_t thread) { return 1 + thread / kWarp; }

  void wait(Group& group) {
    group.waiting.push_back(active_);
    const size_t self = active_;
    release(group);
    swapcontext(&fibers_[self].context, &scheduler_);
  }

  void release(Group& group) {
    if (group.live == 0 || group.waiting.size() < group.live) return;
    ready_.insert(ready_.end(), group.waiting.begin(), group.waiting.end());
    group.waiting.clear();
    ++group.round;
    group.any[group.round % 2] = false;
    for (auto& lane : group.brought[group.round % 2]) lane.fill(0);
  }

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
  std::vector<Group> groups_;  // the block, then its warps
  std::vector<size_t> ready_;
  ucontext_t scheduler_;
  size_t active_ = 0;
};

// What `kernel<<<grid, threads, shared_bytes, stream>>>(...)` becomes.
inline void launch(dim3 grid, dim3 threads, std::function<void()> body) {
  blockDim = threads;
  gridDim = grid;
  Block block(threads, std::move(body));
  std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t(0));
  for (size_t left = order.size(); left > 0; --left) {
    std::swap(order[next_random() % left], order[left - 1]);
    const size_t i = order[left - 1];
    block.run(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y));
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::wait_block(); }
inline int __syncthreads_or(int condition) { return emulated::Block::wait_block(condition != 0); }

inline unsigned __ballot_sync(unsigned, bool condition) {
  const auto all = emulated::Block::exchange<unsigned char>(condition);
  unsigned bits = 0;
  for (size_t lane = 0; lane < all.size(); ++lane) bits |= unsigned(all[lane] != 0) << lane;
  return bits;
}
