#pragma once

#include <utility>

#include "lithe/kernels/causal_conv.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/layers/position_cache.hpp"

// T tokens, D features, W taps
namespace lithe::inline LITHE_ABI {

/// The depthwise convolution before UltraMem's query (arXiv 2411.12364 section 3.1): y_t = Σ_τ w_τ ⊙ x_{t-W+1+τ} within
/// each sequence, x and y [T x D], no bias. Without taps y = x. The cache keeps a sequence's last inputs: the W - 1
/// that the next row sees, and those of placed_cache::reserve rows before it, by which `truncate` can go back.
///
/// Starts as the identity plus N(0, 0.02): the original's start is not published. Throws shape_error, index_error,
/// state_error.
template <std::floating_point S>
struct query_convolution {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> weight;
  };
  struct cache : placed_cache {
    matrix<S> rows;  // [slots room x D], by place
    /// The row of a slot's token t, which is kept or the next one.
    [[nodiscard]] index_t row(index_t slot, index_t t) const {
      const auto s = static_cast<std::size_t>(slot);
      return place[s] * room + t - first[s];
    }
  };

  matrix<S> weight;  // [W x D], the newest row last

  query_convolution() = default;
  /// Starts as the identity plus N(0, 0.02); width 0 is no convolution. Throws config_error for a width below 0.
  query_convolution(index_t width, index_t features, rng_key key) {
    require<config_error>(width >= 0, "query_convolution: expected a width of 0 (none) or more, got ", width);
    weight.resize(width, features);
    fill_normal<S>(weight, 0.02, key);
    if (width > 0) weight.row(width - 1).array() += S(1);
  }
  [[nodiscard]] bool none() const { return weight.rows() == 0; }  ///< whether there are no taps

  shape output_shape(matrix_view<const S> x) const {
    require_features("query_convolution", weight.cols(), x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    if (none()) return copy<S>(x, y, ctx);
    check_forward("query_convolution", *this, x, y, ctx);
    causal_conv<S>(shown<S>(x, ctx), weight, y, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record&, const context& ctx) const { forward(x, y, ctx); }
  void backward(matrix_view<const S> x, const record&, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    if (none()) return copy<S>(dy, dx, ctx);
    check_backward("query_convolution", *this, x, dy, dx, g, ctx);
    dx.map().setZero();
    add_backward(x, dy, dx, g, ctx);
  }
  /// The same, but dx is added to. Needs taps.
  void add_backward(matrix_view<const S> x, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("query_convolution", *this, x, dy, dx, g, ctx);
    causal_conv_backward<S>(shown<S>(x, ctx), weight, shown<S>(dy, ctx), dx, g.weight, ctx);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    if (none()) return {};
    cache c{{"query_convolution", slots, capacity, 1, weight.rows() - 1}, {}};
    c.rows.resize(slots * c.room, weight.cols());
    return c;
  }
  /// y for the new rows x of each sequence, after what the cache holds.
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    if (none()) return copy<S>(x, y, ctx);
    check(x, c, ctx);
    const index_t before = weight.rows() - 1;
    causal_conv<S>(x, weight, y, ctx);
    for (index_t s = 0; s < ctx.rows.count(); ++s) {  // the first rows of a sequence see cached ones
      const index_t begin = ctx.rows.begin(s), slot = ctx.slot(s), length = c.tokens(slot),
                    past = std::min(before, length);
      const index_t n = std::min(before, ctx.rows.end(s, x.rows()) - begin);
      if (past == 0 || n == 0) continue;
      const scratch<S> in(ctx, past + n, x.cols()), out(ctx, past + n, x.cols());
      copy<S>(view(std::as_const(c.rows)).slice_rows(c.row(slot, length - past), past), in.view().slice_rows(0, past),
              ctx);
      copy<S>(x.slice_rows(begin, n), in.view().slice_rows(past, n), ctx);
      causal_conv<S>(in, weight, out, ctx.position_wise());
      copy<S>(out.view().slice_rows(past, n), y.slice_rows(begin, n), ctx);
    }
    append(x, c, ctx);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    if (none()) return;
    check(x, c, ctx);
    append(x, c, ctx);
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    return none() ? 0 : c.least_length("query_convolution", slot);
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    if (!none()) c.truncate("query_convolution", slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    if (none()) return;
    c.permute("query_convolution", order, [&](index_t from, index_t to, index_t n) {
      c.rows.middleRows(to * c.room, n) = c.rows.middleRows(from * c.room, n);
    });
  }

  [[nodiscard]] cost forward_cost(index_t) const {
    const double n = static_cast<double>(weight.size());
    return {n, 2 * n, n * sizeof(S)};
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
  }

 private:
  void check(matrix_view<const S> x, cache& c, const context& ctx) const {
    output_shape(x);
    require<state_error>(c.rows.cols() == weight.cols() && c.before == weight.rows() - 1,
                         "query_convolution: the cache is of another layer: expected one of ", weight.rows(),
                         " taps and ", weight.cols(), " features, got ", c.before + 1, " and ", c.rows.cols());
    c.check("query_convolution", x.rows(), ctx);
  }
  static void append(matrix_view<const S> x, cache& c, const context& ctx) {
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t slot = ctx.slot(s), end = ctx.rows.end(s, x.rows());
      for (index_t i = ctx.rows.begin(s), n = 0; i < end; i += n) {
        n = c.make_room(slot, end - i, [&](index_t place, index_t from, index_t rows) {
          S* const to = c.rows.data() + place * c.room * c.rows.cols();
          std::copy_n(to + from * c.rows.cols(), rows * c.rows.cols(), to);
        });
        copy<S>(x.slice_rows(i, n), matrix_view<S>(c.rows).slice_rows(c.row(slot, c.tokens(slot)), n), ctx);
        c.length[static_cast<std::size_t>(slot)] += n;
      }
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
