#pragma once

#include "lithe/kernels/bilinear_top_k.hpp"
#include "lithe/kernels/gather.hpp"
#include "lithe/kernels/gemm.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/layers/memory/score_norm.hpp"
#include "lithe/layers/memory/tucker_core.hpp"

// T tokens, H heads, n keys of an axis, d their width, r rank, M cores, m candidates of an axis, k pairs kept for a head
namespace lithe::inline LITHE_ABI {

/// Which part of the query is scored with the keys of an axis and rank. Shared (UltraMem): [axis], for all ranks. Per rank (UltraMemV2):
/// [axis][rank]. Released: [2][axis] as in the authors' code of UltraMemV2, where heads 0 and 1 read the first half, 2 and 3 the second.
/// Ascend: [axis][2] as in TRC-HPC's code, which reads the first of both. The last two are for imports of rank 2.
enum class tucker_query { shared, per_rank, released, ascend };

struct tucker_keys_config {
  index_t heads = 2, sub_keys = 512;
  index_t width = 64;  ///< of the keys of one axis and rank
  index_t rank = 2, cores = 2;
  index_t top_k = 42;  ///< candidates of each axis
  index_t final_k = 0; ///< pairs kept for each head; 0 = top_k
  tucker_query query = tucker_query::shared;
  score_norm_kind norm = score_norm_kind::rms;
  bool norm_bias = false;
  double epsilon = 1e-5;
  double norm_scale = 1;  ///< start of the norm's weight
};

/// Tucker-decomposed query-key retrieval (arXiv 2411.12364 section 3.2). For a head, with the normed keys K̂ of axis 0 (rows) and 1 (columns):
///
///     R_ai = <q_0a, K̂[0, i, a]>, Q_bj = <q_1b, K̂[1, j, b]>;  the score of core c of a pair (i, j) is s^c_ij = Σ_ab R_ai C^c_ab Q_bj
///     I = top_m of Σ_a u_a R_ai, J = top_m of Σ_b t_b Q_bj;   the k pairs of I x J whose Σ_c s^c is largest
///
/// u, t are the leading singular vectors of Σ_c C^c: state that `after_step` moves on, no gradient reaches them. The filter is exact for rank 1
/// and factors of one sign; else it may miss pairs. It costs one product of width d: u is folded into the keys. Largest values count, not
/// magnitudes; ties go to the lower i, then j. Pairs are i n + j. A row with NaN gets NaN scores and pairs within range.
template <std::floating_point S>
struct tucker_keys {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> keys;
    typename score_norm<S>::gradient norm;
    matrix<S> cores;
    nothing u, t;
  };

  tucker_keys_config config;
  matrix<S> keys;  // [H 2 n x r d], rows in the order [head][axis][key]
  score_norm<S> norm;
  matrix<S> cores;  // [M H r x r], rows in the order [core][head][row rank]
  matrix<S> u, t;   // [H x r]
  // Functions of the parameters, made by `prepack`: the normed keys, and those with u or t folded in.
  matrix<S> unit, filter;
  packed_matrix<S> packed;                     // the filter's, a head and axis a part
  std::vector<packed_matrix<S>> packed_ranks;  // the same of each rank's

