#pragma once

#include <optional>

#include "lithe/layers/parameters.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// Where a tensor stands in the layer that was called, for messages.
struct tensor_path {
  const tensor_path* up;
  std::string_view name;
  friend std::ostream& operator<<(std::ostream& out, const tensor_path& p) {
    if (p.up != nullptr && !p.up->name.empty()) out << *p.up << (p.name.empty() ? "" : ".");
    return out << p.name;
  }
};

template <class L>
void check_gradient(const char* who, const L& l, const gradient_of<L>& g, const tensor_path& path) {
  const auto sizes = [&](const tensor_path& at, index_t rows, index_t cols, index_t found_rows, index_t found_cols) {
    require<state_error>(rows == found_rows && cols == found_cols, who, ": expected a gradient that make_gradient made for this layer, whose ", at,
                         " is ", to_text(rows, cols), ", got one of ", to_text(found_rows, found_cols));
  };
  std::remove_cvref_t<L>::visit(
      [&](const field& f, const auto& p, const auto& q) {
        using Q = std::remove_cvref_t<decltype(q)>;
        const tensor_path at{&path, f.name};
        if constexpr (has_parameters<std::remove_cvref_t<decltype(p)>>) {
          check_gradient(who, p, q, at);
        } else if constexpr (requires { q.target; }) {
          require<state_error>(p.rows() * p.cols() == 0 || q.target != nullptr, who, ": expected a gradient that make_gradient made for this layer, got "
                               "none for ", at);
          if (q.target != nullptr) sizes(at, p.rows(), p.cols(), q.target->total_rows, q.target->cols);
        } else if constexpr (sparse_gradient<const Q>) {
          sizes(at, p.rows(), p.cols(), q.total_rows, q.cols);
        } else if constexpr (!std::same_as<Q, nothing>) {
          sizes(at, p.rows(), p.cols(), q.rows(), q.cols());
        }
      },
      l, g);
}

template <class S>
void require_data(const char* who, const char* what, matrix_view<S> m) {
  require<shape_error>(m.data() != nullptr || m.size() == 0, who, ": expected ", what, " of shape ", to_text(m.rows(), m.cols()), ", got no data");
  if constexpr (!std::is_const_v<S>)
    require<shape_error>(m.stride() >= m.cols() || m.rows() <= 1, who, ": expected ", what, " of rows apart from each other, got ", m.cols(),
                         " columns with a stride of ", m.stride());
}

/// An input's gradient.
template <class S>
void check_like(const char* who, const char* what, matrix_view<S> dx, matrix_view<const S> x) {
  require_shape(who, what, dx, x.rows(), x.cols());
  require_data(who, what, dx);
}

/// The rows of what a layer reads.
template <class S>
index_t rows_of_input(matrix_view<const S> x) {
  return x.rows();
}
inline index_t rows_of_input(std::span<const token_t> ids) { return static_cast<index_t>(ids.size()); }

/// What all calls have in common: x, and an output y (or its gradient dy) called `what`.
template <class L, class S>
void check_matrices(const char* who, const char* what, const L& l, input_of<L> x, matrix_view<S> y) {
  const shape out = l.output_shape(x);
  require_shape(who, what, y, out.rows, out.cols);
  require_data(who, what, y);
  if constexpr (requires { x.cols(); }) require_data(who, "x", x);
}
/// The same and the context, which is that of x's rows.
template <class L, class S>
void check_rows(const char* who, const char* what, const L& l, input_of<L> x, matrix_view<S> y, const context& ctx) {
  check_matrices(who, what, l, x, y);
  ctx.check(who, rows_of_input(x));
}

}  // namespace detail

// The one door for the arguments of calls. A layer whose sentences begin with `who` passes them here before it reads or writes anything, so that what
// is wrong is said in the same words by every layer, with NDEBUG, too, and nothing is half-written.

