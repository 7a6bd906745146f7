#pragma once

#include <algorithm>
#include <cmath>

#include "lithe/tensor/scratch.hpp"

// T tokens, N exits (after blocks 1 .. N), z halting signals, q the distribution over exits
namespace lithe::inline LITHE_ABI {

/// σ(z) = 1 / (1 + exp(-z)), without overflow.
template <class S>
[[nodiscard]] S sigmoid(S z) {
  const S e = std::exp(-std::abs(z));
  return z < S(0) ? e / (S(1) + e) : S(1) / (S(1) + e);
}

/// log σ(z), finite for every finite z.
template <class S>
[[nodiscard]] S log_sigmoid(S z) {
  return std::min(z, S(0)) - std::log1p(std::exp(-std::abs(z)));
}

/// The exit test: whether a confidence reaches its threshold (or, strictly, passes it). A threshold of 1 or more means never, of 0 or less
/// always; a confidence that is not a number is none.
[[nodiscard]] inline bool reaches(double confidence, double threshold, bool strict) {
  if (threshold >= 1 || std::isnan(threshold)) return false;
  return threshold <= 0 || (strict ? confidence > threshold : confidence >= threshold);
}

namespace detail {
inline constexpr index_t exit_rows = 64;  // tokens in one piece of work on exit distributions
}

/// Poisson-binomial exits by breaking a stick (arXiv 1910.10073, section 4.2): with χⁿ = σ(zⁿ) for n < N,
///
///     log q(n) = log χⁿ + Σ_{m<n} log(1 - χᵐ),      log q(N) = Σ_m log(1 - χᵐ)
///
/// z [N-1 x T], a row for each block; log_q [T x N]. N = 1 gives log q = 0.
template <class S>
void stick_breaking(matrix_view<const S> z, matrix_view<S> log_q, const context& ctx) {
  const index_t last = log_q.cols() - 1;
  LITHE_ASSERT(z.rows() == last && (last == 0 || z.cols() == log_q.rows()));
  ctx.exec->run(log_q.rows(), detail::exit_rows, [&](index_t first, index_t end) {
    for (index_t t = first; t < end; ++t) {
      S stay = 0;
      for (index_t n = 0; n < last; ++n) {
        log_q(t, n) = stay + log_sigmoid(z(n, t));
        stay += log_sigmoid(-z(n, t));
      }
      log_q(t, last) = stay;
    }
  });
}

/// dz from d = dL/dlog q: dzⁿ = (1 - χⁿ) d(n) - χⁿ Σ_{m>n} d(m). Overwritten.
template <class S>
void stick_breaking_backward(matrix_view<const S> z, matrix_view<const S> dlog_q, matrix_view<S> dz, const context& ctx) {
  const index_t last = dlog_q.cols() - 1;
  ctx.exec->run(dlog_q.rows(), detail::exit_rows, [&](index_t first, index_t end) {
    for (index_t t = first; t < end; ++t) {
      S later = dlog_q(t, last);
      for (index_t n = last - 1; n >= 0; --n) {
        dz(n, t) = sigmoid(-z(n, t)) * dlog_q(t, n) - sigmoid(z(n, t)) * later;
        later += dlog_q(t, n);
      }
    }
  });
}

/// The expected exit of each token under `stick_breaking`, E = Σ_{n=0}^{N-1} Sₙ with Sₙ = Π_{k<=n} (1 - χᵏ), into expected [T]; and, unless dz is
/// empty, dE/dzⁿ = -χⁿ Σ_{m>=n} Sₘ: what a penalty on depth needs. z and dz [N-1 x T].
template <class S>
void expected_exit(matrix_view<const S> z, std::span<double> expected, matrix_view<S> dz, const context& ctx) {
  const index_t last = z.rows();
  ctx.exec->run(static_cast<index_t>(expected.size()), detail::exit_rows, [&](index_t first, index_t end) {
    const scratch<double> left(ctx, last + 1);
    for (index_t t = first; t < end; ++t) {
      left[0] = 1;
      for (index_t n = 0; n < last; ++n) left[n + 1] = left[n] * sigmoid(-static_cast<double>(z(n, t)));
      double sum = 0;
      for (index_t n = last; n > 0; --n) {
        sum += left[n];
        if (dz.data() != nullptr) dz(n - 1, t) = static_cast<S>(-sigmoid(static_cast<double>(z(n - 1, t))) * sum);
      }
      expected[static_cast<std::size_t>(t)] = sum + 1;
    }
  });
}

/// Multinomial exits: log_q = log softmax of each row. logits and log_q [T x N]; they may be the same.
template <class S>
void multinomial_exits(matrix_view<const S> logits, matrix_view<S> log_q, const context& ctx) {
  ctx.exec->run(logits.rows(), detail::exit_rows, [&](index_t first, index_t end) {
    for (index_t t = first; t < end; ++t) {
      const S largest = logits.row_array(t).maxCoeff();
      S sum = 0;  // not Eigen's: its order depends on the address
      for (index_t n = 0; n < logits.cols(); ++n) sum += std::exp(logits(t, n) - largest);
      log_q.row_array(t) = (logits.row_array(t) - largest) - std::log(sum);  // not z - (largest + log Σ): that cancels
    }
  });
}

/// dlogits = d - q Σ d from d = dL/dlog q. All [T x N].
template <class S>
void multinomial_exits_backward(matrix_view<const S> log_q, matrix_view<const S> dlog_q, matrix_view<S> dlogits, const context& ctx) {
  ctx.exec->run(log_q.rows(), detail::exit_rows, [&](index_t first, index_t end) {
    for (index_t t = first; t < end; ++t) {
      S sum = 0;
      for (index_t n = 0; n < log_q.cols(); ++n) sum += dlog_q(t, n);
      dlogits.row_array(t) = dlog_q.row_array(t) - log_q.row_array(t).exp() * sum;
    }
  });
}

/// The most probable exit of each row, from 1; ties go to the lowest. exits has a number for each row.
template <class S>
void most_probable_exits(matrix_view<const S> log_q, std::span<std::int32_t> exits) {
  for (index_t t = 0; t < log_q.rows(); ++t) {
    index_t best = 0;
    for (index_t n = 1; n < log_q.cols(); ++n)
      if (log_q(t, n) > log_q(t, best)) best = n;
    exits[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(best + 1);
  }
}

/// The first exit n < N of each token whose χⁿ = σ(zⁿ) reaches thresholds[n-1] (one for all, or N-1), else N. z [N-1 x T].
template <class S>
void first_exits(matrix_view<const S> z, std::span<const double> thresholds, bool strict, std::span<std::int32_t> exits) {
  for (std::size_t t = 0; t < exits.size(); ++t) {
    index_t n = 0;
    const auto leaves = [&] {
      const double tau = thresholds.size() == 1 ? thresholds[0] : thresholds[static_cast<std::size_t>(n)];
      return reaches(static_cast<double>(sigmoid(z(n, static_cast<index_t>(t)))), tau, strict);
    };
    while (n < z.rows() && !leaves()) ++n;
    exits[t] = static_cast<std::int32_t>(n + 1);
  }
}

}  // namespace lithe::inline LITHE_ABI
