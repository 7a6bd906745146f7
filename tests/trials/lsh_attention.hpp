#pragma once

#include <numeric>

#include "lithe/layers/linear.hpp"

// T tokens, D features, H heads, d head size, R rounds, L tokens of one sequence
namespace trials {

using namespace lithe;

struct lsh_attention_config {
  index_t features = 0, heads = 1, head_size = 0;
  index_t buckets = 4, rounds = 2, chunk = 4;
};

/// Causal LSH attention with shared queries and keys (arXiv 2001.04451 section 2). For each head and round tokens are hashed,
/// bucket = argmax [q Rot | -q Rot], and sorted by (bucket, position); the sorted list is cut into chunks, and a query sees its own chunk
/// and the one before. Keys are queries of unit mean square over √d; a token sees itself with score -1e5; one softmax over all rounds.
///
/// The bucket ids are the layer's choice: `kept`, used again under ctx.replay. Rotations come from ctx.key.
template <std::floating_point S>
struct lsh_attention {
  using scalar = S;
  struct record {
    kept<matrix<std::uint16_t>> buckets;  // [H R x T]
    matrix<S> q, v, o;                    // [T x H d]
    matrix<S> softmax;                    // [T x 2 H]: largest score and sum of exponentials; their log would lose the digits of -1e5
  };
  struct gradient {
    gradient_of<linear<S>> query_key, value, output;
  };

  lsh_attention_config config;
  linear<S> query_key, value, output;

  lsh_attention() = default;
  lsh_attention(lsh_attention_config c, rng_key key)
      : config(c), query_key({c.features, c.heads * c.head_size, false}, key.child(0)), value({c.features, c.heads * c.head_size, false}, key.child(1)),
        output({c.heads * c.head_size, c.features, false}, key.child(2)) {
    require<config_error>(c.buckets >= 2 && c.buckets % 2 == 0 && c.buckets <= 65536, "lsh_attention: expected an even number of buckets, got ", c.buckets);
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("lsh_attention", config.features, x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;  // without a record there is no choice to keep
    record r;
    forward(x, y, r, c);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("lsh_attention", "y", y, out.rows, out.cols);
    ctx.rows.check("lsh_attention", x.rows());
    const index_t T = x.rows(), H = config.heads;
    for (matrix<S>* m : {&r.q, &r.v, &r.o}) m->resize(T, H * config.head_size);
    r.softmax.resize(T, 2 * H);
    query_key.forward(x, r.q, ctx);
    value.forward(x, r.v, ctx);
    if (ctx.replay)
      require<state_error>(r.buckets.value.cols() == T, "lsh_attention: replay needs the bucket ids of ", T, " tokens, got ", r.buckets.value.cols());
    else
      hash(r.q, r.buckets.value, ctx);
    ctx.exec->run(H, 1, [&](index_t first, index_t last) {
      for (index_t h = first; h < last; ++h) attend(r, h, ctx);
    });
    output.forward(r.o, y, ctx);
  }

  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t T = x.rows(), width = config.heads * config.head_size;
    const scratch<S> d_o(ctx, T, width), dq(ctx, T, width), dv(ctx, T, width);
    output.backward(r.o, {}, dy, d_o, g.output, ctx);
    dq.map().setZero();
    dv.map().setZero();
    ctx.exec->run(config.heads, 1, [&](index_t first, index_t last) {
      for (index_t h = first; h < last; ++h) attend_backward(r, h, d_o, dq, dv, ctx);
    });
    query_key.backward(x, {}, dq, dx, g.query_key, ctx);
    value.add_backward(x, dv, dx, g.value, ctx);
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query_key", s.query_key...);
    f("value", s.value...);
    f("output", s.output...);
  }

 private:
  void hash(const matrix<S>& q, matrix<std::uint16_t>& buckets, const context& ctx) const {
    const index_t d = config.head_size, half = config.buckets / 2;
    buckets.resize(config.heads * config.rounds, q.rows());
    matrix<S> rotation(d, half);
    for (index_t h = 0; h < config.heads; ++h)
      for (index_t round = 0; round < config.rounds; ++round) {
        const index_t row = h * config.rounds + round;
        fill_normal<S>(rotation, 1.0, ctx.key.child(static_cast<std::uint64_t>(row)));
        for (index_t t = 0; t < q.rows(); ++t) {
          const Eigen::Matrix<S, 1, Eigen::Dynamic> p = q.row(t).segment(h * d, d) * rotation;
          index_t up = 0, down = 0;
          const S largest = p.maxCoeff(&up), smallest = p.minCoeff(&down);
          buckets(row, t) = static_cast<std::uint16_t>(-smallest > largest ? half + down : up);
        }
      }
  }

