#pragma once

#include <limits>
#include <numeric>
#include <span>

#include "lithe/tensor/row_gradient.hpp"

// The k largest of n scores without sorting them. The maxima of some 2k to 4k interleaved groups give a bound: if k of them reach t,
// then at least k scores do. A short bisection makes t so tight that little more than k scores survive it, and the place of a
// survivor is the number of larger ones: no sort, next to no mispredicted branch. The plan is exact whatever t is; where it does not
// pay (k above 128, hundreds of scores equal to the k-th, fewer than k numbers) a partial sort takes over.

namespace lithe::inline LITHE_ABI::detail {

template <class S>
inline constexpr S lowest_score = -std::numeric_limits<S>::infinity();
/// NaN ranks as -infinity.
template <class S>
constexpr S ranked_score(S s) {
  return s > lowest_score<S> ? s : lowest_score<S>;
}

inline constexpr index_t max_survivors = 256;
inline constexpr index_t max_threshold_k = 128;  // larger k: a partial sort

/// What is left of a row of scores: room for the survivors and for the block that overflows them.
template <class S>
struct survivors {
  alignas(64) S value[max_survivors + 64];
  alignas(64) std::int32_t index[max_survivors + 64];
  index_t count;
};

/// The order of results: larger first, then the lower index. Also the plain form that the tests compare with.
template <class S>
void top_k_row_sorted(const S* scores, index_t n, index_t k, S* values, std::int32_t* indices, std::span<std::int32_t> order) {
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.begin() + n, [&](std::int32_t i, std::int32_t j) {
    const S a = ranked_score(scores[i]), b = ranked_score(scores[j]);
    return a > b || (a == b && i < j);
  });
  for (index_t j = 0; j < k; ++j) {
    indices[j] = order[static_cast<std::size_t>(j)];
    values[j] = ranked_score(scores[indices[j]]);
  }
}

/// A bound t > -infinity that at least k of the maxima reach and few more; -infinity if there is none. `at_least(t)` counts them.
template <class S, class Count>
S bisect_threshold(S low, S high, index_t k, Count&& at_least) {
  if (!(low > lowest_score<S>) || at_least(low) < k) return lowest_score<S>;
  // The k-th of many maxima lies below the middle of their range.
  for (int step = 0; step < 8; ++step) {
    const S middle = low + S(0.4) * (high - low);
    const index_t count = at_least(middle);  // 0 if infinities made it NaN
    if (count >= k)
      low = middle;
    else
      high = middle;
    if (count >= k && count <= k + 4) break;
  }
  return low;
}

template <class S, int G>
S group_threshold(const S* scores, index_t n, index_t k) {
  S most[G];
  std::fill_n(most, G, lowest_score<S>);
  index_t i = 0;
  for (; i + G <= n; i += G)
    for (int g = 0; g < G; ++g) most[g] = scores[i + g] > most[g] ? scores[i + g] : most[g];
  for (int g = 0; g < n - i; ++g) most[g] = scores[i + g] > most[g] ? scores[i + g] : most[g];
  S low = std::numeric_limits<S>::infinity(), high = lowest_score<S>;
  for (int g = 0; g < G; ++g) {
    const S least = most[g] > lowest_score<S> ? most[g] : std::numeric_limits<S>::infinity();
    low = least < low ? least : low;
    high = most[g] > high ? most[g] : high;
  }
  return bisect_threshold(low, high, k, [&](S t) {
    int count = 0;
    for (int g = 0; g < G; ++g) count += most[g] >= t;
    return static_cast<index_t>(count);
  });
}

/// Keeps the scores >= t in the order of their indices; stops when there are too many. Every number is written and most are written over: a
/// branch that is taken for one score in ten would cost more.
template <class S>
void collect_survivors(const S* scores, index_t n, S t, survivors<S>& kept) {
  constexpr index_t block = 64;
  index_t m = 0;
  for (index_t i = 0; i < n && m <= max_survivors; i += block)
    for (index_t j = i; j < std::min(n, i + block); ++j) {
      kept.index[m] = static_cast<std::int32_t>(j);
      m += scores[j] >= t;
    }
  for (index_t j = 0; j < m; ++j) kept.value[j] = scores[kept.index[j]];
  kept.count = m;
}

/// Writes the k first of `kept` in the order of results, given room for `Width` >= kept.count of them.
template <int Width, class S>
void rank_survivors(survivors<S>& kept, index_t k, S* values, std::int32_t* indices) {
  const index_t m = kept.count;
  std::fill(kept.value + m, kept.value + Width, lowest_score<S>);
  std::int32_t rank[Width] = {};
  for (index_t i = 0; i < m; ++i) {
    const S v = kept.value[i];
    for (int j = 0; j < Width; ++j) rank[j] += v > kept.value[j];
  }
  const index_t sum = std::accumulate(rank, rank + m, index_t{0});
  if (sum != m * (m - 1) / 2)  // equal scores: the earlier one comes first
    for (index_t j = 1; j < m; ++j)
      for (index_t i = 0; i < j; ++i) rank[j] += kept.value[i] == kept.value[j];
  for (index_t j = 0; j < m; ++j)
    if (rank[j] < k) {
      values[rank[j]] = kept.value[j];
      indices[rank[j]] = kept.index[j];
    }
}
template <class S>
void rank_survivors(survivors<S>& kept, index_t k, S* values, std::int32_t* indices) {
  const index_t m = kept.count;
  if (m <= 16) return rank_survivors<16>(kept, k, values, indices);
  if (m <= 32) return rank_survivors<32>(kept, k, values, indices);
  if (m <= 48) return rank_survivors<48>(kept, k, values, indices);
  if (m <= 64) return rank_survivors<64>(kept, k, values, indices);
  if (m <= 128) return rank_survivors<128>(kept, k, values, indices);
  rank_survivors<max_survivors>(kept, k, values, indices);
}

/// The plan without intrinsics. False, and nothing written, where it does not pay.
template <class S>
bool top_k_row_portable(const S* scores, index_t n, index_t k, S* values, std::int32_t* indices) {
  if (k > max_threshold_k) return false;
  const S t = k <= 16 ? group_threshold<S, 64>(scores, n, k) : k <= 64 ? group_threshold<S, 128>(scores, n, k) : group_threshold<S, 256>(scores, n, k);
  if (!(t > lowest_score<S>)) return false;
  survivors<S> kept;
  collect_survivors(scores, n, t, kept);
  if (kept.count > max_survivors) return false;
  rank_survivors(kept, k, values, indices);
  return true;
}

}  // namespace lithe::inline LITHE_ABI::detail
