#include "lithe/training/gradient_check.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/linear.hpp"

namespace gradient_check_tests {

using namespace lithe;

// The checker is itself checked: right layers pass, and every kind of wrong layer fails.

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}

/// What a broken layer does wrong.
enum class fault { none, wrong_input_gradient, wrong_parameter_gradient, dx_added_to, gradient_overwritten, reads_outside, other_inference, nan };

/// y = tanh(x) * scale, with a fault.
template <fault Fault>
struct scaled_tanh {
  using scalar = double;
  struct record {
    matrix<double> tanh;
  };
  struct gradient {
    matrix<double> scale;
  };
  matrix<double> scale;

  shape output_shape(matrix_view<const double> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const double> x, matrix_view<double> y, const context& ctx) const {
    record r;
    forward(x, y, r, ctx);
    if (Fault == fault::other_inference) y(0, 0) += 1e-3;
  }
  void forward(matrix_view<const double> x, matrix_view<double> y, record& r, const context&) const {
    r.tanh = x.map().array().tanh();
    y.map() = r.tanh * scale.row(0).asDiagonal();
    if (Fault == fault::reads_outside) y(0, 0) += *(x.row(0) - 1);
  }
  void backward(matrix_view<const double>, const record& r, matrix_view<const double> dy, matrix_view<double> dx, gradient& g, const context&) const {
    const matrix<double> slope = (1 - r.tanh.array().square()).matrix() * scale.row(0).asDiagonal();
    if (Fault == fault::dx_added_to)
      dx.map().array() += dy.map().array() * slope.array();
    else
      dx.map() = dy.map().cwiseProduct(slope);
    const matrix<double> ds = dy.map().cwiseProduct(r.tanh).colwise().sum();
    if (Fault == fault::gradient_overwritten)
      g.scale = ds;
    else
      g.scale += ds;
    if (Fault == fault::wrong_input_gradient) dx(1, 2) *= 1.01;
    if (Fault == fault::wrong_parameter_gradient) g.scale(0, 1) += 1e-3;
    if (Fault == fault::nan) g.scale(0, 0) = std::numeric_limits<double>::quiet_NaN();
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("scale", s.scale...);
  }
};
template <fault Fault>
gradient_check_report check_tanh() {
  return gradient_check(scaled_tanh<Fault>{random_matrix(1, 5, 2)}, random_matrix(4, 5, 1));
}

TEST(gradient_check, passes_right_layers) {
  const linear<double> l({5, 4}, rng_key{1});
  const auto report = gradient_check(l, random_matrix(7, 5, 2));
  EXPECT_LT(report.worst(), 1e-8) << report.where();  // a linear function: rounding only, 1e-16 / (2 step)
  EXPECT_GT(report.smallest_gradient(), 0.1);
  EXPECT_EQ(report.at("x").checked, 35);
  EXPECT_EQ(report.at("weight").checked, 20);
  EXPECT_EQ(report.at("bias").checked, 4);
  EXPECT_EQ(report.checked(), 2 * 28 + 35 + 20 + 4);
  EXPECT_THROW((void)report.at("weights"), state_error);
  EXPECT_LT(check_tanh<fault::none>().worst(), 1e-7);
}

TEST(gradient_check, finds_every_fault_and_says_where) {
  EXPECT_GT(check_tanh<fault::wrong_input_gradient>().worst(), 1e-3);
  EXPECT_EQ(check_tanh<fault::wrong_input_gradient>().where().substr(0, 7), "x(1, 2)");
  EXPECT_GT(check_tanh<fault::wrong_parameter_gradient>().worst(), 1e-5);
  EXPECT_EQ(check_tanh<fault::wrong_parameter_gradient>().where().substr(0, 11), "scale(0, 1)");
  EXPECT_EQ(check_tanh<fault::dx_added_to>().at("x").worst, std::numeric_limits<double>::infinity());
  EXPECT_GT(check_tanh<fault::gradient_overwritten>().at("scale").worst, 0.4);
  EXPECT_EQ(check_tanh<fault::reads_outside>().worst(), std::numeric_limits<double>::infinity());
  EXPECT_GT(check_tanh<fault::other_inference>().at("y without a record").worst, 1e-5);
  EXPECT_EQ(check_tanh<fault::nan>().where().substr(0, 11), "scale(0, 0)");
}

