#pragma once

#include "lithe/layers/linear.hpp"
#include "lithe/layers/memory/query_convolution.hpp"
#include "lithe/layers/memory/score_norm.hpp"

// T tokens, D features, B blocks of a query, d their width
namespace lithe::inline LITHE_ABI {

/// The queries of UltraMem: q = norm(W_q conv(x)), the norm over each of the B blocks of width d (arXiv 2411.12364 section 3). x [T x D], q [T x B d],
/// W_q [B d x D] without bias.
template <std::floating_point S>
struct ultra_mem_query {
  using scalar = S;
  struct record {
    matrix<S> convolved;   // [T x D], if there is a convolution
    matrix<S> projected;   // before the norm
    matrix<S> statistics;  // [T B x 2]
    matrix<S> queries;
  };
  struct gradient {
    gradient_of<query_convolution<S>> convolution;
    gradient_of<linear<S>> projection;
    typename score_norm<S>::gradient norm;
  };
  using cache = cache_of<query_convolution<S>>;

  query_convolution<S> convolution;
  linear<S> projection;
  score_norm<S> norm;

  [[nodiscard]] index_t outputs() const { return projection.weight.rows(); }  ///< B d, the columns of q

  void forward(matrix_view<const S> x, matrix_view<S> q, const context& ctx) const {
    const scratch<S> convolved(ctx, convolution.none() ? 0 : x.rows(), x.cols());
    if (!convolution.none()) convolution.forward(x, convolved, ctx);
    finish(convolution.none() ? x : matrix_view<const S>(convolved), q, ctx);
  }
  void forward(matrix_view<const S> x, record& r, const context& ctx) const {
    const index_t T = x.rows();
    r.convolved.resize(convolution.none() ? 0 : T, x.cols());
    r.projected.resize(T, outputs());
    r.statistics.resize(by_block(view(r.projected)).rows(), 2);
    r.queries.resize(T, outputs());
    if (!convolution.none()) convolution.forward(x, r.convolved, ctx);
    projection.forward(input(x, r), r.projected, ctx);
    norm.forward(by_block(view(std::as_const(r.projected))), by_block(view(r.queries)), r.statistics, ctx);
  }
  /// Throws state_error unless r is of a forward over x.
  void check_record(matrix_view<const S> x, const record& r) const {
    constexpr const char* who = "ultra_mem";
    const index_t T = x.rows();
    recorded(who, r.convolved, convolution.none() ? 0 : T, x.cols());
    for (const matrix<S>* m : {&r.projected, &r.queries}) recorded(who, *m, T, outputs());
    recorded(who, r.statistics, by_block(view(r.projected)).rows(), 2);
  }
  /// dq is used up, dx added to.
  void backward(matrix_view<const S> x, const record& r, matrix_view<S> dq, matrix_view<S> dx, gradient& g, const context& ctx) const {
    norm.backward(by_block(view(r.projected)), r.statistics, by_block(dq), by_block(dq), g.norm, ctx);
    if (convolution.none()) return projection.add_backward(x, dq, dx, g.projection, ctx);
    const scratch<S> dconvolved(ctx, x.rows(), x.cols());
    projection.backward(r.convolved, {}, dq, dconvolved, g.projection, ctx);
    convolution.add_backward(x, dconvolved, dx, g.convolution, ctx);
  }
  /// The queries of new rows, after what the cache holds.
  void decode(matrix_view<const S> x, matrix_view<S> q, cache& c, const context& ctx) const {
    const scratch<S> convolved(ctx, convolution.none() ? 0 : x.rows(), x.cols());
    if (!convolution.none()) convolution.decode(x, convolved, c, ctx);
    finish(convolution.none() ? x : matrix_view<const S>(convolved), q, ctx);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    const double n = static_cast<double>(norm.weight.size() + norm.bias.size());
    return convolution.forward_cost(length) + projection.forward_cost(length) + cost{n, 0, n * sizeof(S)};
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("convolution", s.convolution...);
    f("projection", s.projection...);
    f("norm", s.norm...);
  }

 private:
  matrix_view<const S> input(matrix_view<const S> x, const record& r) const { return convolution.none() ? x : matrix_view<const S>(r.convolved); }
  /// [T x B d] seen as [T B x d].
  template <class E>
  matrix_view<E> by_block(matrix_view<E> q) const {
    return q.cut_rows(norm.weight.cols());
  }
  void finish(matrix_view<const S> x, matrix_view<S> q, const context& ctx) const {
    projection.forward(x, q, ctx);
    const auto rows = by_block(q);
    const scratch<S> statistics(ctx, rows.rows(), 2);
    if (norm.kind != score_norm_kind::none) norm.forward(rows, rows, statistics, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