  /// pair(i, j) for every query i and key j that meet in some round, as often as they meet, in the sequence that begins at `begin`.
  template <class F>
  void each_pair(const matrix<std::uint16_t>& buckets, index_t h, index_t begin, index_t L, const context& ctx, F&& pair) const {
    const scratch<index_t> order(ctx, L);
    for (index_t round = 0; round < config.rounds; ++round) {
      const auto* id = buckets.data() + (h * config.rounds + round) * buckets.cols();
      std::iota(order.data(), order.data() + L, begin);
      std::sort(order.data(), order.data() + L, [&](index_t a, index_t b) { return id[a] != id[b] ? id[a] < id[b] : a < b; });
      for (index_t p = 0; p < L; ++p) {
        const index_t chunk = p / config.chunk * config.chunk;
        for (index_t k = std::max<index_t>(0, chunk - config.chunk); k < std::min(L, chunk + config.chunk); ++k)
          if (order[k] <= order[p]) pair(order[p], order[k]);
      }
    }
  }
  auto head(const matrix<S>& m, index_t t, index_t h) const { return m.row(t).segment(h * config.head_size, config.head_size); }
  auto head(const scratch<S>& m, index_t t, index_t h) const { return m.view().slice_rows(t, 1).slice_cols(h * config.head_size, config.head_size).map().row(0); }

  /// k_j = c n_j q_j with c = 1/√d and n_j = 1/√(mean square of q_j + 1e-6): the factor.
  S key_scale(const matrix<S>& q, index_t j, index_t h) const {
    const S d = static_cast<S>(config.head_size);
    return 1 / std::sqrt(head(q, j, h).squaredNorm() + d * S(1e-6));
  }
  S score(const matrix<S>& q, index_t i, index_t j, index_t h) const {
    return i == j ? S(-1e5) : head(q, i, h).dot(head(q, j, h)) * key_scale(q, j, h);
  }

  void attend(record& r, index_t h, const context& ctx) const {
    auto largest = r.softmax.col(2 * h), sum = r.softmax.col(2 * h + 1);
    largest.setConstant(-std::numeric_limits<S>::infinity());
    sum.setZero();
    for (index_t t = 0; t < r.o.rows(); ++t) r.o.row(t).segment(h * config.head_size, config.head_size).setZero();
    each_sequence(r.q.rows(), ctx, [&](index_t begin, index_t L) {
      each_pair(r.buckets.value, h, begin, L, ctx, [&](index_t i, index_t j) { largest(i) = std::max(largest(i), score(r.q, i, j, h)); });
      each_pair(r.buckets.value, h, begin, L, ctx, [&](index_t i, index_t j) { sum(i) += std::exp(score(r.q, i, j, h) - largest(i)); });
      each_pair(r.buckets.value, h, begin, L, ctx, [&](index_t i, index_t j) {
        r.o.row(i).segment(h * config.head_size, config.head_size) += std::exp(score(r.q, i, j, h) - largest(i)) / sum(i) * head(r.v, j, h);
      });
    });
  }
  /// dv_j += A g_i, ds = A (<g_i, v_j> - <g_i, o_i>), and through key and query roles to q; a token's score with itself is a constant.
  void attend_backward(const record& r, index_t h, const scratch<S>& d_o, const scratch<S>& dq, const scratch<S>& dv, const context& ctx) const {
    each_sequence(r.q.rows(), ctx, [&](index_t begin, index_t L) {
      each_pair(r.buckets.value, h, begin, L, ctx, [&](index_t i, index_t j) {
        const auto g = head(d_o, i, h);
        const auto qi = head(r.q, i, h), qj = head(r.q, j, h);
        const S a = std::exp(score(r.q, i, j, h) - r.softmax(i, 2 * h)) / r.softmax(i, 2 * h + 1);
        head(dv, j, h) += a * g;
        if (i == j) return;
        const S ds = a * (g.dot(head(r.v, j, h)) - g.dot(head(r.o, i, h))), scale = key_scale(r.q, j, h);
        head(dq, i, h) += ds * scale * qj;
        head(dq, j, h) += ds * scale * (qi - scale * scale * qi.dot(qj) * qj);
      });
    });
  }
  template <class F>
  static void each_sequence(index_t rows, const context& ctx, F&& f) {
    for (index_t s = 0; s < ctx.rows.count(); ++s) f(ctx.rows.begin(s), ctx.rows.end(s, rows) - ctx.rows.begin(s));
  }
};

}  // namespace trials
