#pragma once

#include "lithe/kernels/activation.hpp"
#include "lithe/kernels/dropout_factors.hpp"

namespace lithe::inline LITHE_ABI {

/// y = x / (1 - rate) where a draw of the key keeps the element, else 0; x and y may be the same matrix. The draw of element (i, j) is
/// a function of the key and (ctx.first_row + i) cols + j alone, so the backward pass is the same call on gradients.
template <class S>
void drop(matrix_view<const S> x, matrix_view<S> y, double rate, rng_key key, const context& ctx) {
  constexpr index_t block = 256;
  ctx.exec->run(x.rows(), detail::grain_rows(4 * x.cols()), [&](index_t first, index_t last) {
    S factors[block];
    for (index_t t = first; t < last; ++t)
      for (index_t j = 0; j < x.cols(); j += block) {
        const index_t n = std::min(block, x.cols() - j);
        draw_factors(key, 0, static_cast<std::uint64_t>((ctx.first_row + t) * x.cols() + j), n, rate, factors);
        const S* from = x.row(t) + j;
        S* to = y.row(t) + j;
        for (index_t i = 0; i < n; ++i) to[i] = factors[i] == S(0) ? S(0) : from[i] * factors[i];
      }
  });
}

}  // namespace lithe::inline LITHE_ABI
