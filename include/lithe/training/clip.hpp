#pragma once

#include <cmath>
#include <limits>

#include "lithe/training/accumulate.hpp"
#include "lithe/training/parameter_groups.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

inline constexpr index_t gradient_piece = 16384;  // numbers in one piece of work on gradients

/// Σ g² of contiguous numbers, in double and in a fixed order.
template <class S>
double sum_of_squares(const S* g, index_t n, const context& ctx) {
  const scratch<double> pieces(ctx, (n + gradient_piece - 1) / gradient_piece);
  ctx.exec->run(n, gradient_piece, [&](index_t first, index_t last) { pieces[first / gradient_piece] = sum_of_squares(g + first, last - first); });
  double sum = 0;
  for (const double piece : pieces.span()) sum += piece;
  return sum;
}

/// f(contiguous numbers, n) for the gradient of every chosen parameter. Throws state_error if no name fits a pattern,
/// or for a gradient of another model.
template <class F, class L, class G>
void for_each_gradient(const char* who, const parameter_choice& which, F&& f, const L& model, G& gradient) {
  bool any = false;
  for_each_parameter(
      [&](const std::string& name, const auto& p, auto& q) {
        if (!which(name)) return;
        any = true;
        check_gradient(who, name, p, q);
        const auto g = numbers_of(q);
        f(g.data(), g.size());
      },
      model, gradient);
  require<state_error>(any || !which.pattern(), who, ": no parameter has a name like '", which.pattern().value_or(""),
                       "'");
}

}  // namespace detail

/// gradient *= factor, for every chosen parameter. To accumulate the gradient of a batch too large for memory, call
/// backward for each of n parts (gradients are added to), then scale by 1 / n if the loss of each part was a mean over
/// as many rows. The layers' own losses are means over a call, too, and come out right with it; where the parts'
/// gradients are not scaled afterwards (the loss of each was divided by the rows of the whole batch), give each part's
/// context `auxiliary` = its rows / all rows.
template <class L>
void scale_gradient(const L& model, gradient_of<L>& gradient, double factor, const context& ctx = {},
                    const parameter_choice& which = {}) {
  detail::for_each_gradient(
      "scale_gradient", which,
      [&](auto* g, index_t n) {
        using S = std::remove_reference_t<decltype(*g)>;
        ctx.exec->run(n, detail::gradient_piece, [&](index_t first, index_t last) {
          Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>(g + first, last - first) *= static_cast<S>(factor);
        });
      },
      model, gradient);
}

/// The root of the sum of squares of all gradients, dense and row-sparse, of the chosen parameters; what several layers
/// share counts once. Throws state_error if a pattern fits no name.
template <class L>
[[nodiscard]] double global_norm(const L& model, const gradient_of<L>& gradient, const context& ctx = {},
                                 const parameter_choice& which = {}) {
  double sum = 0;
  detail::for_each_gradient(
      "global_norm", which, [&](const auto* g, index_t n) { sum += detail::sum_of_squares(g, n, ctx); }, model,
      gradient);
  return std::sqrt(sum);
}

/// Clips by the global norm: gradient *= min(1, max_norm / norm); returns the norm before (Pascanu et al., arXiv
/// 1211.5063, algorithm 1). With an optimiser that freezes tensors, give its groups, so that only what moves is
/// counted: clip_by_global_norm(model, g, 1.0, ctx, adam.config.groups).
///
/// A norm that is not finite leaves the gradient as it is, so that the caller can skip the step. The same bits with any
/// number of workers. Throws config_error unless max_norm > 0, state_error if a pattern fits no name.
template <class L>
double clip_by_global_norm(const L& model, gradient_of<L>& gradient, double max_norm, const context& ctx = {},
                           const parameter_choice& which = {}) {
  require<config_error>(max_norm > 0, "clip_by_global_norm: expected a norm above 0, got ", max_norm);
  const double norm = global_norm(model, gradient, ctx, which);
  if (norm > max_norm && norm <= std::numeric_limits<double>::max())
    scale_gradient(model, gradient, max_norm / norm, ctx, which);
  return norm;
}

}  // namespace lithe::inline LITHE_ABI
