#pragma once

#include <random>

#include "lithe/kernels/gather.hpp"
#include "lithe/kernels/gemm.hpp"
#include "lithe/kernels/product_top_k.hpp"
#include "lithe/kernels/top_k.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/initialise.hpp"

namespace lithe::inline LITHE_ABI {

struct product_keys_config {
  index_t heads = 4, sub_keys = 512;
  index_t width = 128;  ///< of one half of a query; of the whole query if flat
  index_t top_k = 32;   ///< candidates of each half
  index_t final_k = 0;  ///< pairs kept for each head; 0 = top_k
  bool flat = false;    ///< one key for each slot instead of pairs: the baseline
  bool shared = false;  ///< one table of keys for all heads and halves
};

/// Exact search over the products of two small key tables (arXiv 1907.05242 section 3.2). For a head with query (q₀, q₁):
///
///     s₀ = K₀ q₀, s₁ = K₁ q₁;  (a, I) = top_k(s₀), (b, J) = top_k(s₁);  the final_k largest a_i + b_j, as pairs I_i sub_keys + J_j
///
/// which are the final_k largest of all sub_keys² sums. There is no 1/√width. Scores descend, ties go to the lower (i, j). Flat: one
/// table, pairs are key numbers. A row whose query has no finite score gets NaN scores and pairs within range.
template <std::floating_point S>
struct product_keys {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> keys;
  };

  matrix<S> keys;  // [tables sub_keys x width], tables in the order [head][half]
  product_keys_config config;
  packed_matrix<S> packed;

  product_keys() = default;
  /// Keys start at U(±1/√width), drawn as in the authors' code: std::mt19937 seeded by 2 head + half (flat: head; shared: 0).
  explicit product_keys(product_keys_config c) : config(c) {
    if (config.final_k == 0) config.final_k = config.top_k;
    require<config_error>(c.heads >= 1, "product keys: expected at least 1 head, got ", c.heads);
    require<config_error>(c.sub_keys >= 1 && c.width >= 1, "product keys: expected at least 1 sub-key of width 1, got ", c.sub_keys, " of ", c.width);
    require<config_error>(c.top_k >= 1 && c.top_k <= c.sub_keys, "product keys: expected top_k from 1 to the ", c.sub_keys, " sub-keys, got ", c.top_k);
    const index_t most = c.flat ? c.top_k : c.top_k * c.top_k;
    require<config_error>(config.final_k >= 1 && config.final_k <= most && (!c.flat || config.final_k == c.top_k),
                          "product keys: expected final_k from 1 to ", most, c.flat ? " and equal to top_k for flat keys" : "", ", got ", config.final_k);
    require<config_error>(c.flat || c.sub_keys < 46341, "product keys: sub_keys² must stay below 2^31, got ",
                          c.sub_keys, " sub-keys");
    keys.resize(tables() * c.sub_keys, c.width);
    const double bound = 1 / std::sqrt(static_cast<double>(c.width));
    for (index_t t = 0; t < tables(); ++t) {
      std::mt19937 draw(static_cast<std::mt19937::result_type>(t));
      for (index_t i = 0; i < c.sub_keys; ++i)
        for (index_t j = 0; j < c.width; ++j) {
          const double high = static_cast<double>(draw() >> 5), low = static_cast<double>(draw() >> 6);
          keys(t * c.sub_keys + i, j) = static_cast<S>(-bound + 2 * bound * ((high * 0x1p26 + low) * 0x1p-53));
        }
    }
  }

  /// Parts of a query, each with a top_k of its own.
  [[nodiscard]] index_t halves() const { return config.flat ? 1 : 2; }
  /// Parts of all queries of a token, `width` numbers each.
  [[nodiscard]] index_t groups() const { return config.heads * halves(); }
  /// Tables of sub-keys: one for each group, or one for all.
  [[nodiscard]] index_t tables() const { return config.shared ? 1 : groups(); }
  /// What a pair may be, from 0: sub_keys², or the keys if flat.
  [[nodiscard]] index_t slots() const { return config.flat ? config.sub_keys : config.sub_keys * config.sub_keys; }
  [[nodiscard]] index_t picks() const { return config.heads * config.final_k; }  ///< of one token

  /// pairs and scores [T x heads final_k] for queries q [T x groups width]. Rows that ctx.mask hides get pairs -1 and scores 0.
  void search(matrix_view<const S> q, matrix_view<slot_t> pairs, matrix_view<S> scores, const context& ctx) const {
    check(q, ctx);
    require_shape(who, "pairs", pairs, q.rows(), picks());
    require_shape(who, "scores", scores, q.rows(), picks());
    const index_t T = q.rows(), n = config.sub_keys, k = config.top_k, last_k = config.final_k;
    const index_t tiles = (T + tile - 1) / tile;
    ctx.exec->run(tiles * config.heads, 1, [&](index_t piece, index_t) {
      const index_t first = piece / config.heads * tile, head = piece % config.heads, rows = std::min(tile, T - first);
      const scratch<S> all(ctx, rows, n), best(ctx, halves() * rows, k), sums(ctx, 1, last_k);
      const scratch<slot_t> ids(ctx, halves() * rows, k), cells(ctx, 1, last_k);
      for (index_t half = 0; half < halves(); ++half) {
        const index_t group = head * halves() + half;
        score(group, q.slice_rows(first, rows).slice_cols(group * config.width, config.width), all, ctx);
        top_k<S>(all, best.view().slice_rows(half * rows, rows), ids.view().slice_rows(half * rows, rows), ctx);
      }
      for (index_t t = 0; t < rows; ++t) {
        S* out_scores = scores.row(first + t) + head * last_k;
        slot_t* out_pairs = pairs.row(first + t) + head * last_k;
        if (!ctx.valid(first + t)) {
          std::fill_n(out_scores, last_k, S(0));
          std::fill_n(out_pairs, last_k, slot_t{-1});
          continue;
        }
        if (config.flat) {
          std::copy_n(best.row(t), k, out_scores);
          std::copy_n(ids.row(t), k, out_pairs);
        } else {
          product_top_k_row<S>(best.row(t), best.row(rows + t), k, last_k, sums.data(), cells.data(), ctx);
          std::copy_n(sums.data(), last_k, out_scores);
          for (index_t j = 0; j < last_k; ++j)
            out_pairs[j] = static_cast<slot_t>(ids.row(t)[cells[j] / k] * n + ids.row(rows + t)[cells[j] % k]);
        }
        if (!(out_scores[0] > -std::numeric_limits<S>::infinity()))
          std::fill_n(out_scores, last_k, std::numeric_limits<S>::quiet_NaN());
      }
    });
  }

