#pragma once

#include "lithe/kernels/top_k.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// A lower bound of the final_k-th largest sum: with a and b descending, at least (i+1)(j+1) sums are no smaller than a[i] + b[j].
template <class S>
S product_threshold(const S* a, const S* b, index_t k, index_t final_k) {
  S t = lowest_score<S>;
  for (index_t i = 0; i < k && i < final_k; ++i) {
    const index_t j = (final_k + i) / (i + 1) - 1;  // the least with (i+1)(j+1) >= final_k
    if (j < k) t = a[i] + b[j] > t ? a[i] + b[j] : t;
  }
  return t;
}

/// Keeps the candidates not below t, by i, then j; stops when there are too many. A row ends at (i+1)(j+1) > final_k, because so many
/// sums before it are no smaller.
template <class S>
void collect_pairs(const S* a, const S* b, index_t k, index_t final_k, S t, survivors<S>& kept) {
  index_t m = 0;
  for (index_t i = 0; i < k && i < final_k && m <= max_survivors; ++i) {
    const index_t width = std::min(k, final_k / (i + 1));
    index_t j = 0;
    for (; j < width && m < max_survivors + 64; ++j) {
      const S sum = ranked_score(a[i] + b[j]);
      if (!(sum >= t)) break;  // the row descends
      kept.value[m] = sum;
      kept.index[m++] = static_cast<std::int32_t>(i * k + j);
    }
    if (j == 0) break;  // and so do the rows
  }
  kept.count = m;
}

/// All candidates, sorted.
template <class S>
void product_top_k_row_sorted(const S* a, const S* b, index_t k, index_t final_k, S* sums, std::int32_t* pairs, const context& ctx) {
  index_t n = 0;
  for (index_t i = 0; i < k && i < final_k; ++i) n += std::min(k, final_k / (i + 1));
  const scratch<S> sum(ctx, n);
  const scratch<std::int32_t> pair(ctx, n), order(ctx, n);
  index_t m = 0;
  for (index_t i = 0; i < k && i < final_k; ++i)
    for (index_t j = 0; j < std::min(k, final_k / (i + 1)); ++j, ++m) {
      sum[m] = a[i] + b[j];
      pair[m] = static_cast<std::int32_t>(i * k + j);
    }
  top_k_row_sorted(sum.data(), n, final_k, sums, pairs, order.span());
  for (index_t j = 0; j < final_k; ++j) pairs[j] = pair[pairs[j]];
}

/// The plan without intrinsics. False, and nothing written, if too many sums survive.
template <class S>
bool product_top_k_row_portable(const S* a, const S* b, index_t k, index_t final_k, S* sums, std::int32_t* pairs) {
  if (final_k > max_threshold_k) return false;
  survivors<S> kept;
  collect_pairs(a, b, k, final_k, product_threshold(a, b, k, final_k), kept);
  if (kept.count > max_survivors) return false;
  rank_survivors(kept, final_k, sums, pairs);
  return true;
}

}  // namespace detail

/// The final_k largest of the k² sums a[i] + b[j], largest first, equal sums by i, then j; pairs[.] = i k + j (1907.05242, section 3.1).
///
/// a, b [k] descending and without NaN, as `top_k` gives them; 1 <= final_k <= k² < 2^31. Exact: only the pairs with
/// (i+1)(j+1) <= final_k are looked at, because every other one has final_k earlier ones that are no smaller. -infinity is a score like
/// any other, infinity - infinity counts as -infinity. Allocates nothing (beyond 128 results, or 256 equal sums, it takes scratch).
template <class S>
void product_top_k_row(const S* a, const S* b, index_t k, index_t final_k, S* sums, std::int32_t* pairs, const context& ctx) {
  LITHE_ASSERT(1 <= final_k && final_k <= k * k && k * k <= std::numeric_limits<std::int32_t>::max());
  if (detail::product_top_k_row_portable(a, b, k, final_k, sums, pairs)) return;
  detail::product_top_k_row_sorted(a, b, k, final_k, sums, pairs, ctx);
}

}  // namespace lithe::inline LITHE_ABI
