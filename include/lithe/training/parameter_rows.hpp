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

/// All numbers of a gradient that may differ from zero, as one matrix.
template <class Q>
[[nodiscard]] auto numbers_of(Q& q) {
  if constexpr (row_sparse<Q>)
    return touched(q).values();
  else
    return view(q);
}

/// f(name, parameter, gradient) for every tensor that training may change, a shared table once.
template <class F, class L, class G>
void for_each_parameter(F&& f, L& model, G& gradient) {
  for_each_tensor(
      [&](const std::string& name, role kind, auto& p, auto& q) {
        if constexpr (real_tensor<decltype(p)>)
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
