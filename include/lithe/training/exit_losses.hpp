#pragma once

#include "lithe/layers/halting_distributions.hpp"
#include "lithe/training/losses.hpp"

// T tokens, N exits, V classes
namespace lithe::inline LITHE_ABI {

/// Weights of exits n = 1 .. N: 1, n, √n, 1/n or 1/√n (arXiv 1910.10073, table 1; n: arXiv 2207.07061).
enum class exit_weighting { uniform, linear, root, inverse, inverse_root };
[[nodiscard]] inline std::vector<double> exit_weights(exit_weighting kind, index_t exits) {
  std::vector<double> w;
  for (index_t n = 1; n <= exits; ++n) {
    const auto x = static_cast<double>(n);
    switch (kind) {
      case exit_weighting::uniform:
        w.push_back(1);
        break;
      case exit_weighting::linear:
        w.push_back(x);
        break;
      case exit_weighting::root:
        w.push_back(std::sqrt(x));
        break;
      case exit_weighting::inverse:
        w.push_back(1 / x);
        break;
      case exit_weighting::inverse_root:
        w.push_back(1 / std::sqrt(x));
        break;
    }
  }
  return w;
}

namespace detail {

/// Weights divided by their sum; throws config_error for a negative one, or if all are 0.
inline std::vector<double> shares_of(const char* who, std::span<const double> weights) {
  double sum = 0;
  for (const double w : weights) {
    require<config_error>(w >= 0 && std::isfinite(w), who, ": expected weights of at least 0, got ", w);
    sum += w;
  }
  require<config_error>(sum > 0, who, ": expected at least one exit with a weight above 0");
  std::vector<double> shares(weights.begin(), weights.end());
  for (double& w : shares) w /= sum;
  return shares;
}

}  // namespace detail

/// The loss of anytime prediction (arXiv 1910.10073, equation 2): -(1/Σ w) Σₙ wₙ Σₜ log softmax(logitsⁿ)ₜ[y_t], over the targets that count, summed
/// or averaged over them. logits [N T x V], exit n's rows below those of exit n - 1; dlogits of the same shape is overwritten, may be the logits, and
/// may be empty. With equal weights it is also the loss of M passes of mixed training.
///
/// Throws as `cross_entropy` does, and config_error for weights below 0 or all 0.
template <class S>
loss_result aligned_exit_loss(matrix_view<const S> logits, std::span<const token_t> targets, std::span<const double> weights, reduction reduce,
                              token_t ignore_index, matrix_view<S> dlogits, const context& ctx = {}) {
  const auto T = static_cast<index_t>(targets.size()), N = static_cast<index_t>(weights.size());
  const auto shares = detail::shares_of("aligned_exit_loss", weights);
  require<shape_error>(logits.rows() == N * T, "aligned_exit_loss: expected the logits of ", T, " tokens for each of ", N, " exits, got ",
                       logits.rows(), " rows");
  if (dlogits.data() != nullptr) require_shape("aligned_exit_loss", "dlogits", dlogits, logits.rows(), logits.cols());
  const cross_entropy_options o{.ignore_index = ignore_index, .reduce = reduce};
  const index_t counted = detail::count_targets("aligned_exit_loss", targets, T, logits.cols(), o);
  const double scale = detail::loss_scale(reduce, counted);
  const scratch<double> losses(ctx, T);
  double loss = 0;
  for (index_t n = 0; n < N; ++n) {
    const double share = shares[static_cast<std::size_t>(n)] * scale;
    const auto d = dlogits.data() == nullptr ? dlogits : dlogits.slice_rows(n * T, T);
    detail::cross_entropy_rows<S>(logits.slice_rows(n * T, T), targets, o, share, d, losses.span(), ctx);
    loss += share * detail::ordered_sum(losses.span());
  }
  return {loss, counted};
}

/// Cross entropy between oracle exits and an exit distribution: α Σₜ -log q_t(exits[t]), summed or averaged over the tokens (sequences) that have a
/// label; 0 is none. log_q [T x N] from `halting` or `sequence_halting`; dlog_q is overwritten. Throws config_error for α below 0, index_error for an
/// exit above N, shape_error.
template <class S>
loss_result exit_loss(matrix_view<const S> log_q, std::span<const std::int32_t> exits, double alpha, reduction reduce, matrix_view<S> dlog_q) {
  require<config_error>(alpha >= 0 && std::isfinite(alpha), "exit_loss: expected a weight alpha of at least 0, got ", alpha);
  require<shape_error>(static_cast<index_t>(exits.size()) == log_q.rows(), "exit_loss: expected an exit for each of ", log_q.rows(), " rows, got ",
                       exits.size());
  if (dlog_q.data() != nullptr) require_shape("exit_loss", "dlog_q", dlog_q, log_q.rows(), log_q.cols());
  index_t counted = 0;
  for (const auto n : exits) {
    require<index_error>(n >= 0 && n <= log_q.cols(), "exit_loss: expected exits from 1 to ", log_q.cols(), " (0: no label), got ", n);
    counted += n != 0;
  }
  const double scale = alpha * detail::loss_scale(reduce, counted);
  if (dlog_q.data() != nullptr) dlog_q.map().setZero();
  double loss = 0;
  for (index_t t = 0; t < log_q.rows(); ++t)
    if (const auto n = exits[static_cast<std::size_t>(t)]; n != 0) {
      loss -= static_cast<double>(log_q(t, n - 1));
      if (dlog_q.data() != nullptr) dlog_q(t, n - 1) = static_cast<S>(-scale);
    }
  return {loss * scale, counted};
}

/// The same for a target distribution Q [T x N]: α Σₜ Σₙ Q_t(n) (-log q_t(n)); a row of zeros has no label. Throws config_error for a negative entry.
template <class S>
loss_result soft_exit_loss(matrix_view<const S> log_q, matrix_view<const S> target, double alpha, reduction reduce, matrix_view<S> dlog_q) {
  require<config_error>(alpha >= 0 && std::isfinite(alpha), "soft_exit_loss: expected a weight alpha of at least 0, got ", alpha);
  require_shape("soft_exit_loss", "a target distribution", target, log_q.rows(), log_q.cols());
  if (dlog_q.data() != nullptr) require_shape("soft_exit_loss", "dlog_q", dlog_q, log_q.rows(), log_q.cols());
  index_t counted = 0;
  double loss = 0;
  for (index_t t = 0; t < target.rows(); ++t) {
    bool any = false;
    for (index_t n = 0; n < target.cols(); ++n) {
      require<config_error>(target(t, n) >= S(0), "soft_exit_loss: expected probabilities of at least 0, got ", target(t, n));
      if (target(t, n) == S(0)) continue;
      any = true;
      loss -= static_cast<double>(target(t, n)) * static_cast<double>(log_q(t, n));
    }
    counted += any;
  }
  const double scale = alpha * detail::loss_scale(reduce, counted);
  if (dlog_q.data() != nullptr) dlog_q.map() = static_cast<S>(-scale) * target.map();
  return {loss * scale, counted};
}

/// What a confidence that is learned afterwards should say (arXiv 2207.07061, section 3.3): 1 where exit n < N already predicts the class that exit N
/// predicts. logits [N T x V]; consistent [N-1 x T].
template <class S>
void meta_targets(matrix_view<const S> logits, index_t exits, matrix_view<S> consistent, const context& ctx = {}) {
  require<shape_error>(exits >= 1 && logits.rows() % exits == 0, "meta_targets: expected the logits of ", exits, " exits, got ", logits.rows(),
                       " rows");
  const index_t T = logits.rows() / exits;
  require_shape("meta_targets", "targets", consistent, exits - 1, T);
  const auto predicted = [&](index_t row) { return std::max_element(logits.row(row), logits.row(row) + logits.cols()) - logits.row(row); };
  ctx.exec->run(T, std::max<index_t>(1, 16384 / std::max<index_t>(1, logits.cols())), [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t) {
      const auto final = predicted((exits - 1) * T + t);
      for (index_t n = 0; n + 1 < exits; ++n) consistent(n, t) = predicted(n * T + t) == final ? S(1) : S(0);
    }
  });
}