  /// The scores of pairs that were chosen before (replay).
  void rescore(matrix_view<const S> q, matrix_view<const slot_t> pairs, matrix_view<S> scores, const context& ctx) const {
    check(q, ctx);
    require_shape(who, "pairs", pairs, q.rows(), picks());
    require_shape(who, "scores", scores, q.rows(), picks());
    ctx.exec->run(q.rows(), 16, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t p = 0; p < picks(); ++p) {
          S sum = 0;
          for (index_t half = 0; pairs(t, p) >= 0 && half < halves(); ++half) {
            const index_t group = p / config.final_k * halves() + half;
            sum += (q.slice_cols(group * config.width, config.width).row_array(t) * keys_of(group).row_array(key_of(pairs(t, p), half))).sum();
          }
          scores(t, p) = sum;
        }
    });
  }

  /// dK_half[key] += ds q_half and dq_half = Σ ds K_half[key] over the picks; dq is overwritten.
  void backward(matrix_view<const S> q, matrix_view<const slot_t> pairs, matrix_view<const S> ds, matrix_view<S> dq, gradient& g,
                const context& ctx) const {
    check(q, ctx);
    require_shape(who, "pairs", pairs, q.rows(), picks());
    require_shape(who, "ds", ds, q.rows(), picks());
    require_shape(who, "dq", dq, q.rows(), q.cols());
    check_gradient(who, *this, g);
    const index_t T = q.rows(), k = config.final_k;
    const scratch<slot_t> ids(ctx, groups(), T * k);
    const scratch<S> weights(ctx, config.heads, T * k);
    ctx.exec->run(groups(), 1, [&](index_t group, index_t) {
      const index_t head = group / halves(), half = group % halves();
      for (index_t t = 0; t < T; ++t)
        for (index_t j = 0; j < k; ++j) {
          const slot_t pair = pairs(t, head * k + j);
          ids.row(group)[t * k + j] = pair < 0 ? slot_t{-1} : static_cast<slot_t>(key_of(pair, half));
          if (half == 0) weights.row(head)[t * k + j] = ds(t, head * k + j);
        }
    });
    const auto picked = [&](index_t group) {
      const auto n = static_cast<std::size_t>(T * k);
      return lithe::picks<S>{{ids.row(group), n}, {weights.row(group / halves()), n}, k};
    };
    for (index_t group = 0; group < groups(); ++group)
      gather_sum<S>(keys_of(group), picked(group), dq.slice_cols(group * config.width, config.width), ctx);
    // Groups that share a table take turns, so that its sums have one order.
    for (index_t group = 0; group < groups(); ++group)
      scatter_add<S>(picked(group), q.slice_cols(group * config.width, config.width), table_of(g.keys, group), ctx);
  }

  void prepack() { packed.assign(keys, tables()); }
  void refresh() {
    if (!packed.empty()) prepack();
  }
  void after_step(const gradient&) { refresh(); }

  [[nodiscard]] cost forward_cost(index_t) const {
    cost c = dense_cost<S>(groups() * config.sub_keys, config.width);
    c.parameters = static_cast<double>(keys.size());
    c.bytes = c.parameters * sizeof(S);
    return c;
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("", s.keys...);
  }

 private:
  static constexpr const char* who = "product keys";
  void check(matrix_view<const S> q, const context& ctx) const {
    require_features(who, groups() * config.width, q);
    ctx.check(who, q.rows());
  }
  static constexpr index_t tile = 128;  // tokens: their scores of one half stay in the second-level cache

  [[nodiscard]] index_t key_of(slot_t pair, index_t half) const {
    return config.flat ? pair : half == 0 ? pair / config.sub_keys : pair % config.sub_keys;
  }
  [[nodiscard]] matrix_view<const S> keys_of(index_t group) const {
    return matrix_view<const S>(keys).slice_rows(config.shared ? 0 : group * config.sub_keys, config.sub_keys);
  }
  [[nodiscard]] matrix_view<S> table_of(matrix<S>& m, index_t group) const {
    return matrix_view<S>(m).slice_rows(config.shared ? 0 : group * config.sub_keys, config.sub_keys);
  }
  void score(index_t group, matrix_view<const S> q, matrix_view<S> scores, const context& ctx) const {
    if (packed.empty())
      gemm_nt<S>(q, keys_of(group), scores, ctx);
    else
      gemm_packed<S>(q, packed.part(config.shared ? 0 : group), scores, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
