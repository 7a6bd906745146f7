#pragma once

#include "lithe/core/context.hpp"
#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

/// Uninitialised memory for the length of a scope: from the arena of the calling worker, or from the heap if the context has no
/// workspace. Reads as a `matrix_view<S>` [rows x cols] (rows follow one another, start aligned to 64 bytes) or as a span.
template <class S>
class scratch {
  static_assert(std::is_trivially_destructible_v<S>);

 public:
  scratch(const context& ctx, index_t rows, index_t cols) : rows_(rows), cols_(cols) {
    const std::size_t bytes = static_cast<std::size_t>(rows * cols) * sizeof(S);
    if (ctx.work != nullptr) {
      arena_ = &ctx.work->arena(ctx.exec->worker());
      mark_ = arena_->top();
      data_ = reinterpret_cast<S*>(arena_->take(bytes));
    } else {
      heap_ = detail::allocate_aligned(bytes + 64);
      data_ = reinterpret_cast<S*>(heap_.get());
    }
  }
  scratch(const context& ctx, index_t n) : scratch(ctx, 1, n) {}
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;
  ~scratch() {
    if (arena_ != nullptr) arena_->release(mark_);
  }

  [[nodiscard]] S* data() const { return data_; }
  [[nodiscard]] index_t rows() const { return rows_; }
  [[nodiscard]] index_t cols() const { return cols_; }
  [[nodiscard]] matrix_view<S> view() const { return {data_, rows_, cols_}; }
  [[nodiscard]] auto map() const { return view().map(); }
  [[nodiscard]] S* row(index_t i) const { return data_ + i * cols_; }
  [[nodiscard]] std::span<S> span() const { return {data_, static_cast<std::size_t>(rows_ * cols_)}; }
  S& operator[](index_t i) const { return data_[i]; }

 private:
  S* data_ = nullptr;
  index_t rows_, cols_;
  detail::arena* arena_ = nullptr;
  detail::arena::mark mark_;
  detail::aligned_bytes heap_;
};

/// A scratch matrix is a matrix like any other.
template <class S>
struct matrix_access<scratch<S>> {
  static S* data(const scratch<S>& m) { return m.data(); }
  static index_t rows(const scratch<S>& m) { return m.rows(); }
  static index_t cols(const scratch<S>& m) { return m.cols(); }
  static index_t stride(const scratch<S>& m) { return m.cols(); }
};

}  // namespace lithe::inline LITHE_ABI
