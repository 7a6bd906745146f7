#pragma once

#include "lithe/kernels/dropout_factors.hpp"
#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {
/// Sets number i of m, row by row, to f(words per_number i, per_number i + 1, ... of a key's stream).
template <index_t PerNumber, class S, class F>
void fill_from_stream(matrix_view<S> m, rng_key key, F&& f) {
  constexpr index_t some = 4 * philox_blocks;
  std::uint32_t words[some];
  index_t at = 0;
  for (index_t i = 0; i < m.rows(); ++i)
    for (index_t j = 0; j < m.cols(); ++j, at += PerNumber) {
      if (at % some == 0) philox_words(key, static_cast<std::uint64_t>(at / 4), 0, words);
      m(i, j) = static_cast<S>(f(words + at % some));
    }
}
}  // namespace detail

/// Fills m with numbers uniform in [-bound, bound).
template <class S>
void fill_uniform(matrix_view<S> m, double bound, rng_key key) {
  detail::fill_from_stream<1>(m, key, [&](const std::uint32_t* w) { return bound * (2 * (w[0] * 0x1p-32) - 1); });
}

/// Fills m with normal numbers of mean 0 and the given standard deviation.
template <class S>
void fill_normal(matrix_view<S> m, double deviation, rng_key key) {
  if (deviation == 0) return void(m.map().setZero());
  detail::fill_from_stream<2>(m, key, [&](const std::uint32_t* w) { return deviation * detail::normal_of(w[0], w[1]); });
}

}  // namespace lithe::inline LITHE_ABI
