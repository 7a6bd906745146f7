#pragma once

#include "lithe/kernels/norm.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// What layer_norm and rms_norm share: a norm of each row with a learned scale, and a shift if it is centred.
template <std::floating_point S, bool Centred>
struct row_norm {
  using scalar = S;
  struct record {
    matrix<S> statistics;  // [T x 2]: mean, inverse deviation
  };
  struct gradient {
    matrix<S> weight, bias;
  };
  static constexpr const char* name = Centred ? "layer_norm" : "rms_norm";

  matrix<S> weight, bias;
  S epsilon = S(1e-5);

  row_norm() = default;
  explicit row_norm(index_t features, S epsilon_ = S(1e-5)) : epsilon(epsilon_) {
    require<config_error>(features >= 1, name, ": expected at least 1 feature, got ", features);
    require<config_error>(epsilon > S(0) && std::isfinite(epsilon), name, ": expected an epsilon above 0, got ",
                          epsilon);
    weight.setOnes(1, features);
    bias.setZero(Centred ? 1 : 0, features);
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features(name, weight.cols(), x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(name, *this, x, y, ctx);
    const scratch<S> statistics(ctx, x.rows(), 2);
    normalise_rows<S>(x, weight, bias, epsilon, Centred, y, statistics, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(name, *this, x, y, ctx);
    r.statistics.resize(x.rows(), 2);
    normalise_rows<S>(shown<S>(x, ctx), weight, bias, epsilon, Centred, y, r.statistics, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(name, *this, x, dy, dx, g, ctx);
    const auto statistics = recorded(name, r.statistics, x.rows(), 2);
    normalise_rows_backward<S>(shown<S>(x, ctx), weight, Centred, statistics, shown<S>(dy, ctx), dx, g.weight, g.bias, ctx);
  }
  [[nodiscard]] cost forward_cost(index_t) const {
    const double n = static_cast<double>(weight.size() + bias.size());
    return {n, 8.0 * static_cast<double>(weight.size()), n * sizeof(S)};
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
  }
};

}  // namespace detail

/// Layer norm over the features of each token: y = (x - mean) / √(variance + ε) ⊙ weight + bias, biased variance, x and y [T x D]
/// (arXiv 1607.06450). ε is 1e-5 unless given. Throws shape_error for x of another width.
template <std::floating_point S>
struct layer_norm : detail::row_norm<S, true> {
  using detail::row_norm<S, true>::row_norm;
};

/// Root-mean-square norm of each token: y = x / √(mean square + ε) ⊙ weight, x and y [T x D] (arXiv 1910.07467).
template <std::floating_point S>
struct rms_norm : detail::row_norm<S, false> {
  using detail::row_norm<S, false>::row_norm;
};

/// Batch norm over tokens, per feature (arXiv 1502.03167): y = (x - mean) / √(variance + ε) ⊙ weight + bias, x and y [T x D].
///
/// Under ctx.train mean and biased variance are those of the rows that ctx.mask leaves, and at least 2 of them are needed; else they are
/// the running ones. Running statistics are state: backward gathers each batch's mean and unbiased variance in the gradient and
/// `after_step` moves them by `momentum` towards the average over the gathered batches. Throws shape_error.
template <std::floating_point S>
struct batch_norm {
  using scalar = S;
  struct record {
    matrix<S> statistics;  // [2 x D]: mean, inverse deviation
    index_t counted = 0;   // rows in them; 0 = running statistics
    index_t rows = 0;      // of the call
  };
  struct gradient {
    matrix<S> weight, bias, running_mean, running_var;
    index_t batches = 0;
    /// Counts the gathered batches from 0 again.
    void reset() { batches = 0; }
  };

  matrix<S> weight, bias, running_mean, running_var;
  S epsilon = S(1e-5), momentum = S(0.1);

  batch_norm() = default;
  /// Weight and running variance start at 1, bias and running mean at 0. Throws config_error without a feature.
  explicit batch_norm(index_t features) {
    require<config_error>(features >= 1, "batch_norm: expected at least 1 feature, got ", features);
    for (matrix<S>* m : {&weight, &running_var}) m->setOnes(1, features);
    for (matrix<S>* m : {&bias, &running_mean}) m->setZero(1, features);
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("batch_norm", weight.cols(), x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    const scratch<S> statistics(ctx, 2, weight.cols());
    run(x, y, statistics, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    r.statistics.resize(2, weight.cols());
    r.counted = run(x, y, r.statistics, ctx);
    r.rows = x.rows();
  }
  /// Training: dx = weight ρ (dy - mean(dy) - ẑ mean(dy ⊙ ẑ)) over the counted rows; evaluation: dx = weight ρ dy. Masked rows get 0.
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("batch_norm", *this, x, dy, dx, g, ctx);
    recorded("batch_norm", r.statistics, 2, weight.cols());
    require<state_error>(r.rows == x.rows(), "batch_norm: the record is of another call: expected ", x.rows(), " rows, got ", r.rows);
    const scratch<S> sums(ctx, 2, weight.cols());  // Σ dy ⊙ ẑ, Σ dy
    const auto along = sums.view().row_array(0), sum = sums.view().row_array(1);
    const auto mean = r.statistics.row(0).array(), inverse = r.statistics.row(1).array();
    detail::sum_over_rows<S>(x.rows(), sums, ctx, [&](index_t first, index_t last, matrix_view<S> piece) {
      for (index_t t = first; t < last; ++t)
        if (ctx.valid(t)) {
          piece.row_array(0) += dy.row_array(t) * (x.row_array(t) - mean) * inverse;
          piece.row_array(1) += dy.row_array(t);
        }
    });
    const S share = r.counted == 0 ? S(0) : S(1) / static_cast<S>(r.counted);
    ctx.exec->run(x.rows(), detail::norm_rows, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        if (ctx.valid(t))
          dx.row_array(t) = weight.row(0).array() * inverse * (dy.row_array(t) - share * (sum + (x.row_array(t) - mean) * inverse * along));
        else
          dx.row_array(t).setZero();
    });
    g.weight.row(0).array() += along;
    g.bias.row(0).array() += sum;
    if (r.counted == 0) return;
    g.running_mean.row(0).array() += mean;
    g.running_var.row(0).array() += (inverse.square().inverse() - epsilon) * (static_cast<S>(r.counted) / static_cast<S>(r.counted - 1));
    ++g.batches;
  }
  void after_step(const gradient& g) {
    if (g.batches == 0) return;
    running_mean += momentum * (g.running_mean / static_cast<S>(g.batches) - running_mean);
    running_var += momentum * (g.running_var / static_cast<S>(g.batches) - running_var);
  }
  [[nodiscard]] cost forward_cost(index_t) const {
    const double n = static_cast<double>(weight.size());
    return {2 * n, 2 * n, 4 * n * sizeof(S)};
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
    f(field("running_mean", role::state), s.running_mean...);
    f(field("running_var", role::state), s.running_var...);
  }

 private:
  index_t run(matrix_view<const S> x, matrix_view<S> y, matrix_view<S> statistics, const context& ctx) const {
    check_forward("batch_norm", *this, x, y, ctx);
    index_t counted = 0;
    for (index_t t = 0; ctx.train && t < x.rows(); ++t) counted += ctx.valid(t);
    if (x.rows() == 0) return 0;
    require<shape_error>(!ctx.train || counted >= 2, "batch_norm: expected at least 2 rows that are no padding in training, got ", counted);
    auto mean = statistics.row_array(0), inverse = statistics.row_array(1);
    if (ctx.train) {
      const auto average = [&](matrix_view<S> total, const auto& term) {
        detail::sum_over_rows<S>(x.rows(), total, ctx, [&](index_t first, index_t last, matrix_view<S> piece) {
          for (index_t t = first; t < last; ++t)
            if (ctx.valid(t)) piece.row_array(0) += term(x.row_array(t));
        });
        total.row_array(0) /= static_cast<S>(counted);
      };
      average(statistics.slice_rows(0, 1), [](const auto& row) { return row; });
      average(statistics.slice_rows(1, 1), [&](const auto& row) { return (row - mean).square(); });
      inverse = (inverse + epsilon).rsqrt();
    } else {
      mean = running_mean.row(0).array();
      inverse = (running_var.row(0).array() + epsilon).rsqrt();
    }
    ctx.exec->run(x.rows(), detail::norm_rows, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) y.row_array(t) = (x.row_array(t) - mean) * inverse * weight.row(0).array() + bias.row(0).array();
    });
    return counted;
  }
};

}  // namespace lithe::inline LITHE_ABI
