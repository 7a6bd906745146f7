#pragma once

#include "lithe/layers/halting_head.hpp"

// T tokens, D features, N exits
namespace lithe::inline LITHE_ABI {

enum class exit_distribution {
  geometric,   ///< a stick is broken after each block (Poisson-binomial)
  multinomial  ///< one choice among all exits, after block 1
};

struct halting_config {
  exit_distribution kind = exit_distribution::geometric;
  index_t exits = 1, features = 0;
  bool per_block = false;  ///< geometric: a head for each block instead of one for all
  index_t hidden_layers = 0;
  halting_activation activation = halting_activation::tanh;
  double bias = 0;
};

/// The distribution over exits that a model's own states predict (arXiv 1910.10073, section 4.2): x [N T x D] holds the outputs of blocks
/// 1 .. N one below the other (rows (n-1) T .. n T - 1 are block n's), log_q [T x N]. Geometric: zⁿ = head(hⁿ) for n < N and `stick_breaking`;
/// multinomial: log softmax(head(h¹)). With one exit log q = 0 and there is no head. Segments and mask are those of the T tokens. Throws config_error, shape_error.
template <std::floating_point S>
struct halting {
  using scalar = S;
  struct record {
    std::vector<record_of<halting_head<S>>> heads;
    matrix<S> signals;  // geometric: z [N-1 x T]; multinomial: log q [T x N]
  };
  struct gradient {
    std::vector<gradient_of<halting_head<S>>> heads;
  };

  std::vector<halting_head<S>> heads;  ///< 1, or N-1 of a geometric distribution per block
  exit_distribution kind = exit_distribution::geometric;
  index_t exits = 1;

  halting() = default;
  /// Heads start as `halting_head`. Throws config_error without an exit, and for a multinomial head per block.
  halting(halting_config c, rng_key key) : kind(c.kind), exits(c.exits) {
    require<config_error>(c.exits >= 1, "halting: expected at least 1 exit, got ", c.exits);
    require<config_error>(!c.per_block || kind == exit_distribution::geometric,
                          "halting: a multinomial distribution has one head, not one for each block");
    const index_t n = exits == 1 ? 0 : c.per_block ? exits - 1 : 1;
    for (index_t i = 0; i < n; ++i)
      heads.emplace_back(halting_head_config{c.features, geometric() ? 1 : exits, c.hidden_layers, c.activation, c.bias},
                         key.child(static_cast<std::uint64_t>(i)));
  }
  /// Whether a stick is broken after each block; else one choice is made after block 1.
  [[nodiscard]] bool geometric() const { return kind == exit_distribution::geometric; }
  /// The head that reads the states of block n, from 1.
  [[nodiscard]] const halting_head<S>& head(index_t n) const { return heads[heads.size() == 1 ? 0 : static_cast<std::size_t>(n - 1)]; }

  void prepare(gradient& g) const { g.heads.resize(heads.size()); }
  shape output_shape(matrix_view<const S> x) const {
    require<shape_error>(x.rows() % exits == 0, "halting: expected the states of ", exits, " blocks one below the other, got ", x.rows(), " rows");
    if (!heads.empty()) heads.front().output_shape(x);
    return {x.rows() / exits, exits};
  }
  void forward(matrix_view<const S> x, matrix_view<S> log_q, const context& ctx) const {
    const index_t T = checked(x, log_q, ctx);
    const scratch<S> z(ctx, geometric() ? exits - 1 : 0, T);
    run(
        x, z.view(), log_q, [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out) { heads[i].forward(in, out, ctx.position_wise()); }, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> log_q, record& r, const context& ctx) const {
    const index_t T = checked(x, log_q, ctx);
    const regrouped by_state(ctx, x.rows(), [T](index_t i) { return i % T; });
    r.heads.resize(heads.size());
    geometric() ? r.signals.resize(exits - 1, T) : r.signals.resize(T, exits);
    run(
        x, r.signals, log_q,
        [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out) {
          heads[i].forward(in, out, r.heads[i], by_state.ctx(static_cast<index_t>(i) * T, in.rows()));
        },
        ctx);
    if (!geometric()) r.signals = log_q.map();
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dlog_q, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t T = checked(x, dlog_q, ctx);
    detail::check_like("halting", "dx", dx, x);
    check_gradient("halting", *this, g);
    recorded("halting", r.heads, heads.size());
    recorded("halting", r.signals, geometric() ? exits - 1 : T, geometric() ? T : exits);
    dx.map().setZero();
    if (heads.empty()) return;
    const scratch<S> dz(ctx, T, exits);
    const regrouped by_state(ctx, x.rows(), [T](index_t i) { return i % T; });
    if (geometric()) {
      const matrix_view<S> d(dz.data(), exits - 1, T);
      stick_breaking_backward<S>(r.signals, dlog_q, d, ctx);
      each_head(T, [&](std::size_t i, index_t first, index_t n) {
        heads[i].backward(x.slice_rows(first, n), r.heads[i], matrix_view<S>(dz.data() + first, n, 1), dx.slice_rows(first, n), g.heads[i],
                          by_state.ctx(first, n));
      });
    } else {
      multinomial_exits_backward<S>(r.signals, dlog_q, dz, ctx);
      heads[0].backward(x.slice_rows(0, T), r.heads[0], dz, dx.slice_rows(0, T), g.heads[0], by_state.ctx(0, T));
    }
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto& h : heads) sum += h.forward_cost(length);
    return sum;
  }
  template <class F, class First, class... Rest>
  static void visit(F&& f, First& s, Rest&... rest) {
    visit_parts(f, {"", 1, ""}, s.heads, rest.heads...);
  }

 private:
  template <class T>
  index_t checked(matrix_view<const S> x, matrix_view<T> log_q, const context& ctx) const {
    detail::check_matrices("halting", "log q", *this, x, log_q);
    ctx.check("halting", log_q.rows());
    return log_q.rows();
  }
  /// f(head, first row of x, rows) for the rows that each head of a geometric distribution reads.
  template <class F>
  void each_head(index_t T, F&& f) const {
    const index_t n = static_cast<index_t>(heads.size()), rows = n == 0 ? 0 : (exits - 1) * T / n;
    for (index_t i = 0; i < n; ++i) f(static_cast<std::size_t>(i), i * rows, rows);
  }
  template <class Head>
  void run(matrix_view<const S> x, matrix_view<S> z, matrix_view<S> log_q, Head&& predict, const context& ctx) const {
    const index_t T = log_q.rows();
    if (heads.empty()) {
      log_q.map().setZero();
    } else if (geometric()) {  // z [N-1 x T] is one column for all states of blocks 1 .. N-1
      each_head(T, [&](std::size_t i, index_t first, index_t n) { predict(i, x.slice_rows(first, n), matrix_view<S>(z.data() + first, n, 1)); });
      stick_breaking<S>(z, log_q, ctx);
    } else {
      predict(0, x.slice_rows(0, T), log_q);
      multinomial_exits<S>(log_q, log_q, ctx);
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
