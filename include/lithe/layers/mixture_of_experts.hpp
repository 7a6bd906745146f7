#pragma once

#include "lithe/kernels/activation.hpp"
#include "lithe/kernels/gather.hpp"
#include "lithe/kernels/top_k.hpp"
#include "lithe/layers/linear.hpp"

// T tokens, D features, F hidden features of an expert, E experts, K experts of a token, A = T K assignments of tokens to experts
namespace lithe::inline LITHE_ABI {

struct mixture_of_experts_config {
  index_t features = 0;
  index_t hidden = 0;  ///< of one expert
  index_t experts = 8, top_k = 2;
  activation kind = activation::gelu;
  bool gated = false;        ///< experts down(a(gate x) ⊙ up x) in place of down(a(up x))
  bool renormalise = false;  ///< divide the weights of a token by their sum
  double balance = 0.01;     ///< coefficient of the balance loss
  double z_loss = 0.001;     ///< coefficient of the z-loss
};

namespace detail {

/// The assignments of tokens to experts in the order of the experts and, of one expert, of the tokens.
struct grouped_routes {
  scratch<row_pick> sorted, spare;
  index_t count;           // assignments; those of masked tokens are left out
  scratch<slot_t> place;   // of each assignment in `sorted`, -1 if it is left out
  scratch<index_t> start;  // of each expert in `sorted`, and the end of the last
  scratch<slot_t> active;  // the experts that any token chose
  index_t actives = 0;

  grouped_routes(matrix_view<const slot_t> routes, index_t experts, const context& ctx)
      : sorted(ctx, routes.size()), spare(ctx, routes.size()),
        count(sort_rows({routes.data(), static_cast<std::size_t>(routes.size())}, experts, sorted.span(), spare.span())), place(ctx, routes.size()),
        start(ctx, experts + 1), active(ctx, experts) {
    std::fill_n(place.data(), routes.size(), slot_t{-1});
    for (index_t i = 0; i < count; ++i) place[sorted[i].pick] = static_cast<slot_t>(i);
    for (index_t e = 0, i = 0; e < experts; ++e) {
      start[e] = i;
      while (i < count && sorted[i].row == e) ++i;
      if (i > start[e]) active[actives++] = static_cast<slot_t>(e);
    }
    start[experts] = count;
  }
  [[nodiscard]] index_t size(index_t e) const { return start[e + 1] - start[e]; }
  /// The rows of m that belong to an expert.
  template <class E>
  [[nodiscard]] matrix_view<E> of(matrix_view<E> m, index_t e) const {
    return m.slice_rows(start[e], size(e));
  }
};

}  // namespace detail

/// Mixture of experts (arXiv 1701.06538; switch and z-loss as in arXiv 2202.08906): for every token x [D]
///
///     s = W_r x, p = softmax(s);  the K experts of largest p;  w_e = p_e, or p_e / Σ_chosen p;  y = Σ_chosen w_e FFN_e(x)
///     FFN_e(x) = down_e a(up_e x), or gated down_e (a(gate_e x) ⊙ up_e x)
///
/// x and y [T x D]. Tokens are grouped by expert, and an expert multiplies all of its tokens at once. Its own losses, in training and
/// in evaluation: balance E Σ_e f_e p̄_e (f_e the share of assignments that fell on e, constant; p̄ the mean of p; arXiv 2101.03961 eq. 4)
/// and z, the mean of logsumexp(s)² (arXiv 2202.08906 eq. 5). Rows that ctx.mask hides give 0 and count nowhere; a row with NaN gives NaN.
/// Routes are kept for replay. Throws config_error, shape_error, state_error (replay without routes).
template <std::floating_point S>
struct mixture_of_experts {
  using scalar = S;
  struct record {
    kept<matrix<slot_t>> routes;  // [T x K], the largest p first
    matrix<S> probabilities;      // [T x E]
    matrix<S> log_sum;            // [T x 1]
    matrix<S> up, gate;           // [A x F], before the activation
    matrix<S> read;               // [A x D], outputs of the experts
    auxiliary<S> balance, z;
  };
  struct gradient {
    gradient_of<linear<S>> router;
    matrix<S> up, gate, down;
  };

