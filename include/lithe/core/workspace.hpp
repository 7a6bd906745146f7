#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "lithe/core/error.hpp"
#include "lithe/core/executor.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

struct aligned_delete {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using aligned_bytes = std::unique_ptr<std::byte[], aligned_delete>;
inline aligned_bytes allocate_aligned(std::size_t bytes) {
  return aligned_bytes(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
}

/// Blocks of memory, the same sizes for each of `stacks` stacks: where one stack needs another block, all get one. So what a loop needs
/// is there for every worker once any worker has run each piece, and nobody allocates because the pieces fell to others this time.
class blocks {
 public:
  explicit blocks(index_t stacks) : stacks_(stacks) {}

  [[nodiscard]] std::size_t count() const { return count_.load(std::memory_order_acquire); }
  [[nodiscard]] std::size_t size(std::size_t i) const { return list_[i].size; }
  [[nodiscard]] std::byte* data(std::size_t i, index_t stack) const { return list_[i].of[static_cast<std::size_t>(stack)].get(); }
  /// Adds a block that holds `bytes`, unless there are more than `known` blocks by now. From several threads at a time.
  void extend(std::size_t known, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    if (count() > known) return;
    block next{std::max({bytes, bytes_of_a_stack(), std::size_t{1} << 16}), {}};
    for (index_t i = 0; i < stacks_; ++i) next.of.push_back(allocate_aligned(next.size));
    list_[known] = std::move(next);
    count_.store(known + 1, std::memory_order_release);
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_of_a_stack() * static_cast<std::size_t>(stacks_); }

 private:
  struct block {
    std::size_t size = 0;
    std::vector<aligned_bytes> of;
  };
  [[nodiscard]] std::size_t bytes_of_a_stack() const {
    std::size_t n = 0;
    for (std::size_t i = 0; i < count(); ++i) n += list_[i].size;
    return n;
  }
  index_t stacks_;
  std::array<block, 48> list_;  // each at least as large as all before it, the first of 2^16 bytes: more than there are addresses
  std::atomic<std::size_t> count_{0};
  std::mutex mutex_;
};

/// Last in, first out memory of one worker. A request goes into the first block from the top on that has room for it: calls that have
/// found room once find it again, whatever blocks were added since.
class alignas(64) arena {
 public:
  struct mark {
    std::size_t block = 0, used = 0;
  };
  arena(blocks& from, index_t stack) : from_(&from), stack_(stack) {}

  std::byte* take(std::size_t bytes) {
    bytes = (bytes + 63) & ~std::size_t{63};
    for (;; top_ = {top_.block + 1, 0}) {
      if (top_.block == from_->count()) from_->extend(top_.block, bytes);
      if (top_.used + bytes <= from_->size(top_.block)) break;
    }
    std::byte* p = from_->data(top_.block, stack_) + top_.used;
    top_.used += bytes;
    return p;
  }
  [[nodiscard]] mark top() const { return top_; }
  void release(mark m) { top_ = m; }

 private:
  blocks* from_;
  index_t stack_;
  mark top_;
};

}  // namespace detail

/// Scratch memory of one calling thread and of the workers that run its loops: an arena each. It keeps what it once needed, so from the
/// second equal call on nothing is allocated, whichever worker runs which piece. Not to be shared by two threads that call layers at the
/// same time (they may share the executor, which then runs some loops where they were called).
class workspace {
 public:
  /// For loops run by `exec`.
  explicit workspace(const executor& exec = serial_executor)
      : outside_(std::make_unique<detail::blocks>(1)), inside_(std::make_unique<detail::blocks>(exec.workers())) {
    arenas_.emplace_back(*outside_, 0);
    for (index_t w = 0; w < exec.workers(); ++w) arenas_.emplace_back(*inside_, w);
  }

  /// The arena of executor::worker(): 0 outside of loops. Throws state_error when the workspace was made for an executor of fewer workers.
  [[nodiscard]] detail::arena& arena(index_t worker) {
    require<state_error>(worker < static_cast<index_t>(arenas_.size()), "workspace: made for ", arenas_.size() - 1,
                         " workers, used by worker ", worker, "; construct it with the executor that the context uses");
    return arenas_[static_cast<std::size_t>(worker)];
  }
  /// Bytes held for all workers.
  [[nodiscard]] std::size_t bytes() const { return outside_->bytes() + inside_->bytes(); }

 private:
  std::unique_ptr<detail::blocks> outside_, inside_;
  std::vector<detail::arena> arenas_;
};

}  // namespace lithe::inline LITHE_ABI
