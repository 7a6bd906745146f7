#pragma once

#include "lithe/kernels/dropout.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/memory/key_balance.hpp"
#include "lithe/layers/memory/tucker_keys.hpp"
#include "lithe/layers/memory/ultra_mem_query.hpp"
#include "lithe/layers/memory/value_expansion.hpp"

// T tokens, D features, H heads, n keys of an axis, d their width, r rank, M cores, m candidates of an axis, K picks of a token
namespace lithe::inline LITHE_ABI {

/// Published starts of the parameters. Released: norm weights d^-0.33 (UltraMem) or d^-0.4 (V2), values of deviation 0.02, the rest
/// 1/√inputs. Paper, 2411.12364 section 3.5: Var(V) = E / (2 m H L), key norm d^-1/2, query norm such that the mean selected score is 1.
/// Paper, 2508.18756: linear maps of deviation √(2 / 5D), values and pre-values of deviation σ with
/// σ⁴ = 0.2 k D / (m H (1 + s²) Dp dv L), k the feed-forward's width over D, s² the variance of the selected scores. Constants of
/// selected scores are measured on normal inputs.
enum class ultra_mem_start_kind { released, released_v2, paper, paper_v2 };
/// Which of them, and what it depends on beside the layer itself.
struct ultra_mem_start {
  ultra_mem_start_kind kind = ultra_mem_start_kind::released;
  index_t blocks = 0;       ///< L, of the whole model; the papers' starts need it
  double inner_ratio = 4;   ///< k
};

/// The defaults are UltraMem's; `ultra_mem_presets.hpp` has those of UltraMemV2.
struct ultra_mem_config {
  index_t features = 0;
  index_t heads = 2;
  index_t sub_keys = 512;      ///< keys of an axis, a multiple of √expansion: sub_keys² addresses, sub_keys² / expansion table rows
  index_t key_width = 64;      ///< of one axis and rank
  index_t rank = 2, cores = 2;
  index_t top_k = 42;          ///< candidates of an axis, for each head
  index_t final_k = 0;         ///< picks of a head; 0 = top_k
  tucker_query query = tucker_query::shared;
  score_norm_kind norm = score_norm_kind::rms;
  bool norm_bias = false;
  double epsilon = 1e-5;
  bool relu_scores = false;    ///< max(0, s) of every core's score, after the selection
  index_t expansion = 4;       ///< virtual tables, a square
  index_t groups = 0;          ///< 0 = expansion: a projection for each virtual table; 1: one for their sum
  index_t value_width = 0;     ///< 0 = features / 2
  index_t table_rows = 0;      ///< of a table that several layers share; 0 = a table of this layer's own
  index_t table_offset = 0;    ///< this layer's first row in it
  index_t pre_width = 0;       ///< of pre-values; 0 = none
  bool pre_gelu = false;
  index_t query_conv = 0;      ///< taps of a convolution before the query; 0 = none
  double rank_loss = 0;        ///< coefficient of the loss on the cores' lesser singular values
  double rank_margin = 0.15;   ///< above which they count
  double balance = 0;          ///< coefficient of the key-balance loss
  double output_dropout = 0;
  ultra_mem_start start{};
};

/// UltraMem (arXiv 2411.12364) and, by its options, UltraMemV2 (2508.18756): for every token x [D]
///
///     q = norm(W_q conv(x));   (addresses, s) = tucker_keys(q);   y = dropout(value_expansion(x, addresses, s))
///
/// x and y [T x D]. Scores are used as they are: no softmax, and they may be negative. All heads and, if shared, all ranks read one query; the picks
/// of all heads are pooled. Own losses: rank_loss (tucker_core.hpp) and balance (key_balance.hpp). Selection carries no gradient; addresses
/// are kept for replay. Without a convolution the layer is position-wise; with one it looks back within ctx.rows and decodes with a
/// cache. Rows that ctx.mask hides give 0 and touch nothing; a row with NaN gives NaN. Throws config_error, shape_error, state_error.
template <std::floating_point S, value_table Table = dense_table<S>>
struct ultra_mem {
  using scalar = S;
  struct record {
    record_of<ultra_mem_query<S>> query;
    kept<matrix<slot_t>> addresses;  // [T x K]
    kept<matrix<S>> hits;            // [2 x n], the share of candidates that each key was; if balanced
    matrix<S> scores;                // [T x K M]
    record_of<value_expansion<S, Table>> values;
    auxiliary<S> rank_loss, balance;
  };
  struct gradient {
    gradient_of<ultra_mem_query<S>> query;
    gradient_of<tucker_keys<S>> search;
    gradient_of<value_expansion<S, Table>> expansion;
  };
  using cache = cache_of<query_convolution<S>>;

