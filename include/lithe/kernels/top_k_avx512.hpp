#pragma once

#include "lithe/kernels/top_k_portable.hpp"

#if defined(LITHE_AVX512)

#include <immintrin.h>

#include <bit>

// The plan of top_k.hpp for float in AVX-512: compressing lane numbers under the mask of a compare lists the survivors, and the
// popcount of such a mask is a rank.

namespace lithe::inline LITHE_ABI::detail {

inline __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
/// The first n lanes; n may be negative or above 16.
inline __mmask16 first_lanes(index_t n) { return static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<std::uint32_t>(std::clamp<index_t>(n, 0, 16)))); }
inline __m512 load_scores(const float* p, index_t n) { return _mm512_mask_loadu_ps(_mm512_set1_ps(lowest_score<float>), first_lanes(n), p); }
/// The largest or least lane. Not _mm512_reduce_* and casts: GCC 12 warns about those, in its own header.
template <class Op>
float reduce(__m512 v, Op op) {
  const __m256 x = op(_mm512_maskz_extractf32x8_ps(0xff, v, 0), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
  const __m256 y = op(x, _mm256_permute2f128_ps(x, x, 1));
  const __m256 z = op(y, _mm256_permute_ps(y, 0b01'00'11'10));
  return _mm256_cvtss_f32(op(z, _mm256_permute_ps(z, 0b10'11'00'01)));
}
inline index_t set_bits(__mmask16 m) { return std::popcount(static_cast<std::uint32_t>(m)); }

/// The words under the mask, moved together: vpcompressw, or the same in plain code for tests on machines that lack it.
inline __m512i compress_words(std::uint32_t mask, __m512i words) {
#if defined(__AVX512VBMI2__)
  return _mm512_maskz_compress_epi16(mask, words);
#else
  alignas(64) std::uint16_t in[32], out[32] = {};
  _mm512_store_si512(in, words);
  for (int m = 0; mask != 0; mask &= mask - 1) out[m++] = in[std::countr_zero(mask)];
  return _mm512_load_si512(out);
#endif
}

/// Lists the numbers of survivors, 32 scores at a time, as words. For n up to 65536.
struct word_list {
  alignas(64) std::uint16_t number[max_survivors + 64];
  // Two words a lane: 0 and 1, 2 and 3, ...
  __m512i now = _mm512_add_epi32(_mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(0x00020002)), _mm512_set1_epi32(0x00010000));

  index_t append(index_t m, __mmask16 low, __mmask16 high) {
    const std::uint32_t mask = static_cast<std::uint32_t>(low) | static_cast<std::uint32_t>(high) << 16;
    _mm512_storeu_si512(number + m, compress_words(mask, now));
    now = _mm512_add_epi16(now, _mm512_set1_epi16(32));
    return m + std::popcount(mask);
  }
  [[nodiscard]] __m512i load(index_t m) const { return _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(number + m))); }
};
/// The same as 32-bit numbers, for any n and without VBMI2.
struct number_list {
  alignas(64) std::int32_t number[max_survivors + 64];
  __m512i now = lane_numbers();

  index_t append(index_t m, __mmask16 low, __mmask16 high) {
    const __m512i next = _mm512_add_epi32(now, _mm512_set1_epi32(16));
    const index_t middle = m + set_bits(low);
    _mm512_storeu_si512(number + m, _mm512_maskz_compress_epi32(low, now));
    _mm512_storeu_si512(number + middle, _mm512_maskz_compress_epi32(high, next));
    now = _mm512_add_epi32(next, _mm512_set1_epi32(16));
    return middle + set_bits(high);
  }
  [[nodiscard]] __m512i load(index_t m) const { return _mm512_load_si512(number + m); }
};

template <int V>
float group_threshold_avx512(const float* scores, index_t n, index_t k) {
  const __m512 lowest = _mm512_set1_ps(lowest_score<float>);
  __m512 most[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) most[v] = lowest;
  index_t i = 0;
  for (; i + 16 * V <= n; i += 16 * V)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) most[v] = _mm512_max_ps(_mm512_loadu_ps(scores + i + 16 * v), most[v]);  // of a NaN and most: most
  if (i < n)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      if (i + 16 * v < n) most[v] = _mm512_max_ps(load_scores(scores + i + 16 * v, n - i - 16 * v), most[v]);
  __m512 low = _mm512_set1_ps(-lowest_score<float>), high = lowest;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    low = _mm512_mask_min_ps(low, _mm512_cmp_ps_mask(most[v], lowest, _CMP_GT_OQ), low, most[v]);
    high = _mm512_max_ps(high, most[v]);
  }
  const auto least = [](__m256 a, __m256 b) { return _mm256_min_ps(a, b); };
  const auto largest = [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); };
  return bisect_threshold(reduce(low, least), reduce(high, largest), k, [&](float t) {
    const __m512 bound = _mm512_set1_ps(t);
    index_t count = 0;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) count += set_bits(_mm512_cmp_ps_mask(most[v], bound, _CMP_GE_OQ));
    return count;
  });
}

