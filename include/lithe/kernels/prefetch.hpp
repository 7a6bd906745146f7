#pragma once

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI::detail {

inline constexpr index_t line_bytes = 64;  ///< of a cache

/// Asks for `Bytes` from p on in the nearest cache.
template <index_t Bytes>
void prefetch(const void* p) {
#pragma GCC unroll 16
  for (index_t b = 0; b < Bytes; b += line_bytes) __builtin_prefetch(static_cast<const char*>(p) + b);
}

}  // namespace lithe::inline LITHE_ABI::detail
