#pragma once

#include "lithe/kernels/top_k_avx512.hpp"
#include "lithe/kernels/top_k_portable.hpp"
#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// values[0..k), indices[0..k) = the k largest of n scores and where they stand, largest first, equal scores by lower index.
///
/// Exact. NaN counts as -infinity, and so comes last, with value -infinity; indices are always in range and differ. 1 <= k <= n < 2^31.
/// Allocates nothing (a partial sort takes 4 n bytes of scratch).
template <class S>
void top_k_row(const S* scores, index_t n, index_t k, S* values, std::int32_t* indices, const context& ctx) {
  LITHE_ASSERT(1 <= k && k <= n && n <= std::numeric_limits<std::int32_t>::max());
#if defined(LITHE_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    if (detail::top_k_row_avx512(scores, n, k, values, indices)) return;
  } else
#endif
      if (detail::top_k_row_portable(scores, n, k, values, indices))
    return;
  const scratch<std::int32_t> order(ctx, n);
  detail::top_k_row_sorted(scores, n, k, values, indices, order.span());
}

/// The same for each row of scores [T x n]: values, indices [T x k]. Throws shape_error unless 1 <= k <= n and the rows agree.
template <class S>
void top_k(matrix_view<const S> scores, matrix_view<S> values, matrix_view<std::int32_t> indices, const context& ctx) {
  const index_t n = scores.cols(), k = values.cols();
  require<shape_error>(k >= 1 && k <= n, "top_k: expected 1 <= k <= ", n, " columns, got k = ", k);
  require_shape("top_k", "values", values, scores.rows(), k);
  require_shape("top_k", "indices", indices, scores.rows(), k);
  ctx.exec->run(scores.rows(), std::max<index_t>(1, 16384 / n), [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t) top_k_row<S>(scores.row(t), n, k, values.row(t), indices.row(t), ctx);
  });
}

}  // namespace lithe::inline LITHE_ABI