  mixture_of_experts_config config;
  linear<S> router;
  matrix<S> up, gate;  // [E F x D], one expert below the other; gate only if gated
  matrix<S> down;      // [E D x F]
  packed_matrix<S> packed_up, packed_gate, packed_down;  // an expert a part, made by `prepack`

  mixture_of_experts() = default;
  /// Weights start at U(±1/√inputs), as those of `linear`.
  mixture_of_experts(mixture_of_experts_config c, rng_key key) : config(c) {
    require<config_error>(c.features >= 1 && c.experts >= 1 && c.hidden >= 1,
                          "mixture_of_experts: expected at least 1 feature, 1 expert and 1 hidden feature, got ", c.features, ", ", c.experts, " and ",
                          c.hidden);
    require<config_error>(c.top_k >= 1 && c.top_k <= c.experts, "mixture_of_experts: expected top_k from 1 to the ", c.experts, " experts, got ", c.top_k);
    require<config_error>(c.balance >= 0 && c.z_loss >= 0, "mixture_of_experts: expected loss coefficients of 0 or more, got ", c.balance, " and ",
                          c.z_loss);
    router = linear<S>({c.features, c.experts, false}, key.child(0));
    const double in = 1 / std::sqrt(static_cast<double>(c.features)), out = 1 / std::sqrt(static_cast<double>(c.hidden));
    up.resize(c.experts * c.hidden, c.features);
    gate.resize(c.gated ? c.experts * c.hidden : 0, c.features);
    down.resize(c.experts * c.features, c.hidden);
    fill_uniform<S>(up, in, key.child(1));
    fill_uniform<S>(gate, in, key.child(2));
    fill_uniform<S>(down, out, key.child(3));
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("mixture_of_experts", config.features, x);
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    const index_t T = x.rows(), A = T * config.top_k;
    check_forward(who, *this, x, y, ctx);
    const scratch<slot_t> routes(ctx, T, config.top_k);
    const scratch<S> p(ctx, T, config.experts), log_sum(ctx, T, 1), u(ctx, A, config.hidden), v(ctx, config.gated ? A : 0, config.hidden);
    const scratch<S> read(ctx, A, config.features);
    route(x, p, log_sum, ctx);
    choose(p, routes, ctx);
    compute(x, p, routes, u, v, u, read, y, ctx);
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const index_t T = x.rows(), A = T * config.top_k;
    check_forward(who, *this, x, y, ctx);
    if (ctx.replay) recorded_slots(who, r.routes.value, T, config.top_k, config.experts);
    r.probabilities.resize(T, config.experts);
    r.log_sum.resize(T, 1);
    r.up.resize(A, config.hidden);
    r.gate.resize(config.gated ? A : 0, config.hidden);
    r.read.resize(A, config.features);
    route(x, r.probabilities, r.log_sum, ctx);
    if (!ctx.replay) {
      r.routes.value.resize(T, config.top_k);
      choose(r.probabilities, r.routes.value, ctx);
    }
    const scratch<S> h(ctx, A, config.hidden);
    compute(x, r.probabilities, r.routes.value, r.up, r.gate, h, r.read, y, ctx);
    measure(r, ctx);
  }

