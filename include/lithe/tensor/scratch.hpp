#pragma once

#include "lithe/core/context.hpp"
#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

/// Uninitialised memory for the length of a scope: from the arena of the calling worker, or from the heap if the context has no
/// workspace. Throws state_error while another thread takes memory from that workspace (core/workspace.hpp). Reads as a `matrix_view<S>` [rows x cols] (rows follow one another, start aligned to 64 bytes) or as a span.
template <class S>
class scratch {
  static_assert(std::is_trivially_destructible_v<S>);

 public:
  /// A matrix [rows x cols] of unspecified contents.
  scratch(const context& ctx, index_t rows, index_t cols) : rows_(rows), cols_(cols) {
    const std::size_t bytes = static_cast<std::size_t>(rows * cols) * sizeof(S);
    if (ctx.work != nullptr) {
      arena_ = &ctx.work->arena(ctx.exec->worker());
      const auto taken = arena_->take(bytes);
      mark_ = taken.before;
      data_ = reinterpret_cast<S*>(taken.data);
    } else {
      heap_ = detail::allocate_aligned(bytes + 64);
      data_ = reinterpret_cast<S*>(heap_.get());
    }
  }
  /// n numbers: one row.
  scratch(const context& ctx, index_t n) : scratch(ctx, 1, n) {}
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;
  ~scratch() {
    if (arena_ != nullptr) arena_->release(mark_);
  }

  [[nodiscard]] S* data() const { return data_; }                                                       ///< the first element
  [[nodiscard]] index_t rows() const { return rows_; }                                                  ///< as asked for; 1 for a span
  [[nodiscard]] index_t cols() const { return cols_; }                                                  ///< as asked for; also the stride
  [[nodiscard]] matrix_view<S> view() const { return {data_, rows_, cols_}; }                           ///< [rows x cols]
  [[nodiscard]] auto map() const { return view().map(); }                                               ///< the same for Eigen's expressions
  [[nodiscard]] S* row(index_t i) const { return data_ + i * cols_; }                                   ///< the first element of row i
  [[nodiscard]] std::span<S> span() const { return {data_, static_cast<std::size_t>(rows_ * cols_)}; }  ///< all numbers, row after row
  S& operator[](index_t i) const { return data_[i]; }                                                   ///< number i of all, row after row

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
  static S* data(const scratch<S>& m) { return m.data(); }         ///< where row 0 begins
  static index_t rows(const scratch<S>& m) { return m.rows(); }    ///< that it was made with
  static index_t cols(const scratch<S>& m) { return m.cols(); }    ///< that it was made with
  static index_t stride(const scratch<S>& m) { return m.cols(); }  ///< the rows follow one another
};

}  // namespace lithe::inline LITHE_ABI
