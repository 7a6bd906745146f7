// What UltraMem's rank-1 filter finds of the exact top-m, by rank and by ratio of singular values, and the share of picks in the best pick's row or
// column, which TDQKR is to lower (arXiv 2411.12364 section 3.2).
#include <Eigen/QR>

#include "facts.hpp"

namespace {

using namespace lithe;
using real = float;
using search_layer = tucker_keys<real>;

constexpr index_t tokens = 256;

/// Of the picks of all heads but each head's best, the share that lies in the row or the column of the best.
double beside_best(matrix_view<const slot_t> pairs, index_t heads, index_t sub_keys) {
  const index_t k = pairs.cols() / heads;
  double beside = 0;
  for (index_t t = 0; t < pairs.rows(); ++t)
    for (index_t p = 0; p < pairs.cols(); ++p) {
      const slot_t pair = pairs(t, p), best = pairs(t, p / k * k);
      beside += p % k != 0 && (pair / sub_keys == best / sub_keys || pair % sub_keys == best % sub_keys);
    }
  return beside / static_cast<double>(pairs.rows() * heads * std::max<index_t>(1, k - 1));
}

struct found {
  double recall, positive;  // positive: of the exact top-m among pairs whose filter scores are not both negative
  double beside, ratio;     // ratio: of the second singular value to the first, mean of the heads
};

/// The scores [n x n] of all pairs of a token and head, from the factors [r x n] of both axes.
matrix<real> all_scores(const search_layer& k, index_t head, const matrix<real>& R, const matrix<real>& Q) {
  matrix<real> sum = matrix<real>::Zero(k.config.rank, k.config.rank);
  for (index_t c = 0; c < k.config.cores; ++c) sum += k.core(head, c).map();
  return R.transpose() * (sum * Q);
}

/// The picks that are among the m best of all scores [n x n], up to rounding of a tie; `order` is room for all scores.
index_t among_best(const matrix<real>& G, const slot_t* picks, index_t m, std::vector<real>& order) {
  order.assign(G.data(), G.data() + G.size());
  std::nth_element(order.begin(), order.begin() + m - 1, order.end(), std::greater<>());
  const real least = order[static_cast<std::size_t>(m - 1)], slack = 2e-6F * std::abs(least);
  return std::count_if(picks, picks + m, [&](slot_t pick) { return G.data()[pick] >= least - slack; });
}

/// Searches with the filter and by brute force.
found compare_searches(const search_layer& k, const matrix<real>& q, const context& ctx) {
  const index_t n = k.config.sub_keys, r = k.config.rank, m = k.config.final_k, H = k.config.heads, T = q.rows();
  const search_layer::prepared prepared(k, true, ctx);
  matrix<slot_t> pairs(T, k.picks());
  matrix<real> scores(T, k.picks() * k.config.cores);
  k.search(q, prepared, pairs, scores, ctx);
  index_t hits = 0, positive_hits = 0;
  double ratio = 0;
  std::vector<real> order;
  for (index_t head = 0; head < H; ++head) {
    std::vector<matrix<real>> factors(static_cast<std::size_t>(2 * r), matrix<real>(T, n));  // [axis][rank]
    for (index_t axis = 0; axis < 2; ++axis)
      for (index_t a = 0; a < r; ++a) k.rank_scores(q, prepared, head, axis, a, factors[static_cast<std::size_t>(axis * r + a)], ctx);
    matrix<real> R(r, n), Q(r, n);
    for (index_t t = 0; t < T; ++t) {
      for (index_t a = 0; a < r; ++a) {
        R.row(a) = factors[static_cast<std::size_t>(a)].row(t);
        Q.row(a) = factors[static_cast<std::size_t>(r + a)].row(t);
      }
      matrix<real> G = all_scores(k, head, R, Q);
      hits += among_best(G, pairs.data() + t * pairs.cols() + head * m, m, order);
      const matrix<real> alpha = k.u.row(head) * R, beta = k.t.row(head) * Q;
      for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j)
          if (alpha(0, i) < 0 && beta(0, j) < 0) G(i, j) = std::numeric_limits<real>::lowest();
      positive_hits += among_best(G, pairs.data() + t * pairs.cols() + head * m, m, order);
    }
    detail::decompose_cores<real>(k.cores, H, head,
                                  [&](const auto&, const auto& values, const auto&) { ratio += r > 1 ? values(1) / values(0) : 0; });
  }
  const auto all = static_cast<double>(T * H * m);
  return {static_cast<double>(hits) / all, static_cast<double>(positive_hits) / all, beside_best(pairs, H, n), ratio / static_cast<double>(H)};
}

