#pragma once

#include "lithe/layers/halting_distributions.hpp"
#include "lithe/layers/linear.hpp"

namespace lithe::inline LITHE_ABI {

enum class halting_activation { tanh, relu, sigmoid };

struct halting_head_config {
  index_t features = 0, outputs = 1;
  index_t hidden_layers = 0;  ///< each of `features` numbers
  halting_activation kind = halting_activation::tanh;
  double bias = 0;  ///< where the output's bias starts; below 0, stick-breaking exits start deeper
};

/// A predictor of halting signals: z = W_o u_L + b_o with u_i = a(W_i u_{i-1} + b_i), u_0 = x. x [T x features], z [T x outputs]. Without hidden
/// layers it is a linear map (arXiv 1910.10073); with them, the multi-layer predictor of its author's public code (attn2d).
///
/// Weights start Xavier-uniform, biases at 0. Throws config_error, shape_error.
template <std::floating_point S>
struct halting_head {
  using scalar = S;
  struct record {
    std::vector<matrix<S>> hidden;  // after the activation
  };
  struct gradient {
    std::vector<typename linear<S>::gradient> hidden;
    typename linear<S>::gradient output;
  };

  std::vector<linear<S>> hidden;
  linear<S> output;
  halting_activation kind = halting_activation::tanh;

  halting_head() = default;
  /// Throws config_error for sizes below 1 and hidden layers below 0.
  halting_head(halting_head_config c, rng_key key) : output({c.features, c.outputs}, key.child(0)), kind(c.kind) {
    require<config_error>(c.hidden_layers >= 0, "halting_head: expected 0 or more hidden layers, got ", c.hidden_layers);
    start(output, c.bias, key.child(0));
    for (index_t i = 0; i < c.hidden_layers; ++i) {
      const rng_key k = key.child(static_cast<std::uint64_t>(i + 1));
      start(hidden.emplace_back(linear_config{c.features, c.features}, k), 0, k);
    }
  }

  void prepare(gradient& g) const { g.hidden.resize(hidden.size()); }
  shape output_shape(matrix_view<const S> x) const {
    require_features("halting_head", (hidden.empty() ? output : hidden.front()).weight.cols(), x);
    return {x.rows(), output.weight.rows()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> z, const context& ctx) const {
    check_forward("halting_head", *this, x, z, ctx);
    const index_t T = hidden.empty() ? 0 : x.rows();
    const scratch<S> a(ctx, T, x.cols()), b(ctx, hidden.size() > 1 ? T : 0, x.cols());
    matrix_view<const S> u = x;
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      const matrix_view<S> v = i % 2 == 0 ? a.view() : b.view();
      hidden[i].forward(u, v, ctx);
      apply(v);
      u = v;
    }
    output.forward(u, z, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> z, record& r, const context& ctx) const {
    check_forward("halting_head", *this, x, z, ctx);
    r.hidden.resize(hidden.size());
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      r.hidden[i].resize(x.rows(), x.cols());
      hidden[i].forward(input(x, r, i), r.hidden[i], ctx);
      apply(r.hidden[i]);
    }
    output.forward(input(x, r, hidden.size()), z, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dz, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("halting_head", *this, x, dz, dx, g, ctx);
    for (const matrix<S>& u : recorded("halting_head", r.hidden, hidden.size())) recorded("halting_head", u, x.rows(), x.cols());
    const scratch<S> d(ctx, hidden.empty() ? 0 : x.rows(), x.cols());
    output.backward(input(x, r, hidden.size()), {}, dz, dx, g.output, ctx);
    for (std::size_t i = hidden.size(); i-- > 0;) {
      multiply_by_slope(r.hidden[i], dx, d);
      hidden[i].backward(input(x, r, i), {}, d, dx, g.hidden[i], ctx);
    }
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum = output.forward_cost(length);
    for (const auto& l : hidden) sum += l.forward_cost(length);
    return sum;
  }
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    visit_parts(f, {"hidden."}, s.hidden, rest.hidden...);
    f("output", s.output, rest.output...);
  }

 private:
  static void start(linear<S>& l, double bias, rng_key key) {
    fill_uniform<S>(l.weight, std::sqrt(6 / static_cast<double>(l.weight.rows() + l.weight.cols())), key);
    l.bias.setConstant(static_cast<S>(bias));
  }
  static matrix_view<const S> input(matrix_view<const S> x, const record& r, std::size_t i) {
    return i == 0 ? x : matrix_view<const S>(r.hidden[i - 1]);
  }
  void apply(matrix_view<S> u) const {
    for (index_t t = 0; t < u.rows(); ++t) {
      auto row = u.row_array(t);
      switch (kind) {
        case halting_activation::tanh:
          row = row.tanh();
          break;
        case halting_activation::relu:
          row = (row < S(0)).select(S(0), row);
          break;
        case halting_activation::sigmoid:
          row = row.unaryExpr([](S v) { return sigmoid(v); });
          break;
      }
    }
  }
  /// du = dy ⊙ a'(.), written with the activated y: 1 - y², [y > 0], y (1 - y).
  void multiply_by_slope(const matrix<S>& y, matrix_view<const S> dy, matrix_view<S> du) const {
    for (index_t t = 0; t < y.rows(); ++t) {
      const auto u = y.row(t).array();
      const auto d = dy.row_array(t);
      auto out = du.row_array(t);
      switch (kind) {
        case halting_activation::tanh:
          out = d * (S(1) - u.square());
          break;
        case halting_activation::relu:
          out = (u > S(0)).select(d, S(0));
          break;
        case halting_activation::sigmoid:
          out = d * u * (S(1) - u);
          break;
      }
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