  tucker_keys() = default;
  /// Keys start at N(0, 1/√d), cores at U(0, 1). Throws config_error.
  tucker_keys(tucker_keys_config c, rng_key key)
      : config(checked(c)), keys(c.heads * 2 * c.sub_keys, c.rank * c.width), norm(c.norm, c.width, c.norm_bias, c.epsilon, c.norm_scale),
        cores(c.cores * c.heads * c.rank, c.rank), u(matrix<S>::Zero(c.heads, c.rank)), t(matrix<S>::Zero(c.heads, c.rank)) {
    if (config.final_k == 0) config.final_k = config.top_k;
    fill_normal<S>(keys, 1 / std::sqrt(static_cast<double>(c.width)), key.child(0));
    fill_uniform<S>(cores, 0.5, key.child(1));
    cores.array() += S(0.5);
    follow();
  }
  /// Throws config_error unless the settings go together.
  static tucker_keys_config checked(tucker_keys_config c) {
    require<config_error>(c.heads >= 1, "ultra_mem: expected at least 1 head, got ", c.heads);
    require<config_error>(c.sub_keys >= 1 && c.sub_keys < 46341, "ultra_mem: expected 1 to 46340 keys of an axis (pairs below 2^31), got ", c.sub_keys);
    require<config_error>(c.width >= 1 && c.rank >= 1 && c.cores >= 1, "ultra_mem: expected a key width, rank and number of cores of at least 1, got ",
                          c.width, ", ", c.rank, " and ", c.cores);
    require<config_error>(c.top_k >= 1 && c.top_k <= c.sub_keys, "ultra_mem: expected top_k from 1 to the ", c.sub_keys, " keys of an axis, got ", c.top_k);
    require<config_error>(c.final_k >= 0 && c.final_k <= c.top_k * c.top_k, "ultra_mem: expected final_k from 1 to top_k² = ", c.top_k * c.top_k, ", got ",
                          c.final_k);
    const bool two = c.query == tucker_query::released || c.query == tucker_query::ascend;
    require<config_error>(!two || c.rank == 2, "ultra_mem: queries laid out as released are for rank 2, got ", c.rank);
    require<config_error>(c.query != tucker_query::released || c.heads <= 4, "ultra_mem: queries laid out as released are for 1 to 4 heads, got ", c.heads);
    return c;
  }

  /// Blocks of width d in a query.
  [[nodiscard]] index_t blocks() const { return config.query == tucker_query::shared ? 2 : 2 * config.rank; }
  /// The block that is scored with the keys of a head, axis and rank.
  [[nodiscard]] index_t block(index_t head, index_t axis, index_t rank) const {
    switch (config.query) {
      case tucker_query::released: return head / 2 * 2 + axis;
      case tucker_query::per_rank: return axis * config.rank + rank;
      case tucker_query::ascend: return 2 * axis;
      default: return axis;
    }
  }
  [[nodiscard]] index_t picks() const { return config.heads * config.final_k; }  ///< of one token

  /// The normed keys: the copies of `prepack`, or made here.
  struct prepared {
    scratch<S> own_unit, own_filter, statistics;
    matrix_view<const S> unit, filter;

    /// `again` makes them here even if there are copies.
    prepared(const tucker_keys& k, bool again, const context& ctx)
        : own_unit(ctx, again || k.packed.empty() ? k.keys.rows() : 0, k.keys.cols()),
          own_filter(ctx, again || k.packed.empty() ? k.keys.rows() : 0, k.filter_width()),
          statistics(ctx, again || k.packed.empty() ? k.keys.rows() * k.config.rank : 0, 2) {
      if (own_unit.rows() != 0) k.prepare(own_unit, own_filter, statistics, ctx);
      unit = own_unit.rows() != 0 ? matrix_view<const S>(own_unit) : view(k.unit);
      filter = own_unit.rows() != 0 ? matrix_view<const S>(own_filter) : view(k.filter);
    }
  };

