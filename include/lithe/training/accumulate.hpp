#pragma once

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI::detail {

/// Σ term(i), i < n, in double and always in the same order: sixteen sums side by side, which compilers turn into vector
/// instructions (Eigen's cast to double is not vectorised everywhere) and whose bits do not depend on addresses.
template <class Term>
[[nodiscard]] double accumulate(index_t n, Term&& term) {
  constexpr index_t lanes = 16;
  double sums[lanes] = {};
  index_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (index_t j = 0; j < lanes; ++j) sums[j] += static_cast<double>(term(i + j));
  for (; i < n; ++i) sums[i % lanes] += static_cast<double>(term(i));
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

/// Σ x²
template <class S>
[[nodiscard]] double sum_of_squares(const S* x, index_t n) {
  return accumulate(n, [x](index_t i) { return static_cast<double>(x[i]) * static_cast<double>(x[i]); });
}

}  // namespace lithe::inline LITHE_ABI::detail
