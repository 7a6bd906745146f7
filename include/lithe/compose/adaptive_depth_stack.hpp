#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

// T tokens, D features, N blocks, hⁿ the output of block n (h⁰ the input), n_j the exit of token j
namespace lithe::inline LITHE_ABI {

namespace detail {

/// Whether blocks of this type read a memory.
template <class B>
inline constexpr bool reads_memory = conditioned_layer<B> && !layer<B>;
template <class B>
consteval bool explain_block() {
  if constexpr (reads_memory<B>)
    return true;
  else
    return explain_layer<B>();
}
template <class B>
using memory_of = std::conditional_t<reads_memory<B>, memory_view<typename B::scalar>, nothing>;
template <class B>
using memory_gradient_of = std::conditional_t<reads_memory<B>, matrix_view<typename B::scalar>, nothing>;

// A block's calls, with or without a memory.
template <class B, class... R>
void block_forward(const B& b, matrix_view<const typename B::scalar> x, const memory_of<B>& m, matrix_view<typename B::scalar> y, const context& ctx,
                   R&... record) {
  if constexpr (reads_memory<B>)
    b.forward(x, m, y, record..., ctx);
  else
    b.forward(x, y, record..., ctx);
}
template <class B>
void block_backward(const B& b, matrix_view<const typename B::scalar> x, const memory_of<B>& m, const record_of<B>& r,
                    matrix_view<const typename B::scalar> dy, matrix_view<typename B::scalar> dx, const memory_gradient_of<B>& dm, gradient_of<B>& g,
                    const context& ctx) {
  if constexpr (reads_memory<B>)
    b.backward(x, m, r, dy, dx, dm, g, ctx);
  else
    b.backward(x, r, dy, dx, g, ctx);
}

}  // namespace detail

/// N blocks that all show their outputs: y = [h¹; h²; ...; h^N], one below the other, hⁿ = blockₙ(hⁿ⁻¹), h⁰ = x. x [T x D], y [N T x D]. Losses on
/// any of them send their gradients back through those rows of dy (aligned training, arXiv 1910.10073, section 3.1). One block may be tied to
/// serve at every depth (`depth` of them; Universal Transformer, arXiv 1807.03819).
///
/// Skipped tokens: a token that takes no part in block n copies its state, h_jⁿ = h_jⁿ⁻¹, while the others still see the keys and values that
/// block n itself makes of that state. So go mixed training (`forward_mixed`; section 3.2: token j is skipped by the blocks above its exit n_j) and
/// stochastic depth (`drop_rates`; arXiv 2404.16710, section 4.1: under ctx.train each sequence skips block n with probability drop_rates[n-1],
/// without rescaling).
///
/// Blocks that need a memory (`decoder_block`) make it a `conditioned_layer`. Throws config_error, shape_error, state_error.
template <class B>
struct adaptive_stack {
  static_assert(detail::explain_block<B>());
  using scalar = typename B::scalar;
  using S = scalar;
  using memory = detail::memory_of<B>;
  using memory_gradient = detail::memory_gradient_of<B>;
  static constexpr bool reads_memory = detail::reads_memory<B>;
  static constexpr bool looks_across = true;
  struct record {
    std::vector<record_of<B>> blocks;
    matrix<S> states;                         // h¹ .. h^{N-1}
    kept<std::vector<std::uint8_t>> skipped;  // [N x T], or empty
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };

  std::vector<B> blocks;                ///< N, or the one that is tied
  index_t depth = 0;                    ///< N, if one block is tied; 0: as many as there are blocks
  std::vector<double> drop_rates;       ///< N numbers, or none; changed between steps (see `layer_drop_rates`)
  std::vector<double> gradient_scales;  ///< N numbers gₙ, or none: backward multiplies what block n sends down to hⁿ⁻¹ by 1 / gₙ

