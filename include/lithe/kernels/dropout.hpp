#pragma once

#include "lithe/core/random.hpp"
#include "lithe/kernels/activation.hpp"

namespace lithe::inline LITHE_ABI {

/// y = x / (1 - rate) where a draw of the key keeps the element, else 0; x and y may be the same matrix. The draw of element (i, j) is
/// a function of the key and (ctx.first_row + i) cols + j alone, so the backward pass is the same call on gradients.
template <class S>
void drop(matrix_view<const S> x, matrix_view<S> y, double rate, rng_key key, const context& ctx) {
  const auto threshold = static_cast<std::uint64_t>(rate * 0x1p32);
  const S scale = static_cast<S>(1 / (1 - rate));
  ctx.exec->run(x.rows(), detail::grain_rows(8 * x.cols()), [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t)
      for (index_t j = 0; j < x.cols();) {
        const auto at = static_cast<std::uint64_t>((ctx.first_row + t) * x.cols() + j);
        const auto words = philox(key, at / 4);
        for (auto w = at % 4; w < 4 && j < x.cols(); ++w, ++j) y(t, j) = words[w] < threshold ? S(0) : x(t, j) * scale;
      }
  });
}

}  // namespace lithe::inline LITHE_ABI