/// Binary cross entropy of the meta confidence (the same section): Σₜ 1/(N-1) Σ_{n<N} H(consistent, σ(zₜⁿ)), summed or averaged over tokens. z,
/// targets and dz [N-1 x T]; dz = (σ(z) - target) / (N - 1), overwritten, may be empty.
template <class S>
loss_result meta_exit_loss(matrix_view<const S> z, matrix_view<const S> consistent, reduction reduce, matrix_view<S> dz) {
  require_shape("meta_exit_loss", "targets", consistent, z.rows(), z.cols());
  if (dz.data() != nullptr) require_shape("meta_exit_loss", "dz", dz, z.rows(), z.cols());
  const index_t T = z.cols();
  const double scale = detail::loss_scale(reduce, T) / static_cast<double>(std::max<index_t>(1, z.rows()));
  double loss = 0;
  for (index_t n = 0; n < z.rows(); ++n)
    for (index_t t = 0; t < T; ++t) {
      const auto signal = static_cast<double>(z(n, t)), y = static_cast<double>(consistent(n, t));
      loss -= y * log_sigmoid(signal) + (1 - y) * log_sigmoid(-signal);
      if (dz.data() != nullptr) dz(n, t) = static_cast<S>(scale * (sigmoid(signal) - y));
    }
  return {loss * scale, T};
}

/// Self-distillation of early answers from the last (arXiv 2004.02178, equation 7): Σ_{n<N} Σₜ KL(p_t^N, p_tⁿ), summed or averaged over rows; the
/// teacher is constant. logits [N T x V]; dlogitsⁿ = pⁿ - p^N, 0 for n = N, overwritten.
template <class S>
loss_result distillation_exit_loss(matrix_view<const S> logits, index_t exits, reduction reduce, matrix_view<S> dlogits, const context& ctx = {}) {
  require<shape_error>(exits >= 1 && logits.rows() % exits == 0, "distillation_exit_loss: expected the logits of ", exits, " exits, got ",
                       logits.rows(), " rows");
  require_shape("distillation_exit_loss", "dlogits", dlogits, logits.rows(), logits.cols());
  const index_t T = logits.rows() / exits, last = (exits - 1) * T;
  const double scale = detail::loss_scale(reduce, T);
  const scratch<S> log_p(ctx, logits.rows(), logits.cols());
  multinomial_exits<S>(logits, log_p, ctx);  // log softmax of each row
  double loss = 0;
  for (index_t i = 0; i < last; ++i)
    for (index_t v = 0; v < logits.cols(); ++v) {
      const auto student = static_cast<double>(log_p.view()(i, v)), teacher = static_cast<double>(log_p.view()(last + i % T, v));
      const double p = std::exp(teacher);
      loss += p == 0 ? 0 : p * (teacher - student);
      dlogits(i, v) = static_cast<S>(scale * (std::exp(student) - p));
    }
  dlogits.slice_rows(last, T).map().setZero();
  return {loss * scale, T};
}

}  // namespace lithe::inline LITHE_ABI
