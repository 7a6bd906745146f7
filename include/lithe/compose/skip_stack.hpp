#pragma once

#include <charconv>
#include <string_view>

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

/// A block that shows a value inside of it, the tap, and takes a gradient for it. x, y and the tap are [T x D].
///
///     forward_tapped(x, y, tap, ctx)                   // inference; writes the tap, too
///     tapped(record)                                   // the tap of a recorded forward
///     backward_tapped(x, record, dy, dtap, dx, g, ctx) // dtap may be an empty view: zero
///     decode_tapped(x, y, tap, cache, ctx)             // if the block has a cache
template <class B>
concept tapped_layer = layer<B> && requires(const B b, matrix_view<const typename B::scalar> x, matrix_view<typename B::scalar> y, const record_of<B> r,
                                            gradient_of<B> g, const context& ctx) {
  b.forward_tapped(x, y, y, ctx);
  { b.tapped(r) } -> std::same_as<matrix_view<const typename B::scalar>>;
  b.backward_tapped(x, r, x, x, y, g, ctx);
};

namespace detail {

template <class B>
consteval bool explain_tapped() {
  static_assert(tapped_layer<B>, "lithe: a skip unit reads a value inside a block, so a skip_stack needs blocks with forward_tapped, tapped and "
                                 "backward_tapped, such as `tapped_block`; a reversible block keeps nothing inside that a unit could read.");
  return true;
}

}  // namespace detail

/// The block of a pre-norm Transformer: h = mix(x), tap = norm(h), y = h + feed(tap). Mix holds its own residual connection. A memory as
/// `Feed` stands in place of the feed-forward; one that a skip_stack has read and join at this block runs beside it.
template <layer Mix, layer Norm, layer Feed>
struct tapped_block {
  using scalar = typename Mix::scalar;
  using S = scalar;
  struct record {
    record_of<Mix> mix;
    record_of<Norm> norm;
    record_of<Feed> feed;
    matrix<S> h, tap;
  };
  struct gradient {
    gradient_of<Mix> mix;
    gradient_of<Norm> norm;
    gradient_of<Feed> feed;
  };
  struct cache {
    cache_of<Mix> mix;
    cache_of<Feed> feed;
  };
  static constexpr bool looks_across = looks_across_tokens<Mix> || looks_across_tokens<Feed>;

  Mix mix;
  Norm norm;
  Feed feed;