  /// pairs [T x H k] and scores [T x H k M] for queries q [T x blocks d]. Rows that ctx.mask hides get pairs -1 and scores 0.
  void search(matrix_view<const S> q, const prepared& p, matrix_view<slot_t> pairs, matrix_view<S> scores, const context& ctx) const {
    check(q, pairs.rows(), pairs.cols(), scores, ctx);
    const index_t T = q.rows(), n = config.sub_keys, m = config.top_k, k = config.final_k, r = config.rank, M = config.cores;
    const index_t tiles = (T + tile - 1) / tile;
    const scratch<S> sum(ctx, config.heads * r, r);
    sum_cores(sum);
    ctx.exec->run(tiles * config.heads, 1, [&](index_t piece, index_t) {
      const index_t first = piece / config.heads * tile, head = piece % config.heads, rows = std::min(tile, T - first);
      const auto q_tile = q.slice_rows(first, rows);
      const scratch<slot_t> ids(ctx, 2 * rows, m), cells(ctx, 1, k);
      const scratch<S> factors(ctx, 2 * r * rows, m), best(ctx, 1, k);  // factors in the order [axis][rank][token]
      for (index_t axis = 0; axis < 2; ++axis) {
        const scratch<S> all(ctx, rows, n), values(ctx, rows, m);
        const auto of_axis = ids.view().slice_rows(axis * rows, rows);
        filter_scores(q_tile, p, head, axis, all, ctx);
        top_k<S>(all, values, of_axis, ctx);
        factor_candidates(q_tile, p, head, axis, of_axis, values, all, factors.row(axis * r * rows), ctx);
      }
      for (index_t token = 0; token < rows; ++token) {
        S* out_scores = scores.row(first + token) + head * k * M;
        slot_t* out_pairs = pairs.row(first + token) + head * k;
        if (!ctx.valid(first + token)) {
          std::fill_n(out_scores, k * M, S(0));
          std::fill_n(out_pairs, k, slot_t{-1});
          continue;
        }
        const auto of_axis = [&](index_t axis) { return matrix_view<const S>(factors.row(axis * r * rows + token), r, m, rows * m); };
        bilinear_top_k_row<S>(of_axis(0), of_axis(1), sum.view().slice_rows(head * r, r), k, best.data(), cells.data(), ctx);
        for (index_t j = 0; j < k; ++j) {
          const index_t row = cells[j] / m, column = cells[j] % m;
          out_pairs[j] = static_cast<slot_t>(ids.row(token)[row] * n + ids.row(rows + token)[column]);
          core_scores(head, of_axis(0).data() + row, of_axis(1).data() + column, rows * m, out_scores + j * M);
        }
      }
    });
  }

  /// The scores of pairs that were chosen before (replay).
  void rescore(matrix_view<const S> q, const prepared& p, matrix_view<const slot_t> pairs, matrix_view<S> scores, const context& ctx) const {
    check(q, pairs.rows(), pairs.cols(), scores, ctx);
    const index_t T = q.rows(), k = config.final_k, M = config.cores;
    const scratch<slot_t> ids(ctx, 2, T * k);
    const scratch<S> factors(ctx, 2 * config.rank, T * k);
    for (index_t head = 0; head < config.heads; ++head) {
      factor_pairs(q, p, head, pairs, ids, factors, ctx);
      ctx.exec->run(T, 64, [&](index_t first, index_t last) {
        for (index_t at = first * k; at < last * k; ++at)
          core_scores(head, factors.data() + at, factors.row(config.rank) + at, T * k, scores.row(at / k) + (head * k + at % k) * M);
      });
    }
  }

