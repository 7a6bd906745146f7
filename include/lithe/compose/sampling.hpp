#pragma once

#include <cmath>
#include <limits>

#include "lithe/core/random.hpp"
#include "lithe/kernels/top_k.hpp"

// V tokens of a vocabulary
namespace lithe::inline LITHE_ABI {

/// How the next token is drawn from logits z: p ∝ exp(z / temperature) over the `top_k` most likely tokens, of these the fewest whose
/// probabilities reach `top_p` (nucleus sampling, arXiv 1904.09751).
struct sampling {
  double temperature = 1;  ///< 0 = the most likely token, the lowest of equals
  index_t top_k = 0;       ///< 0 = all
  double top_p = 1;

  /// Throws config_error for settings out of range.
  void check() const {
    require<config_error>(temperature >= 0 && std::isfinite(temperature), "sampling: expected a temperature of at least 0, got ", temperature);
    require<config_error>(top_k >= 0, "sampling: expected top_k of at least 0, got ", top_k);
    require<config_error>(top_p > 0 && top_p <= 1, "sampling: expected top_p in (0, 1], got ", top_p);
  }
};

namespace detail {

/// Where the first of the largest logits stands; one that is no number is none of them. Throws state_error for logits
/// that are all NaN or -infinity.
template <class S>
[[nodiscard]] std::size_t largest_logit(std::span<const S> logits) {
  S largest = -std::numeric_limits<S>::infinity();
  std::size_t best = 0;
  for (std::size_t v = 0; v < logits.size(); ++v)
    if (logits[v] > largest) largest = logits[best = v];
  require<state_error>(largest > -std::numeric_limits<S>::infinity(), "sampling: no logit is a number above -infinity");
  return best;
}
/// z - largest: 0 for those that are largest, +infinity too, and -infinity for a z that is no number.
template <class S>
[[nodiscard]] double below_largest(S z, S largest) {
  if (z == largest) return 0;
  return z < largest ? static_cast<double>(z) - static_cast<double>(largest) : -std::numeric_limits<double>::infinity();
}

}  // namespace detail

/// The probabilities [V] by which tokens are drawn from a row of logits [V]; 0 for those that are cut. A logit that is no number has probability 0.
/// Throws config_error for settings out of range, shape_error for no logits, state_error for logits that are all NaN or -infinity.
template <class S>
void token_probabilities(std::span<const S> logits, const sampling& how, std::span<double> p, const context& ctx) {
  how.check();
  const auto V = static_cast<index_t>(logits.size());
  require<shape_error>(V > 0 && p.size() == logits.size(), "sampling: expected logits and as many probabilities, got ", V, " and ", p.size());
  const std::size_t best = detail::largest_logit(logits);
  const S largest = logits[best];
  std::fill(p.begin(), p.end(), 0.0);
  if (how.temperature == 0) {
    p[best] = 1;
    return;
  }
  const auto weight = [&](S z) { return std::exp(detail::below_largest(z, largest) / how.temperature); };
  const index_t k = how.top_k == 0 ? V : std::min(V, how.top_k);
  double total = 0;
  if (k == V && how.top_p == 1) {  // nothing to cut, so nothing to sort
    for (std::size_t v = 0; v < logits.size(); ++v) total += p[v] = weight(logits[v]);
  } else {
    const scratch<S> value(ctx, k);
    const scratch<std::int32_t> token(ctx, k);
    top_k_row<S>(logits.data(), V, k, value.data(), token.data(), ctx);
    double among = 0;
    for (index_t i = 0; i < k; ++i) among += weight(value[i]);
    for (index_t i = 0; i < k && total < how.top_p * among; ++i) total += p[static_cast<std::size_t>(token[i])] = weight(value[i]);
  }
  for (double& x : p) x /= total;
}

/// log p [V] for p = softmax(logits); -infinity for a logit that is no number and, beside +infinity, for all that are
/// finite. Throws as `token_probabilities` does.
template <class S>
void token_log_probabilities(std::span<const S> logits, std::span<double> log_p) {
  require<shape_error>(!logits.empty() && log_p.size() == logits.size(),
                       "sampling: expected logits and as many probabilities, got ", logits.size(), " and ",
                       log_p.size());
  const S largest = logits[detail::largest_logit(logits)];
  double total = 0;
  for (std::size_t v = 0; v < logits.size(); ++v)
    total += std::exp(log_p[v] = detail::below_largest(logits[v], largest));
  const double log_total = std::log(total);
  for (double& x : log_p) x -= log_total;
}

/// The token at which the running sum of weights [V] passes u times their sum, for u in [0, 1).
[[nodiscard]] inline token_t draw_token(std::span<const double> weights, double u) {
  double total = 0, sum = 0;
  for (const double w : weights) total += w;
  std::size_t last = 0;
  for (std::size_t v = 0; v < weights.size(); ++v) {
    if (weights[v] <= 0) continue;
    last = v;
    if ((sum += weights[v]) > u * total) break;
  }
  return static_cast<token_t>(last);
}

/// One token drawn from a row of logits by a number u in [0, 1). Throws as `token_probabilities` does.
template <class S>
token_t sample_token(std::span<const S> logits, const sampling& how, double u, const context& ctx) {
  const scratch<double> p(ctx, static_cast<index_t>(logits.size()));
  token_probabilities<S>(logits, how, p.span(), ctx);
  return draw_token(p.span(), u);
}

/// One token drawn by u so that, if `guess` was drawn from q [V], the result is distributed as p [V]: the guess with probability min(1, p / q), else
/// one of the normalised max(0, p - q) (speculative sampling, arXiv 2211.17192, section 2.3). `again` draws that one. p is used up.
[[nodiscard]] inline token_t correct_token(token_t guess, std::span<const double> q, std::span<double> p, double u, double again) {
  if (const auto g = static_cast<std::size_t>(guess); u * q[g] < p[g]) return guess;
  double left = 0;
  for (std::size_t v = 0; v < p.size(); ++v) left += p[v] = std::max(0.0, p[v] - q[v]);
  if (left == 0) return guess;  // p and q differ by rounding alone
  return draw_token(p, again);
}

}  // namespace lithe::inline LITHE_ABI
