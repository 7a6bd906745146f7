#pragma once

#include <memory>
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

/// Last in, first out memory of one worker. Grows by blocks; when it is empty again, several blocks become one, so from the second
/// equal call on nothing is allocated.
class arena {
 public:
  struct mark {
    std::size_t block = 0, used = 0;
  };
  std::byte* take(std::size_t bytes) {
    bytes = (bytes + 63) & ~std::size_t{63};
    while (top_.block < blocks_.size() && top_.used + bytes > blocks_[top_.block].size) top_ = {top_.block + 1, 0};
    if (top_.block == blocks_.size()) {
      const std::size_t size = std::max({bytes, total(), std::size_t{1} << 16});
      blocks_.push_back({allocate_aligned(size), size});
    }
    std::byte* p = blocks_[top_.block].data.get() + top_.used;
    top_.used += bytes;
    return p;
  }
  [[nodiscard]] mark top() const { return top_; }
  void release(mark m) {
    top_ = m;
    if (m.block == 0 && m.used == 0 && blocks_.size() > 1) {
      const std::size_t size = total();
      blocks_.clear();
      blocks_.push_back({allocate_aligned(size), size});
    }
  }
  [[nodiscard]] std::size_t total() const {
    std::size_t n = 0;
    for (const auto& b : blocks_) n += b.size;
    return n;
  }

 private:
  struct block {
    aligned_bytes data;
    std::size_t size;
  };
  std::vector<block> blocks_;
  mark top_;
};

}  // namespace detail

/// Scratch memory of one calling thread and of the workers that run its loops: an arena each. It keeps what it once needed, so a
/// model that sees the same shapes again allocates nothing. Not to be shared by two threads that call layers at the same time.
class workspace {
 public:
  /// For loops run by `exec`; throws nothing.
  explicit workspace(const executor& exec = serial_executor) : arenas_(static_cast<std::size_t>(exec.workers())) {}

  /// The arena of one worker. Throws state_error when the workspace was made for an executor of fewer workers.
  [[nodiscard]] detail::arena& arena(index_t worker) {
    require<state_error>(worker < static_cast<index_t>(arenas_.size()), "workspace: made for ", arenas_.size(),
                         " workers, used by worker ", worker, "; construct it with the executor that the context uses");
    return arenas_[static_cast<std::size_t>(worker)];
  }
  /// Bytes held for all workers.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t n = 0;
    for (const auto& a : arenas_) n += a.total();
    return n;
  }

 private:
  std::vector<detail::arena> arenas_;
};

}  // namespace lithe::inline LITHE_ABI
