#pragma once

#include <algorithm>

#include "lithe/core/random.hpp"

#if defined(LITHE_AVX512)
#include <immintrin.h>
#endif

namespace lithe::inline LITHE_ABI {

namespace detail {

inline constexpr std::size_t philox_blocks = 16;  // counters side by side, so that the rounds of Philox fill whole vectors

// philox_words: words[4 b + w] = word w of philox(key, block + b, row) for b < philox_blocks.
#if defined(LITHE_AVX512)
// Eight counters a register, in the low halves of its 64-bit numbers; what the high halves hold is never read.
inline void philox_words(rng_key key, std::uint64_t block, std::uint64_t row, std::uint32_t* words) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i first = _mm512_set1_epi64(static_cast<long long>(block)), step = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i c[2][4];
  for (int half = 0; half < 2; ++half) {
    c[half][0] = _mm512_add_epi64(first, _mm512_add_epi64(step, _mm512_set1_epi64(8 * half)));
    c[half][1] = _mm512_srli_epi64(c[half][0], 32);
    c[half][2] = _mm512_set1_epi64(static_cast<long long>(row));
    c[half][3] = _mm512_srli_epi64(c[half][2], 32);
  }
  auto k0 = static_cast<std::uint32_t>(key.value), k1 = static_cast<std::uint32_t>(key.value >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9U, k1 += 0xBB67AE85U)
    for (auto& half : c) {
      const __m512i x = _mm512_mul_epu32(half[0], m0), y = _mm512_mul_epu32(half[2], m1);
      half[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(y, 32), half[1], _mm512_set1_epi64(k0), 0x96);
      half[1] = y;
      half[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(x, 32), half[3], _mm512_set1_epi64(k1), 0x96);
      half[3] = x;
    }
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  for (int half = 0; half < 2; ++half) {
    const __m512i front = _mm512_mask_blend_epi32(0xAAAA, c[half][0], _mm512_slli_epi64(c[half][1], 32));
    const __m512i back = _mm512_mask_blend_epi32(0xAAAA, c[half][2], _mm512_slli_epi64(c[half][3], 32));
    _mm512_storeu_si512(words + 32 * half, _mm512_permutex2var_epi64(front, low, back));
    _mm512_storeu_si512(words + 32 * half + 16, _mm512_permutex2var_epi64(front, high, back));
  }
}
#else
inline void philox_words(rng_key key, std::uint64_t block, std::uint64_t row, std::uint32_t* words) {
  std::uint32_t c[4][philox_blocks];
  for (std::size_t b = 0; b < philox_blocks; ++b) {
    c[0][b] = static_cast<std::uint32_t>(block + b);
    c[1][b] = static_cast<std::uint32_t>((block + b) >> 32);
    c[2][b] = static_cast<std::uint32_t>(row);
    c[3][b] = static_cast<std::uint32_t>(row >> 32);
  }
  auto k0 = static_cast<std::uint32_t>(key.value), k1 = static_cast<std::uint32_t>(key.value >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9U, k1 += 0xBB67AE85U)
    for (std::size_t b = 0; b < philox_blocks; ++b) {
      const std::uint64_t x = 0xD2511F53ULL * c[0][b], y = 0xCD9E8D57ULL * c[2][b];
      c[0][b] = static_cast<std::uint32_t>(y >> 32) ^ c[1][b] ^ k0;
      c[1][b] = static_cast<std::uint32_t>(y);
      c[2][b] = static_cast<std::uint32_t>(x >> 32) ^ c[3][b] ^ k1;
      c[3][b] = static_cast<std::uint32_t>(x);
    }
  for (std::size_t b = 0; b < philox_blocks; ++b)
    for (std::size_t w = 0; w < 4; ++w) words[4 * b + w] = c[w][b];
}
#endif

}  // namespace detail

/// Dropout factors: factors[j] = 0 with probability `rate`, else 1 / (1 - rate), for element first + j of a row, j < n. A function of
/// key, row and first + j alone: word (first + j) % 4 of philox(key, (first + j) / 4, row).
template <class S>
void draw_factors(rng_key key, std::uint64_t row, std::uint64_t first, index_t n, double rate, S* factors) {
  const auto threshold = static_cast<std::uint64_t>(rate * 0x1p32);
  if (threshold > 0xFFFFFFFFU) return void(std::fill_n(factors, n, S(0)));
  const auto below = static_cast<std::uint32_t>(threshold);
  const S scale = static_cast<S>(1 / (1 - rate));
  alignas(64) std::uint32_t words[4 * detail::philox_blocks];
  index_t skip = static_cast<index_t>(first % 4);
  for (std::uint64_t block = first / 4; n > 0; block += detail::philox_blocks) {
    detail::philox_words(key, block, row, words);
    const index_t here = std::min<index_t>(n, static_cast<index_t>(4 * detail::philox_blocks) - skip);
    for (index_t j = 0; j < here; ++j) factors[j] = words[skip + j] < below ? S(0) : scale;
    factors += here;
    n -= here;
    skip = 0;
  }
}

}  // namespace lithe::inline LITHE_ABI
