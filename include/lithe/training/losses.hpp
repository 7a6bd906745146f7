#pragma once

#include <limits>

#include "lithe/layers/layer.hpp"
#include "lithe/training/accumulate.hpp"

// T tokens, V classes, D features
namespace lithe::inline LITHE_ABI {

/// Over what a loss is averaged: nothing, or the rows (entries) that count.
enum class reduction { mean, sum };

struct cross_entropy_options {
  double label_smoothing = 0;   ///< e: the share of the target that is spread evenly over all V classes, the target included
  token_t ignore_index = -100;  ///< rows with this target give no loss and no gradient
  reduction reduce = reduction::mean;
};

/// A loss after its reduction, and the number of rows (mean_square: entries) that count. With `mean`, loss * counted is the sum.
struct loss_result {
  double loss = 0;
  index_t counted = 0;
};

namespace detail {

inline constexpr index_t loss_block = 512;  // numbers that are summed in S before the sum goes on in double

/// Checks all targets; the number of rows that count.
inline index_t count_targets(const char* who, std::span<const token_t> targets, index_t rows, index_t classes, const cross_entropy_options& o) {
  require<config_error>(o.label_smoothing >= 0 && o.label_smoothing <= 1, who, ": label smoothing must lie in [0, 1], got ", o.label_smoothing);
  require<shape_error>(static_cast<index_t>(targets.size()) == rows, who, ": expected a target for each of ", rows, " rows, got ", targets.size());
  index_t counted = 0;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    if (targets[t] == o.ignore_index) continue;
    require<index_error>(targets[t] >= 0 && targets[t] < classes, who, ": target of row ", t, " must lie in [0, ", classes, "), got ", targets[t]);
    ++counted;
  }
  return counted;
}

/// The loss of one row; writes `scale` times its gradient to d unless d is null. d may be x.
template <class S>
double cross_entropy_row(const S* x, index_t classes, token_t target, double smoothing, double scale, S* d) {
  using array = Eigen::Array<S, Eigen::Dynamic, 1>;
  using const_map = Eigen::Map<const array>;
  using map = Eigen::Map<array>;
  const S largest = const_map(x, classes).maxCoeff();
  const double target_logit = static_cast<double>(x[target]) - static_cast<double>(largest);
  double shifted_sum = 0, exp_sum = 0;
  alignas(64) S buffer[loss_block];
  for (index_t first = 0; first < classes; first += loss_block) {
    const index_t n = std::min(loss_block, classes - first);
    const const_map block(x + first, n);
    if (smoothing != 0) shifted_sum += accumulate(n, [&](index_t i) { return block[i] - largest; });  // else a logit of -inf is fine
    // Always summed from an aligned buffer: Eigen's sums begin at an aligned number, so their bits would depend on the address of x.
    Eigen::Map<array, Eigen::Aligned64> e(buffer, n);
    e = (block - largest).exp();
    exp_sum += static_cast<double>(e.sum());
    if (d != nullptr) std::copy_n(buffer, n, d + first);
  }
  if (d != nullptr) {
    map gradient(d, classes);
    gradient *= static_cast<S>(scale / exp_sum);
    if (smoothing != 0) gradient -= static_cast<S>(scale * smoothing / static_cast<double>(classes));
    d[target] -= static_cast<S>(scale * (1 - smoothing));
  }
  const double uniform = smoothing != 0 ? smoothing * shifted_sum / static_cast<double>(classes) : 0;
  return std::log(exp_sum) - (1 - smoothing) * target_logit - uniform;
}

/// The loss of each row of a piece, and its gradient times `scale` unless dlogits is empty.
template <class S>
void cross_entropy_rows(matrix_view<const S> logits, std::span<const token_t> targets, const cross_entropy_options& o, double scale,
                        matrix_view<S> dlogits, std::span<double> losses, const context& ctx) {
  const index_t grain = std::max<index_t>(1, 16384 / std::max<index_t>(1, logits.cols()));
  ctx.exec->run(logits.rows(), grain, [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t) {
      const token_t target = targets[static_cast<std::size_t>(t)];
      S* d = dlogits.data() == nullptr ? nullptr : dlogits.row(t);
      double& loss = losses[static_cast<std::size_t>(t)];
      if (target != o.ignore_index) {
        loss = cross_entropy_row<S>(logits.row(t), logits.cols(), target, o.label_smoothing, scale, d);
      } else {
        loss = 0;
        if (d != nullptr) std::fill_n(d, logits.cols(), S(0));
      }
    }
  });
}