  /// dC^c_ab += ds^c R_ai Q_bj, dR_ai = Σ_c ds^c Σ_b C^c_ab Q_bj, dQ_bj likewise, over the picks; from them dq (added to) and the gradient
  /// of the normed keys d_unit (added to).
  void backward(matrix_view<const S> q, const prepared& p, matrix_view<const slot_t> pairs, matrix_view<const S> ds, matrix_view<S> dq,
                matrix_view<S> d_unit, gradient& g, const context& ctx) const {
    check(q, pairs.rows(), pairs.cols(), ds, ctx);
    require_shape(who, "dq", dq, q.rows(), q.cols());
    require_shape(who, "d_unit", d_unit, keys.rows(), keys.cols());
    check_gradient(who, *this, g);
    constexpr index_t part = 64;  // tokens of one partial sum of the cores' gradient
    const index_t T = q.rows(), k = config.final_k, r = config.rank, M = config.cores, parts = (T + part - 1) / part, d = config.width;
    const scratch<slot_t> ids(ctx, 2, T * k);
    const scratch<S> factors(ctx, 2 * r, T * k), changes(ctx, 2 * r, T * k), sums(ctx, parts, M * r * r);
    for (index_t head = 0; head < config.heads; ++head) {
      factor_pairs(q, p, head, pairs, ids, factors, ctx);
      ctx.exec->run(parts, 1, [&](index_t piece, index_t) {
        const matrix_view<S> sum(sums.row(piece), M * r, r);
        const scratch<S> mixed(ctx, r, r);
        sum.map().setZero();
        for (index_t at = piece * part * k; at < std::min(T, (piece + 1) * part) * k; ++at) {
          const auto column = [&](const scratch<S>& of, index_t axis) {  // [r x 1]
            return Eigen::Map<Eigen::Matrix<S, Eigen::Dynamic, 1>, 0, Eigen::InnerStride<>>(of.row(axis * r) + at, r, Eigen::InnerStride<>(T * k));
          };
          const auto R = column(factors, 0), Q = column(factors, 1);
          mixed.map().setZero();
          for (index_t c = 0; c < M; ++c) {
            const S change = ds(at / k, (head * k + at % k) * M + c);
            for (index_t a = 0; a < r; ++a)
              for (index_t b = 0; b < r; ++b) {
                sum(c * r + a, b) += change * R(a) * Q(b);
                mixed.view()(a, b) += change * core(head, c)(a, b);
              }
          }
          for (index_t a = 0; a < r; ++a) {
            S row = 0, col = 0;
            for (index_t b = 0; b < r; ++b) {
              row += mixed.view()(a, b) * Q(b);
              col += mixed.view()(b, a) * R(b);
            }
            changes.row(a)[at] = row;
            changes.row(r + a)[at] = col;
          }
        }
      });
      for (index_t piece = 0; piece < parts; ++piece)
        for (index_t c = 0; c < M; ++c)
          g.cores.middleRows((c * config.heads + head) * r, r) += matrix_view<S>(sums.row(piece), M * r, r).slice_rows(c * r, r).map();
      for (index_t axis = 0; axis < 2; ++axis)
        for (index_t a = 0; a < r; ++a) {
          const auto size = static_cast<std::size_t>(T * k);
          const lithe::picks<S> picked{{ids.row(axis), size}, {changes.row(axis * r + a), size}, k};
          const index_t at = block(head, axis, a) * d;
          gather_sum<S>(group(p.unit, head, axis).slice_cols(a * d, d), picked, dq.slice_cols(at, d), ctx, update::add);
          scatter_add<S>(picked, q.slice_cols(at, d), group(d_unit, head, axis).slice_cols(a * d, d), ctx);
        }
    }
  }
  /// The gradient of the keys and their norm from that of the normed keys, which is used up.
  void norm_backward(const prepared& p, matrix_view<S> d_unit, gradient& g, const context& ctx) const {
    norm.backward(by_rank(view(keys)), p.statistics, by_rank(d_unit), by_rank(d_unit), g.norm, ctx);
    add<S>(d_unit, g.keys, ctx);
  }

  /// The filter's scores [T x n] of all keys of a head and axis.
  void filter_scores(matrix_view<const S> q, const prepared& p, index_t head, index_t axis, matrix_view<S> scores, const context& ctx) const {
    const auto part = q.slice_cols(block(head, axis, 0) * config.width, filter_width());
    if (p.own_unit.rows() == 0)
      gemm_packed<S>(part, packed.part(head * 2 + axis), scores, ctx);
    else
      gemm_nt<S>(part, group(p.filter, head, axis), scores, ctx);
  }
  /// The scores [T x n] of all keys of a head, axis and rank.
  void rank_scores(matrix_view<const S> q, const prepared& p, index_t head, index_t axis, index_t a, matrix_view<S> scores, const context& ctx) const {
    const index_t d = config.width;
    const auto part = q.slice_cols(block(head, axis, a) * d, d);
    if (p.own_unit.rows() == 0)
      gemm_packed<S>(part, packed_ranks[static_cast<std::size_t>(a)].part(head * 2 + axis), scores, ctx);
    else
      gemm_nt<S>(part, group(p.unit, head, axis).slice_cols(a * d, d), scores, ctx);
  }
  /// How wide the keys of the filter are: with one query for all ranks their sum over the ranks is scored.
  [[nodiscard]] index_t filter_width() const { return config.query == tucker_query::per_rank ? config.rank * config.width : config.width; }
  /// The rows of keys (or of what has their shape) that belong to a head and axis.
  template <class E>
  [[nodiscard]] matrix_view<E> group(matrix_view<E> m, index_t head, index_t axis) const {
    return m.slice_rows((head * 2 + axis) * config.sub_keys, config.sub_keys);
  }
  /// C^c of a head, [r x r].
  [[nodiscard]] matrix_view<const S> core(index_t head, index_t c) const {
    return view(cores).slice_rows((c * config.heads + head) * config.rank, config.rank);
  }
  /// What the filter multiplies rank a of an axis by.
  [[nodiscard]] S filter_weight(index_t head, index_t axis, index_t a) const { return axis == 0 ? u(head, a) : t(head, a); }