  /// With dw_e = <dy, FFN_e(x)>: dp_e = dw_e, or renormalised (dw_e - Σ w dw) / Σ_chosen p; the losses add c_b E f_e / N to every dp_e and
  /// 2 c_z logsumexp(s) p_e / N to ds; ds = p ⊙ (dp - <p, dp>). Expert e gets w_e dy.
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t T = x.rows(), D = config.features, E = config.experts, K = config.top_k, A = T * K;
    check_backward(who, *this, x, dy, dx, g, ctx);
    const matrix_view<const slot_t> routes = recorded_slots(who, r.routes.value, T, K, E);
    recorded(who, r.probabilities, T, E);
    recorded(who, r.log_sum, T, 1);
    recorded(who, r.up, A, config.hidden);
    recorded(who, r.gate, config.gated ? A : 0, config.hidden);
    recorded(who, r.read, A, D);
    const detail::grouped_routes groups(routes, E, ctx);
    const scratch<S> dw(ctx, T, K), ds(ctx, T, E), weights(ctx, T, K);
    row_dots<S>(r.read, groups.place.span(), K, dy, dw.span(), ctx);
    weigh(r.probabilities, routes, weights, ctx);
    router_gradient(r, groups, weights, dw, ds, ctx);
    router.backward(x, {}, ds, dx, g.router, ctx);

