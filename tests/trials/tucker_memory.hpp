#pragma once

#include <Eigen/SVD>
#include <numeric>

#include "lithe/layers/linear.hpp"

// T tokens, D features, k key width, r rank, n keys of an axis, m picks
namespace trials {

using namespace lithe;

struct tucker_memory_config {
  index_t features = 0, key_width = 0, keys = 0, rank = 2, picks = 2;
};

/// The heart of UltraMem (arXiv 2411.12364 section 3.2): a slot (i, j) has the score s = Σ_ab R_ai C_ab Q_bj with R_ai = <q₀, K₀[a, i]>
/// and Q_bj = <q₁, K₁[b, j]>; y = Σ s V[i n + j] over m picks. Candidates are the m largest Σ_a u_a R_ai and Σ_b t_b Q_bj, the picks the m
/// largest scores among their pairs.
///
/// u and t are the leading singular vectors of C: state, followed by `after_step` with a continuous sign. No gradient reaches them, for they
/// only choose.
template <std::floating_point S>
struct tucker_memory {
  using scalar = S;
  struct record {
    matrix<S> query;              // [T x 2 k]
    kept<matrix<slot_t>> slots;  // [T x m]
    matrix<S> scores;             // [T x m]
  };
  struct gradient {
    gradient_of<linear<S>> query;
    matrix<S> row_keys, column_keys, core, values, u, t;
  };

  tucker_memory_config config;
  linear<S> query;
  matrix<S> row_keys, column_keys;  // [r n x k], a block of n keys for each rank
  matrix<S> core;                   // [r x r]
  matrix<S> values;                 // [n² x D]
  matrix<S> u, t;                   // [1 x r]

  tucker_memory() = default;
  tucker_memory(tucker_memory_config c, rng_key key)
      : config(c), query({c.features, 2 * c.key_width, false}, key.child(0)), row_keys(c.rank * c.keys, c.key_width), column_keys(c.rank * c.keys, c.key_width),
        core(c.rank, c.rank), values(c.keys * c.keys, c.features), u(matrix<S>::Zero(1, c.rank)), t(matrix<S>::Zero(1, c.rank)) {
    fill_normal<S>(row_keys, 1.0, key.child(1));
    fill_normal<S>(column_keys, 1.0, key.child(2));
    fill_uniform<S>(core, 0.5, key.child(3));
    core.array() += S(0.5);
    fill_normal<S>(values, 1.0, key.child(4));
    follow_core();
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("tucker_memory", config.features, x);
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
    require_shape("tucker_memory", "y", y, out.rows, out.cols);
    const index_t T = x.rows(), m = config.picks;
    r.query.resize(T, 2 * config.key_width);
    query.forward(x, r.query, ctx);
    require<state_error>(!ctx.replay || r.slots.value.rows() == T, "tucker_memory: replay needs the slots of ", T, " tokens, got ", r.slots.value.rows());
    if (!ctx.replay) r.slots.value.resize(T, m);
    r.scores.resize(T, m);
    y.map().setZero();
    for (index_t token = 0; token < T; ++token) {
      const matrix<S> rows = axis_scores(row_keys, r.query, token, 0), columns = axis_scores(column_keys, r.query, token, 1);
      if (!ctx.replay) choose(rows, columns, r.slots.value, token);
      for (index_t p = 0; p < m; ++p) {
        const slot_t slot = r.slots.value(token, p);
        r.scores(token, p) = rows.col(slot / config.keys).dot(core * columns.col(slot % config.keys));
        y.map().row(token) += r.scores(token, p) * values.row(slot);
      }
    }
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t k = config.key_width;
    const scratch<S> dq(ctx, x.rows(), 2 * k);
    dq.map().setZero();
    for (index_t token = 0; token < x.rows(); ++token) {
      const matrix<S> rows = axis_scores(row_keys, r.query, token, 0), columns = axis_scores(column_keys, r.query, token, 1);
      const auto q0 = r.query.row(token).head(k), q1 = r.query.row(token).tail(k);
      for (index_t p = 0; p < config.picks; ++p) {
        const slot_t slot = r.slots.value(token, p);
        const index_t i = slot / config.keys, j = slot % config.keys;
        g.values.row(slot) += r.scores(token, p) * dy.map().row(token);
        const S ds = values.row(slot).dot(dy.map().row(token));
        g.core += ds * rows.col(i) * columns.col(j).transpose();
        const Eigen::Matrix<S, Eigen::Dynamic, 1> drow = ds * core * columns.col(j), dcolumn = ds * core.transpose() * rows.col(i);
        for (index_t a = 0; a < config.rank; ++a) {
          g.row_keys.row(a * config.keys + i) += drow(a) * q0;
          g.column_keys.row(a * config.keys + j) += dcolumn(a) * q1;
          dq.map().row(token).head(k) += drow(a) * row_keys.row(a * config.keys + i);
          dq.map().row(token).tail(k) += dcolumn(a) * column_keys.row(a * config.keys + j);
        }
      }
    }
    query.backward(x, {}, dq, dx, g.query, ctx);
  }

