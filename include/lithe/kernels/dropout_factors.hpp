#pragma once

#include <algorithm>

#include "lithe/core/random.hpp"

namespace lithe::inline LITHE_ABI {

/// Dropout of softmax weights, which are never stored: factors[j] = 0 with probability `rate`, else 1 / (1 - rate), for element first + j
/// of a row, j < n. A function of key, row and first + j alone: word (first + j) % 4 of philox(key, (first + j) / 4, row).
template <class S>
void draw_factors(rng_key key, std::uint64_t row, std::uint64_t first, index_t n, double rate, S* factors) {
  constexpr std::size_t blocks = 16;  // counters side by side, so that the rounds of Philox fill whole vectors
  const auto threshold = static_cast<std::uint64_t>(rate * 0x1p32);
  const S scale = static_cast<S>(1 / (1 - rate));
  std::uint32_t c[4][blocks];
  std::uint64_t skip = first % 4;
  for (std::uint64_t block = first / 4; n > 0; block += blocks) {
    for (std::size_t b = 0; b < blocks; ++b) {
      c[0][b] = static_cast<std::uint32_t>(block + b);
      c[1][b] = static_cast<std::uint32_t>((block + b) >> 32);
      c[2][b] = static_cast<std::uint32_t>(row);
      c[3][b] = static_cast<std::uint32_t>(row >> 32);
    }
    auto k0 = static_cast<std::uint32_t>(key.value), k1 = static_cast<std::uint32_t>(key.value >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9U, k1 += 0xBB67AE85U)
      for (std::size_t b = 0; b < blocks; ++b) {
        const std::uint64_t x = 0xD2511F53ULL * c[0][b], y = 0xCD9E8D57ULL * c[2][b];
        c[0][b] = static_cast<std::uint32_t>(y >> 32) ^ c[1][b] ^ k0;
        c[1][b] = static_cast<std::uint32_t>(y);
        c[2][b] = static_cast<std::uint32_t>(x >> 32) ^ c[3][b] ^ k1;
        c[3][b] = static_cast<std::uint32_t>(x);
      }
    const auto here = std::min<std::uint64_t>(static_cast<std::uint64_t>(n), 4 * blocks - skip);
    for (std::uint64_t j = 0; j < here; ++j) factors[j] = c[(skip + j) % 4][(skip + j) / 4] < threshold ? S(0) : scale;
    factors += here;
    n -= static_cast<index_t>(here);
    skip = 0;
  }
}

}  // namespace lithe::inline LITHE_ABI
