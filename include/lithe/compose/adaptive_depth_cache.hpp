#pragma once

#include "lithe/compose/adaptive_depth.hpp"
#include "lithe/layers/position_cache.hpp"

// N exits, D features, t a position in a sequence
namespace lithe::inline LITHE_ABI {

namespace detail {

// A block's decode interface, with or without a memory.
template <class B>
cache_of<B> make_block_cache(const B& b, index_t slots, index_t capacity) {
  if constexpr (reads_memory<B>)
    return b.make_cache(slots, capacity);
  else
    return lithe::make_cache(b, slots, capacity);
}
template <class B>
void decode_block(const B& b, matrix_view<const typename B::scalar> x, const memory_of<B>& m, matrix_view<typename B::scalar> y, cache_of<B>& c,
                  const context& ctx) {
  if constexpr (reads_memory<B>)
    b.decode(x, m, y, c, ctx);
  else
    lithe::decode(b, x, y, c, ctx);
}
template <class B>
void fill_block(const B& b, matrix_view<const typename B::scalar> x, cache_of<B>& c, const context& ctx) {
  if constexpr (reads_memory<B>)
    b.fill(x, c, ctx);
  else
    lithe::fill(b, x, c, ctx);
}
template <class B>
void truncate_block(const B& b, cache_of<B>& c, index_t slot, index_t length) {
  if constexpr (reads_memory<B>)
    b.truncate(c, slot, length);
  else
    lithe::truncate(b, c, slot, length);
}
template <class B>
void permute_block(const B& b, cache_of<B>& c, std::span<const index_t> order) {
  if constexpr (reads_memory<B>)
    b.permute(c, order);
  else
    lithe::permute(b, c, order);
}

}  // namespace detail

/// What decoding with exits remembers of each slot. Block n has the keys and values of the first filled[n-1][slot] positions, and every later
/// position left below n, so that its input to block n is its exit state: the keys and values can be made when somebody first needs them.
template <class Block>
struct adaptive_cache : placed_cache {
  using S = typename Block::scalar;
  std::vector<cache_of<Block>> blocks;       ///< of each depth
  std::vector<std::vector<index_t>> filled;  ///< [N][slots]
  matrix<S> states;                          ///< row place * capacity + t: the state with which position t left
  std::vector<index_t> start;                ///< of each slot: the positions of its `length` that belong to the prompt
  index_t projected = 0, visited = 0;        ///< rows of keys and values made, rows that went through a block

