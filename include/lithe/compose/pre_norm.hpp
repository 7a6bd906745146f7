#pragma once

#include "lithe/compose/reversible_part.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/dropout.hpp"

// T tokens, D features
namespace lithe::inline LITHE_ABI {

/// A residual branch: y = dropout(inner(norm(x))), x and y [T x D]: what Transformer blocks add to their stream (arXiv 2002.04745), and F
/// and G of `reversible`. With an inner layer that needs a memory (cross-attention) it is a `conditioned_layer`; the norm then is that
/// of x, the memory comes as it is. Throws what its parts throw.
template <class Inner, class Norm = layer_norm<typename Inner::scalar>>
struct pre_norm {
  static_assert(detail::explain_part<Inner>());
  using scalar = typename Inner::scalar;
  using S = scalar;
  static constexpr bool conditioned = conditioned_layer<Inner>;
  static constexpr bool looks_across = looks_across_tokens<Inner>;
  struct record {
    record_of<Norm> norm;
    record_of<Inner> inner;
    record_of<dropout<S>> drop;
    matrix<S> normed;
  };
  struct gradient {
    gradient_of<Norm> norm;
    gradient_of<Inner> inner;
  };
  using cache = cache_of<Inner>;

  Norm norm;
  Inner inner;
  dropout<S> drop;

  pre_norm() = default;
  /// Throws config_error for a dropout rate outside [0, 1], or above 0 if the inner layer is a `fused_part`.
  pre_norm(Norm norm_, Inner inner_, double dropout_rate = 0) : norm(std::move(norm_)), inner(std::move(inner_)), drop(dropout_rate) {
    require<config_error>(!fused_part<Inner> || dropout_rate == 0, "pre_norm: this inner layer drops its output itself; give it the rate of ", dropout_rate);
  }

  shape output_shape(matrix_view<const S> x) const {
    norm.output_shape(x);
    return inner.output_shape(x);
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const requires(!conditioned) { run(x, {}, y, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const requires(!conditioned) { run(x, {}, y, r, ctx); }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const
      requires(!conditioned) {
    run_back(x, {}, r, dy, dx, g, ctx);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const requires conditioned { run(x, {m}, y, ctx); }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const requires conditioned {
    run(x, {m}, y, r, ctx);
  }
  /// dm is added to.
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const requires conditioned {
    run_back(x, {m, dm}, r, dy, dx, g, ctx);
  }
  /// y += f(x) and, for reversible blocks, back (see `fused_part`). Beside what the inner layer needs: [T x D] forwards, twice that back.
  void add_to(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const requires fused_part<Inner> {
    check_forward(who, *this, x, y, ctx);
    const scratch<S> h(ctx, x.rows(), x.cols());
    norm.forward(x, h, ctx.child(0));
    inner.add_to(h, y, r.inner, ctx.child(1));
  }
  /// y -= f(x), dx += f'(x)ᵀ dy, g is added to, with the choices of the record (lithe::fused_part).
  void reverse(matrix_view<const S> x, matrix_view<S> y, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
               const context& ctx) const requires fused_part<Inner> {
    check_forward(who, *this, x, y, ctx);
    check_backward(who, *this, x, dy, dx, g, ctx);
    const scratch<S> h(ctx, x.rows(), x.cols()), dh(ctx, x.rows(), x.cols());
    record_of<Norm> statistics;
    norm.forward(x, h, statistics, ctx.child(0));
    ctx.exec->run(x.rows(), detail::grain_rows(x.cols()), [&](index_t first, index_t last) { dh.view().slice_rows(first, last - first).map().setZero(); });
    inner.reverse(h, y, r.inner, dy, dh, g.inner, ctx.child(1));
    norm.backward(x, statistics, dh, dh, g.norm, ctx.child(0));
    add<S>(dh, dx, ctx);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const { return lithe::make_cache(inner, slots, capacity); }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const requires(!conditioned) {
    check_decode(who, *this, x, y);
    const scratch<S> h(ctx, x.rows(), x.cols());
    norm.forward(x, h, ctx.child(0));
    lithe::decode(inner, h, y, c, ctx.child(1));
    drop.forward(y, y, ctx.child(2));
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const requires(!conditioned) {
    const scratch<S> h(ctx, looks_across ? x.rows() : 0, x.cols());
    if constexpr (!looks_across) return;
    norm.forward(x, h, ctx.child(0));
    lithe::fill(inner, h, c, ctx.child(1));
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const { return lithe::least_length(inner, c, slot); }
  void truncate(cache& c, index_t slot, index_t length) const { lithe::truncate(inner, c, slot, length); }
  void permute(cache& c, std::span<const index_t> order) const { lithe::permute(inner, c, order); }

  [[nodiscard]] cost forward_cost(index_t length) const { return cost_of(norm, length) + cost_of(inner, length); }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("norm", s.norm...);
    f("inner", s.inner...);
  }

 private:
  static constexpr const char* who = "pre_norm";
  using conditioning = detail::conditioning<S>;

  void run(matrix_view<const S> x, const conditioning& m, matrix_view<S> y, const context& ctx) const {
    detail::check_rows(who, "y", *this, x, y, ctx);
    const scratch<S> h(ctx, x.rows(), x.cols());
    norm.forward(x, h, ctx.child(0));
    detail::forward_part<Inner, S>(inner, h, m, y, ctx.child(1));
    drop.forward(y, y, ctx.child(2));
  }
  void run(matrix_view<const S> x, const conditioning& m, matrix_view<S> y, record& r, const context& ctx) const {
    detail::check_rows(who, "y", *this, x, y, ctx);
    r.normed.resize(x.rows(), x.cols());
    norm.forward(x, r.normed, r.norm, ctx.child(0));
    detail::forward_part<Inner, S>(inner, r.normed, m, y, r.inner, ctx.child(1));
    drop.forward(y, y, r.drop, ctx.child(2));
  }
  void run_back(matrix_view<const S> x, const conditioning& m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
                const context& ctx) const {
    detail::check_rows(who, "dy", *this, x, dy, ctx);
    detail::check_like(who, "dx", dx, x);
    check_gradient(who, *this, g);
    recorded(who, r.normed, x.rows(), x.cols());
    const scratch<S> d(ctx, dy.rows(), ctx.train && drop.rate > 0 ? dy.cols() : 0), dn(ctx, x.rows(), x.cols());
    typename dropout<S>::gradient none;
    if (d.cols() != 0) {
      drop.backward(dy, r.drop, dy, d, none, ctx.child(2));
      dy = d;
    }
    detail::backward_part<Inner, S>(inner, r.normed, m, r.inner, dy, dn, g.inner, ctx.child(1));
    norm.backward(x, r.norm, dn, dx, g.norm, ctx.child(0));
  }
};

}  // namespace lithe::inline LITHE_ABI
