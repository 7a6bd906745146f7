#pragma once

#include <limits>
#include <utility>

#include "lithe/layers/initialise.hpp"
#include "lithe/training/parameter_rows.hpp"

namespace lithe::inline LITHE_ABI {

struct gradient_check_options {
  double step = 1e-5;    ///< h of the central difference
  double floor = 1e-3;   ///< an error is divided by max(|gradient|, floor)
  index_t entries = 60;  ///< numbers checked in each tensor
  rng_key key{0x6c69};   ///< draws the upstream gradient and the numbers to check
};

/// What a gradient check found, tensor by tensor.
struct gradient_check_report {
  /// The numbers of one tensor.
  struct tensor {
    std::string name;          ///< "x", "memory", a parameter's name, or "y without a record", "y replayed"
    double worst = 0;          ///< largest relative error; infinite where a number was not finite
    double largest = 0;        ///< largest |gradient| of the numbers checked: near zero, the check says nothing
    index_t row = 0, col = 0;  ///< where the largest error is
    index_t checked = 0;

    /// Takes in one number: what the layer says and what it should be.
    void compare(index_t i, index_t j, double got, double expected, double floor) {
      const double error = std::abs(got - expected) / std::max(std::abs(got), floor);
      ++checked;
      largest = std::max(largest, std::abs(got));
      if (error <= worst) return;
      worst = std::isfinite(error) ? error : std::numeric_limits<double>::infinity();  // NaN comes here too
      row = i;
      col = j;
    }
  };
  std::vector<tensor> tensors;

  /// The tensor with the largest error.
  [[nodiscard]] const tensor& worst_tensor() const {
    return *std::max_element(tensors.begin(), tensors.end(), [](const tensor& a, const tensor& b) { return a.worst < b.worst; });
  }
  [[nodiscard]] double worst() const { return worst_tensor().worst; }  ///< the largest relative error of all tensors
  /// The worst number as text: "weight(3, 1): relative error 0.5".
  [[nodiscard]] std::string where() const {
    const tensor& t = worst_tensor();
    return concat(t.name, "(", t.row, ", ", t.col, "): relative error ", t.worst);
  }
  /// The smallest of the tensors' largest gradients: a test asserts that it is not near zero.
  [[nodiscard]] double smallest_gradient() const {
    double least = std::numeric_limits<double>::infinity();
    for (const tensor& t : tensors) least = std::min(least, t.largest);
    return least;
  }
  /// How many numbers were checked, of all tensors.
  [[nodiscard]] index_t checked() const {
    index_t n = 0;
    for (const tensor& t : tensors) n += t.checked;
    return n;
  }
  /// The report of one tensor; throws state_error if it was not checked.
  [[nodiscard]] const tensor& at(const std::string& name) const {
    for (const tensor& t : tensors)
      if (t.name == name) return t;
    throw state_error("gradient_check: no tensor " + name + " was checked");
  }
};

namespace detail {

/// A matrix whose rows are neither contiguous nor aligned, NaN in it and around it: whatever a layer reads outside of its view, or
/// adds to instead of overwriting it, shows.
class hostile_matrix {
 public:
  hostile_matrix(index_t rows, index_t cols) : all_(rows, cols + 4) { all_.setConstant(std::numeric_limits<double>::quiet_NaN()); }
  explicit hostile_matrix(matrix_view<const double> m) : hostile_matrix(m.rows(), m.cols()) { view().map() = m.map(); }
  [[nodiscard]] matrix_view<double> view() { return matrix_view<double>(all_).slice_cols(1, all_.cols() - 4); }

