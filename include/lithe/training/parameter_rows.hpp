#pragma once

#include "lithe/layers/parameters.hpp"

// How code that meets every tensor of a model reaches their numbers: parameters are matrices or value tables, gradients are dense
// or of touched rows, and a table that several layers share has one gradient behind several handles.
namespace lithe::inline LITHE_ABI::detail {

template <class P>
struct number_of {
  using type = typename P::scalar;
};
template <eigen_type P>
struct number_of<P> {
  using type = typename P::Scalar;
};
/// Walked tensors of real numbers; integer tensors are always state.
template <class P>
concept real_tensor = std::floating_point<typename number_of<std::remove_cvref_t<P>>::type>;

template <class Q>
concept row_sparse = requires(Q& q) {
  q.storage;
}
|| requires(Q& q) { rows_of(q); };

/// The row_gradient that q is, or that its handle leads to.
template <row_sparse Q>
[[nodiscard]] auto& touched(Q& q) {
  if constexpr (requires { q.storage; })
    return q;
  else
    return rows_of(q);
}

/// Reads and writes whole rows, of a matrix in place and of a table through its `read_row` and `write_row`.
template <class S, class P>
void read_row(const P& p, index_t row, std::span<S> out) {
  if constexpr (eigen_type<P>)
    std::copy_n(p.data() + row * p.cols(), p.cols(), out.data());
  else
    p.read_row(row, out);
}
template <class S, class P>
void write_row(P& p, index_t row, std::span<const S> in) {
  if constexpr (eigen_type<P>)
    std::copy_n(in.data(), p.cols(), p.data() + row * p.cols());
  else
    p.write_row(row, in);
}

}  // namespace lithe::inline LITHE_ABI::detail