  ultra_mem_config config;
  ultra_mem_query<S> query;
  tucker_keys<S> search;
  value_expansion<S, Table> expansion;

  ultra_mem() = default;
  /// A memory with tables of its own.
  ultra_mem(ultra_mem_config c, rng_key key) : ultra_mem(c, make_table(c, false), make_table(c, true), key) {
    const double deviation = value_deviation(key.child(7));
    fill_normal_rows(expansion.values, deviation, key.child(4));
    fill_normal_rows(expansion.pre_values, deviation, key.child(5));
  }
  /// A memory that reads the given tables: table_rows cores rows of value_width / cores numbers, and table_rows pre-values.
  ultra_mem(ultra_mem_config c, Table values, Table pre_values, rng_key key)
      : config(completed(c)), search(keys_config(config), key.child(1)),
        expansion(expansion_config(config), std::move(values), std::move(pre_values), key.child(2)) {
    query.convolution = query_convolution<S>(config.query_conv, config.features, key.child(6));
    query.projection = linear<S>({config.features, search.blocks() * config.key_width, false}, key.child(0));
    query.norm = score_norm<S>(config.norm, config.key_width, config.norm_bias, config.epsilon, norm_scale(config));
    start(key.child(3));
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("ultra_mem", config.features, x);
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const shown<S> in(x, ctx);
    const scratch<S> q(ctx, x.rows(), query.outputs());
    query.forward(in, q, ctx);
    answer(in, q, y, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const shown<S> in(x, ctx);
    const index_t T = x.rows(), K = search.picks();
    if (ctx.replay) check_addresses(T, r);
    query.forward(in, r.query, ctx);
    const typename tucker_keys<S>::prepared keys(search, false, ctx);
    r.scores.resize(T, K * config.cores);
    if (ctx.replay) {
      search.rescore(r.query.queries, keys, view(r.addresses.value), r.scores, ctx);
    } else {
      r.addresses.value.resize(T, K);
      search.search(r.query.queries, keys, r.addresses.value, r.scores, ctx);
    }
    r.balance.loss = config.balance > 0 ? static_cast<S>(config.balance * detail::key_balance<S>(search, keys, ctx).loss(r.query.queries, r.hits.value)) : S(0);
    r.rank_loss.loss =
        config.rank_loss > 0 ? static_cast<S>(config.rank_loss * detail::rank_loss<S>(search.cores, config.heads, config.rank_margin, 0, {})) : S(0);
    const scratch<S> weights(ctx, config.relu_scores ? T : 0, r.scores.cols());
    expansion.forward(in, view(r.addresses.value), activated(r.scores, weights), y, &r.values, ctx);
    drop_and_hide(y, ctx);
  }

  /// As in value_expansion and tucker_keys, from the last step back to the first; the own losses add ctx.auxiliary times theirs.
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    const index_t T = x.rows();
    check_addresses(T, r);
    recorded(who, r.scores, T, search.picks() * config.cores);
    query.check_record(x, r.query);
    if (config.balance > 0) recorded(who, r.hits.value, 2, config.sub_keys);
    const shown<S> in(x, ctx);
    const bool changed = !ctx.mask.empty() || (ctx.train && config.output_dropout > 0);
    const scratch<S> shown(ctx, changed ? T : 0, dy.cols()), weights(ctx, config.relu_scores ? T : 0, r.scores.cols()), ds(ctx, T, r.scores.cols());
    const scratch<S> dq(ctx, T, query.outputs()), d_unit(ctx, search.keys.rows(), search.keys.cols());
    const typename tucker_keys<S>::prepared keys(search, true, ctx);
    if (changed) {
      copy<S>(dy, shown, ctx);
      drop_and_hide(shown, ctx);
    }
    dx.map().setZero();
    dq.map().setZero();
    d_unit.map().setZero();
    expansion.backward(in, view(r.addresses.value), activated(r.scores, weights), r.values, changed ? matrix_view<const S>(shown) : dy, ds, dx, g.expansion,
                       ctx);
    if (config.relu_scores) ds.map().array() *= (r.scores.array() > S(0)).template cast<S>();
    search.backward(r.query.queries, keys, view(r.addresses.value), ds, dq, d_unit, g.search, ctx);
    if (config.balance > 0)
      detail::key_balance<S>(search, keys, ctx).backward(r.query.queries, r.hits.value, ctx.auxiliary * config.balance, dq, d_unit);
    if (config.rank_loss > 0)
      detail::rank_loss<S>(search.cores, config.heads, config.rank_margin, ctx.auxiliary * config.rank_loss, matrix_view<S>(g.search.cores));
    search.norm_backward(keys, d_unit, g.search, ctx);
    query.backward(in, r.query, dq, dx, g.query, ctx);
  }