    const scratch<S> in(ctx, A, D), out(ctx, A, D), h(ctx, A, config.hidden), dh(ctx, A, config.hidden), dgate(ctx, config.gated ? A : 0, config.hidden);
    gather_rows(x, groups, in, ctx);
    ctx.exec->run(groups.count, detail::grain_rows(D), [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) {
        const auto pick = static_cast<index_t>(groups.sorted[i].pick);
        out.view().row_array(i) = weights[pick] * dy.row_array(pick / K);
      }
    });
    const auto used = [&](auto&& m) { return view(m).slice_rows(0, groups.count); };
    activate_hidden(used(r.up), used(r.gate), used(h), ctx);
    each_active(groups, [&](index_t e) {
      gemm_nn<S>(groups.of(out.view(), e), of_expert(view(down), e), groups.of(dh.view(), e), ctx);
      gemm_tn<S>(groups.of(out.view(), e), groups.of(h.view(), e), of_expert(matrix_view<S>(g.down), e), ctx, update::add);
    });
    if (config.gated)
      activate_gated_backward<S>(config.kind, used(r.gate), used(r.up), used(dh), used(dgate), used(dh), ctx);
    else
      activate_backward<S>(config.kind, used(r.up), used(dh), used(dh), ctx);
    each_active(groups, [&](index_t e) {
      const auto x_e = groups.of(in.view(), e), din = groups.of(out.view(), e);  // the output's gradient is done with
      gemm_tn<S>(groups.of(dh.view(), e), x_e, of_expert(matrix_view<S>(g.up), e), ctx, update::add);
      gemm_nn<S>(groups.of(dh.view(), e), of_expert(view(up), e), din, ctx);
      if (!config.gated) return;
      gemm_tn<S>(groups.of(dgate.view(), e), x_e, of_expert(matrix_view<S>(g.gate), e), ctx, update::add);
      gemm_nn<S>(groups.of(dgate.view(), e), of_expert(view(gate), e), din, ctx, update::add);
    });
    weights.map().setOnes();
    gather_sum<S>(out, {groups.place.span(), weights.span(), K}, dx, ctx, update::add);
  }

  /// How many tokens chose each expert [E].
  [[nodiscard]] std::vector<index_t> load(const record& r) const {
    std::vector<index_t> n(static_cast<std::size_t>(config.experts));
    count(r, n);
    return n;
  }

  void prepack() {
    packed_up.assign(up, config.experts);
    if (config.gated) packed_gate.assign(gate, config.experts);
    packed_down.assign(down, config.experts);
  }
  void refresh() {
    if (!packed_up.empty()) prepack();
  }
  void after_step(const gradient&) { refresh(); }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost all = dense_cost<S>((config.gated ? 3 : 2) * config.hidden, config.features);
    all.parameters *= static_cast<double>(config.experts);
    all.flops *= static_cast<double>(config.top_k);
    all.bytes *= static_cast<double>(config.top_k);
    return all + router.forward_cost(length);
  }
  template <class V, class... Structs>
  static void visit(V&& f, Structs&... s) {
    f("router", s.router...);
    f("up", s.up...);
    f("gate", s.gate...);
    f("down", s.down...);
  }

 private:
  static constexpr const char* who = "mixture_of_experts";
  static constexpr index_t block = 256;  // rows of a weight: one token through one expert is then work for several workers

  /// The part of stacked weights (or of their gradient) that belongs to an expert.
  template <class E>
  matrix_view<E> of_expert(matrix_view<E> stacked, index_t e) const {
    const index_t rows = stacked.rows() / config.experts;
    return stacked.slice_rows(e * rows, rows);
  }
  template <class F>
  void each_active(const detail::grouped_routes& groups, F&& f) const {
    for (index_t i = 0; i < groups.actives; ++i) f(static_cast<index_t>(groups.active[i]));
  }

  /// p = softmax(W_r x) and logsumexp.
  void route(matrix_view<const S> x, matrix_view<S> p, matrix_view<S> log_sum, const context& ctx) const {
    router.forward(x, p, ctx);
    ctx.exec->run(x.rows(), detail::grain_rows(8 * config.experts), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) {
        auto row = p.row_array(t);
        const S most = row.maxCoeff();
        row = (row - most).exp();
        const S sum = row.sum();
        row /= sum;
        log_sum(t, 0) = most + std::log(sum);
      }
    });
  }
  void choose(matrix_view<const S> p, matrix_view<slot_t> routes, const context& ctx) const {
    const scratch<S> best(ctx, p.rows(), config.top_k);
    top_k<S>(p, best, routes, ctx);
    for (index_t t = 0; !ctx.mask.empty() && t < p.rows(); ++t)
      if (!ctx.valid(t)) std::fill_n(routes.row(t), config.top_k, slot_t{-1});
  }
  void weigh(matrix_view<const S> p, matrix_view<const slot_t> routes, matrix_view<S> weights, const context& ctx) const {
    ctx.exec->run(p.rows(), 256, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) {
        S sum = 0;
        for (index_t k = 0; k < config.top_k; ++k) sum += weights(t, k) = routes(t, k) < 0 ? S(0) : p(t, routes(t, k));
        if (config.renormalise && routes(t, 0) >= 0) weights.row_array(t) /= sum;
      }
    });
  }
  /// Row i of `in` is the token of the i-th assignment.
  void gather_rows(matrix_view<const S> x, const detail::grouped_routes& groups, matrix_view<S> in, const context& ctx) const {
    ctx.exec->run(groups.count, detail::grain_rows(x.cols()), [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) std::copy_n(x.row(static_cast<index_t>(groups.sorted[i].pick) / config.top_k), x.cols(), in.row(i));
    });
  }
  /// out = in Wᵀ, the rows of each expert by its weights.
  void multiply(matrix_view<const S> in, const detail::grouped_routes& groups, const matrix<S>& stacked, const packed_matrix<S>& packed,
                matrix_view<S> out, const context& ctx) const {
    const index_t rows = out.cols(), parts = (rows + block - 1) / block;
    ctx.exec->run(groups.actives * parts, 1, [&](index_t piece, index_t) {
      const index_t e = groups.active[piece / parts], first = piece % parts * block, n = std::min(block, rows - first);
      const auto a = groups.of(in, e);
      const auto c = groups.of(out, e).slice_cols(first, n);
      if (packed.empty())
        gemm_nt<S>(a, of_expert(view(stacked), e).slice_rows(first, n), c, ctx);
      else
        gemm_packed<S>(a, packed.part(e).slice_rows(first, n), c, ctx);
    });
  }
  void activate_hidden(matrix_view<const S> u, matrix_view<const S> v, matrix_view<S> h, const context& ctx) const {
    if (config.gated)
      activate_gated<S>(config.kind, v, u, h, ctx);
    else
      activate<S>(config.kind, u, h, ctx);
  }
  /// u, v [A x F] before the activation, h after it (may be u), read [A x D].
  void compute(matrix_view<const S> x, matrix_view<const S> p, matrix_view<const slot_t> routes, matrix_view<S> u, matrix_view<S> v, matrix_view<S> h,
               matrix_view<S> read, matrix_view<S> y, const context& ctx) const {
    const detail::grouped_routes groups(routes, config.experts, ctx);
    const scratch<S> weights(ctx, x.rows(), config.top_k), in(ctx, groups.count, config.features);
    gather_rows(x, groups, in, ctx);
    multiply(in, groups, up, packed_up, u, ctx);
    if (config.gated) multiply(in, groups, gate, packed_gate, v, ctx);
    const auto used = [&](matrix_view<S> m) { return m.slice_rows(0, std::min(m.rows(), groups.count)); };
    activate_hidden(used(u), used(v), used(h), ctx);
    multiply(h, groups, down, packed_down, read, ctx);
    weigh(p, routes, weights, ctx);
    gather_sum<S>(read, {groups.place.span(), weights.span(), config.top_k}, y, ctx);
  }

  /// N, the tokens that count.
  [[nodiscard]] static double counted(const record& r) {
    return r.routes.value.rows() == 0 ? 0 : static_cast<double>((r.routes.value.col(0).array() >= 0).count());
  }
  static void count(const record& r, std::span<index_t> chosen) {
    std::fill(chosen.begin(), chosen.end(), index_t{0});
    for (index_t i = 0; i < r.routes.value.size(); ++i)
      if (r.routes.value.data()[i] >= 0) ++chosen[static_cast<std::size_t>(r.routes.value.data()[i])];
  }
  void measure(record& r, const context& ctx) const {
    const double N = counted(r), E = static_cast<double>(config.experts), K = static_cast<double>(config.top_k);
    double balance = 0, z = 0;
    const scratch<index_t> chosen(ctx, config.experts);
    count(r, chosen.span());
    for (index_t e = 0; e < config.experts; ++e) {
      double sum = 0;
      for (index_t t = 0; t < r.probabilities.rows(); ++t) sum += ctx.valid(t) ? static_cast<double>(r.probabilities(t, e)) : 0;
      balance += static_cast<double>(chosen[e]) * sum;
    }
    for (index_t t = 0; t < r.log_sum.rows(); ++t) z += ctx.valid(t) ? static_cast<double>(r.log_sum(t, 0)) * static_cast<double>(r.log_sum(t, 0)) : 0;
    r.balance.loss = N > 0 ? static_cast<S>(config.balance * E * balance / (N * N * K)) : S(0);
    r.z.loss = N > 0 ? static_cast<S>(config.z_loss * z / N) : S(0);
  }
  void router_gradient(const record& r, const detail::grouped_routes& groups, const scratch<S>& weights, const scratch<S>& dw, const scratch<S>& ds,
                       const context& ctx) const {
    const index_t E = config.experts, K = config.top_k;
    const double N = counted(r);
    const scratch<S> slope(ctx, 1, E);
    for (index_t e = 0; e < E; ++e)
      slope[e] = N > 0 ? static_cast<S>(ctx.auxiliary * config.balance * static_cast<double>(E * groups.size(e)) / (N * N * static_cast<double>(K))) : S(0);
    const S z = N > 0 ? static_cast<S>(2 * ctx.auxiliary * config.z_loss / N) : S(0);
    ctx.exec->run(ds.rows(), detail::grain_rows(4 * E), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) {
        auto d = ds.view().row_array(t);
        d.setZero();
        if (r.routes.value(t, 0) < 0) continue;
        const auto p = r.probabilities.row(t).array();
        const auto w = weights.view().row_array(t), change = dw.view().row_array(t);
        S sum = 0, mean = 0;
        if (config.renormalise) {
          for (index_t k = 0; k < K; ++k) sum += p(r.routes.value(t, k));
          mean = (w * change).sum();
        }
        d = slope.view().row_array(0);
        for (index_t k = 0; k < K; ++k) d(r.routes.value(t, k)) += config.renormalise ? (change(k) - mean) / sum : change(k);
        const S along = (p * d).sum();
        d = p * (d - along + z * r.log_sum(t, 0));
      }
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
