#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
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
/// found room once find it again, whatever blocks were added since. While anything is taken, it belongs to the thread that took it.
class alignas(64) arena {
 public:
  struct mark {
    std::size_t block = 0, used = 0;
    bool operator==(const mark&) const = default;
  };
  struct taken {
    std::byte* data;
    mark before;  // what release() asks for
  };
  arena(blocks& from, index_t stack) : from_(&from), stack_(stack) {}
  arena(arena&& other) noexcept : from_(other.from_), stack_(other.stack_), top_(other.top_) {}  // for the vector, which owns all or none

  /// Throws state_error while another thread holds memory of this arena.
  taken take(std::size_t bytes) {
    own();
    const mark before = top_;
    bytes = (std::max<std::size_t>(bytes, 1) + 63) & ~std::size_t{63};  // of no bytes too: `before` tells the first from the others
    try {
      for (;; top_ = {top_.block + 1, 0}) {
        if (top_.block == from_->count()) from_->extend(top_.block, bytes);
        if (top_.used + bytes <= from_->size(top_.block)) break;
      }
    } catch (...) {
      release(before);
      throw;
    }
    std::byte* p = from_->data(top_.block, stack_) + top_.used;
    top_.used += bytes;
    return {p, before};
  }
  void release(mark before) {
    top_ = before;
    if (before == mark{}) owner_.store({}, std::memory_order_release);
  }

 private:
  void own() {
    const auto here = std::this_thread::get_id();
    if (owner_.load(std::memory_order_relaxed) == here) return;
    std::thread::id nobody;
    require<state_error>(owner_.compare_exchange_strong(nobody, here, std::memory_order_acquire),
                         "workspace: used by two threads at the same time; a workspace belongs to one caller at a time");
  }
  blocks* from_;
  index_t stack_;
  mark top_;
  std::atomic<std::thread::id> owner_{};  // nobody while nothing is taken
};

}  // namespace detail

/// Scratch memory of one calling thread and of the workers that run its loops: an arena each. It keeps what it once needed, so from the
/// second equal call on nothing is allocated, whichever worker runs which piece.
///
/// A workspace belongs to one caller at a time: threads that call layers at the same time need one each, or get a state_error from the
/// call that finds memory in use (they may share the executor, which then runs some loops where they were called). It may be handed from
/// thread to thread between calls.
class workspace {
 public:
  /// For loops run by `exec`.
  explicit workspace(const executor& exec = serial_executor)
      : outside_(std::make_unique<detail::blocks>(1)), inside_(std::make_unique<detail::blocks>(exec.workers())) {
    arenas_.emplace_back(*outside_, 0);
    for (index_t w = 0; w < exec.workers(); ++w) arenas_.emplace_back(*inside_, w);
  }

  /// The arena of executor::worker(): 0 outside of loops. Throws state_error when the workspace was made for an executor of fewer workers,
  /// or moved to another one.
  [[nodiscard]] detail::arena& arena(index_t worker) {
    require<state_error>(!arenas_.empty(), "workspace: its memory was moved to another workspace");
    require<state_error>(worker < static_cast<index_t>(arenas_.size()), "workspace: made for ", arenas_.size() - 1,
                         " workers, used by worker ", worker, "; construct it with the executor that the context uses");
    return arenas_[static_cast<std::size_t>(worker)];
  }
  /// Bytes held for all workers.
  [[nodiscard]] std::size_t bytes() const { return arenas_.empty() ? 0 : outside_->bytes() + inside_->bytes(); }

 private:
  std::unique_ptr<detail::blocks> outside_, inside_;
  std::vector<detail::arena> arenas_;
};

}  // namespace lithe::inline LITHE_ABI
