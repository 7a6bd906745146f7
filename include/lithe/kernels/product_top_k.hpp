#pragma once

#include <array>

#include "lithe/kernels/top_k.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// The pairs (i, j) with (i+1)(j+1) <= K by i, then j: i in the upper half of a word, j in the lower. Every other pair of two
/// descending lists has K earlier ones whose sums are no smaller, so these are all that a selection of K sums can take.
template <int K>
struct product_pairs {
  static constexpr int count = [] {
    int n = 0;
    for (int i = 1; i <= K; ++i) n += K / i;
    return n;
  }();
  static constexpr int padded = (count + 15) / 16 * 16;
  static constexpr std::array<std::int32_t, padded> pair = [] {
    std::array<std::int32_t, padded> p{};
    std::size_t n = 0;
    for (int i = 0; i < K; ++i)
      for (int j = 0; j < K / (i + 1); ++j) p[n++] = i << 16 | j;
    return p;
  }();
};

/// A lower bound of the final_k-th largest sum: at least (i+1)(j+1) sums are no smaller than a[i] + b[j]. The larger the bound the
/// better, so i or j is as small as it can be.
template <class S>
S product_threshold(const S* a, const S* b, index_t k, index_t final_k) {
  S t = lowest_score<S>;
  for (std::int32_t i = 0, j = static_cast<std::int32_t>(final_k) - 1; i <= j; ++i, j = (static_cast<std::int32_t>(final_k) + i) / (i + 1) - 1) {
    if (j >= k) continue;
    t = a[i] + b[j] > t ? a[i] + b[j] : t;
    t = a[j] + b[i] > t ? a[j] + b[i] : t;
  }
  return t;
}

/// For final_k <= K and k <= K. False, and nothing written, if fewer than final_k sums are numbers.
template <int K, class S>
bool product_top_k_row_portable(const S* a, const S* b, index_t k, index_t final_k, S* sums, std::int32_t* pairs) {
  using table = product_pairs<K>;
  const S t = product_threshold(a, b, k, final_k);
  if (!(t > lowest_score<S>)) return false;
  S first[K], second[K], sum[table::padded];
  std::fill(std::copy_n(a, k, first), first + K, lowest_score<S>);
  std::fill(std::copy_n(b, k, second), second + K, lowest_score<S>);
  int n = 0;
  for (int i = 0; i < K; ++i)
    for (int j = 0; j < K / (i + 1); ++j) sum[n++] = first[i] + second[j];
  survivors<S> kept;
  collect_survivors(sum, index_t{table::count}, t, kept);
  if (kept.count > max_survivors) return false;
  rank_survivors(kept, final_k, sums, pairs);
  for (index_t j = 0; j < final_k; ++j) {
    const std::int32_t pair = table::pair[static_cast<std::size_t>(pairs[j])];
    pairs[j] = (pair >> 16) * static_cast<std::int32_t>(k) + (pair & 0xffff);
  }
  return true;
}

