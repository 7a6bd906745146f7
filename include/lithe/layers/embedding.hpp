#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/kernels/gather.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/layers/position_cache.hpp"

namespace lithe::inline LITHE_ABI {

struct embedding_config {
  index_t tokens = 0, features = 0;
  index_t positions = 0;   ///< longest sequence with learned positions; 0 = none
  double deviation = 0.02; ///< of the normal numbers that both tables start at
};

/// Token embedding: y_t = E[id_t] + P[position of t in its sequence]; ids [T] -> y [T x features], E [tokens x features], P [positions x
/// features] or empty. Both gradients hold touched rows only. While decoding, positions go on where the cache slot stands.
///
/// Throws config_error, index_error (a token or position outside its table).
template <std::floating_point S>
struct embedding {
  using scalar = S;
  using input_type = std::span<const token_t>;
  using input_gradient_type = nothing;
  struct record {};
  struct gradient {
    row_gradient<S> weight, position;
  };
  using cache = position_cache;
  static constexpr bool looks_across = true;  // through positions

  matrix<S> weight, position;

  embedding() = default;
  /// Both tables start at N(0, c.deviation). Throws config_error without a token or a feature, and for positions below 0.
  embedding(embedding_config c, rng_key key) {
    require<config_error>(c.tokens >= 1 && c.features >= 1 && c.positions >= 0, "embedding: expected at least 1 token, 1 feature and 0 positions, got ",
                          c.tokens, ", ", c.features, " and ", c.positions);
    weight.resize(c.tokens, c.features);
    position.resize(c.positions, c.features);
    fill_normal<S>(weight, c.deviation, key.child(0));
    fill_normal<S>(position, c.deviation, key.child(1));
  }

  shape output_shape(input_type ids) const { return {static_cast<index_t>(ids.size()), weight.cols()}; }

  void forward(input_type ids, matrix_view<S> y, const context& ctx) const {
    check_forward("embedding", *this, ids, y, ctx);
    const scratch<slot_t> at(ctx, output_shape(ids).rows);
    find_positions(ids, at.span(), nullptr, ctx);
    look_up(ids, at.span(), y, ctx);
  }
  void forward(input_type ids, matrix_view<S> y, record&, const context& ctx) const { forward(ids, y, ctx); }

  /// dE[id_t] += dy_t, dP[position] += dy_t.
  void backward(input_type ids, const record&, matrix_view<const S> dy, nothing, gradient& g, const context& ctx) const {
    check_backward("embedding", *this, ids, dy, {}, g, ctx);
    check_tokens(ids);
    const shown<S> d(dy, ctx);
    const scratch<S> ones(ctx, output_shape(ids).rows);
    const scratch<slot_t> at(ctx, output_shape(ids).rows);
    find_positions(ids, at.span(), nullptr, ctx);
    std::fill_n(ones.data(), ids.size(), S(1));
    scatter_add<S>({ids, ones.span(), 1}, d, g.weight, ctx);
    if (position.rows() > 0) scatter_add<S>({at.span(), ones.span(), 1}, d, g.position, ctx);
  }

  /// As many tokens as there are learned positions; without them any number.
  [[nodiscard]] index_t longest_sequence() const {
    return position.rows() > 0 ? position.rows() : std::numeric_limits<index_t>::max();
  }
  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const { return {"embedding", slots, capacity}; }
  void decode(input_type ids, matrix_view<S> y, cache& c, const context& ctx) const {
    const scratch<slot_t> at(ctx, output_shape(ids).rows);
    find_positions(ids, at.span(), &c, ctx);
    look_up(ids, at.span(), y, ctx);
    c.advance(output_shape(ids).rows, ctx);
  }
  void fill(input_type ids, cache& c, const context& ctx) const {
    const scratch<slot_t> at(ctx, output_shape(ids).rows);
    find_positions(ids, at.span(), &c, ctx);
    c.advance(output_shape(ids).rows, ctx);
  }
  void truncate(cache& c, index_t slot, index_t length) const { c.truncate("embedding", slot, length); }
  void permute(cache& c, std::span<const index_t> order) const { c.permute("embedding", order); }

  [[nodiscard]] cost forward_cost(index_t) const {
    const double row = static_cast<double>(weight.cols()), tables = position.rows() > 0 ? 2 : 1;
    return {static_cast<double>(weight.size() + position.size()), (tables - 1) * row, tables * row * sizeof(S)};
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("position", s.position...);
  }

 private:
  void check_tokens(input_type ids) const {
    for (std::size_t t = 0; t < ids.size(); ++t)
      require<index_error>(ids[t] >= 0 && ids[t] < weight.rows(), "embedding: token ", ids[t], " in row ", t, " lies outside 0 .. ", weight.rows() - 1);
  }
  void find_positions(input_type ids, std::span<slot_t> at, cache* c, const context& ctx) const {
    detail::find_positions("embedding", output_shape(ids).rows, c, ctx, at, [&](index_t n) {
      require<index_error>(position.rows() == 0 || n <= position.rows(), "embedding: a sequence of ", n, " tokens is longer than the ", position.rows(),
                           " learned positions");
    });
  }
  void look_up(input_type ids, std::span<const slot_t> at, matrix_view<S> y, const context& ctx) const {
    const shape out = output_shape(ids);
    require_shape("embedding", "y", y, out.rows, out.cols);
    check_tokens(ids);
    ctx.exec->run(out.rows, detail::grain_rows(out.cols), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) {
        const auto i = static_cast<std::size_t>(t);
        auto row = y.slice_rows(t, 1).map().row(0);
        row = weight.row(ids[i]);
        if (position.rows() > 0) row += position.row(at[i]);
      }
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