/// What a row's gradient is multiplied with.
inline double loss_scale(reduction r, index_t counted) { return r == reduction::mean && counted > 0 ? 1 / static_cast<double>(counted) : 1; }

inline double ordered_sum(std::span<const double> terms) {
  double sum = 0;
  for (const double t : terms) sum += t;
  return sum;
}

}  // namespace detail

/// Cross entropy of logits x [T x V] with label smoothing e: for each row, with p = softmax(x),
/// loss = -((1 - e) log p[y] + e meanᵥ log p[v]) and d loss / dx = p - (1 - e) [v = y] - e / V, summed or averaged over the rows that
/// count (Szegedy et al., arXiv 1512.00567, section 7).
///
/// dlogits [T x V] is overwritten; an empty view means that no gradient is wanted; it may be the logits themselves, which it then
/// replaces. `row_losses` (T numbers, or none) takes the losses before the reduction. If no row counts, loss and gradient are 0.
/// Sums run in double and in a fixed order. Throws shape_error, index_error for a target that is neither a class nor
/// `ignore_index`, config_error for a smoothing outside of [0, 1].
template <class S>
loss_result cross_entropy(matrix_view<const S> logits, std::span<const token_t> targets, const cross_entropy_options& o, matrix_view<S> dlogits,
                          const context& ctx = {}, std::span<double> row_losses = {}) {
  const index_t counted = detail::count_targets("cross_entropy", targets, logits.rows(), logits.cols(), o);
  if (dlogits.data() != nullptr) require_shape("cross_entropy", "dlogits", dlogits, logits.rows(), logits.cols());
  require<shape_error>(row_losses.empty() || row_losses.size() == targets.size(), "cross_entropy: expected room for ", targets.size(),
                       " row losses, got ", row_losses.size());
  const double scale = detail::loss_scale(o.reduce, counted);
  const scratch<double> own(ctx, row_losses.empty() ? logits.rows() : 0);
  const std::span<double> losses = row_losses.empty() ? own.span() : row_losses;
  detail::cross_entropy_rows<S>(logits, targets, o, scale, dlogits, losses, ctx);
  return {detail::ordered_sum(losses) * scale, counted};
}

namespace detail {

template <class L, class Backward>
loss_result cross_entropy_by_chunks(const L& output, matrix_view<const typename L::scalar> h, std::span<const token_t> targets,
                                    const cross_entropy_options& o, const context& ctx, index_t chunk, bool train, Backward&& backward) {
  using S = typename L::scalar;
  require<config_error>(chunk >= 1, "chunked_cross_entropy: expected chunks of at least 1 row, got ", chunk);
  const index_t classes = output.output_shape(h).cols;
  const index_t counted = count_targets("chunked_cross_entropy", targets, h.rows(), classes, o);
  const double scale = loss_scale(o.reduce, counted);
  chunk = std::min(chunk, h.rows());
  const auto all = static_cast<double>(std::max<index_t>(1, ctx.count_valid(0, h.rows())));
  const scratch<S> room(ctx, chunk, classes);
  const scratch<double> losses(ctx, h.rows());
  record_of<L> record;
  for (index_t first = 0; first < h.rows(); first += chunk) {
    const index_t n = std::min(chunk, h.rows() - first);
    const auto at = static_cast<std::size_t>(first), count = static_cast<std::size_t>(n);
    const context c = ctx.chunk(first, n, static_cast<double>(ctx.count_valid(first, n)) / all);
    const matrix_view<S> logits = room.view().slice_rows(0, n);
    if (train)
      output.forward(h.slice_rows(first, n), logits, record, c);
    else
      output.forward(h.slice_rows(first, n), logits, c);
    cross_entropy_rows<S>(logits, targets.subspan(at, count), o, scale, train ? logits : matrix_view<S>(), losses.span().subspan(at, count), ctx);
    backward(first, n, record, logits, c);
  }
  return {ordered_sum(losses.span()) * scale, counted};
}

}  // namespace detail