  /// How many sequences there is room for.
  [[nodiscard]] index_t slots() const { return static_cast<index_t>(length.size()); }
  /// The exit states of positions t .. t + n - 1 of a slot, [n x D].
  [[nodiscard]] matrix_view<S> state(index_t slot, index_t t, index_t n) {
    return matrix_view<S>(states).slice_rows(place[static_cast<std::size_t>(slot)] * capacity + t, n);
  }
  /// How many positions of a slot block n, from 1, has the keys and values of.
  [[nodiscard]] index_t& filled_to(index_t n, index_t slot) { return filled[static_cast<std::size_t>(n - 1)][static_cast<std::size_t>(slot)]; }
};

/// A cache for `slots` sequences of up to `capacity` tokens; slot s reads sequence s of a memory, if the blocks need one. Throws config_error for
/// a model whose parts are of different numbers of exits.
template <class Block, class Norm>
[[nodiscard]] adaptive_cache<Block> make_adaptive_cache(const adaptive_depth<Block, Norm>& model, index_t slots, index_t capacity) {
  model.check();
  adaptive_cache<Block> c{{"adaptive_cache", slots, capacity}, {}, {}, {}, {}};
  for (index_t n = 1; n <= model.exits(); ++n) c.blocks.push_back(detail::make_block_cache(model.stack.block(n), slots, capacity));
  c.filled.assign(c.blocks.size(), std::vector<index_t>(static_cast<std::size_t>(slots), 0));
  c.states.resize(slots * capacity, model.features());
  c.start = c.length;
  return c;
}

/// Says which sequence of the memory each slot reads, before the first step with that memory.
template <class Block, class Norm>
void start_memory(const adaptive_depth<Block, Norm>& model, const detail::memory_of<Block>& m, std::span<const index_t> source,
                  adaptive_cache<Block>& c) {
  if constexpr (detail::reads_memory<Block>)
    for (index_t n = 1; n <= model.exits(); ++n) model.stack.block(n).start(m, source, c.blocks[static_cast<std::size_t>(n - 1)]);
}

namespace detail {

template <class Block, class Norm>
void check_exits(const adaptive_depth<Block, Norm>& model, const adaptive_cache<Block>& c) {
  require<state_error>(static_cast<index_t>(c.blocks.size()) == model.exits() && c.states.cols() == model.features(),
                       "adaptive_cache: the cache is of another model: expected ", model.exits(),
                       " exits and states of ", model.features(), " features, got ", c.blocks.size(), " and ",
                       c.states.cols());
}
/// Block n keeps the first `count` positions of a slot alone; one that threw may hold more than were counted.
template <class Block, class Norm>
void keep_filled(const adaptive_depth<Block, Norm>& model, adaptive_cache<Block>& c, index_t n, index_t slot, index_t count) {
  truncate_block(model.stack.block(n), c.blocks[static_cast<std::size_t>(n - 1)], slot, count);
  c.filled_to(n, slot) = count;
}

}  // namespace detail

/// The shortest length but 0 that `truncate` can cut a slot to: above 0 only if blocks keep windows of their tokens.
template <class Block, class Norm>
[[nodiscard]] index_t least_length(const adaptive_depth<Block, Norm>& model, const adaptive_cache<Block>& c,
                                   index_t slot) {
  c.check_slot("adaptive_cache", slot);
  index_t least = 0;
  for (index_t n = 1; n <= model.exits(); ++n)
    least = std::max(least, lithe::least_length(model.stack.block(n), c.blocks[static_cast<std::size_t>(n - 1)], slot));
  return least;
}

/// Forgets all but the first `length` positions of a slot. Throws index_error for a slot or a length that is not there,
/// state_error for a cache of another number of exits; then nothing has changed.
template <class Block, class Norm>
void truncate(const adaptive_depth<Block, Norm>& model, adaptive_cache<Block>& c, index_t slot, index_t length) {
  detail::check_exits(model, c);
  c.check_length("adaptive_cache", slot, length);
  detail::check_cut("adaptive_cache", least_length(model, c, slot), slot, length);
  for (index_t n = 1; n <= model.exits(); ++n) detail::keep_filled(model, c, n, slot, std::min(c.filled_to(n, slot), length));
  c.truncate("adaptive_cache", slot, length);
  auto& start = c.start[static_cast<std::size_t>(slot)];
  start = std::min(start, length);
}

/// Slot i becomes what slot order[i] was (beam search). Throws shape_error or index_error for an order that is not one,
/// state_error for a cache of another number of exits; then nothing has changed.
template <class Block, class Norm>
void permute(const adaptive_depth<Block, Norm>& model, adaptive_cache<Block>& c, std::span<const index_t> order, const context& ctx = {}) {
  detail::check_exits(model, c);
  c.permute("adaptive_cache", order, [&](index_t from, index_t to, index_t n) {
    c.states.middleRows(to * c.capacity, n) = c.states.middleRows(from * c.capacity, n);
  });
  for (index_t n = 1; n <= model.exits(); ++n) detail::permute_block(model.stack.block(n), c.blocks[static_cast<std::size_t>(n - 1)], order);
  const scratch<index_t> before(ctx, c.slots());
  const auto reorder = [&](std::vector<index_t>& numbers) {
    std::copy(numbers.begin(), numbers.end(), before.data());
    for (std::size_t i = 0; i < order.size(); ++i) numbers[i] = before[order[i]];
  };
  for (auto& f : c.filled) reorder(f);
  reorder(c.start);
}

namespace detail {

/// The keys and values of block n for all positions of these slots that have none yet, in one product.
template <class Block, class Norm>
void fill_pending(const adaptive_depth<Block, Norm>& model, index_t n, std::span<const index_t> slots, adaptive_cache<Block>& c, const context& ctx) {
  const auto B = static_cast<index_t>(slots.size());
  const scratch<index_t> offsets(ctx, B + 1), who(ctx, B);
  index_t count = 0;
  offsets[0] = 0;
  for (const index_t s : slots)
    if (const index_t missing = c.length[static_cast<std::size_t>(s)] - c.filled_to(n, s); missing > 0) {
      who[count++] = s;
      offsets[count] = offsets[count - 1] + missing;
    }
  if (count == 0) return;
  const index_t total = offsets[count];
  const scratch<typename Block::scalar> rows(ctx, total, c.states.cols());
  for (index_t i = 0; i < count; ++i) {
    const index_t rows_of_slot = offsets[i + 1] - offsets[i];
    rows.view().slice_rows(offsets[i], rows_of_slot).map() = c.state(who[i], c.filled_to(n, who[i]), rows_of_slot).map();
  }
  context inner = ctx.child(static_cast<std::uint64_t>(n - 1));
  inner.rows = {offsets.span().first(static_cast<std::size_t>(count) + 1)};
  inner.slots = who.span().first(static_cast<std::size_t>(count));
  fill_block<Block>(model.stack.block(n), rows, c.blocks[static_cast<std::size_t>(n - 1)], inner);
  for (index_t i = 0; i < count; ++i) c.filled_to(n, who[i]) += offsets[i + 1] - offsets[i];
  c.projected += total;
}

/// Takes back what a call that failed has added to these slots beyond their lengths. A slot of whose window too much is
/// gone is emptied.
template <class Block, class Norm>
void roll_back(const adaptive_depth<Block, Norm>& model, std::span<const index_t> slots, adaptive_cache<Block>& c) {
  for (const index_t s : slots) {
    const index_t length = c.tokens(s);
    lithe::truncate(model, c, s, length >= least_length(model, c, s) ? length : 0);
  }
}

template <class Block>
void check_room(const char* who, const adaptive_cache<Block>& c, index_t rows, const context& ctx) {
  ctx.rows.check(who, rows);
  require<shape_error>(ctx.slots.empty() || static_cast<index_t>(ctx.slots.size()) == ctx.rows.count(), who,
                       ": expected a slot for each of ", ctx.rows.count(), " sequences, got ", ctx.slots.size());
  for (index_t i = 0; i < ctx.rows.count(); ++i) {
    const index_t s = ctx.slot(i), n = ctx.rows.end(i, rows) - ctx.rows.begin(i);
    c.check_slot(who, s);
    if (c.length[static_cast<std::size_t>(s)] + n > c.capacity)
      throw std::length_error(
          concat(who, ": slot ", s, " holds ", c.length[static_cast<std::size_t>(s)], " of ", c.capacity, " tokens; ", n, " more do not fit"));
  }
}

}  // namespace detail

/// Leads new rows x [R x D] of some slots (ctx.rows, ctx.slots) through blocks `first` .. `last`, from 1, and into
/// their caches; y [R x D] is the output of the last. The lengths of the slots stay: whoever has been through all
/// blocks calls `advance`. Throws std::length_error when a slot is full; then, and if a block throws, the slots are as
/// they were before (one that has lost too much of a window on the way is emptied).
template <class Block, class Norm>
void decode_blocks(const adaptive_depth<Block, Norm>& model, index_t first, index_t last, matrix_view<const typename Block::scalar> x,
                   const detail::memory_of<Block>& m, matrix_view<typename Block::scalar> y, adaptive_cache<Block>& c, const context& ctx) {
  using S = typename Block::scalar;
  detail::check_exits(model, c);
  detail::check_room("adaptive_depth", c, x.rows(), ctx);
  const index_t B = ctx.rows.count();
  const scratch<index_t> slots(ctx, B), before(ctx, (last - first + 1) * B);
  for (index_t i = 0; i < B; ++i) slots[i] = ctx.slot(i);
  for (index_t n = first; n <= last; ++n)
    for (index_t i = 0; i < B; ++i) before[(n - first) * B + i] = c.filled_to(n, slots[i]);
  const scratch<S> in(ctx, x.rows(), x.cols());
  copy<S>(x, in, ctx);
  try {
    for (index_t n = first; n <= last; ++n) {
      detail::fill_pending(model, n, slots.span(), c, ctx);
      detail::decode_block(model.stack.block(n), matrix_view<const S>(in), m, y, c.blocks[static_cast<std::size_t>(n - 1)],
                           ctx.child(static_cast<std::uint64_t>(n - 1)));
      for (index_t i = 0; i < B; ++i) c.filled_to(n, slots[i]) += ctx.rows.end(i, x.rows()) - ctx.rows.begin(i);
      c.visited += x.rows();
      c.projected += x.rows();
      if (n < last) copy<S>(y, in, ctx);
    }
  } catch (...) {
    for (index_t i = 0; i < B; ++i) {
      const index_t least = least_length(model, c, slots[i]);
      bool kept = true;
      for (index_t n = first; n <= last; ++n) kept = kept && before[(n - first) * B + i] >= least;
      for (index_t n = first; kept && n <= last; ++n)
        detail::keep_filled(model, c, n, slots[i], before[(n - first) * B + i]);
      if (!kept) truncate(model, c, slots[i], 0);
    }
    throw;
  }
}

/// Appends the states y [R x D] with which new rows left to the lengths of their slots.
template <class Block>
void advance(matrix_view<const typename Block::scalar> y, adaptive_cache<Block>& c, const context& ctx) {
  for (index_t i = 0; i < ctx.rows.count(); ++i) {
    const index_t s = ctx.slot(i), begin = ctx.rows.begin(i), n = ctx.rows.end(i, y.rows()) - begin;
    auto& length = c.length[static_cast<std::size_t>(s)];
    c.state(s, length, n).map() = y.slice_rows(begin, n).map();
    length += n;
  }
}

/// Takes a prompt in: all of its rows x [R x D] through all blocks.
template <class Block, class Norm>
void prefill(const adaptive_depth<Block, Norm>& model, matrix_view<const typename Block::scalar> x, const detail::memory_of<Block>& m,
             adaptive_cache<Block>& c, const context& ctx) {
  const scratch<typename Block::scalar> y(ctx, x.rows(), x.cols());
  decode_blocks(model, 1, model.exits(), x, m, y.view(), c, ctx);
  advance<Block>(y, c, ctx);
  for (index_t i = 0; i < ctx.rows.count(); ++i)
    if (ctx.rows.end(i, x.rows()) > ctx.rows.begin(i)) c.start[static_cast<std::size_t>(ctx.slot(i))] = c.length[static_cast<std::size_t>(ctx.slot(i))];
}

}  // namespace lithe::inline LITHE_ABI
