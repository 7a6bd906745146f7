#pragma once

#include <algorithm>
#include <vector>

#include "lithe/core/context.hpp"

namespace lithe::inline LITHE_ABI {

/// The cache of a layer that only needs to know where a token stands: how many tokens each slot holds.
struct position_cache {
  std::vector<index_t> lengths;

  /// The T new rows that ctx describes are in their slots now.
  void advance(index_t T, const context& ctx) {
    for (index_t s = 0; s < ctx.rows.count(); ++s) lengths[static_cast<std::size_t>(ctx.slot(s))] += ctx.rows.end(s, T) - ctx.rows.begin(s);
  }
  void truncate(index_t slot, index_t length) {
    auto& n = lengths[static_cast<std::size_t>(slot)];
    n = std::min(n, length);
  }
  void permute(std::span<const index_t> order) {
    const auto before = lengths;
    for (std::size_t i = 0; i < order.size(); ++i) lengths[i] = before[static_cast<std::size_t>(order[i])];
  }
};

namespace detail {

/// at[t] = the position of row t in its sequence, which goes on where its slot of the cache stands; without a cache it begins at 0. check(n)
/// hears how long each sequence then is. Throws shape_error for segments that do not fit T rows, and what `check` throws.
template <class I, class Check>
void find_positions(const char* who, index_t T, const position_cache* c, const context& ctx, std::span<I> at, Check&& check) {
  ctx.rows.check(who, T);
  for (index_t s = 0; s < ctx.rows.count(); ++s) {
    const index_t begin = ctx.rows.begin(s), n = ctx.rows.end(s, T) - begin;
    const index_t start = c == nullptr ? 0 : c->lengths[static_cast<std::size_t>(ctx.slot(s))];
    check(start + n);
    for (index_t i = 0; i < n; ++i) at[static_cast<std::size_t>(begin + i)] = static_cast<I>(start + i);
  }
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
