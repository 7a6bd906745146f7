#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"

// T tokens, D features, N blocks, h^n the output of block n, n_j the exit of token j
namespace trials {

using namespace lithe;

/// Mixed exit training (arXiv 1910.10073 section 3.2): token j leaves after block n_j and its state is copied upwards,
///
///     h_j^k = block_k(h^{k-1})_j  for n_j >= k,   h_j^k = h_j^{k-1}  otherwise;   y_j = h_j^N
///
/// so blocks above n_j see the keys and values that they themselves make of the copied state. x and y [T x D]. Under ctx.train exits are
/// uniform on 1..N, drawn from ctx.key, and kept; otherwise, or if `exit` is set, all tokens leave together.
template <class B>
struct mixed_exit_stack {
  static_assert(explain_layer<B>());
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    std::vector<matrix<S>> between;           // h^1 .. h^{N-1}
    kept<std::vector<std::int32_t>> exits;  // n_j
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };

  std::vector<B> blocks;
  index_t exit = 0;  ///< of all tokens, from 1 to N; 0: drawn in training, N in inference

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const {
    for (const B& b : blocks) b.output_shape(x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;
    record r;
    forward(x, y, r, c);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const std::size_t N = blocks.size();
    const auto T = static_cast<std::size_t>(x.rows());
    if (ctx.replay) {
      require<state_error>(r.exits.value.size() == T, "mixed_exit_stack: replay needs the exits of ", T, " tokens, got ", r.exits.value.size());
    } else {
      r.exits.value.resize(T);
      for (std::size_t j = 0; j < T; ++j) r.exits.value[j] = static_cast<std::int32_t>(draw(j, ctx));
    }
    r.blocks.resize(N);
    r.between.resize(N - 1);
    for (std::size_t k = 0; k < N; ++k) {
      if (k + 1 < N) r.between[k].resize(x.rows(), x.cols());
      const matrix_view<const S> in = k == 0 ? x : matrix_view<const S>(r.between[k - 1]);
      const matrix_view<S> out = k + 1 < N ? matrix_view<S>(r.between[k]) : y;
      blocks[k].forward(in, out, r.blocks[k], ctx.child(k));
      each_gone(r, k, [&](index_t j) { out.map().row(j) = in.map().row(j); });
    }
  }
  /// A token that is gone takes no part in block k but as keys and values: its dy is 0 there and goes on downwards.
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const scratch<S> d(ctx, x.rows(), x.cols()), active(ctx, x.rows(), x.cols());
    copy<S>(dy, d, ctx);
    for (std::size_t k = blocks.size(); k-- > 0;) {
      copy<S>(d, active, ctx);
      each_gone(r, k, [&](index_t j) { active.map().row(j).setZero(); });
      blocks[k].backward(k == 0 ? x : matrix_view<const S>(r.between[k - 1]), r.blocks[k], active, dx, g.blocks[k], ctx.child(k));
      each_gone(r, k, [&](index_t j) { dx.map().row(j) += d.map().row(j); });
      copy<S>(dx, d, ctx);
    }
  }
  template <class V, class First, class... Rest>
  static void visit(V&& f, First& s, Rest&... rest) {
    for (std::size_t i = 0; i < s.blocks.size(); ++i) f(std::to_string(i), s.blocks[i], rest.blocks[i]...);
  }

 private:
  [[nodiscard]] index_t draw(std::size_t j, const context& ctx) const {
    const auto N = static_cast<index_t>(blocks.size());
    if (exit != 0 || !ctx.train) return exit != 0 ? exit : N;
    return 1 + static_cast<index_t>(uniform(ctx.key.child(blocks.size()), j) * static_cast<double>(N));
  }
  /// f(j) for the tokens that left before block k (counted from 0).
  template <class F>
  static void each_gone(const record& r, std::size_t k, F&& f) {
    for (std::size_t j = 0; j < r.exits.value.size(); ++j)
      if (static_cast<std::size_t>(r.exits.value[j]) <= k) f(static_cast<index_t>(j));
  }
};

/// Aligned exit training (the same paper): the full stack once, all states side by side, y = [h^1 | ... | h^N] [T x N D]. A loss on each
/// slice sends its gradient back through that slice of dy.
template <class B>
struct aligned_stack {
  static_assert(explain_layer<B>());
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    matrix<S> states;  // h^1 .. h^{N-1}, side by side
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };

  std::vector<B> blocks;

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols() * static_cast<index_t>(blocks.size())}; }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    for (std::size_t k = 0; k < blocks.size(); ++k) blocks[k].forward(k == 0 ? x : state(matrix_view<const S>(y), x, k - 1), state(y, x, k), ctx.child(k));
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    r.blocks.resize(blocks.size());
    for (std::size_t k = 0; k < blocks.size(); ++k)
      blocks[k].forward(k == 0 ? x : state(matrix_view<const S>(y), x, k - 1), state(y, x, k), r.blocks[k], ctx.child(k));
    r.states = y.map().leftCols(y.cols() - x.cols());
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const scratch<S> d(ctx, x.rows(), x.cols());
    dx.map().setZero();
    for (std::size_t k = blocks.size(); k-- > 0;) {
      copy<S>(dx, d, ctx);
      add<S>(state(dy, x, k), d, ctx);
      blocks[k].backward(k == 0 ? x : state(matrix_view<const S>(r.states), x, k - 1), r.blocks[k], d, dx, g.blocks[k], ctx.child(k));
    }
  }
  template <class V, class First, class... Rest>
  static void visit(V&& f, First& s, Rest&... rest) {
    for (std::size_t i = 0; i < s.blocks.size(); ++i) f(std::to_string(i), s.blocks[i], rest.blocks[i]...);
  }

 private:
  template <class E>
  static matrix_view<E> state(matrix_view<E> y, matrix_view<const S> x, std::size_t k) {
    return y.slice_cols(static_cast<index_t>(k) * x.cols(), x.cols());
  }
};

}  // namespace trials