TEST(gradient_check, samples_large_tensors_and_sees_packed_weights) {
  linear<double> l({40, 30}, rng_key{1});
  l.prepack();
  const auto report = gradient_check(l, random_matrix(9, 40, 2), {}, {.entries = 25});
  EXPECT_EQ(report.at("weight").checked, 25);
  EXPECT_LT(report.worst(), 1e-8) << report.where();
}

/// y_t = x_t + the row of a table that the largest feature of x_t chooses: a choice, a table and a row-sparse gradient.
struct chosen_row {
  using scalar = double;
  struct table {
    using scalar = double;
    matrix<double> values;
    index_t rows() const { return values.rows(); }
    index_t cols() const { return values.cols(); }
    void read_row(index_t i, std::span<double> out) const { std::copy_n(values.row(i).data(), cols(), out.data()); }
    void write_row(index_t i, std::span<const double> in) { std::copy_n(in.data(), cols(), values.row(i).data()); }
  };
  struct record {
    kept<std::vector<slot_t>> chosen;
  };
  struct gradient {
    row_gradient<double> values;
  };
  table values;
  bool ignores_replay = false, forgets_a_row = false;

  shape output_shape(matrix_view<const double> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const double> x, matrix_view<double> y, const context& ctx) const {
    record r;
    forward(x, y, r, ctx);
  }
  void forward(matrix_view<const double> x, matrix_view<double> y, record& r, const context& ctx) const {
    auto& chosen = r.chosen.value;
    if (!ctx.replay || ignores_replay) {
      chosen.resize(static_cast<std::size_t>(x.rows()));
      for (index_t t = 0; t < x.rows(); ++t) {
        index_t best = 0;
        x.map().row(t).maxCoeff(&best);
        chosen[static_cast<std::size_t>(t)] = static_cast<slot_t>(2 * best + 1);
      }
    }
    y.map() = x.map();
    for (index_t t = 0; t < x.rows(); ++t) y.map().row(t) += values.values.row(chosen[static_cast<std::size_t>(t)]);
  }
  void backward(matrix_view<const double>, const record& r, matrix_view<const double> dy, matrix_view<double> dx, gradient& g, const context&) const {
    dx.map() = dy.map();
    matrix<double> all = matrix<double>::Zero(values.rows(), values.cols());
    for (index_t i = 0; i < g.values.count(); ++i) all.row(g.values.rows[static_cast<std::size_t>(i)]) = g.values.values().map().row(i);
    for (std::size_t t = forgets_a_row ? 1 : 0; t < r.chosen.value.size(); ++t) all.row(r.chosen.value[t]) += dy.map().row(static_cast<index_t>(t));
    std::set<slot_t> touched(r.chosen.value.begin() + (forgets_a_row ? 1 : 0), r.chosen.value.end());
    g.values.assign_rows({touched.begin(), touched.end()});
    for (index_t i = 0; i < g.values.count(); ++i) g.values.values().map().row(i) = all.row(g.values.rows[static_cast<std::size_t>(i)]);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("values", s.values...);
  }
};

TEST(gradient_check, covers_tables_and_holds_choices_still) {
  matrix<double> x = matrix<double>::Zero(3, 4);
  x << 1, 0, 0, 0,        //
      0, 1, 1 - 1e-9, 0,  // a step of 1e-5 in either feature would choose another row
      0, 0, 0, 1;
  chosen_row l{{random_matrix(8, 4, 3)}};
  auto report = gradient_check(l, x);
  EXPECT_LT(report.worst(), 1e-8) << report.where();
  EXPECT_GT(report.smallest_gradient(), 0.1);
  EXPECT_GT(report.at("values").checked, 12) << "three touched rows of four, and untouched ones";

  l.ignores_replay = true;
  EXPECT_GT(gradient_check(l, x).at("x").worst, 1.0);
  l.ignores_replay = false;
  l.forgets_a_row = true;  // its gradient is then an untouched row, which must not move the output
  EXPECT_GT(gradient_check(l, x, {}, {.entries = 128}).at("values").worst, 1.0);
}

/// Rows of a matrix chosen by tokens: an input without a gradient.
struct small_embedding {
  using scalar = double;
  using input_type = std::span<const token_t>;
  using input_gradient_type = nothing;
  struct record {};
  struct gradient {
    row_gradient<double> weight;
  };
  matrix<double> weight;