  [[nodiscard]] index_t exits() const { return depth > 0 ? depth : static_cast<index_t>(blocks.size()); }
  /// The block of depth n, from 1.
  [[nodiscard]] const B& block(index_t n) const { return blocks[place(n)]; }

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const {
    require<config_error>(!blocks.empty() && (depth == 0 || blocks.size() == 1),
                          "adaptive_stack: expected at least 1 block, and exactly 1 if it is tied, got ", blocks.size(), " with a tied depth of ",
                          depth);
    for (const auto* rates : {&drop_rates, &gradient_scales})
      require<config_error>(rates->empty() || static_cast<index_t>(rates->size()) == exits(),
                            "adaptive_stack: expected a drop rate and a gradient scale for each of ", exits(), " blocks or none, got ",
                            rates->size());
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const shape s = blocks[i].output_shape(x);
      require<shape_error>(s == shape{x.rows(), x.cols()}, "adaptive_stack: block ", i + 1, " turns ", to_text(x.rows(), x.cols()), " into ",
                           to_text(s.rows, s.cols), "; stacked blocks must keep the shape");
    }
    return {exits() * x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, const memory& m, matrix_view<S> y, const context& ctx) const {
    check(x, y, ctx);
    std::vector<std::uint8_t> skipped;
    draw(x.rows(), skipped, ctx);
    through(x, y, skipped,
            [&](index_t n, matrix_view<const S> in, matrix_view<S> out) { detail::block_forward(block(n), in, m, out, child(n, ctx)); });
  }
  void forward(matrix_view<const S> x, const memory& m, matrix_view<S> y, record& r, const context& ctx) const {
    check(x, y, ctx);
    if (!ctx.replay) draw(x.rows(), r.skipped.value, ctx);
    check_skipped(x.rows(), r);
    keep(x, m, y, r, ctx);
  }
  /// Mixed training: one exit for each token, from 1 to N. h^N of each token is then the state it left with. Throws config_error for another exit.
  void forward_mixed(matrix_view<const S> x, const memory& m, std::span<const std::int32_t> token_exits, matrix_view<S> y, record& r,
                     const context& ctx) const {
    check(x, y, ctx);
    const index_t T = x.rows(), N = exits();
    require<shape_error>(static_cast<index_t>(token_exits.size()) == T, "adaptive_stack: expected an exit for each of ", T, " tokens, got ",
                         token_exits.size());
    for (const auto n : token_exits) require<config_error>(n >= 1 && n <= N, "adaptive_stack: expected exits from 1 to ", N, ", got ", n);
    r.skipped.value.resize(static_cast<std::size_t>(N * T));
    for (index_t n = 1; n <= N; ++n)
      for (index_t t = 0; t < T; ++t) r.skipped.value[static_cast<std::size_t>((n - 1) * T + t)] = token_exits[static_cast<std::size_t>(t)] < n;
    keep(x, m, y, r, ctx);
  }
  /// dm (if there is a memory) is added to.
  void backward(matrix_view<const S> x, const memory& m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, const memory_gradient& dm,
                gradient& g, const context& ctx) const {
    const index_t T = x.rows(), N = exits();
    const std::vector<std::uint8_t>& skipped = r.skipped.value;
    detail::check_rows("adaptive_stack", "dy", *this, x, dy, ctx);
    detail::check_like("adaptive_stack", "dx", dx, x);
    check_gradient("adaptive_stack", *this, g);
    recorded("adaptive_stack", r.blocks, static_cast<std::size_t>(N));
    recorded("adaptive_stack", r.states, (N - 1) * T, x.cols());
    check_skipped(T, r);
    const scratch<S> d(ctx, T, x.cols()), active(ctx, skipped.empty() ? 0 : T, x.cols());
    copy<S>(dy.slice_rows((N - 1) * T, T), d, ctx);
    for (index_t n = N; n >= 1; --n) {
      const auto in = n == 1 ? x : matrix_view<const S>(r.states).slice_rows((n - 2) * T, T);
      const record_of<B>& block_record = r.blocks[static_cast<std::size_t>(n - 1)];
      gradient_of<B>& block_gradient = g.blocks[place(n)];
      if (skipped.empty()) {
        detail::block_backward(block(n), in, m, block_record, d, dx, dm, block_gradient, child(n, ctx));
      } else {
        // For block n a skipped token is keys and values only: its gradient goes past the block, and what comes out of it is added.
        copy<S>(d, active, ctx);
        each_skipped(skipped, n, T, [&](index_t t) { active.view().row_array(t).setZero(); });
        detail::block_backward(block(n), in, m, block_record, active, dx, dm, block_gradient, child(n, ctx));
      }
      if (!gradient_scales.empty()) dx.map() *= static_cast<S>(1 / gradient_scales[static_cast<std::size_t>(n - 1)]);
      if (!skipped.empty()) each_skipped(skipped, n, T, [&](index_t t) { dx.row_array(t) += d.view().row_array(t); });
      if (n > 1) {
        copy<S>(dx, d, ctx);
        add<S>(dy.slice_rows((n - 2) * T, T), d, ctx);
      }
    }
  }