  /// The table rows and the virtual table of each pick, both [T x K], -1 and 0 for hidden rows: for usage metrics.
  void picked(const record& r, matrix_view<slot_t> rows, matrix_view<slot_t> group, const context& ctx) const {
    check_addresses(r.addresses.value.rows(), r);
    require_shape(who, "picked rows", rows, r.addresses.value.rows(), search.picks());
    require_shape(who, "picked groups", group, rows.rows(), rows.cols());
    expansion.locate(view(r.addresses.value), rows, group, ctx);
  }

  // Only the convolution keeps a cache.
  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const { return query.convolution.make_cache(slots, capacity); }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const scratch<S> q(ctx, x.rows(), query.outputs());
    query.decode(x, q, c, ctx);
    answer(x, q, y, ctx);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const { query.convolution.fill(x, c, ctx); }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    return query.convolution.least_length(c, slot);
  }
  void truncate(cache& c, index_t slot, index_t length) const { query.convolution.truncate(c, slot, length); }
  void permute(cache& c, std::span<const index_t> order) const { query.convolution.permute(c, order); }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return query.forward_cost(length) + search.forward_cost(length) + expansion.forward_cost(length, search.picks());
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query", s.query...);
    f("search", s.search...);
    f("expansion", s.expansion...);
  }

 private:
  static constexpr const char* who = "ultra_mem";

  static ultra_mem_config completed(ultra_mem_config c) {
    require<config_error>(c.features >= 1, "ultra_mem: expected at least 1 feature, got ", c.features);
    if (c.value_width == 0) c.value_width = std::max<index_t>(1, c.features / 2);
    if (c.groups == 0) c.groups = c.expansion;
    if (c.final_k == 0) c.final_k = c.top_k;
    tucker_keys<S>::checked(keys_config(c));
    value_expansion<S, Table>::checked(expansion_config(c));
    const auto root = static_cast<index_t>(std::lround(std::sqrt(static_cast<double>(c.expansion))));
    require<config_error>(c.sub_keys % root == 0, "ultra_mem: sub_keys must be a multiple of √expansion = ", root, ", got ", c.sub_keys);
    require<config_error>(c.query_conv >= 0, "ultra_mem: expected a query_conv of 0 (none) or more taps, got ", c.query_conv);
    require<config_error>(c.rank_loss >= 0 && c.balance >= 0, "ultra_mem: expected loss coefficients of 0 or more, got ", c.rank_loss, " and ", c.balance);
    const bool paper = c.start.kind == ultra_mem_start_kind::paper || c.start.kind == ultra_mem_start_kind::paper_v2;
    require<config_error>(!paper || c.start.blocks >= 1, "ultra_mem: this start needs the number of blocks, got ", c.start.blocks);
    require<config_error>(c.start.kind != ultra_mem_start_kind::paper || c.norm != score_norm_kind::none, "ultra_mem: this start needs normed queries");
    require<config_error>(c.start.kind != ultra_mem_start_kind::paper_v2 || c.pre_width > 0, "ultra_mem: this start is for a memory with pre-values");
    checked_rate("ultra_mem", c.output_dropout);
    return c;
  }
  static double norm_scale(const ultra_mem_config& c) {
    const bool v2 = c.start.kind == ultra_mem_start_kind::released_v2 || c.start.kind == ultra_mem_start_kind::paper_v2;
    return std::pow(static_cast<double>(c.key_width), c.start.kind == ultra_mem_start_kind::paper ? -0.5 : v2 ? -0.4 : -0.33);
  }
  static tucker_keys_config keys_config(const ultra_mem_config& c) {
    return {.heads = c.heads, .sub_keys = c.sub_keys, .width = c.key_width, .rank = c.rank, .cores = c.cores, .top_k = c.top_k, .final_k = c.final_k,
            .query = c.query, .norm = c.norm, .norm_bias = c.norm_bias, .epsilon = c.epsilon, .norm_scale = norm_scale(c)};
  }
  static value_expansion_config expansion_config(const ultra_mem_config& c) {
    return {.features = c.features, .expansion = c.expansion, .groups = c.groups, .rows = c.sub_keys * c.sub_keys / std::max<index_t>(1, c.expansion),
            .value_width = c.value_width, .cores = c.cores, .table_rows = c.table_rows, .offset = c.table_offset, .pre_width = c.pre_width,
            .pre_gelu = c.pre_gelu};
  }
  static Table make_table(const ultra_mem_config& given, bool pre) {
    const auto e = value_expansion<S, Table>::checked(expansion_config(completed(given)));
    if (!pre) return Table(e.table_rows * e.cores, e.value_width / e.cores);
    return e.pre_width > 0 ? Table(e.table_rows, e.pre_width) : Table();
  }
  static void fill_normal_rows(Table& table, double deviation, rng_key key) {
    if (table.rows() == 0) return;
    if constexpr (requires { table.fill_normal(deviation, key); }) return table.fill_normal(deviation, key);
    matrix<S> row(1, table.cols());
    for (index_t i = 0; i < table.rows(); ++i) {
      fill_normal<S>(row, deviation, key.child(static_cast<std::uint64_t>(i)));
      table.write_row(i, {row.data(), static_cast<std::size_t>(row.size())});
    }
  }

  /// Draws the linear maps and finds the weight of the queries' norm.
  void start(rng_key key) {
    const double D = static_cast<double>(config.features), read = static_cast<double>(config.value_width * config.groups);
    const bool v2 = config.start.kind == ultra_mem_start_kind::paper_v2;
    const double even = std::sqrt(2 / (5 * D));
    fill_normal<S>(query.projection.weight, v2 ? even : 1 / std::sqrt(static_cast<double>(config.key_width)), key.child(0));
    fill_normal<S>(expansion.projection.weight, v2 ? even : 1 / std::sqrt(read), key.child(1));
    fill_normal<S>(expansion.pre_projection.weight, v2 ? even : 1 / std::sqrt(D), key.child(2));
    if (config.start.kind != ultra_mem_start_kind::paper) return;
    const double mean = selected_scores(key.child(3)).first;
    if (mean > 0) query.norm.weight /= static_cast<S>(std::sqrt(mean));  // scores grow with the square of the queries
  }
  [[nodiscard]] double value_deviation(rng_key key) const {
    const double picks = static_cast<double>(config.top_k * config.heads), L = static_cast<double>(config.start.blocks);
    switch (config.start.kind) {
      case ultra_mem_start_kind::paper: return std::sqrt(static_cast<double>(config.expansion) / (2 * picks * L));
      case ultra_mem_start_kind::paper_v2:
        return std::pow(0.2 * config.start.inner_ratio * static_cast<double>(config.features) /
                            (picks * (1 + selected_scores(key).second) * static_cast<double>(config.pre_width * config.value_width) * L),
                        0.25);
      default: return 0.02;
    }
  }
  /// Mean and variance of the scores Σ_c s^c that normal inputs select.
  std::pair<double, double> selected_scores(rng_key key) const {
    constexpr index_t T = 256;
    matrix<S> x(T, config.features), q(T, query.outputs()), s(T, search.picks() * config.cores);
    matrix<slot_t> addresses(T, search.picks());
    fill_normal<S>(x, 1, key);
    query.forward(x, q, {});
    search.search(q, typename tucker_keys<S>::prepared(search, false, {}), addresses, s, {});
    double sum = 0, square = 0;
    for (index_t i = 0; i < s.size(); i += config.cores) {
      double score = 0;
      for (index_t c = 0; c < config.cores; ++c) score += static_cast<double>(s.data()[i + c]);
      sum += score;
      square += score * score;
    }
    const double count = static_cast<double>(addresses.size()), mean = sum / count;
    return {mean, square / count - mean * mean};
  }

  void check_addresses(index_t T, const record& r) const {
    recorded_slots(who, r.addresses.value, T, search.picks(), config.sub_keys * config.sub_keys);
  }
  void answer(matrix_view<const S> x, matrix_view<const S> q, matrix_view<S> y, const context& ctx) const {
    const index_t T = x.rows(), K = search.picks();
    const scratch<slot_t> addresses(ctx, T, K);
    const scratch<S> scores(ctx, T, K * config.cores);
    {
      const typename tucker_keys<S>::prepared keys(search, false, ctx);
      search.search(q, keys, addresses, scores, ctx);
    }
    expansion.forward(x, addresses, activated(scores, scores), y, nullptr, ctx);
    drop_and_hide(y, ctx);
  }
  /// The scores as they weigh values: themselves, or their positive part in `to` (may be they).
  matrix_view<const S> activated(matrix_view<const S> scores, matrix_view<S> to) const {
    if (!config.relu_scores) return scores;
    to.map().array() = (scores.map().array() < S(0)).select(S(0), scores.map().array());  // NaN stays NaN
    return to;
  }
  void drop_and_hide(matrix_view<S> y, const context& ctx) const {
    if (ctx.train && config.output_dropout > 0) drop<S>(y, y, config.output_dropout, ctx.child(0).key, ctx);
    for (index_t t = 0; !ctx.mask.empty() && t < y.rows(); ++t)
      if (!ctx.valid(t)) y.row_array(t).setZero();
  }
};

}  // namespace lithe::inline LITHE_ABI
