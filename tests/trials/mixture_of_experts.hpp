#pragma once

#include "lithe/kernels/gemm.hpp"
#include "lithe/layers/feed_forward.hpp"

// T tokens, D features, E experts, K experts of a token
namespace trials {

using namespace lithe;

struct mixture_of_experts_config {
  feed_forward_config expert{};
  index_t experts = 1, top_k = 1;
  double balance = 0;  ///< weight of the balance loss
};

/// Mixture of experts: p = softmax(x Wrᵀ), y_t = Σ_{e in the K largest p_t} p_te expert_e(x_t). Each expert runs once, over the tokens that chose
/// it. Auxiliary: balance E Σ_e f_e mean_t(p_te), f_e the share of choices that fell on e, a constant (arXiv 2101.03961 eq. 4).
template <std::floating_point S>
struct mixture_of_experts {
  using scalar = S;
  struct record {
    kept<matrix<slot_t>> routes;  // [T x K]
    matrix<S> probabilities;      // [T x E]
    std::vector<record_of<feed_forward<S>>> experts;
    std::vector<matrix<S>> inputs, outputs;  // of each expert, its tokens in order
    auxiliary<S> balance;
  };
  struct gradient {
    gradient_of<linear<S>> router;
    std::vector<gradient_of<feed_forward<S>>> experts;
  };

  linear<S> router;
  std::vector<feed_forward<S>> experts;
  index_t top_k = 1;
  double balance = 0;

  mixture_of_experts() = default;
  mixture_of_experts(mixture_of_experts_config c, rng_key key)
      : router({c.expert.features, c.experts, false}, key.child(0)), top_k(c.top_k), balance(c.balance) {
    require<config_error>(c.top_k >= 1 && c.top_k <= c.experts, "mixture_of_experts: expected top_k from 1 to ", c.experts, ", got ", c.top_k);
    for (index_t e = 0; e < c.experts; ++e) experts.emplace_back(c.expert, key.child(static_cast<std::uint64_t>(e + 1)));
  }

  void prepare(gradient& g) const { g.experts.resize(experts.size()); }
  shape output_shape(matrix_view<const S> x) const {
    require_features("mixture_of_experts", router.weight.cols(), x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;
    record r;
    forward(x, y, r, c);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("mixture_of_experts", "y", y, out.rows, out.cols);
    const std::size_t E = experts.size();
    r.probabilities.resize(x.rows(), router.weight.rows());
    router.forward(x, r.probabilities, ctx);
    for (index_t t = 0; t < x.rows(); ++t) {
      auto p = r.probabilities.row(t).array();
      p = (p - p.maxCoeff()).exp();
      p /= p.sum();
    }
    require<state_error>(!ctx.replay || r.routes.value.rows() == x.rows(), "mixture_of_experts: replay needs the routes of ", x.rows(), " tokens, got ",
                         r.routes.value.rows());
    if (!ctx.replay) choose(r.probabilities, r.routes.value);
    r.experts.resize(E);
    r.inputs.resize(E);
    r.outputs.resize(E);
    y.map().setZero();
    for (std::size_t e = 0; e < E; ++e) {
      const auto tokens = tokens_of(r.routes.value, e);
      const auto n = static_cast<index_t>(tokens.size());
      r.inputs[e].resize(n, x.cols());
      r.outputs[e].resize(n, x.cols());
      for (index_t i = 0; i < n; ++i) r.inputs[e].row(i) = x.map().row(tokens[static_cast<std::size_t>(i)]);
      experts[e].forward(r.inputs[e], r.outputs[e], r.experts[e], expert_context(e, ctx));
      for (index_t i = 0; i < n; ++i) {
        const index_t t = tokens[static_cast<std::size_t>(i)];
        y.map().row(t) += r.probabilities(t, static_cast<index_t>(e)) * r.outputs[e].row(i);
      }
    }
    r.balance.loss = 0;
    for (std::size_t e = 0; e < E; ++e) r.balance.loss += balance_slope(r, e) * r.probabilities.col(static_cast<index_t>(e)).sum();
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const scratch<S> dp(ctx, x.rows(), router.weight.rows()), from_experts(ctx, x.rows(), x.cols());
    from_experts.map().setZero();
    for (std::size_t e = 0; e < experts.size(); ++e) {
      const auto tokens = tokens_of(r.routes.value, e);
      const auto n = static_cast<index_t>(tokens.size()), column = static_cast<index_t>(e);
      const scratch<S> dout(ctx, n, x.cols()), din(ctx, n, x.cols());
      dp.map().col(column).setConstant(static_cast<S>(ctx.auxiliary) * balance_slope(r, e));
      for (index_t i = 0; i < n; ++i) {
        const index_t t = tokens[static_cast<std::size_t>(i)];
        dp.map()(t, column) += r.outputs[e].row(i).dot(dy.map().row(t));
        dout.map().row(i) = r.probabilities(t, column) * dy.map().row(t);
      }
      experts[e].backward(r.inputs[e], r.experts[e], dout, din, g.experts[e], expert_context(e, ctx));
      for (index_t i = 0; i < n; ++i) from_experts.map().row(tokens[static_cast<std::size_t>(i)]) += din.map().row(i);
    }
    for (index_t t = 0; t < x.rows(); ++t) {
      const auto p = r.probabilities.row(t).array();
      auto d = dp.map().row(t).array();
      const S mean = (p * d).sum();
      d = p * (d - mean);
    }
    router.backward(x, {}, dp, dx, g.router, ctx);
    dx.map() += from_experts.map();
  }
  template <class F, class First, class... Rest>
  static void visit(F&& f, First& s, Rest&... rest) {
    f("router", s.router, rest.router...);
    for (std::size_t e = 0; e < s.experts.size(); ++e) f("experts." + std::to_string(e), s.experts[e], rest.experts[e]...);
  }

 private:
  /// Rows are regrouped, so segments and mask of the caller say nothing about them.
  static context expert_context(std::size_t e, const context& ctx) {
    return ctx.child(e + 1).position_wise();
  }
  void choose(const matrix<S>& p, matrix<slot_t>& routes) const {
    routes.resize(p.rows(), top_k);
    for (index_t t = 0; t < p.rows(); ++t)
      for (index_t k = 0; k < top_k; ++k) {
        index_t best = -1;
        for (index_t e = 0; e < p.cols(); ++e)
          if ((routes.row(t).head(k).array() != static_cast<slot_t>(e)).all() && (best < 0 || p(t, e) > p(t, best))) best = e;
        routes(t, k) = static_cast<slot_t>(best);
      }
  }
  static std::vector<index_t> tokens_of(const matrix<slot_t>& routes, std::size_t e) {
    std::vector<index_t> tokens;
    for (index_t t = 0; t < routes.rows(); ++t)
      if ((routes.row(t).array() == static_cast<slot_t>(e)).any()) tokens.push_back(t);
    return tokens;
  }
  /// d balance loss / d p_te: the same for all tokens.
  S balance_slope(const record& r, std::size_t e) const {
    const auto T = static_cast<double>(r.routes.value.rows()), chosen = static_cast<double>(r.inputs[e].rows());
    return T == 0 ? S(0) : static_cast<S>(balance * static_cast<double>(experts.size()) * chosen / (T * static_cast<double>(top_k)) / T);
  }
};

}  // namespace trials
