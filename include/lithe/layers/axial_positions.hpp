#pragma once

#include "lithe/kernels/dropout_factors.hpp"
#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/layers/position_cache.hpp"

namespace lithe::inline LITHE_ABI {

struct axial_positions_config {
  std::vector<index_t> shape;   ///< A_0, A_1, ...: their product is the longest sequence
  std::vector<index_t> widths;  ///< d_0, d_1, ...: their sum is the number of features
  double deviation = 1;         ///< of the normal numbers that the tables start at
  double dropout = 0;           ///< of the position embedding, not of x
};

/// Axial position embeddings (arXiv 2001.04451, section 5; N axes): position p of a token in its sequence, written in mixed radix A_0, A_1, ... with
/// the last axis fastest, has a digit i_k for each axis, and
///
///     y_t = x_t + dropout(concat_k W_k[i_k(p_t)])
///
/// x and y [T x Σ d_k], W_k [A_k x d_k]. A sequence may have any length up to Π A_k; rows of W_k that it does not reach have a gradient of
/// exactly 0. While decoding, positions go on where the cache slot stands.
/// Throws config_error, shape_error, index_error (a sequence longer than the grid).
template <std::floating_point S>
struct axial_positions {
  using scalar = S;
  struct record {};
  struct gradient {
    std::vector<matrix<S>> weights;
  };
  using cache = position_cache;

  std::vector<matrix<S>> weights;
  double rate = 0;

  axial_positions() = default;
  /// Tables start at N(0, c.deviation). Throws config_error for axes without a width, sizes below 1 and a rate outside [0, 1].
  axial_positions(const axial_positions_config& c, rng_key key) : rate(checked_rate(who, c.dropout)) {
    require<config_error>(!c.shape.empty() && c.shape.size() == c.widths.size(), who, ": expected a width for each axis of the shape, got ",
                          c.widths.size(), " widths and ", c.shape.size(), " axes");
    for (std::size_t k = 0; k < c.shape.size(); ++k) {
      require<config_error>(c.shape[k] >= 1 && c.widths[k] >= 1, who, ": expected axes and widths of at least 1, got ", c.shape[k], " and ",
                            c.widths[k]);
      fill_normal<S>(weights.emplace_back(c.shape[k], c.widths[k]), c.deviation, key.child(k));
    }
  }

  /// Σ d_k, the width of x and y.
  [[nodiscard]] index_t features() const {
    index_t n = 0;
    for (const auto& w : weights) n += w.cols();
    return n;
  }
  /// The longest sequence.
  [[nodiscard]] index_t positions() const {
    index_t n = 1;
    for (const auto& w : weights) n = n > std::numeric_limits<index_t>::max() / w.rows() ? std::numeric_limits<index_t>::max() : n * w.rows();
    return n;
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features(who, features(), x);
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const scratch<index_t> at(ctx, x.rows());
    find_positions(x.rows(), at.span(), nullptr, ctx);
    add_positions(x, y, at.span(), ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record&, const context& ctx) const { forward(x, y, ctx); }

  /// dx = dy; dW_k[i] += the sum of the k-th part of dy over all tokens whose k-th digit is i.
  void backward(matrix_view<const S> x, const record&, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    const scratch<index_t> at(ctx, x.rows());
    find_positions(x.rows(), at.span(), nullptr, ctx);
    const shown<S> d(dy, ctx);
    copy<S>(dy, dx, ctx);
    // Each piece has columns of its own, so every sum runs over the tokens in order, whoever does it.
    ctx.exec->run(x.cols(), 64, [&](index_t first, index_t last) {
      const scratch<S> factors(ctx, last - first);
      for (index_t t = 0; t < x.rows(); ++t) {
        if (dropping(ctx)) draw(t, first, last - first, factors.data(), ctx);
        each_part(at[t], first, last, [&](std::size_t k, index_t row, index_t column, index_t begin, index_t n) {
          S* to = &g.weights[k](row, begin - column);
          const S* from = d.view().row(t) + begin;
          if (dropping(ctx))
            for (index_t j = 0; j < n; ++j) to[j] += factors[begin - first + j] * from[j];
          else
            for (index_t j = 0; j < n; ++j) to[j] += from[j];
        });
      }
    });
  }

  [[nodiscard]] index_t longest_sequence() const { return positions(); }  ///< all cells of the grid
  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const { return {who, slots, capacity}; }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const scratch<index_t> at(ctx, x.rows());
    find_positions(x.rows(), at.span(), &c, ctx);
    add_positions(x, y, at.span(), ctx);
    c.advance(x.rows(), ctx);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    const scratch<index_t> at(ctx, x.rows());
    find_positions(x.rows(), at.span(), &c, ctx);
    c.advance(x.rows(), ctx);
  }
  void truncate(cache& c, index_t slot, index_t length) const { c.truncate(who, slot, length); }
  void permute(cache& c, std::span<const index_t> order) const { c.permute(who, order); }

  [[nodiscard]] cost forward_cost(index_t) const {
    double n = 0;
    for (const auto& w : weights) n += static_cast<double>(w.size());
    const double row = static_cast<double>(features());
    return {n, row, row * sizeof(S)};
  }

  void prepare(gradient& g) const { g.weights.resize(weights.size()); }
  template <class F, class First, class... Rest>
  static void visit(F&& f, First& first, Rest&... rest) {
    visit_parts(f, {"weights."}, first.weights, rest.weights...);
  }

 private:
  static constexpr const char* who = "axial_positions";

  [[nodiscard]] bool dropping(const context& ctx) const { return ctx.train && rate > 0; }
  void draw(index_t t, index_t first, index_t n, S* factors, const context& ctx) const {
    draw_factors(ctx.key, static_cast<std::uint64_t>(t), static_cast<std::uint64_t>(first), n, rate, factors);
  }
  /// f(axis, row of its table, first column of the axis, first column, columns) for each axis that has columns in [first, last).
  template <class F>
  void each_part(index_t position, index_t first, index_t last, F&& f) const {
    index_t end = features();
    for (std::size_t k = weights.size(); k-- > 0;) {
      const index_t rows = weights[k].rows(), column = end - weights[k].cols();
      const index_t begin = std::max(first, column), n = std::min(last, end) - begin;
      if (n > 0) f(k, position % rows, column, begin, n);
      position /= rows;
      end = column;
    }
  }
  void add_positions(matrix_view<const S> x, matrix_view<S> y, std::span<const index_t> at, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape(who, "y", y, out.rows, out.cols);
    ctx.exec->run(out.rows, detail::grain_rows(out.cols), [&](index_t first, index_t last) {
      const scratch<S> embedding(ctx, out.cols), factors(ctx, out.cols);
      for (index_t t = first; t < last; ++t) {
        each_part(at[static_cast<std::size_t>(t)], 0, out.cols, [&](std::size_t k, index_t row, index_t column, index_t, index_t n) {
          std::copy_n(&weights[k](row, 0), n, embedding.data() + column);
        });
        if (dropping(ctx)) {
          draw(t, 0, out.cols, factors.data(), ctx);
          embedding.view().row_array(0) *= factors.view().row_array(0);
        }
        y.row_array(t) = x.row_array(t) + embedding.view().row_array(0);
      }
    });
  }
  void find_positions(index_t T, std::span<index_t> at, cache* c, const context& ctx) const {
    detail::find_positions(who, T, c, ctx, at, [&](index_t n) {
      require<index_error>(n <= positions(), who, ": a sequence of ", n, " tokens is longer than the grid of ", positions(), " positions");
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