matrix<real> normal_matrix(index_t rows, index_t cols, rng_key key) {
  matrix<real> x(rows, cols);
  fill_normal<real>(x, 1, key);
  return x;
}
/// Keys as they start, for 4 heads; with one core if `ratio` is given: its lesser singular values are all `ratio` times the first.
search_layer fresh_keys(index_t rank, index_t n, index_t m, std::optional<double> ratio, rng_key key) {
  search_layer k(search_layer::checked({.heads = 4, .sub_keys = n, .width = 32, .rank = rank, .cores = ratio ? 1 : 2, .top_k = m}), key);
  if (!ratio) return k;
  const auto orthogonal = [&](rng_key of) -> matrix<real> {
    return Eigen::HouseholderQR<Eigen::MatrixXf>(normal_matrix(rank, rank, of)).householderQ() * Eigen::MatrixXf::Identity(rank, rank);
  };
  for (index_t head = 0; head < 4; ++head) {
    const rng_key of = key.child(static_cast<std::uint64_t>(10 + head));
    Eigen::VectorXf values = Eigen::VectorXf::Constant(rank, static_cast<real>(*ratio));
    values(0) = 1;
    k.cores.middleRows(head * rank, rank) = orthogonal(of.child(0)) * values.asDiagonal() * orthogonal(of.child(1)).transpose();
  }
  k.u.setZero();  // so that the vectors are those of the new cores
  k.t.setZero();
  k.follow();
  return k;
}
/// One rank, factors that are not negative, C = [1]: what brute force selects.
search_layer one_sign(index_t n, index_t m, rng_key key) {
  search_layer k(search_layer::checked({.heads = 4, .sub_keys = n, .width = 32, .rank = 1, .cores = 1, .top_k = m, .norm = score_norm_kind::none}),
                 key);
  k.cores.setOnes();
  k.follow();
  k.keys = k.keys.cwiseAbs();
  return k;
}

double product_keys_beside(index_t n, index_t m, rng_key key, const context& ctx) {
  const product_keys<real> k({.heads = 4, .sub_keys = n, .width = 32, .top_k = m});
  matrix<slot_t> pairs(tokens, k.picks());
  matrix<real> scores(tokens, k.picks());
  k.search(normal_matrix(tokens, 4 * 2 * 32, key), pairs, scores, ctx);
  return beside_best(pairs, 4, n);
}

