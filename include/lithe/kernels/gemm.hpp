#pragma once

#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// Whether a product replaces its output or is added to it.
enum class update { assign, add };

namespace detail {

inline constexpr index_t gemm_rows = 64;  // rows of the output in one piece of work

template <class C, class A, class B>
void eigen_product(C&& c, const A& a, const B& b, update mode) {
  if (mode == update::assign)
    c.noalias() = a * b;
  else
    c.noalias() += a * b;
}

}  // namespace detail

/// c = a bᵀ or c += a bᵀ; a [m x k], b [n x k], c [m x n].
template <class S>
void gemm_nt(matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode = update::assign) {
  LITHE_ASSERT(a.cols() == b.cols() && c.rows() == a.rows() && c.cols() == b.rows());
  ctx.exec->run(c.rows(), detail::gemm_rows, [&](index_t first, index_t last) {
    detail::eigen_product(c.slice_rows(first, last - first).map(), a.slice_rows(first, last - first).map(), b.map().transpose(), mode);
  });
}

/// c = a b or c += a b; a [m x k], b [k x n], c [m x n].
template <class S>
void gemm_nn(matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode = update::assign) {
  LITHE_ASSERT(a.cols() == b.rows() && c.rows() == a.rows() && c.cols() == b.cols());
  ctx.exec->run(c.rows(), detail::gemm_rows, [&](index_t first, index_t last) {
    detail::eigen_product(c.slice_rows(first, last - first).map(), a.slice_rows(first, last - first).map(), b.map(), mode);
  });
}

/// c = aᵀ b or c += aᵀ b; a [k x m], b [k x n], c [m x n].
template <class S>
void gemm_tn(matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode = update::assign) {
  LITHE_ASSERT(a.rows() == b.rows() && c.rows() == a.cols() && c.cols() == b.cols());
  ctx.exec->run(c.rows(), detail::gemm_rows, [&](index_t first, index_t last) {
    detail::eigen_product(c.slice_rows(first, last - first).map(), a.slice_cols(first, last - first).map().transpose(), b.map(), mode);
  });
}

/// A weight [n x k] stored so that products x wᵀ need no packing. Empty until `assign`.
template <class S>
class packed_matrix {
 public:
  [[nodiscard]] bool empty() const { return copy_.size() == 0; }
  [[nodiscard]] index_t rows() const { return copy_.rows(); }
  [[nodiscard]] index_t cols() const { return copy_.cols(); }
  void assign(matrix_view<const S> w) { copy_ = w.map(); }
  [[nodiscard]] const matrix<S>& copy() const { return copy_; }

 private:
  matrix<S> copy_;
};

/// c = a wᵀ or c += a wᵀ for a packed w.
template <class S>
void gemm_packed(matrix_view<const S> a, const packed_matrix<S>& w, matrix_view<S> c, const context& ctx, update mode = update::assign) {
  gemm_nt<S>(a, w.copy(), c, ctx, mode);
}

}  // namespace lithe::inline LITHE_ABI
