#pragma once

#include <algorithm>
#include <vector>

#include "lithe/core/context.hpp"

namespace lithe::inline LITHE_ABI {

/// How many tokens each slot of a cache holds, up to `capacity`: all that a layer keeps which only asks where a token stands, and what
/// `placed_cache` builds on.
struct position_cache {
  index_t capacity = 0;
  std::vector<index_t> length;      ///< tokens in each slot
  std::vector<index_t> old_length;  // `permute` needs them and must not allocate
  std::vector<std::uint8_t> used;

  position_cache() = default;
  /// Empty slots of so many tokens each. Throws config_error in the name of `who` for a size below 0 or from 2^31 on.
  position_cache(const char* who, index_t slots, index_t capacity_) : capacity(capacity_) {
    require<config_error>(slots >= 0 && capacity >= 0 && (slots | capacity) >> 31 == 0, who,
                          ": expected a cache of 0 or more slots and tokens, each below 2^31, got ", slots, " and ", capacity);
    length.assign(static_cast<std::size_t>(slots), 0);
    old_length = length;
    used.resize(length.size());
  }

  [[nodiscard]] index_t tokens(index_t slot) const { return length[static_cast<std::size_t>(slot)]; }  ///< that a slot holds
  /// Throws, before anything has changed, unless the T new rows that ctx describes fit their slots.
  void check(const char* who, index_t T, const context& ctx) {
    ctx.rows.check(who, T);
    require<state_error>(ctx.mask.empty(), who, ": decoding takes no padding; leave the rows out");
    require<shape_error>(ctx.slots.empty() || static_cast<index_t>(ctx.slots.size()) == ctx.rows.count(), who, ": expected a slot for each of ",
                         ctx.rows.count(), " sequences, got ", ctx.slots.size());
    std::fill(used.begin(), used.end(), std::uint8_t{0});
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t slot = ctx.slot(s), n = ctx.rows.end(s, T) - ctx.rows.begin(s);
      check_slot(who, slot);
      require<state_error>(used[static_cast<std::size_t>(slot)]++ == 0, who, ": slot ", slot, " comes twice in one call");
      require<state_error>(tokens(slot) + n <= capacity, who, ": slot ", slot, " holds ", tokens(slot), " of ", capacity, " tokens; ", n,
                           " more do not fit");
    }
  }
  /// The T new rows that ctx describes are in their slots now.
  void advance(index_t T, const context& ctx) {
    for (index_t s = 0; s < ctx.rows.count(); ++s) length[static_cast<std::size_t>(ctx.slot(s))] += ctx.rows.end(s, T) - ctx.rows.begin(s);
  }
  /// Forgets all but the first n tokens of a slot.
  void truncate(const char* who, index_t slot, index_t n) {
    check_slot(who, slot);
    require<index_error>(n >= 0 && n <= tokens(slot), who, ": expected to keep 0 to ", tokens(slot), " tokens of slot ", slot, ", got ", n);
    length[static_cast<std::size_t>(slot)] = n;
  }
  /// Slot i becomes what slot order[i] was.
  void permute(const char* who, std::span<const index_t> order) {
    require<shape_error>(order.size() == length.size(), who, ": expected an order of ", length.size(), " slots, got ", order.size());
    for (const index_t from : order) check_slot(who, from);
    old_length.swap(length);
    for (std::size_t i = 0; i < order.size(); ++i) length[i] = old_length[static_cast<std::size_t>(order[i])];
  }

 private:
  void check_slot(const char* who, index_t slot) const {
    require<index_error>(slot >= 0 && slot < static_cast<index_t>(length.size()), who, ": expected a slot below ", length.size(), ", got ", slot);
  }
};

/// A cache whose slots keep what they hold in places that they change for one another, so that `permute` copies as little as it can.
struct placed_cache : position_cache {
  std::vector<index_t> place;      ///< where the slot's rows stand
  std::vector<index_t> old_place;  // as old_length

  placed_cache() = default;
  /// Empty slots, slot i in place i; throws as position_cache does.
  placed_cache(const char* who, index_t slots, index_t tokens_in_slot) : position_cache(who, slots, tokens_in_slot) {
    place.resize(length.size());
    for (index_t s = 0; s < slots; ++s) place[static_cast<std::size_t>(s)] = s;
    old_place = place;
  }
  /// Slot i becomes what slot order[i] was; copy(from place, to place, tokens) for what is wanted more than once.
  template <class Copy>
  void permute(const char* who, std::span<const index_t> order, Copy&& copy) {
    position_cache::permute(who, order);
    old_place.swap(place);
    std::fill(used.begin(), used.end(), std::uint8_t{0});
    for (const index_t from : order) used[static_cast<std::size_t>(old_place[static_cast<std::size_t>(from)])] = 1;
    std::size_t free = 0;
    // `used` is 2 once a slot has taken the place over; whoever comes later gets a copy in a place that nobody wants.
    for (std::size_t i = 0; i < order.size(); ++i) {
      const index_t from = old_place[static_cast<std::size_t>(order[i])];
      if (auto& state = used[static_cast<std::size_t>(from)]; state == 1) {
        state = 2;
        place[i] = from;
        continue;
      }
      while (used[free] != 0) ++free;
      used[free] = 2;
      place[i] = static_cast<index_t>(free);
      copy(from, place[i], length[i]);
    }
  }
};

namespace detail {

/// at[t] = the position of row t in its sequence, which goes on where its slot of the cache stands; without a cache it begins at 0. check(n)
/// hears how long each sequence then is. Throws what position_cache::check throws, or shape_error for segments that do not fit T rows, and what
/// `check` throws; then nothing has changed.
template <class I, class Check>
void find_positions(const char* who, index_t T, position_cache* c, const context& ctx, std::span<I> at, Check&& check) {
  c == nullptr ? ctx.rows.check(who, T) : c->check(who, T, ctx);
  for (index_t s = 0; s < ctx.rows.count(); ++s) {
    const index_t begin = ctx.rows.begin(s), n = ctx.rows.end(s, T) - begin;
    const index_t start = c == nullptr ? 0 : c->tokens(ctx.slot(s));
    check(start + n);
    for (index_t i = 0; i < n; ++i) at[static_cast<std::size_t>(begin + i)] = static_cast<I>(start + i);
  }
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