/// Keeps the scores >= t > -infinity in the order of their indices; stops when there are too many.
template <class List>
void collect_survivors_avx512(const float* scores, index_t n, float t, survivors<float>& kept) {
  const __m512 bound = _mm512_set1_ps(t);
  List list;
  index_t m = 0, i = 0;
  for (; i + 32 <= n && m <= max_survivors; i += 32)
    m = list.append(m, _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), bound, _CMP_GE_OQ),
                    _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i + 16), bound, _CMP_GE_OQ));
  if (i < n && m <= max_survivors)
    m = list.append(m, _mm512_cmp_ps_mask(load_scores(scores + i, n - i), bound, _CMP_GE_OQ),
                    _mm512_cmp_ps_mask(load_scores(scores + std::min(n, i + 16), n - i - 16), bound, _CMP_GE_OQ));
  kept.count = m;
  if (m > max_survivors) return;
  for (index_t j = 0; j < m; j += 16) {
    const __m512i number = list.load(j);
    _mm512_store_si512(kept.index + j, number);
    _mm512_store_ps(kept.value + j, _mm512_mask_i32gather_ps(_mm512_set1_ps(lowest_score<float>), first_lanes(m - j), number, scores, 4));
  }
}

/// Writes the k first of `kept` in the order of results, given W >= kept.count / 16 and -infinity in the rest of the last packet.
template <int W>
void rank_survivors_avx512(const survivors<float>& kept, index_t k, float* values, std::int32_t* indices) {
  const index_t m = kept.count;
  __m512 all[W];
#pragma GCC unroll 16
  for (int w = 0; w < W; ++w) all[w] = load_scores(kept.value + 16 * w, m - 16 * w);
  // The rank of each survivor also takes the places behind the k-th, so that the loop has no branch.
  alignas(64) float value[16 * W];
  alignas(64) std::int32_t index[16 * W];
  index_t sum = 0;
  const auto place = [&](index_t j, index_t rank) {
    value[rank] = kept.value[j];
    index[rank] = kept.index[j];
  };
  const auto larger = [&](__m512 than) {
    index_t count = 0;
#pragma GCC unroll 16
    for (int w = 0; w + 1 < W; w += 2)
      count += std::popcount(static_cast<std::uint32_t>(_mm512_kunpackw(_mm512_cmp_ps_mask(all[w], than, _CMP_GT_OQ),
                                                                        _mm512_cmp_ps_mask(all[w + 1], than, _CMP_GT_OQ))));
    if constexpr (W % 2 == 1) count += set_bits(_mm512_cmp_ps_mask(all[W - 1], than, _CMP_GT_OQ));
    return count;
  };
  for (index_t j = 0; j < m; ++j) {
    const index_t rank = larger(_mm512_set1_ps(kept.value[j]));
    place(j, rank);
    sum += rank;
  }
  if (sum != m * (m - 1) / 2)  // equal scores: the earlier one comes first
    for (index_t j = 0; j < m; ++j) {
      const __m512 v = _mm512_set1_ps(kept.value[j]);
      index_t rank = larger(v);
      for (int w = 0; 16 * w < j; ++w) rank += set_bits(_mm512_mask_cmp_ps_mask(first_lanes(j - 16 * w), all[w], v, _CMP_EQ_OQ));
      place(j, rank);
    }
  for (index_t j = 0; j < k; j += 16) {
    const __mmask16 lanes = first_lanes(k - j);
    _mm512_mask_storeu_ps(values + j, lanes, _mm512_load_ps(value + j));
    _mm512_mask_storeu_epi32(indices + j, lanes, _mm512_load_si512(index + j));
  }
}
inline void rank_survivors_avx512(const survivors<float>& kept, index_t k, float* values, std::int32_t* indices) {
  const index_t m = kept.count;
  if (m <= 32) return rank_survivors_avx512<2>(kept, k, values, indices);
  if (m <= 48) return rank_survivors_avx512<3>(kept, k, values, indices);
  if (m <= 64) return rank_survivors_avx512<4>(kept, k, values, indices);
  if (m <= 128) return rank_survivors_avx512<8>(kept, k, values, indices);
  rank_survivors_avx512<16>(kept, k, values, indices);
}

/// False, and nothing written, where the plan does not pay.
template <class List>
bool top_k_row_avx512(const float* scores, index_t n, index_t k, float* values, std::int32_t* indices) {
  if (k > max_threshold_k) return false;
  const float t = k <= 16   ? group_threshold_avx512<4>(scores, n, k)
                  : k <= 64 ? group_threshold_avx512<8>(scores, n, k)
                            : group_threshold_avx512<16>(scores, n, k);
  if (!(t > lowest_score<float>)) return false;
  survivors<float> kept;
  collect_survivors_avx512<List>(scores, n, t, kept);
  if (kept.count > max_survivors) return false;
  rank_survivors_avx512(kept, k, values, indices);
  return true;
}
inline bool top_k_row_avx512(const float* scores, index_t n, index_t k, float* values, std::int32_t* indices) {
#if defined(__AVX512VBMI2__)
  if (n <= 65536) return top_k_row_avx512<word_list>(scores, n, k, values, indices);
#endif
  return top_k_row_avx512<number_list>(scores, n, k, values, indices);
}

}  // namespace lithe::inline LITHE_ABI::detail

#endif