  /// u and t follow the cores, in place of all zeros or of the stored ones (layers/memory/tucker_core.hpp).
  void follow() { detail::follow_cores<S>(cores, u, t); }
  void prepack() {
    unit.resize(keys.rows(), keys.cols());
    filter.resize(keys.rows(), filter_width());
    const scratch<S> statistics({}, keys.rows() * config.rank, 2);
    prepare(unit, filter, statistics, {});
    packed.assign(filter, 2 * config.heads);
    packed_ranks.resize(static_cast<std::size_t>(config.rank));
    for (index_t a = 0; a < config.rank; ++a)
      packed_ranks[static_cast<std::size_t>(a)].assign(view(unit).slice_cols(a * config.width, config.width), 2 * config.heads);
  }
  void refresh() {
    if (!packed.empty()) prepack();
  }
  void after_step(const gradient&) {
    follow();
    refresh();
  }

  /// Of the prepacked search: the filter reads all of its keys, the exact scores those of the candidates.
  [[nodiscard]] cost forward_cost(index_t) const {
    const double H = static_cast<double>(config.heads), m = static_cast<double>(config.top_k), r = static_cast<double>(config.rank);
    const double filtered = static_cast<double>(keys.rows() * filter_width()), exact = 2 * H * m * static_cast<double>(keys.cols());
    return {static_cast<double>(keys.size() + cores.size()) + 1.0 * static_cast<double>(norm.weight.size() + norm.bias.size()),
            2 * filtered + 2 * exact + 2 * H * m * m * r, (filtered + exact) * sizeof(S)};
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("keys", s.keys...);
    f("norm", s.norm...);
    f("cores", s.cores...);
    f(field("u", role::state), s.u...);
    f(field("t", role::state), s.t...);
  }

 private:
  static constexpr const char* who = "tucker_keys";
  template <class T>
  void check(matrix_view<const S> q, index_t rows, index_t cols, matrix_view<T> scores, const context& ctx) const {
    require_features(who, blocks() * config.width, q);
    require<shape_error>(rows == q.rows() && cols == picks(), who, ": expected pairs of shape ", to_text(q.rows(), picks()), ", got ", to_text(rows, cols));
    require_shape(who, "scores", scores, q.rows(), picks() * config.cores);
    ctx.check(who, q.rows());
  }
  static constexpr index_t tile = 128;  // tokens: their scores of one axis stay in the second-level cache

