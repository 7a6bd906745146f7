#pragma once

#include "lithe/kernels/gather.hpp"

namespace lithe::inline LITHE_ABI {

/// target[slot_tj] += w_tj dy_t for every pick, for a target small enough to be held dense (sub-keys). dy [T x D], target [N x D]. The
/// picks are sorted by row and one worker sums a row in the order of the picks: the same bits with any number of workers.
template <class S>
void scatter_add_dense(picks<S> p, matrix_view<const S> dy, matrix_view<S> target, const context& ctx) {
  const index_t D = target.cols(), P = p.per_token;
  const auto total = static_cast<index_t>(p.slots.size());
  LITHE_ASSERT(dy.cols() == D && total == dy.rows() * P && p.weights.size() == p.slots.size());
  const scratch<row_pick> sorted(ctx, total), spare(ctx, total);
  const index_t n = sort_rows(p.slots, target.rows(), sorted.span(), spare.span());
  const scratch<slot_t> token(ctx, n);
  const scratch<S> weight(ctx, n);
  const scratch<index_t> start(ctx, n + 1);
  index_t touched = 0;
  for (index_t i = 0; i < n; ++i) {
    token[i] = static_cast<slot_t>(static_cast<index_t>(sorted[i].pick) / P);
    weight[i] = p.weights[sorted[i].pick];
    if (i == 0 || sorted[i].row != sorted[i - 1].row) start[touched++] = i;
  }
  start[touched] = n;
  const index_t blocks = (D + detail::sum_columns<S> - 1) / detail::sum_columns<S>;
  ctx.exec->run(touched * blocks, 16 * blocks, [&](index_t first, index_t last) {
    for (index_t item = first; item < last; ++item) {
      const index_t c = item % blocks * detail::sum_columns<S>, begin = start[item / blocks], end = start[item / blocks + 1];
      S* out = target.row(sorted[begin].row) + c;
      detail::sum_rows(dy.data() + c, dy.stride(), std::min(detail::sum_columns<S>, D - c), token.data() + begin, weight.data() + begin, end - begin,
                       n - begin, out, out, false);
    }
  });
}

}  // namespace lithe::inline LITHE_ABI