/// Throws shape_error unless x is what l takes, y has its output's shape, and segments and mask are of x's rows.
template <class L>
void check_forward(const char* who, const L& l, input_of<L> x, matrix_view<typename L::scalar> y, const context& ctx) {
  detail::check_rows(who, "y", l, x, y, ctx);
}
/// The same for decode, whose context the cache checks (`position_cache::check`): a container asks here before the first of its caches takes a row.
template <class L>
void check_decode(const char* who, const L& l, input_of<L> x, matrix_view<typename L::scalar> y) {
  detail::check_matrices(who, "y", l, x, y);
}
/// Throws state_error unless every tensor of g has the shape of its parameter.
template <class L>
void check_gradient(const char* who, const L& l, const gradient_of<L>& g) {
  try {
    detail::check_gradient(who, l, g, {nullptr, {}});
  } catch (const unmatched_parts& e) {
    throw state_error(concat(who, ": ", e.what()));
  }
}
/// The same for backward: x, dy, segments and mask as in forward, dx of x's shape (shape_error), and a gradient that `make_gradient` made (state_error).
template <class L>
void check_backward(const char* who, const L& l, input_of<L> x, matrix_view<const typename L::scalar> dy, input_gradient_of<L> dx,
                    const gradient_of<L>& g, const context& ctx) {
  detail::check_rows(who, "dy", l, x, dy, ctx);
  if constexpr (requires { dx.cols(); }) detail::check_like(who, "dx", dx, x);
  check_gradient(who, l, g);
}
/// The matrix (or choices) of a record; throws state_error unless its shape is what a forward of this call left there.
template <class T>
matrix_view<const T> recorded(const char* who, const matrix<T>& m, index_t rows, index_t cols) {
  require<state_error>(m.rows() == rows && m.cols() == cols, who, ": the record is of another call, or was never filled: expected ", to_text(rows, cols),
                       ", got ", to_text(m.rows(), m.cols()));
  return m;
}
/// The same for the parts of a record.
template <class R>
const std::vector<R>& recorded(const char* who, const std::vector<R>& parts, std::size_t n) {
  require<state_error>(parts.size() == n, who, ": the record is of another call, or was never filled: expected ", n, " parts, got ", parts.size());
  return parts;
}
/// The same for slots, pairs or routes, which must also lie in [-1, n): they say where memory is read.
inline matrix_view<const slot_t> recorded_slots(const char* who, const matrix<slot_t>& m, index_t rows, index_t cols, index_t n) {
  const auto slots = recorded(who, m, rows, cols);
  if (m.size() == 0) return slots;
  require<state_error>(m.minCoeff() >= -1 && m.maxCoeff() < n, who, ": the record is of another layer: expected choices from 0 to ", n - 1,
                       ", or -1 for none, got ", m.minCoeff(), " to ", m.maxCoeff());
  return slots;
}

/// The context of a position-wise layer whose row i belongs to token token_of(i) of the call: the tokens' mask goes with the rows, segments and slots do
/// not.
class regrouped {
 public:
  /// Of `rows` rows; token_of is called in this constructor alone.
  template <class TokenOf>
  regrouped(const context& ctx, index_t rows, TokenOf&& token_of) : mask_(ctx, ctx.mask.empty() ? 0 : rows), ctx_(ctx.position_wise()) {
    if (ctx.mask.empty()) return;
    for (index_t i = 0; i < rows; ++i) mask_[i] = ctx.mask[static_cast<std::size_t>(token_of(i))];
    ctx_.mask = mask_.span();
  }
  [[nodiscard]] const context& ctx() const { return ctx_; }  ///< of all rows
  /// Of n rows from `first` on.
  [[nodiscard]] context ctx(index_t first, index_t n) const { return ctx_.chunk(first, n); }

 private:
  scratch<std::uint8_t> mask_;
  context ctx_;
};

/// Rows as a layer may read them: those that ctx.mask hides and that hold a NaN or an infinity count as zeros, because 0 · NaN is NaN and would reach
/// what is visible. Finite rows are left where they are, and nothing is looked at without a mask.
template <class S>
class shown {
 public:
  /// The rows of x, which has as many as the mask of ctx, if there is one.
  shown(matrix_view<const S> x, const context& ctx) : x_(x) {
    for (index_t t = 0; !ctx.mask.empty() && t < x.rows(); ++t) {
      if (ctx.valid(t) || x.row_array(t).isFinite().all()) continue;
      if (!copied_) {
        copied_.emplace(ctx, x.rows(), x.cols());
        copied_->map() = x.map();
        x_ = copied_->view();
      }
      copied_->view().row_array(t).setZero();
    }
  }
  shown(const shown&) = delete;
  shown& operator=(const shown&) = delete;

  [[nodiscard]] matrix_view<const S> view() const { return x_; }  ///< as `x`, [T x D]

 private:
  std::optional<scratch<S>> copied_;
  matrix_view<const S> x_;
};

/// What is shown stands where x would.
template <class S>
struct matrix_access<shown<S>> {
  static const S* data(const shown<S>& m) { return m.view().data(); }        ///< of x, or of the copy
  static index_t rows(const shown<S>& m) { return m.view().rows(); }         ///< as x
  static index_t cols(const shown<S>& m) { return m.view().cols(); }         ///< as x
  static index_t stride(const shown<S>& m) { return m.view().stride(); }     ///< of x, or of the copy
};

}  // namespace lithe::inline LITHE_ABI
