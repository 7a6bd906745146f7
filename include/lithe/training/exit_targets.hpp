#pragma once

#include <cmath>

#include "lithe/training/losses.hpp"

// T tokens, N exits, V classes
namespace lithe::inline LITHE_ABI {

/// What the classifiers of all exits say about the targets, both [T x N], 0 where there is no target: LL = log p_tⁿ[y_t], and C = 1 where
/// y_t is the most probable class (the first of equals), else 0.
struct exit_evidence {
  matrix<double> log_likelihood, correct;
};

/// Fills the evidence from the logits [N T x V] of all exits, exit by exit. Throws shape_error, index_error for a target that is neither a class
/// nor `ignore_index`.
template <class S>
void exit_evidence_from(matrix_view<const S> logits, std::span<const token_t> targets, token_t ignore_index, exit_evidence& e,
                        const context& ctx = {}) {
  const auto T = static_cast<index_t>(targets.size());
  require<shape_error>(T == 0 ? logits.rows() == 0 : logits.rows() % T == 0, "exit_evidence: expected the logits of ", T,
                       " tokens for each exit, got ", logits.rows(), " rows");
  detail::count_targets("exit_evidence", targets, T, logits.cols(), {.ignore_index = ignore_index});
  const index_t N = T == 0 ? 0 : logits.rows() / T;
  e.log_likelihood.resize(T, N);
  e.correct.resize(T, N);
  const index_t grain = std::max<index_t>(1, 16384 / std::max<index_t>(1, logits.cols()));
  ctx.exec->run(logits.rows(), grain, [&](index_t first, index_t last) {
    for (index_t i = first; i < last; ++i) {
      const index_t t = i % T, n = i / T;
      const token_t y = targets[static_cast<std::size_t>(t)];
      const S* row = logits.row(i);
      e.log_likelihood(t, n) = y == ignore_index ? 0 : -detail::cross_entropy_row<S>(row, logits.cols(), y, 0, 0, nullptr);
      e.correct(t, n) = y != ignore_index && !std::isnan(row[y]) && std::max_element(row, row + logits.cols()) == row + y ? 1 : 0;
    }
  });
}

enum class exit_oracle { likelihood, correctness };
enum class exit_granularity { token, sequence };

/// Which exit a token or a sequence should take.
struct exit_target_config {
  exit_oracle oracle = exit_oracle::correctness;
  exit_granularity granularity = exit_granularity::token;
  double penalty = 0.1;    ///< λ for each block: nats (likelihood) or counts (correctness)
  double sigma = 0;        ///< width of the smoothing over neighbours; 0: none
  bool normalise = false;  ///< smoothed scores are averages instead of sums
  token_t ignore_index = -100;
};

namespace detail {

/// The first of the largest scores, from 1.
inline std::int32_t best_exit(const double* score, index_t N) {
  index_t best = 0;
  for (index_t n = 1; n < N; ++n)
    if (score[n] > score[best]) best = n;
  return static_cast<std::int32_t>(best + 1);
}

}  // namespace detail

/// Oracle exits (arXiv 1910.10073, sections 4.1 and 4.2), constants for the training of exit distributions. With X = LL or C, for each token j with
/// a target, or each sequence,
///
///     token      scoreⁿ = Σᵢ κ(j, i) Xᵢⁿ - λ n,  κ = exp(-(j - i)² / σ) over its sequence's positions with a target (σ = 0: only j itself)
///     sequence   scoreⁿ = Σⱼ Xⱼⁿ - λ n
///
/// and exit = argmaxₙ scoreⁿ, ties to the lowest. `exits` has a number for each token (0: no target) or each sequence; `scores` [T or B x N] too,
/// unless empty. Throws config_error for a negative or infinite σ or a penalty that is no number, shape_error.
inline void exit_targets(const exit_evidence& e, std::span<const token_t> targets, const exit_target_config& c, std::span<std::int32_t> exits,
                         matrix_view<double> scores = {}, const context& ctx = {}) {
  const matrix<double>& x = c.oracle == exit_oracle::likelihood ? e.log_likelihood : e.correct;
  const index_t T = x.rows(), N = x.cols();
  const bool by_token = c.granularity == exit_granularity::token;
  require<config_error>(c.sigma >= 0 && std::isfinite(c.sigma), "exit_targets: expected a width sigma of at least 0, got ", c.sigma);
  require<config_error>(!std::isnan(c.penalty), "exit_targets: expected a penalty for each block, got not a number");
  ctx.rows.check("exit_targets", T);
  require<shape_error>(static_cast<index_t>(targets.size()) == T, "exit_targets: expected a target for each of ", T, " tokens, got ", targets.size());
  const index_t rows = by_token ? T : ctx.rows.count();
  require<shape_error>(static_cast<index_t>(exits.size()) == rows, "exit_targets: expected room for ", rows, " exits, got ", exits.size());
  if (scores.data() != nullptr) require_shape("exit_targets", "scores", scores, rows, N);
  const auto counts = [&](index_t t) { return targets[static_cast<std::size_t>(t)] != c.ignore_index; };
  // Farther away a weight is below 1e-20, which no sum of doubles sees beside the token's own.
  const auto reach = static_cast<index_t>(std::min(std::sqrt(46.1 * c.sigma), static_cast<double>(T)));
  const scratch<double> row(ctx, N);
  const auto put = [&](index_t at, bool any) {
    for (index_t n = 0; n < N; ++n) row[n] = any ? row[n] - (c.penalty == 0 ? 0 : c.penalty * static_cast<double>(n + 1)) : 0;
    exits[static_cast<std::size_t>(at)] = any || !by_token ? detail::best_exit(row.data(), N) : 0;
    if (scores.data() != nullptr) std::copy_n(row.data(), N, scores.row(at));
  };
  for (index_t s = 0; s < ctx.rows.count(); ++s) {
    const index_t begin = ctx.rows.begin(s), end = ctx.rows.end(s, T);
    std::fill_n(row.data(), N, 0.0);
    for (index_t j = begin; j < end; ++j) {
      if (!by_token) {
        for (index_t n = 0; n < N; ++n) row[n] += x(j, n);  // 0 without a target
        continue;
      }
      std::fill_n(row.data(), N, 0.0);
      double total = 0;
      for (index_t i = std::max(begin, j - reach); counts(j) && i < std::min(end, j + reach + 1); ++i) {
        if (!counts(i)) continue;
        const auto distance = static_cast<double>(j - i);
        const double kappa = i == j ? 1 : std::exp(-distance * distance / c.sigma);
        total += kappa;
        for (index_t n = 0; n < N; ++n) row[n] += kappa * x(i, n);
      }
      if (c.normalise && total > 0)
        for (index_t n = 0; n < N; ++n) row[n] /= total;
      put(j, counts(j));
    }
    if (!by_token) put(s, true);
  }
}

}  // namespace lithe::inline LITHE_ABI
