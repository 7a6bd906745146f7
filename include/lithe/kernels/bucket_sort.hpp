#pragma once

#include <numeric>
#include <span>
#include <utility>

#include "lithe/kernels/hashing.hpp"

namespace lithe::inline LITHE_ABI {

/// The number of a token in its sequence. Four bytes, because a head holds an order of all tokens for each round.
using position_t = std::int32_t;

/// Sorts positions by (bucket, position): a stable counting sort, O(T + B) for T tokens and B buckets.
///
/// ids [T], each below B; order [T] receives the positions; starts [B + 1] receives where each bucket begins in it, starts[B] = T.
/// Throws index_error if an id is not below B (nothing is written then), shape_error for 2^31 tokens or more.
inline void bucket_sort(std::span<const bucket_t> ids, std::span<index_t> starts, std::span<position_t> order) {
  LITHE_ASSERT(order.size() == ids.size() && !starts.empty());
  require<shape_error>(ids.size() >> 31 == 0, "bucket_sort: expected fewer than 2^31 tokens, got ", ids.size());
  const std::size_t buckets = starts.size() - 1;
  if (const auto largest = std::max_element(ids.begin(), ids.end()); largest != ids.end())
    require<index_error>(*largest < buckets, "bucket_sort: expected bucket ids below ", buckets, ", got ", *largest);
  std::fill(starts.begin(), starts.end(), index_t{0});
  for (const bucket_t id : ids) ++starts[id];
  std::exclusive_scan(starts.begin(), starts.end(), starts.begin(), index_t{0});
  for (std::size_t t = 0; t < ids.size(); ++t) order[static_cast<std::size_t>(starts[ids[t]]++)] = static_cast<position_t>(t);
  // Each start has moved to the end of its bucket, which is where the next one begins.
  std::copy_backward(starts.begin(), starts.end() - 1, starts.end());
  starts.front() = 0;
}

}  // namespace lithe::inline LITHE_ABI