  // The layer concept, for blocks without a memory.
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const requires(!reads_memory) { forward(x, nothing{}, y, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const requires(!reads_memory) {
    forward(x, nothing{}, y, r, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const
      requires(!reads_memory) {
    backward(x, nothing{}, r, dy, dx, nothing{}, g, ctx);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (index_t n = 1; n <= exits(); ++n) sum += cost_of(block(n), length);
    return sum;
  }
  /// Blocks count from 1.
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    visit_parts(f, {"", 1}, s.blocks, rest.blocks...);
  }

 private:
  [[nodiscard]] std::size_t place(index_t n) const { return depth > 0 ? 0 : static_cast<std::size_t>(n - 1); }
  static context child(index_t n, const context& ctx) { return ctx.child(static_cast<std::uint64_t>(n - 1)); }
  void check(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const { detail::check_rows("adaptive_stack", "y", *this, x, y, ctx); }
  void check_skipped(index_t T, const record& r) const {
    const auto n = static_cast<index_t>(r.skipped.value.size());
    require<state_error>(n == 0 || n == exits() * T, "adaptive_stack: the record is of another call: expected what ", T, " tokens skip of ", exits(),
                         " blocks, got ", n, " choices");
  }
  void draw(index_t T, std::vector<std::uint8_t>& skipped, const context& ctx) const {
    skipped.clear();
    if (!ctx.train || drop_rates.empty()) return;
    skipped.resize(static_cast<std::size_t>(exits() * T));
    for (index_t n = 1; n <= exits(); ++n) {
      const rng_key key = ctx.key.child(static_cast<std::uint64_t>(exits() + n));
      for (index_t s = 0; s < ctx.rows.count(); ++s) {
        const bool drop = uniform(key, static_cast<std::uint64_t>(s)) < drop_rates[static_cast<std::size_t>(n - 1)];
        for (index_t t = ctx.rows.begin(s); t < ctx.rows.end(s, T); ++t) skipped[static_cast<std::size_t>((n - 1) * T + t)] = drop;
      }
    }
  }
  template <class F>
  static void each_skipped(const std::vector<std::uint8_t>& skipped, index_t n, index_t T, F&& f) {
    for (index_t t = 0; t < T; ++t)
      if (skipped[static_cast<std::size_t>((n - 1) * T + t)] != 0) f(t);
  }
  template <class Run>
  void through(matrix_view<const S> x, matrix_view<S> y, const std::vector<std::uint8_t>& skipped, Run&& run) const {
    const index_t T = x.rows();
    for (index_t n = 1; n <= exits(); ++n) {
      const matrix_view<const S> in = n == 1 ? x : matrix_view<const S>(y).slice_rows((n - 2) * T, T);
      const matrix_view<S> out = y.slice_rows((n - 1) * T, T);
      run(n, in, out);
      if (!skipped.empty()) each_skipped(skipped, n, T, [&](index_t t) { out.row_array(t) = in.row_array(t); });
    }
  }
  void keep(matrix_view<const S> x, const memory& m, matrix_view<S> y, record& r, const context& ctx) const {
    r.blocks.resize(static_cast<std::size_t>(exits()));
    through(x, y, r.skipped.value, [&](index_t n, matrix_view<const S> in, matrix_view<S> out) {
      detail::block_forward(block(n), in, m, out, child(n, ctx), r.blocks[static_cast<std::size_t>(n - 1)]);
    });
    r.states = y.slice_rows(0, (exits() - 1) * x.rows()).map();
  }
};

/// Gradient equilibrium (arXiv 1910.10073, appendix): g_n = γ (N - n) for n < N and g_N = 1. `exit_classifiers` multiply what they send back by gₙ,
/// `adaptive_stack` what block n sends down by 1 / gₙ. Throws config_error unless γ > 0.
[[nodiscard]] inline std::vector<double> exit_gradient_scales(index_t exits, double gamma) {
  require<config_error>(exits >= 1 && gamma > 0, "exit_gradient_scales: expected at least 1 exit and gamma above 0, got ", exits, " and ", gamma);
  std::vector<double> g(static_cast<std::size_t>(exits), 1.0);
  for (index_t n = 1; n < exits; ++n) g[static_cast<std::size_t>(n - 1)] = gamma * static_cast<double>(exits - n);
  return g;
}

}  // namespace lithe::inline LITHE_ABI