/// Cross entropy of output(h) without ever holding all logits: the rows of h [T x D] go through the position-wise layer `output`
/// (D -> V features, a `linear` as a rule), the loss and back in chunks, so that memory is chunk * V numbers instead of T * V. The
/// values are those of forward, `cross_entropy` and backward in turn. dh [T x D] is overwritten, g added to. What the layer
/// draws (dropout) does not depend on the chunks. Throws as `cross_entropy` does, and config_error for chunks below one row.
template <layer L>
loss_result chunked_cross_entropy(const L& output, matrix_view<const typename L::scalar> h, std::span<const token_t> targets,
                                  const cross_entropy_options& o, matrix_view<typename L::scalar> dh, gradient_of<L>& g, const context& ctx = {},
                                  index_t chunk = 256) {
  require_shape("chunked_cross_entropy", "dh", dh, h.rows(), h.cols());
  return detail::cross_entropy_by_chunks<L>(output, h, targets, o, ctx, chunk, true,
                                            [&](index_t first, index_t n, const auto& record, auto dlogits, const context& c) {
                                              output.backward(h.slice_rows(first, n), record, dlogits, dh.slice_rows(first, n), g, c);
                                            });
}
/// The loss alone.
template <layer L>
loss_result chunked_cross_entropy(const L& output, matrix_view<const typename L::scalar> h, std::span<const token_t> targets,
                                  const cross_entropy_options& o, const context& ctx = {}, index_t chunk = 256) {
  return detail::cross_entropy_by_chunks<L>(output, h, targets, o, ctx, chunk, false, [](const auto&...) {});
}

/// Squared error Σ (prediction - target)², summed or averaged over all entries; both [T x D]. dprediction is overwritten with
/// 2 (prediction - target) times 1 or 1 / (T D); an empty view means that no gradient is wanted; it may be the prediction itself.
/// No entries: loss 0. Throws shape_error.
template <class S>
loss_result mean_square(matrix_view<const S> prediction, matrix_view<const S> target, reduction reduce, matrix_view<S> dprediction,
                        const context& ctx = {}) {
  require_shape("mean_square", "target", target, prediction.rows(), prediction.cols());
  if (dprediction.data() != nullptr) require_shape("mean_square", "dprediction", dprediction, prediction.rows(), prediction.cols());
  const double scale = detail::loss_scale(reduce, prediction.size());
  const scratch<double> losses(ctx, prediction.rows());
  const index_t grain = std::max<index_t>(1, 32768 / std::max<index_t>(1, prediction.cols()));
  ctx.exec->run(prediction.rows(), grain, [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t) {
      const S* p = prediction.row(t);
      const S* y = target.row(t);
      losses[t] = detail::accumulate(prediction.cols(), [&](index_t j) {
        const double difference = static_cast<double>(p[j]) - static_cast<double>(y[j]);
        return difference * difference;
      });
      if (dprediction.data() != nullptr) dprediction.map().row(t) = static_cast<S>(2 * scale) * (prediction.map().row(t) - target.map().row(t));
    }
  });
  return {detail::ordered_sum(losses.span()) * scale, prediction.size()};
}

}  // namespace lithe::inline LITHE_ABI