#if defined(LITHE_AVX512)
/// The same in AVX-512, for K = 16 or 32: a permutation of one or two registers looks up sixteen numbers.
template <int K>
bool product_top_k_row_avx512(const float* a, const float* b, index_t k, index_t final_k, float* sums, std::int32_t* pairs) {
  using table = product_pairs<K>;
  const float t = product_threshold(a, b, k, final_k);
  if (!(t > lowest_score<float>)) return false;
  const __m512 a0 = load_scores(a, k), b0 = load_scores(b, k);
  const __m512 a1 = load_scores(a + std::min<index_t>(k, 16), k - 16), b1 = load_scores(b + std::min<index_t>(k, 16), k - 16);
  alignas(64) float sum[table::padded];
#pragma GCC unroll 8
  for (int c = 0; c < table::padded; c += 16) {
    const __m512i j = _mm512_loadu_si512(table::pair.data() + c), i = _mm512_srli_epi32(j, 16);
    const __m512 x = K <= 16 ? _mm512_permutexvar_ps(i, a0) : _mm512_permutex2var_ps(a0, i, a1);
    const __m512 y = K <= 16 ? _mm512_permutexvar_ps(j, b0) : _mm512_permutex2var_ps(b0, j, b1);
    _mm512_store_ps(sum + c, _mm512_add_ps(x, y));
  }
  survivors<float> kept;
  collect_survivors_avx512<number_list>(sum, table::count, t, kept);
  rank_survivors_avx512(kept, final_k, sums, pairs);
  const __m512i weights = _mm512_set1_epi32(static_cast<std::int32_t>(k) << 16 | 1);
  for (index_t j = 0; j < final_k; j += 16) {
    const __mmask16 lanes = first_lanes(final_k - j);
    const __m512i at = _mm512_maskz_loadu_epi32(lanes, pairs + j);
    const __m512i pair = _mm512_mask_i32gather_epi32(at, lanes, at, table::pair.data(), 4);
    _mm512_mask_storeu_epi32(pairs + j, lanes, _mm512_madd_epi16(pair, weights));  // i k + j
  }
  return true;
}
#endif

/// For any k and final_k: the candidates are listed and selected from.
template <class S>
void product_top_k_row_any(const S* a, const S* b, index_t k, index_t final_k, S* sums, std::int32_t* pairs, const context& ctx) {
  index_t n = 0;
  for (index_t i = 0; i < k && i < final_k; ++i) n += std::min(k, final_k / (i + 1));
  const scratch<S> sum(ctx, n);
  const scratch<std::int32_t> pair(ctx, n);
  index_t m = 0;
  for (index_t i = 0; i < k && i < final_k; ++i)
    for (index_t j = 0, width = std::min(k, final_k / (i + 1)); j < width; ++j, ++m) {
      sum[m] = a[i] + b[j];
      pair[m] = static_cast<std::int32_t>(i * k + j);
    }
  top_k_row<S>(sum.data(), n, final_k, sums, pairs, ctx);
  for (index_t j = 0; j < final_k; ++j) pairs[j] = pair[pairs[j]];
}

}  // namespace detail

/// The final_k largest of the k² sums a[i] + b[j], largest first, equal sums by i, then j; pairs[.] = i k + j (1907.05242, section 3.1).
///
/// a, b [k] descending and without NaN, as `top_k` gives them; 1 <= final_k <= k² < 2^31. Exact: only the pairs with
/// (i+1)(j+1) <= final_k are looked at. -infinity is a score like any other, infinity - infinity counts as -infinity. Scratch is
/// taken for k or final_k above 64, or when fewer than final_k sums are numbers.
template <class S>
void product_top_k_row(const S* a, const S* b, index_t k, index_t final_k, S* sums, std::int32_t* pairs, const context& ctx) {
  LITHE_ASSERT(1 <= final_k && final_k <= k * k && k * k <= std::numeric_limits<std::int32_t>::max());
  const index_t size = std::max(k, final_k);
  const bool done = [&] {
#if defined(LITHE_AVX512)
    if constexpr (std::is_same_v<S, float>) {
      if (size <= 16) return detail::product_top_k_row_avx512<16>(a, b, k, final_k, sums, pairs);
      // Beyond two registers the AVX-512 top_k over all candidates is faster than the portable plan.
      return size <= 32 && detail::product_top_k_row_avx512<32>(a, b, k, final_k, sums, pairs);
    }
#endif
    if (size <= 16) return detail::product_top_k_row_portable<16>(a, b, k, final_k, sums, pairs);
    if (size <= 32) return detail::product_top_k_row_portable<32>(a, b, k, final_k, sums, pairs);
    return size <= 64 && detail::product_top_k_row_portable<64>(a, b, k, final_k, sums, pairs);
  }();
  if (!done) detail::product_top_k_row_any(a, b, k, final_k, sums, pairs, ctx);
}

}  // namespace lithe::inline LITHE_ABI
