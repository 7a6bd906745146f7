#pragma once

#include "lithe/core/random.hpp"
#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

/// Fills m with numbers uniform in [-bound, bound).
template <class S>
void fill_uniform(matrix_view<S> m, double bound, rng_key key) {
  for (index_t i = 0; i < m.rows(); ++i)
    for (index_t j = 0; j < m.cols(); ++j) m(i, j) = static_cast<S>(bound * (2 * uniform(key, static_cast<std::uint64_t>(i * m.cols() + j)) - 1));
}

/// Fills m with normal numbers of mean 0 and the given standard deviation.
template <class S>
void fill_normal(matrix_view<S> m, double deviation, rng_key key) {
  for (index_t i = 0; i < m.rows(); ++i)
    for (index_t j = 0; j < m.cols(); ++j) m(i, j) = static_cast<S>(deviation * normal(key, static_cast<std::uint64_t>(i * m.cols() + j)));
}

}  // namespace lithe::inline LITHE_ABI
