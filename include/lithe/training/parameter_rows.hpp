#pragma once

#include <string_view>

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

/// The numbers of a parameter where they are: of a matrix, of a table in memory, also behind a handle. Empty for a table that has its
/// rows elsewhere or in another format.
template <class S, class P>
[[nodiscard]] matrix_view<S> rows_in_place(P& p) {
  if constexpr (eigen_type<P>)
    return p;
  else if constexpr (requires {
                       { p.view() } -> std::same_as<matrix_view<S>>;
                     })
    return p.view();
  else if constexpr (requires { p.table(); })
    return rows_in_place<S>(p.table());
  else
    return {};
}

/// f(row) on the numbers of one row: in place, or read into `buffer` and written back.
template <class S, class P, class F>
void change_row(P& p, matrix_view<S> in_place, index_t i, std::span<S> buffer, F&& f) {
  if (in_place.data() != nullptr) return f(in_place.row(i));
  if constexpr (!eigen_type<P>) {
    p.read_row(i, buffer);
    f(buffer.data());
    p.write_row(i, buffer);
  }
}

/// All numbers of a gradient that may differ from zero, as one matrix.
template <class Q>
[[nodiscard]] auto numbers_of(Q& q) {
  if constexpr (sparse_gradient<Q>)
    return rows_of(q).values();
  else
    return view(q);
}

/// Throws state_error unless q is a gradient of p's shape: one that `make_gradient` made.
template <class P, class Q>
void check_gradient(const char* who, const std::string& name, const P& p, const Q& q) {
  index_t rows = 0, cols = 0;
  if constexpr (sparse_gradient<const Q>) {
    rows = rows_of(q).total_rows;
    cols = rows_of(q).cols;
  } else {
    rows = q.rows();
    cols = q.cols();
  }
  require<state_error>(rows == p.rows() && cols == p.cols(), who, ": expected a gradient of ", name, " of shape ",
                       to_text(p.rows(), p.cols()), ", got ", to_text(rows, cols));
}

/// f(name, parameter, gradient) for every tensor that training may change, a shared table once.
template <class F, class L, class G>
void for_each_parameter(F&& f, L& model, G& gradient) {
  for_each_tensor(
      [&](const std::string& name, role kind, auto& p, auto& q) {
        if constexpr (real_tensor<decltype(p)> && !std::same_as<std::remove_cvref_t<decltype(q)>, nothing>)  // state may have no gradient
          if (kind == role::parameter) f(name, p, q);
      },
      model, gradient);
}

/// Whether `name` fits a pattern, in which * stands for any text and ? for any letter; "!" in front turns the answer around.
inline bool matches(std::string_view pattern, std::string_view name) {
  if (pattern.starts_with('!')) return !matches(pattern.substr(1), name);
  std::size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {  // the last star takes one letter more
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

}  // namespace lithe::inline LITHE_ABI::detail