  /// Keys [H 2 n x r d] as rows of one rank each.
  template <class E>
  matrix_view<E> by_rank(matrix_view<E> m) const {
    return m.cut_rows(config.width);
  }
  void prepare(matrix_view<S> to_unit, matrix_view<S> to_filter, matrix_view<S> statistics, const context& ctx) const {
    norm.forward(by_rank(view(keys)), by_rank(to_unit), statistics, ctx);
    const index_t d = config.width;
    ctx.exec->run(keys.rows(), detail::grain_rows(keys.cols()), [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) {
        const index_t head = i / (2 * config.sub_keys), axis = i / config.sub_keys % 2;
        for (index_t a = 0; a < config.rank; ++a) {
          const auto key = to_unit.slice_cols(a * d, d).row_array(i);
          if (config.query == tucker_query::per_rank)
            to_filter.slice_cols(a * d, d).row_array(i) = filter_weight(head, axis, a) * key;
          else if (a == 0)
            to_filter.row_array(i) = filter_weight(head, axis, 0) * key;
          else
            to_filter.row_array(i) += filter_weight(head, axis, a) * key;
        }
      }
    });
  }
  void sum_cores(matrix_view<S> sum) const {
    const index_t rows = config.heads * config.rank;
    sum.map() = view(cores).slice_rows(0, rows).map();
    for (index_t c = 1; c < config.cores; ++c) sum.map() += view(cores).slice_rows(c * rows, rows).map();
  }
  /// out[.] = <q of (axis, a), unit key ids[.] of rank a>, per_token ids for each row of q.
  void factor(matrix_view<const S> q, const prepared& p, index_t head, index_t axis, index_t a, std::span<const slot_t> ids, index_t per_token, S* out,
              const context& ctx) const {
    const index_t d = config.width;
    row_dots<S>(group(p.unit, head, axis).slice_cols(a * d, d), ids, per_token, q.slice_cols(block(head, axis, a) * d, d), {out, ids.size()}, ctx);
  }
  /// The factors of a tile's candidates, out [r][T x m]. The filter's scores Σ_a u_a R_a are known, so one rank follows from the others: that of
  /// the largest |u_a|, which is at least |u| / √r and so costs no accuracy. `all` [T x n] is used up.
  void factor_candidates(matrix_view<const S> q, const prepared& p, index_t head, index_t axis, matrix_view<const slot_t> ids, matrix_view<const S> values,
                         matrix_view<S> all, S* out, const context& ctx) const {
    constexpr index_t tall = 16, dear = 24;  // rows from which on a product is fast; keys of a product in the time of one gathered dot
    const index_t r = config.rank, m = config.top_k, size = ids.rows() * m;
    index_t pivot = 0;
    for (index_t a = 1; a < r; ++a)
      if (std::abs(filter_weight(head, axis, a)) > std::abs(filter_weight(head, axis, pivot))) pivot = a;
    const bool solve = filter_weight(head, axis, pivot) != S(0);
    const std::span<const slot_t> each(ids.data(), static_cast<std::size_t>(size));
    for (index_t a = 0; a < r; ++a) {
      if (a == pivot && solve) continue;
      if (ids.rows() < tall || config.sub_keys > dear * m) {
        factor(q, p, head, axis, a, each, m, out + a * size, ctx);
        continue;
      }
      rank_scores(q, p, head, axis, a, all, ctx);
      for (index_t t0 = 0; t0 < ids.rows(); ++t0)
        for (index_t j = 0; j < m; ++j) out[a * size + t0 * m + j] = all(t0, ids(t0, j));
    }
    if (!solve) return;
    using row = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
    row solved(out + pivot * size, size);
    solved = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>(values.data(), size);
    solved = (solved > detail::lowest_score<S>).select(solved, std::numeric_limits<S>::quiet_NaN());  // what was ranked last was NaN
    for (index_t a = 0; a < r; ++a)
      if (a != pivot) solved -= filter_weight(head, axis, a) * row(out + a * size, size);
    solved /= filter_weight(head, axis, pivot);
  }
  /// ids [2 x T k] of the keys that the pairs of a head name, -1 where there is none, and their factors [2 r x T k].
  void factor_pairs(matrix_view<const S> q, const prepared& p, index_t head, matrix_view<const slot_t> pairs, const scratch<slot_t>& ids,
                    const scratch<S>& factors, const context& ctx) const {
    const index_t T = q.rows(), k = config.final_k;
    for (index_t at = 0; at < T * k; ++at) {
      const slot_t pair = pairs(at / k, head * k + at % k);
      ids.row(0)[at] = pair < 0 ? slot_t{-1} : static_cast<slot_t>(pair / config.sub_keys);
      ids.row(1)[at] = pair < 0 ? slot_t{-1} : static_cast<slot_t>(pair % config.sub_keys);
    }
    for (index_t axis = 0; axis < 2; ++axis)
      for (index_t a = 0; a < config.rank; ++a)
        factor(q, p, head, axis, a, {ids.row(axis), static_cast<std::size_t>(T * k)}, k, factors.row(axis * config.rank + a), ctx);
  }
  /// out[c] = Σ_ab R_a C^c_ab Q_b; R and Q have their ranks `stride` apart.
  void core_scores(index_t head, const S* R, const S* Q, index_t stride, S* out) const {
    for (index_t c = 0; c < config.cores; ++c) {
      const auto C = core(head, c);
      S sum = 0;
      for (index_t a = 0; a < config.rank; ++a) {
        S inner = 0;
        for (index_t b = 0; b < config.rank; ++b) inner += C(a, b) * Q[b * stride];
        sum += R[a * stride] * inner;
      }
      out[c] = sum;
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