/// A layer trained to recall facts, on the inputs that it sees then. Returns the skipped steps.
template <class Layer, class F>
std::int64_t with_trained(Layer start, const tables::options& o, const context& ctx, F&& look) {
  namespace facts = tables::facts;
  const rng_key key{o.seed};
  const facts::corpus known(o.pick<index_t>(200, 4000, 4000), key.child(0));
  facts::model model = facts::make_model({std::move(start)}, key.child(2));
  const std::int64_t skipped = facts::learn(model, known, {.steps = o.pick<index_t>(20, 1000, 2200)}, key.child(3), ctx,
                                            [](double share) { tables::progress("training", 0.99 * share); });
  matrix<real> x;
  std::vector<token_t> target;
  known.read([&](index_t i) { return i; }, x, target);
  const matrix<real> h = facts::middle_input(model, x, ctx).topRows(tokens);
  const auto& [norm, layer] = std::get<1>(model.layers).blocks[1].inner.layers;
  matrix<real> in(tokens, facts::width), y(tokens, facts::width);
  norm.forward(h, in, ctx);
  record_of<Layer> r;
  const Layer& trained = std::get<Layer>(layer.value);
  trained.forward(in, y, r, ctx);
  look(trained, r);
  return skipped;
}

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const index_t n = o.pick<index_t>(32, 128, 256);
  const rng_key key{o.seed};
  t = {.title = "What the filter of TDQKR finds",
       .source = "arXiv 2411.12364 section 3.2",
       .question = concat(
           n, " x ", n,
           " pairs, normal queries and keys as they start, or after training on facts: the share of the exact top-m "
           "that the rank-1 filter lets through, of all pairs and of those whose filter scores are not both negative "
           "(two negative factors make a large score, too, which the filter never sees), and the share of picks in the "
           "best pick's row or column."),
       .columns = {"keys", "rank", "second / first singular value", "m", "recall", "recall, not both negative",
                   "beside the best"},
       .figures = {{.title = "Recall by ratio of singular values",
                    .x = "second / first singular value",
                    .y = "recall, not both negative",
                    .only = "TDQKR, cores of a ratio"},
                   {.title = "Recall by rank",
                    .x = "rank",
                    .y = "recall, not both negative",
                    .by = "m",
                    .only = "TDQKR at its start"}}};
  const auto row = [&](const std::string& what, const search_layer& k, const matrix<real>& q) {
    const found f = compare_searches(k, q, ctx);
    t.row({what, k.config.rank, f.ratio, k.config.final_k, f.recall, f.positive, f.beside});
    return f;
  };
  const auto queries = [&](const search_layer& k) { return normal_matrix(tokens, k.blocks() * k.config.width, key.child(1)); };
  const found exact = [&] {
    const auto k = one_sign(n, 16, key);
    return row("TDQKR, no factor negative", k, queries(k).cwiseAbs());
  }();
  for (const index_t rank : {1, 2, 3, 4, 8})
    for (const index_t m : {8, 16, 32}) {
      const auto k = fresh_keys(rank, n, m, {}, key);
      row("TDQKR at its start", k, queries(k));
    }
  double first = 0, last = 0;
  for (const double ratio : {0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0}) {
    const auto k = fresh_keys(2, n, 16, ratio, key);
    last = row("TDQKR, cores of a ratio", k, queries(k)).positive;
    if (ratio == 0) first = last;
  }
  t.row({"product keys at their start", nullptr, nullptr, 16, 1.0, nullptr, product_keys_beside(n, 16, key.child(1), ctx)});
  double trained_beside = 0, product_beside = 0;
  auto u = tables::facts::ultra_mem_settings(n);
  auto p = tables::facts::product_key_settings(n);
  u.top_k = p.top_k = 16;
  t.skipped += with_trained(ultra_mem<real>(u, key.child(4)), o, ctx, [&](const auto& m, const auto& r) {
    trained_beside = row("TDQKR after training", m.search, r.query.queries).beside;
  });
  t.skipped += with_trained(product_key_memory<real>(p, key.child(4)), o, ctx, [&](const auto& m, const auto& r) {
    product_beside = beside_best(view(r.pairs.value), m.config.heads, m.config.sub_keys);
    t.row({"product keys after training", nullptr, nullptr, p.top_k, 1.0, nullptr, product_beside});
  });
  t.shown = exact.recall == 1 && first > last && trained_beside < product_beside;
  t.finding =
      tables::sentence("Of the exact top-16 whose filter scores are not both negative a rank-2 core's filter lets ",
                       100 * first, " % through with one singular value and ", 100 * last,
                       " % with two equal ones; all where no factor is negative (", 100 * exact.recall,
                       " %). After training ", 100 * trained_beside, " % of TDQKR's picks lie beside the best, ",
                       100 * product_beside, " % of the product keys'.");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