 private:
  matrix<double> all_;
};

/// An input and its gradient: matrices of the checker's own, or what else the layer takes (tokens), passed on as it is.
template <class X, class Dx>
struct checked_input {
  X x;
  explicit checked_input(X given) : x(given) {}
  [[nodiscard]] X view() const { return x; }
  [[nodiscard]] Dx gradient() const { return {}; }
};
template <>
struct checked_input<matrix_view<const double>, matrix_view<double>> {
  hostile_matrix x, dx;
  explicit checked_input(matrix_view<const double> given) : x(given), dx(given.rows(), given.cols()) {}
  [[nodiscard]] matrix_view<double> view() { return x.view(); }
  [[nodiscard]] matrix_view<double> gradient() { return dx.view(); }
};

/// f(i) for `count` of the numbers 0 .. n-1, one in each of `count` equal stretches; for all if there are no more.
template <class F>
void for_samples(index_t n, index_t count, rng_key key, F&& f) {
  count = std::min(n, count);
  for (index_t s = 0; s < count; ++s) {
    const index_t first = s * n / count, last = (s + 1) * n / count;
    f(first + static_cast<index_t>(uniform(key, static_cast<std::uint64_t>(s)) * static_cast<double>(last - first)));
  }
}

template <class L, class Memory>
gradient_check_report check_gradients(L l, input_of<L> x_given, Memory memory_given, const context& ctx, const gradient_check_options& o) {
  static_assert(std::same_as<typename L::scalar, double>, "lithe: gradients are checked in double; float's rounding would hide errors.");
  constexpr bool conditioned = !std::same_as<Memory, nothing>;
  constexpr bool matrix_input = std::same_as<input_gradient_of<L>, matrix_view<double>>;
  using memory_matrix = std::conditional_t<conditioned, matrix_view<const double>, nothing>;

  checked_input<input_of<L>, input_gradient_of<L>> x(x_given);
  checked_input<memory_matrix, std::conditional_t<conditioned, matrix_view<double>, nothing>> memory([&] {
    if constexpr (conditioned)
      return memory_given.x;
    else
      return memory_given;
  }());
  const auto forward = [&](matrix_view<double> y, const context& c, auto&... record) {
    if constexpr (conditioned)
      l.forward(x.view(), memory_view<double>{memory.view(), memory_given.rows}, y, record..., c);
    else
      l.forward(x.view(), y, record..., c);
  };

  require<config_error>(o.step > 0 && o.floor > 0 && o.entries >= 1,
                        "gradient_check: expected a step and a floor above 0 and at least 1 entry, got ", o.step, ", ",
                        o.floor, " and ", o.entries);
  const shape out = l.output_shape(x.view());
  hostile_matrix y(out.rows, out.cols), other(out.rows, out.cols), dy(out.rows, out.cols);
  fill_normal<double>(dy.view(), 1.0, o.key.child(0));
  record_of<L> record;
  forward(y.view(), ctx, record);

  // Backward runs twice: dx is overwritten, all other gradients are sums, so twice the gradient must come out.
  gradient_of<L> g = make_gradient(l);
  if constexpr (conditioned) memory.gradient().map().setZero();
  for (int time = 0; time < 2; ++time) {
    if constexpr (conditioned)
      l.backward(x.view(), memory_view<double>{memory.view(), memory_given.rows}, std::as_const(record), dy.view(), x.gradient(), memory.gradient(),
                 g, ctx);
    else
      l.backward(x.view(), std::as_const(record), dy.view(), x.gradient(), g, ctx);
  }

  forget(record);
  context replay = ctx;
  replay.replay = true;
  const auto forward_again = [&](matrix_view<double> into) {
    record_of<L> r = record;
    forward(into, replay, r);
    return ctx.auxiliary * auxiliary_loss(r);
  };

  gradient_check_report report;
  const auto start = [&](const std::string& name) -> auto& { return report.tensors.emplace_back(gradient_check_report::tensor{name}); };
  const auto compare_output = [&](auto& tensor) {
    for (index_t i = 0; i < out.rows; ++i)
      for (index_t j = 0; j < out.cols; ++j) tensor.compare(i, j, other.view()(i, j), y.view()(i, j), o.floor);
  };
  forward(other.view(), ctx);
  compare_output(start("y without a record"));
  forward_again(other.view());
  compare_output(start("y replayed"));

  // <dy, y(v + h) - y(v - h)> / 2h; the outputs are subtracted first, so that their own size costs no digits.
  const auto difference = [&](double v, auto&& set) {
    const volatile double up = v + o.step, down = v - o.step;
    set(up);
    const double loss_up = forward_again(y.view());
    set(down);
    const double loss_down = forward_again(other.view());
    set(v);
    return ((y.view().map() - other.view().map()).cwiseProduct(dy.view().map()).sum() + loss_up - loss_down) / (up - down);
  };
  const auto check_matrix = [&](auto& tensor, matrix_view<double> m, matrix_view<const double> gradient, double times) {
    for_samples(m.size(), o.entries, o.key.child(report.tensors.size()), [&](index_t at) {
      const index_t i = at / m.cols(), j = at % m.cols();
      const double numeric = difference(m(i, j), [&](double v) {
        m(i, j) = v;
        refresh(l);  // packed copies follow
      });
      tensor.compare(i, j, gradient(i, j) / times, numeric, o.floor);
    });
  };
  const auto check_rows = [&](auto& tensor, auto& table, const row_gradient<double>& gradient) {
    std::vector<double> buffer(static_cast<std::size_t>(table.cols()));
    const auto in_place = rows_in_place<double>(table);
    const auto check = [&](index_t i, index_t j) {
      double number = 0;
      change_row<double>(table, in_place, i, buffer, [&](const double* row) { number = row[j]; });
      const double numeric = difference(number, [&](double v) {
        change_row<double>(table, in_place, i, buffer, [&](double* row) { row[j] = v; });
        refresh(l);
      });
      tensor.compare(i, j, gradient(i, j) / 2, numeric, o.floor);
    };
    const rng_key key = o.key.child(report.tensors.size());
    for_samples(gradient.count() * table.cols(), o.entries, key.child(0),
                [&](index_t at) { check(gradient.rows[static_cast<std::size_t>(at / table.cols())], at % table.cols()); });
    for_samples(table.rows() * table.cols(), o.entries / 4, key.child(1), [&](index_t at) {
      if (gradient.find(static_cast<slot_t>(at / table.cols())) < 0) check(at / table.cols(), at % table.cols());
    });
  };

  if constexpr (matrix_input) check_matrix(start("x"), x.view(), x.gradient(), 1);
  if constexpr (conditioned) check_matrix(start("memory"), memory.view(), memory.gradient(), 2);
  for_each_parameter(
      [&](const std::string& name, auto& p, auto& q) {
        if constexpr (sparse_gradient<decltype(q)>)
          check_rows(start(name), p, rows_of(q));
        else
          check_matrix(start(name), p, q, 2);
      },
      l, g);
  return report;
}

}  // namespace detail

/// Compares the backward pass of a layer with central differences, <dy, f(v + h) - f(v - h)> / 2h for a random dy, over x and every
/// parameter. What a test should assert:
///
///     const auto report = gradient_check(my_layer, x);
///     EXPECT_LT(report.worst(), 1e-5) << report.where();
///     EXPECT_GT(report.smallest_gradient(), 1e-3);          // zero would equal zero
///
/// It also holds a layer to the concept: the three forwards agree, dx is overwritten, gradients are added to (backward runs twice),
/// and all views are strided and stand between NaNs. Of large tensors `entries` numbers are checked, the same in every run; of
/// row-sparse gradients those many in touched rows, and some in untouched rows, whose difference must be zero.
///
/// Choices (slots, buckets, routes) are held still: every forward but the first runs with `replay` on the record that `forget`
/// left, so the derivative is that of the function with these choices, and no step can change them. A layer with kinks of other
/// kinds (ReLU) can fail by chance when a number lies within h of one.
///
/// The layer is copied; a table that copies share is moved in place and put back. Throws what the layer throws.
template <layer L>
[[nodiscard]] gradient_check_report gradient_check(const L& l, input_of<L> x, const context& ctx = {}, const gradient_check_options& o = {}) {
  return detail::check_gradients<L>(l, x, nothing{}, ctx, o);
}
/// The same for a layer with a second input, whose gradient is reported as "memory".
template <conditioned_layer L>
[[nodiscard]] gradient_check_report gradient_check(const L& l, input_of<L> x, memory_view<double> memory, const context& ctx = {},
                                                   const gradient_check_options& o = {}) {
  return detail::check_gradients<L>(l, x, memory, ctx, o);
}

}  // namespace lithe::inline LITHE_ABI
