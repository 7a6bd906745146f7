#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <numbers>

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI {

/// A position in the tree of random streams. Every draw is a pure function of (key, path, index): there is no generator whose
/// state could be saved, lost or shared between threads.
struct rng_key {
  std::uint64_t value = 0;

  /// The key of the i-th child (SplitMix64 finaliser, so that neighbouring paths are unrelated).
  [[nodiscard]] constexpr rng_key child(std::uint64_t i) const {
    std::uint64_t z = value + 0x9e3779b97f4a7c15ULL * (i + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return {z ^ (z >> 31)};
  }
  /// Equal keys draw equal numbers.
  friend bool operator==(const rng_key&, const rng_key&) = default;
};

/// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words for one counter.
[[nodiscard]] constexpr std::array<std::uint32_t, 4> philox(rng_key key, std::uint64_t counter, std::uint64_t high = 0) {
  std::array<std::uint32_t, 4> c{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
                                 static_cast<std::uint32_t>(high), static_cast<std::uint32_t>(high >> 32)};
  auto k0 = static_cast<std::uint32_t>(key.value), k1 = static_cast<std::uint32_t>(key.value >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9U, k1 += 0xBB67AE85U) {
    const std::uint64_t a = 0xD2511F53ULL * c[0], b = 0xCD9E8D57ULL * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(a)};
  }
  return c;
}

/// The i-th uniform number in [0, 1) of a stream: 32 random bits; four neighbours share one Philox block.
[[nodiscard]] constexpr double uniform(rng_key key, std::uint64_t i) {
  return philox(key, i / 4)[i % 4] * 0x1p-32;
}

namespace detail {
/// A standard normal number from 2 x 32 bits (Box-Muller; never infinite).
[[nodiscard]] inline double normal_of(std::uint32_t a, std::uint32_t b) {
  return std::sqrt(-2.0 * std::log((a + 0.5) * 0x1p-32)) * std::cos(2.0 * std::numbers::pi * (b * 0x1p-32));
}
}  // namespace detail

/// The i-th standard normal number of a stream.
[[nodiscard]] inline double normal(rng_key key, std::uint64_t i) {
  const auto block = philox(key, i / 2);
  return detail::normal_of(block[2 * (i % 2)], block[2 * (i % 2) + 1]);
}

}  // namespace lithe::inline LITHE_ABI
