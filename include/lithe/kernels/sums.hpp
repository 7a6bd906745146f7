#pragma once

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI::detail {

/// So many terms go into one accumulator; then its sum is closed and added to the sums before. The error of one chain
/// grows with the number n of terms, that of closed sums with longest_sum + n / longest_sum: in float 3e-5 instead of
/// 1e-2 for a million equal terms.
inline constexpr index_t longest_sum = 512;

}  // namespace lithe::inline LITHE_ABI::detail