  shape output_shape(matrix_view<const S> x) const { return mix.output_shape(x); }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    const scratch<S> tap(ctx, x.rows(), x.cols());
    forward_tapped(x, y, tap, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward("tapped_block", *this, x, y, ctx);
    r.h.resize(x.rows(), x.cols());
    r.tap.resize(x.rows(), x.cols());
    mix.forward(x, r.h, r.mix, ctx.child(0));
    norm.forward(r.h, r.tap, r.norm, ctx.child(1));
    feed.forward(r.tap, y, r.feed, ctx.child(2));
    add<S>(r.h, y, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    backward_tapped(x, r, dy, {}, dx, g, ctx);
  }
  void forward_tapped(matrix_view<const S> x, matrix_view<S> y, matrix_view<S> tap, const context& ctx) const {
    check_forward("tapped_block", *this, x, y, ctx);
    const scratch<S> h(ctx, x.rows(), x.cols());
    mix.forward(x, h, ctx.child(0));
    norm.forward(h, tap, ctx.child(1));
    feed.forward(tap, y, ctx.child(2));
    add<S>(h, y, ctx);
  }
  [[nodiscard]] matrix_view<const S> tapped(const record& r) const { return r.tap; }
  void backward_tapped(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<const S> dtap, matrix_view<S> dx, gradient& g,
                       const context& ctx) const {
    check_backward("tapped_block", *this, x, dy, dx, g, ctx);
    for (const matrix<S>* m : {&r.h, &r.tap}) recorded("tapped_block", *m, x.rows(), x.cols());
    if (dtap.data() != nullptr) require_shape("tapped_block", "dtap", dtap, x.rows(), x.cols());
    const scratch<S> d(ctx, x.rows(), x.cols()), dh(ctx, x.rows(), x.cols());
    feed.backward(r.tap, r.feed, dy, d, g.feed, ctx.child(2));
    if (dtap.data() != nullptr) add<S>(dtap, d, ctx);
    norm.backward(r.h, r.norm, d, dh, g.norm, ctx.child(1));
    add<S>(dy, dh, ctx);
    mix.backward(x, r.mix, dh, dx, g.mix, ctx.child(0));
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return {lithe::make_cache(mix, slots, capacity), lithe::make_cache(feed, slots, capacity)};
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const scratch<S> tap(ctx, x.rows(), x.cols());
    decode_tapped(x, y, tap, c, ctx);
  }
  void decode_tapped(matrix_view<const S> x, matrix_view<S> y, matrix_view<S> tap, cache& c, const context& ctx) const {
    check_decode("tapped_block", *this, x, y);
    const scratch<S> h(ctx, x.rows(), x.cols());
    lithe::decode(mix, x, h.view(), c.mix, ctx.child(0));
    norm.forward(h, tap, ctx.child(1));
    lithe::decode(feed, tap, y, c.feed, ctx.child(2));
    add<S>(h, y, ctx);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    if constexpr (cached_layer<Feed>) {
      const scratch<S> h(ctx, x.rows(), x.cols()), tap(ctx, x.rows(), x.cols());
      lithe::decode(mix, x, h.view(), c.mix, ctx.child(0));
      norm.forward(h, tap, ctx.child(1));
      lithe::fill(feed, tap.view(), c.feed, ctx.child(2));
    } else {
      lithe::fill(mix, x, c.mix, ctx.child(0));
    }
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    return std::max(lithe::least_length(mix, c.mix, slot), lithe::least_length(feed, c.feed, slot));
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("tapped_block", least_length(c, slot), slot, length);
    lithe::truncate(mix, c.mix, slot, length);
    lithe::truncate(feed, c.feed, slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    lithe::permute(mix, c.mix, order);
    lithe::permute(feed, c.feed, order);
  }

  [[nodiscard]] cost forward_cost(index_t length) const { return cost_of(mix, length) + cost_of(norm, length) + cost_of(feed, length); }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("mix", s.mix...);
    f("norm", s.norm...);
    f("feed", s.feed...);
  }
};

/// A unit reads the tap of block `read`, its output joins after block `join`; both from 0.
struct skip_range {
  index_t read = 0, join = 0;
  /// Whether both read and join at the same blocks.
  friend bool operator==(const skip_range&, const skip_range&) = default;
};

/// Throws config_error unless 0 <= read <= join < blocks for every range and no block is read twice. Ranges may overlap.
inline void check_skip_ranges(std::span<const skip_range> ranges, index_t blocks) {
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const auto [read, join] = ranges[i];
    require<config_error>(read >= 0 && join >= 0 && read < blocks && join < blocks, "skip ranges: block ", read < 0 || read >= blocks ? read : join,
                          " of range ", read, ":", join, " (counted from 0) is outside the ", blocks, " blocks");
    require<config_error>(read <= join, "skip ranges: range ", read, ":", join, " joins before the block that it reads");
    for (std::size_t j = 0; j < i; ++j) require<config_error>(ranges[j].read != read, "skip ranges: block ", read, " is read twice");
  }
}

/// The ranges of a text like "3:7/8:12" (read:join, counted from `first`: 1 as in the paper, 0 as in its authors' code), or "full": a unit
/// beside the feed-forward of every block. Throws config_error for anything else and for what `check_skip_ranges` refuses.
[[nodiscard]] inline std::vector<skip_range> parse_skip_ranges(std::string_view text, index_t blocks, index_t first) {
  std::vector<skip_range> ranges;
  if (text == "full") {
    for (index_t i = 0; i < blocks; ++i) ranges.push_back({i, i});
    return ranges;
  }
  const auto number = [&](std::string_view part, std::string_view range) {
    index_t value = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    require<config_error>(error == std::errc{} && end == part.data() + part.size(), "skip ranges: expected read:join, two numbers, got '", range, "' in '",
                          text, "'");
    require<config_error>(value >= first && value < first + blocks, "skip ranges: block ", value, " of '", range, "' is outside the blocks ", first, " .. ",
                          first + blocks - 1);
    return value - first;
  };
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find('/', at), text.size());
    const std::string_view range = text.substr(at, end - at);
    const std::size_t colon = std::min(range.find(':'), range.size());
    require<config_error>(colon < range.size(), "skip ranges: expected read:join, two numbers, got '", range, "' in '", text, "'");
    ranges.push_back({number(range.substr(0, colon), range), number(range.substr(colon + 1), range)});
    at = end + 1;
  }
  check_skip_ranges(ranges, blocks);
  return ranges;
}

