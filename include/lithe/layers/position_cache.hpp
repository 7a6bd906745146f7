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
  /// Forgets all but the first n tokens of a slot. Throws index_error for a slot or a length that is not there; then
  /// nothing has changed.
  void truncate(const char* who, index_t slot, index_t n) {
    check_length(who, slot, n);
    length[static_cast<std::size_t>(slot)] = n;
  }
  /// Slot i becomes what slot order[i] was. Throws shape_error or index_error for an order that is not one; then
  /// nothing has changed.
  void permute(const char* who, std::span<const index_t> order) {
    require<shape_error>(order.size() == length.size(), who, ": expected an order of ", length.size(), " slots, got ", order.size());
    for (const index_t from : order) check_slot(who, from);
    old_length.swap(length);
    for (std::size_t i = 0; i < order.size(); ++i) length[i] = old_length[static_cast<std::size_t>(order[i])];
  }
  /// Throws index_error unless the slot is there.
  void check_slot(const char* who, index_t slot) const {
    require<index_error>(slot >= 0 && slot < static_cast<index_t>(length.size()), who, ": expected a slot below ", length.size(), ", got ", slot);
  }
  /// Throws index_error unless the slot is there and holds n tokens or more.
  void check_length(const char* who, index_t slot, index_t n) const {
    check_slot(who, slot);
    require<index_error>(n >= 0 && n <= tokens(slot), who, ": expected to keep 0 to ", tokens(slot), " tokens of slot ",
                         slot, ", got ", n);
  }
};

/// A cache whose slots keep what they hold in places that they change for one another, so that `permute` copies as
/// little as it can.
///
/// For a layer that looks back a window at a time, a place has `room` for fewer tokens than `capacity`: of a longer
/// text it keeps what the next token sees, and what a token up to `reserve` places before it would. Rows are moved to
/// the front of their place when it is full, which costs less than one row for each that comes in.
struct placed_cache : position_cache {
  static constexpr index_t reserve = 64;  ///< tokens by which `truncate` can always go back

  index_t chunk = 1, before = 0;   ///< the token at position p sees those from (p / chunk - before) chunk on
  index_t room = 0;                ///< rows of a place
  std::vector<index_t> place;      ///< where the slot's rows stand
  std::vector<index_t> first;      ///< the oldest token that a slot keeps, in row 0 of its place
  std::vector<index_t> old_place;  // as old_length
  std::vector<index_t> old_first;

  placed_cache() = default;
  /// Empty slots that keep all of their tokens, slot i in place i; throws as position_cache does.
  placed_cache(const char* who, index_t slots, index_t tokens_in_slot)
      : placed_cache(who, slots, tokens_in_slot, 1, tokens_in_slot) {}
  /// Empty slots for a window of `before` chunks and a token's own one.
  placed_cache(const char* who, index_t slots, index_t tokens_in_slot, index_t chunk_, index_t before_)
      : position_cache(who, slots, tokens_in_slot), chunk(chunk_), before(before_) {
    const index_t window = before >= capacity / chunk ? capacity : (before + 1) * chunk;
    room = std::min(capacity, 2 * (window + reserve));
    place.resize(length.size());
    for (index_t s = 0; s < slots; ++s) place[static_cast<std::size_t>(s)] = s;
    old_place = place;
    first.assign(length.size(), 0);
    old_first = first;
  }

  /// The oldest token that one at `position` sees.
  [[nodiscard]] index_t oldest(index_t position) const {
    return std::max<index_t>(0, position / chunk - before) * chunk;
  }
  /// Makes room for n new rows of a slot, or as many of them as a place can take, at least one; how many. move(place,
  /// from, rows) brings that many rows of a place, from row `from` on, to its front.
  template <class Move>
  [[nodiscard]] index_t make_room(index_t slot, index_t n, Move&& move) {
    const index_t now = tokens(slot);
    index_t& begin = first[static_cast<std::size_t>(slot)];
    const index_t keep = oldest(std::max<index_t>(0, now - reserve));
    if (now - begin + n > room && keep > begin) {
      move(place[static_cast<std::size_t>(slot)], keep - begin, now - keep);
      begin = keep;
    }
    return std::min(n, room - (now - begin));
  }
  /// The shortest length but 0 that `truncate` can cut a slot to: what the next token sees must be there.
  [[nodiscard]] index_t least_length(const char* who, index_t slot) const {
    check_slot(who, slot);
    const index_t begin = first[static_cast<std::size_t>(slot)];
    return begin == 0 ? 0 : begin + before * chunk;
  }
  /// Forgets all but the first n tokens of a slot. Throws index_error, also for an n above 0 that lies before what a
  /// window keeps; then nothing has changed.
  void truncate(const char* who, index_t slot, index_t n) {
    check_length(who, slot, n);
    require<index_error>(n == 0 || n >= least_length(who, slot), who, ": slot ", slot,
                         " keeps its window of the last tokens: expected to keep 0 or ", least_length(who, slot),
                         " to ", tokens(slot), " tokens, got ", n);
    length[static_cast<std::size_t>(slot)] = n;
    if (n == 0) first[static_cast<std::size_t>(slot)] = 0;
  }
  /// Slot i becomes what slot order[i] was; copy(from place, to place, rows) for what is wanted more than once.
  template <class Copy>
  void permute(const char* who, std::span<const index_t> order, Copy&& copy) {
    position_cache::permute(who, order);
    old_first.swap(first);
    for (std::size_t i = 0; i < order.size(); ++i) first[i] = old_first[static_cast<std::size_t>(order[i])];
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
      copy(from, place[i], std::min(length[i], room));
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