  void after_step(const gradient&) { follow_core(); }
  /// u and t become the leading singular vectors, of the two signs the one nearer to what they were (at first: Σ u >= 0).
  void follow_core() {
    const Eigen::JacobiSVD<matrix<S>> svd(core, Eigen::ComputeFullU | Eigen::ComputeFullV);
    const matrix<S> left = svd.matrixU().col(0).transpose(), right = svd.matrixV().col(0).transpose();
    const auto away = [&](S sign) { return (sign * left - u).cwiseAbs().sum() + (sign * right - t).cwiseAbs().sum(); };
    const bool fresh = u.isZero(0) && t.isZero(0);
    const S sign = (fresh ? left.sum() < 0 : away(-1) < away(1)) ? S(-1) : S(1);
    u = sign * left;
    t = sign * right;
  }

  template <class F, class... Structs>
  static void visit(F&& f, Structs&... s) {
    f("query", s.query...);
    f("row_keys", s.row_keys...);
    f("column_keys", s.column_keys...);
    f("core", s.core...);
    f("values", s.values...);
    f(field("u", role::state), s.u...);
    f(field("t", role::state), s.t...);
  }

 private:
  /// [r x n]
  matrix<S> axis_scores(const matrix<S>& keys, const matrix<S>& q, index_t token, index_t axis) const {
    matrix<S> scores(config.rank, config.keys);
    for (index_t a = 0; a < config.rank; ++a)
      for (index_t i = 0; i < config.keys; ++i) scores(a, i) = keys.row(a * config.keys + i).dot(q.row(token).segment(axis * config.key_width, config.key_width));
    return scores;
  }
  /// The numbers of the m largest scores, the largest first, ties to the lowest number.
  static std::vector<index_t> largest(const matrix<S>& scores, index_t m) {
    std::vector<index_t> order(static_cast<std::size_t>(scores.size()));
    std::iota(order.begin(), order.end(), index_t{0});
    std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) { return scores(0, a) > scores(0, b); });
    order.resize(static_cast<std::size_t>(m));
    return order;
  }
  void choose(const matrix<S>& rows, const matrix<S>& columns, matrix<slot_t>& slots, index_t token) const {
    const index_t m = config.picks;
    const auto I = largest(u * rows, m), J = largest(t * columns, m);
    matrix<S> scores(1, m * m);
    for (index_t c = 0; c < m * m; ++c)
      scores(0, c) = rows.col(I[static_cast<std::size_t>(c / m)]).dot(core * columns.col(J[static_cast<std::size_t>(c % m)]));
    const auto best = largest(scores, m);
    for (index_t p = 0; p < m; ++p) {
      const index_t c = best[static_cast<std::size_t>(p)];
      slots(token, p) = static_cast<slot_t>(I[static_cast<std::size_t>(c / m)] * config.keys + J[static_cast<std::size_t>(c % m)]);
    }
  }
};

}  // namespace trials