  shape output_shape(input_type x) const { return {static_cast<index_t>(x.size()), weight.cols()}; }
  void forward(input_type x, matrix_view<double> y, const context&) const {
    for (std::size_t t = 0; t < x.size(); ++t) y.map().row(static_cast<index_t>(t)) = weight.row(x[t]);
  }
  void forward(input_type x, matrix_view<double> y, record&, const context& ctx) const { forward(x, y, ctx); }
  void backward(input_type x, const record&, matrix_view<const double> dy, nothing, gradient& g, const context&) const {
    const bool again = g.weight.count() > 0;  // enough for a test: the same tokens come again
    if (!again) g.weight.assign_rows({x.begin(), x.end()});
    for (index_t t = 0; t < dy.rows(); ++t) {
      auto row = g.weight.values().map().row(t);
      if (again)
        row += dy.map().row(t);
      else
        row = dy.map().row(t);
    }
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
  }
};

TEST(gradient_check, covers_tokens_and_matrices_with_row_gradients) {
  const std::vector<token_t> tokens{1, 4, 5};
  const auto report = gradient_check(small_embedding{random_matrix(9, 3, 4)}, tokens);
  EXPECT_LT(report.worst(), 1e-8) << report.where();
  EXPECT_GT(report.at("weight").checked, 9);
  EXPECT_THROW((void)report.at("x"), state_error);
}

/// y_t = x_t W + the mean of the memory rows of t's sequence.
struct mean_of_memory {
  using scalar = double;
  struct record {};
  struct gradient {
    matrix<double> weight;
  };
  matrix<double> weight;
  bool overwrites_dm = false;

  shape output_shape(matrix_view<const double> x) const { return {x.rows(), weight.cols()}; }
  void forward(matrix_view<const double> x, memory_view<double> m, matrix_view<double> y, const context& ctx) const {
    y.map() = x.map() * weight;
    for (index_t s = 0; s < ctx.rows.count(); ++s)
      for (index_t t = ctx.rows.begin(s); t < ctx.rows.end(s, x.rows()); ++t)
        y.map().row(t) += m.x.slice_rows(m.rows.begin(s), m.rows.end(s, m.x.rows()) - m.rows.begin(s)).map().colwise().mean();
  }
  void forward(matrix_view<const double> x, memory_view<double> m, matrix_view<double> y, record&, const context& ctx) const {
    forward(x, m, y, ctx);
  }
  void backward(matrix_view<const double> x, memory_view<double> m, const record&, matrix_view<const double> dy, matrix_view<double> dx,
                matrix_view<double> dm, gradient& g, const context& ctx) const {
    dx.map() = dy.map() * weight.transpose();
    g.weight += x.map().transpose() * dy.map();
    if (overwrites_dm) dm.map().setZero();
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t n = m.rows.end(s, m.x.rows()) - m.rows.begin(s);
      for (index_t t = ctx.rows.begin(s); t < ctx.rows.end(s, x.rows()); ++t)
        dm.slice_rows(m.rows.begin(s), n).map().rowwise() += (dy.map().row(t) / double(n)).eval();
    }
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
  }
};

TEST(gradient_check, covers_a_second_input) {
  const std::vector<index_t> x_rows{0, 3, 5}, memory_rows{0, 2, 6};
  context ctx;
  ctx.rows.offsets = x_rows;
  const matrix<double> x = random_matrix(5, 3, 5), m = random_matrix(6, 4, 6);
  mean_of_memory l{random_matrix(3, 4, 7)};
  const memory_view<double> memory{m, {memory_rows}};
  auto report = gradient_check(l, x, memory, ctx);
  EXPECT_LT(report.worst(), 1e-8) << report.where();
  EXPECT_GT(report.smallest_gradient(), 0.1);
  EXPECT_EQ(report.at("memory").checked, 24);
  l.overwrites_dm = true;
  EXPECT_GT(gradient_check(l, x, memory, ctx).at("memory").worst, 0.4);
}

TEST(gradient_check, options_change_what_is_done) {
  const matrix<double> x = random_matrix(4, 5, 1);
  const scaled_tanh<fault::none> l{random_matrix(1, 5, 2)};
  const double coarse = gradient_check(l, x, {}, {.step = 1e-2}).worst();
  EXPECT_GT(coarse, 100 * gradient_check(l, x).worst());  // the error of a central difference grows with the square of its step
  EXPECT_LT(gradient_check(l, x, {}, {.step = 1e-2, .floor = 1e3}).worst(), coarse / 10);
  EXPECT_NE(gradient_check(l, x, {}, {.key = {1}}).at("x").largest, gradient_check(l, x, {}, {.key = {2}}).at("x").largest);
}

}  // namespace gradient_check_tests