/// Blocks one after the other, and units that read the tap of one block and add their output to the residual stream after the same or a later
/// block (arXiv 2411.12364 section 3.1): x_{i+1} = block_i(x_i) + Σ_{units u that join at i} u(tap_{read(u)}). x and y [T x D].
///
/// `concurrent` runs a unit that joins later beside the block after the one that it reads, each on one worker: the same bits, and less
/// time where a block leaves workers idle or a lookup waits for memory. Not for tables whose calls are collective. Throws config_error
/// for ranges that do not fit (check_skip_ranges), shape_error.
template <class B, class U>
struct skip_stack {
  static_assert(detail::explain_tapped<B>() && explain_layer<U>());
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    std::vector<record_of<U>> units;
    std::vector<matrix<S>> between;  // the inputs of all blocks but the first
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
    std::vector<gradient_of<U>> units;
  };
  struct cache {
    std::vector<cache_of<B>> blocks;
    std::vector<cache_of<U>> units;
  };
  static constexpr bool looks_across = looks_across_tokens<B> || looks_across_tokens<U>;

  std::vector<B> blocks;
  std::vector<U> units;
  std::vector<skip_range> ranges;  ///< of the units
  bool concurrent = false;

  void prepare(gradient& g) const {
    g.blocks.resize(blocks.size());
    g.units.resize(units.size());
  }
  shape output_shape(matrix_view<const S> x) const {
    require<config_error>(ranges.size() == units.size(), "skip_stack: expected a range for each of the ", units.size(), " units, got ", ranges.size());
    check_skip_ranges(ranges, count());
    const auto keeps = [&](const char* what, std::size_t i, shape s) {
      require<shape_error>(s == shape{x.rows(), x.cols()}, "skip_stack: ", what, " ", i, " turns ", to_text(x.rows(), x.cols()), " into ",
                           to_text(s.rows, s.cols), "; it must keep the shape");
    };
    for (std::size_t i = 0; i < blocks.size(); ++i) keeps("block", i, blocks[i].output_shape(x));
    for (std::size_t u = 0; u < units.size(); ++u) keeps("unit", u, units[u].output_shape(x));
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward("skip_stack", *this, x, y, ctx);
    without_record(
        x, y, ctx,
        [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out, matrix_view<S> tap) { blocks[i].forward_tapped(in, out, tap, block_context(i, ctx)); },
        [&](std::size_t u, matrix_view<const S> tap, matrix_view<S> out) { units[u].forward(tap, out, unit_context(u, ctx)); });
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward("skip_stack", *this, x, y, ctx);
    const std::size_t n = blocks.size();
    r.blocks.resize(n);
    r.units.resize(units.size());
    r.between.resize(n == 0 ? 0 : n - 1);
    const auto output = [&](std::size_t i) { return i + 1 < n ? matrix_view<S>(r.between[i]) : y; };
    for (auto& m : r.between) m.resize(x.rows(), x.cols());
    if (n == 0) copy<S>(x, y, ctx);
    run(
        x.rows(), x.cols(), ctx, [&](std::size_t i) { blocks[i].forward(input(x, r, i), output(i), r.blocks[i], block_context(i, ctx)); },
        [&](std::size_t u, matrix_view<S> out) {
          const auto from = static_cast<std::size_t>(ranges[u].read);
          units[u].forward(blocks[from].tapped(r.blocks[from]), out, r.units[u], unit_context(u, ctx));
        },
        output);
  }

  /// A unit gets the gradient of the stream right after it joined; its dx is added to that of the tap which it read.
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("skip_stack", *this, x, dy, dx, g, ctx);
    const index_t T = x.rows();
    recorded("skip_stack", r.blocks, blocks.size());
    recorded("skip_stack", r.units, units.size());
    for (const matrix<S>& m : recorded("skip_stack", r.between, blocks.empty() ? 0 : blocks.size() - 1)) recorded("skip_stack", m, T, x.cols());
    const scratch<S> d(ctx, T, x.cols()), of_units(ctx, static_cast<index_t>(units.size()) * T, x.cols());
    copy<S>(dy, dx, ctx);
    for (std::size_t i = blocks.size(); i-- > 0;) {
      copy<S>(dx, d, ctx);
      matrix_view<const S> dtap;
      for (std::size_t u = 0; u < units.size(); ++u) {
        const auto dunit = of_units.view().slice_rows(static_cast<index_t>(u) * T, T);
        const auto from = static_cast<std::size_t>(ranges[u].read);
        if (ranges[u].join == static_cast<index_t>(i))
          units[u].backward(blocks[from].tapped(r.blocks[from]), r.units[u], d, dunit, g.units[u], unit_context(u, ctx));
        if (from == i) dtap = dunit;
      }
      blocks[i].backward_tapped(input(x, r, i), r.blocks[i], d, dtap, dx, g.blocks[i], block_context(i, ctx));
    }
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    cache c;
    for (const auto& b : blocks) c.blocks.push_back(lithe::make_cache(b, slots, capacity));
    for (const auto& u : units) c.units.push_back(lithe::make_cache(u, slots, capacity));
    return c;
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode("skip_stack", *this, x, y);
    check(c);
    without_record(
        x, y, ctx,
        [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out, matrix_view<S> tap) {
          if constexpr (cached_layer<B>)
            blocks[i].decode_tapped(in, out, tap, c.blocks[i], block_context(i, ctx));
          else
            blocks[i].forward_tapped(in, out, tap, block_context(i, ctx));
        },
        [&](std::size_t u, matrix_view<const S> tap, matrix_view<S> out) { lithe::decode(units[u], tap, out, c.units[u], unit_context(u, ctx)); });
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    const scratch<S> y(ctx, x.rows(), x.cols());
    decode(x, y, c, ctx);
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    check(c);
    index_t least = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i)
      least = std::max(least, lithe::least_length(blocks[i], c.blocks[i], slot));
    for (std::size_t u = 0; u < units.size(); ++u)
      least = std::max(least, lithe::least_length(units[u], c.units[u], slot));
    return least;
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("skip_stack", least_length(c, slot), slot, length);
    for (std::size_t i = 0; i < blocks.size(); ++i) lithe::truncate(blocks[i], c.blocks[i], slot, length);
    for (std::size_t u = 0; u < units.size(); ++u) lithe::truncate(units[u], c.units[u], slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    check(c);
    for (std::size_t i = 0; i < blocks.size(); ++i) lithe::permute(blocks[i], c.blocks[i], order);
    for (std::size_t u = 0; u < units.size(); ++u) lithe::permute(units[u], c.units[u], order);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto& b : blocks) sum += cost_of(b, length);
    for (const auto& u : units) sum += cost_of(u, length);
    return sum;
  }
  template <class V, class First, class... T>
  static void visit(V&& f, First& s, T&... rest) {
    visit_parts(f, {"blocks."}, s.blocks, rest.blocks...);
    visit_parts(f, {"units."}, s.units, rest.units...);
  }

 private:
  [[nodiscard]] index_t count() const { return static_cast<index_t>(blocks.size()); }
  void check(const cache& c) const {
    detail::check_blocks("skip_stack", blocks.size(), c.blocks.size());
    detail::check_blocks("skip_stack", units.size(), c.units.size());
  }
  static context block_context(std::size_t i, const context& ctx) { return ctx.child(i); }
  [[nodiscard]] context unit_context(std::size_t u, const context& ctx) const { return ctx.child(blocks.size() + u); }
  static matrix_view<const S> input(matrix_view<const S> x, const record& r, std::size_t i) { return i == 0 ? x : matrix_view<const S>(r.between[i - 1]); }

  /// Runs block(i) and unit(u, out) in an order that `concurrent` allows, and adds what units give to output(i). A unit that joins later
  /// runs with the next block, whether in turn or at the same time.
  template <class Block, class Unit, class Output>
  void run(index_t rows, index_t cols, const context& ctx, Block&& block, Unit&& unit, Output&& output) const {
    const scratch<S> given(ctx, static_cast<index_t>(units.size()) * rows, cols);
    const scratch<slot_t> beside(ctx, static_cast<index_t>(units.size()));
    const auto of_unit = [&](std::size_t u) { return given.view().slice_rows(static_cast<index_t>(u) * rows, rows); };
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const auto here = static_cast<index_t>(i);
      index_t n = 0;
      for (std::size_t u = 0; u < units.size(); ++u)
        if (ranges[u].read + 1 == here && ranges[u].join >= here) beside[n++] = static_cast<slot_t>(u);
      const auto task = [&](index_t first, index_t last) {
        for (index_t k = first; k < last; ++k) k == 0 ? block(i) : unit(static_cast<std::size_t>(beside[k - 1]), of_unit(static_cast<std::size_t>(beside[k - 1])));
      };
      if (concurrent && n > 0)
        ctx.exec->run(n + 1, 1, task);
      else
        task(0, n + 1);
      for (std::size_t u = 0; u < units.size(); ++u) {
        if (ranges[u].join != here) continue;
        if (ranges[u].read == here) unit(u, of_unit(u));
        add<S>(of_unit(u), output(i), ctx);
      }
    }
  }
  template <class Block, class Unit>
  void without_record(matrix_view<const S> x, matrix_view<S> y, const context& ctx, Block&& block, Unit&& unit) const {
    const index_t T = x.rows(), D = x.cols();
    if (blocks.empty()) return copy<S>(x, y, ctx);
    // A tap is read no later than during the next block, so two take turns, as do the streams between blocks.
    const scratch<S> taps(ctx, 2 * T, D), streams(ctx, 2 * T, D);
    const auto tap = [&](std::size_t i) { return taps.view().slice_rows(static_cast<index_t>(i % 2) * T, T); };
    const auto output = [&](std::size_t i) { return i + 1 == blocks.size() ? y : streams.view().slice_rows(static_cast<index_t>(i % 2) * T, T); };
    run(
        T, D, ctx, [&](std::size_t i) { block(i, i == 0 ? x : matrix_view<const S>(output(i - 1)), output(i), tap(i)); },
        [&](std::size_t u, matrix_view<S> out) { unit(u, tap(static_cast<std::size_t>(ranges[u].read)), out); }, output);
  }
};

}  // namespace lithe::inline LITHE_ABI
