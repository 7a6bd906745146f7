#include "lithe/training/losses.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/io/safetensors.hpp"
#include "lithe/layers/linear.hpp"

namespace losses_tests {

using namespace lithe;

template <class S>
matrix<S> random_matrix(index_t rows, index_t cols, std::uint64_t seed, double deviation = 1) {
  matrix<S> m(rows, cols);
  fill_normal<S>(m, deviation, rng_key{seed});
  return m;
}
std::vector<token_t> random_targets(index_t rows, index_t classes, std::uint64_t seed) {
  std::vector<token_t> t(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < t.size(); ++i) t[i] = static_cast<token_t>(uniform(rng_key{seed}, i) * static_cast<double>(classes));
  return t;
}
template <class S>
constexpr matrix_view<S> no_gradient{};

/// The definition, one number at a time, in long double.
struct reference {
  double loss = 0;
  index_t counted = 0;
  matrix<double> gradient;
  std::vector<double> rows;

  template <class S>
  reference(const matrix<S>& x, const std::vector<token_t>& targets, const cross_entropy_options& o)
      : gradient(matrix<double>::Zero(x.rows(), x.cols())) {
    for (const token_t y : targets) counted += y != o.ignore_index;
    const double scale = o.reduce == reduction::mean && counted > 0 ? 1.0 / double(counted) : 1.0;
    for (index_t t = 0; t < x.rows(); ++t) {
      const token_t y = targets[std::size_t(t)];
      rows.push_back(0);
      if (y == o.ignore_index) continue;
      long double largest = x(t, 0), sum = 0, row = 0;
      for (index_t v = 0; v < x.cols(); ++v) largest = std::max<long double>(largest, x(t, v));
      for (index_t v = 0; v < x.cols(); ++v) sum += std::exp(x(t, v) - largest);
      for (index_t v = 0; v < x.cols(); ++v) {
        const long double log_p = x(t, v) - largest - std::log(sum);
        const double q = o.label_smoothing / double(x.cols()) + (v == y ? 1 - o.label_smoothing : 0);
        if (q != 0) row -= q * log_p;
        gradient(t, v) = scale * (double(std::exp(log_p)) - q);
      }
      rows.back() = double(row);
      loss += scale * double(row);
    }
  }
};

template <class S>
class cross_entropy_of : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(cross_entropy_of, scalars);

TYPED_TEST(cross_entropy_of, agrees_with_the_definition) {
  using S = TypeParam;
  const double tolerance = std::is_same_v<S, float> ? 2e-6 : 1e-13;  // rounding of exp and of the sums inside a block
  for (const index_t classes : {1, 2, 7, 64, 511, 512, 1300})
    for (const double smoothing : {0.0, 0.1, 1.0})
      for (const reduction r : {reduction::mean, reduction::sum}) {
        const matrix<S> x = random_matrix<S>(9, classes, 1, 3);
        auto targets = random_targets(9, classes, 2);
        targets[2] = targets[5] = -7;
        const cross_entropy_options o{smoothing, -7, r};
        const reference expected(x, targets, o);
        matrix<S> wide = matrix<S>::Constant(9, classes + 3, S(5));  // dlogits as columns of a wider matrix
        std::vector<double> rows(9);
        const loss_result got = cross_entropy<S>(x, targets, o, view(wide).slice_cols(1, classes), {}, rows);
        EXPECT_EQ(got.counted, 7);
        EXPECT_NEAR(got.loss, expected.loss, tolerance * (1 + std::abs(expected.loss)));
        EXPECT_LT((wide.middleCols(1, classes).template cast<double>() - expected.gradient).cwiseAbs().maxCoeff(), tolerance);
        EXPECT_TRUE((wide.leftCols(1).array() == S(5)).all() && (wide.rightCols(2).array() == S(5)).all());
        for (std::size_t t = 0; t < 9; ++t) EXPECT_NEAR(rows[t], expected.rows[t], tolerance * (1 + std::abs(expected.rows[t])));
        EXPECT_EQ(cross_entropy<S>(x, targets, o, no_gradient<S>).loss, got.loss);
      }
}

TYPED_TEST(cross_entropy_of, gradient_may_replace_the_logits) {
  using S = TypeParam;
  matrix<S> x = random_matrix<S>(6, 700, 3), d(6, 700);
  const auto targets = random_targets(6, 700, 4);
  const double loss = cross_entropy<S>(x, targets, {.label_smoothing = 0.2}, d).loss;
  EXPECT_EQ(cross_entropy<S>(x, targets, {.label_smoothing = 0.2}, x).loss, loss);
  EXPECT_EQ(x, d);
}

TYPED_TEST(cross_entropy_of, large_and_infinite_logits_are_stable) {
  using S = TypeParam;
  matrix<S> x(2, 3), d(2, 3);
  x << 10000, 9000, -10000, 1, -std::numeric_limits<S>::infinity(), 1;
  const std::vector<token_t> targets{1, 0};
  std::vector<double> rows(2);
  (void)cross_entropy<S>(x, targets, {.reduce = reduction::sum}, d, {}, rows);
  EXPECT_EQ(rows[0], 1000);
  EXPECT_NEAR(rows[1], std::log(2.0), 1e-7);
  matrix<S> expected(2, 3);
  expected << 1, -1, 0, S(-0.5), 0, S(0.5);
  EXPECT_EQ(d, expected);
}

TYPED_TEST(cross_entropy_of, nan_stays_in_its_row) {
  using S = TypeParam;
  matrix<S> x = random_matrix<S>(3, 5, 1), d(3, 5);
  x(1, 2) = std::numeric_limits<S>::quiet_NaN();
  std::vector<double> rows(3);
  const std::vector<token_t> targets{0, 1, 2}, without{0, -100, 2};
  EXPECT_TRUE(std::isnan(cross_entropy<S>(x, targets, {}, d, {}, rows).loss));
  EXPECT_TRUE(std::isnan(rows[1]) && d.row(1).array().isNaN().all());
  EXPECT_TRUE(std::isfinite(rows[0] + rows[2]) && d.row(0).allFinite() && d.row(2).allFinite());
  EXPECT_TRUE(std::isfinite(cross_entropy<S>(x, without, {}, d).loss)) << "an ignored row is not read";
  EXPECT_TRUE((d.row(1).array() == 0).all());
}

TYPED_TEST(cross_entropy_of, all_ignored_or_no_rows_is_zero) {
  using S = TypeParam;
  const matrix<S> x = random_matrix<S>(3, 5, 1);
  matrix<S> d = matrix<S>::Ones(3, 5), none(0, 5);
  const std::vector<token_t> ignored(3, -100);
  const loss_result r = cross_entropy<S>(x, ignored, {}, d);
  EXPECT_EQ(r.loss, 0);
  EXPECT_EQ(r.counted, 0);
  EXPECT_TRUE(d.isZero(0));
  EXPECT_EQ(cross_entropy<S>(none, {}, {}, none).loss, 0);
}

TYPED_TEST(cross_entropy_of, chunks_change_no_value) {
  using S = TypeParam;
  // The rows of a product may round otherwise when they are multiplied in other company.
  const double tolerance = std::is_same_v<S, float> ? 1e-5 : 1e-12;
  for (const bool bias : {true, false}) {
    linear<S> output({16, 70, bias}, rng_key{1});
    const matrix<S> h = random_matrix<S>(53, 16, 2);
    auto targets = random_targets(53, 70, 3);
    targets[4] = targets[51] = -100;
    const cross_entropy_options o{.label_smoothing = 0.1};
    matrix<S> logits(53, 70), dh(53, 16);
    output.forward(h, logits, {});
    const loss_result whole = cross_entropy<S>(logits, targets, o, logits);
    typename linear<S>::gradient g{matrix<S>::Ones(70, 16), matrix<S>::Ones(bias ? 1 : 0, 70)};  // gradients are added to
    auto expected = g;
    output.backward(h, {}, logits, dh, expected, {});
    for (const index_t chunk : {1, 7, 53, 1000}) {
      auto got = g;
      matrix<S> got_dh = matrix<S>::Constant(53, 16, std::numeric_limits<S>::quiet_NaN());
      const loss_result r = chunked_cross_entropy(output, h, targets, o, got_dh, got, {}, chunk);
      EXPECT_EQ(r.counted, 51);
      EXPECT_NEAR(r.loss, whole.loss, tolerance);
      EXPECT_LT((got_dh - dh).cwiseAbs().maxCoeff(), tolerance);
      EXPECT_LT((got.weight - expected.weight).cwiseAbs().maxCoeff(), tolerance);
      EXPECT_LT(bias ? (got.bias - expected.bias).cwiseAbs().maxCoeff() : 0, tolerance);
      EXPECT_NEAR(chunked_cross_entropy(output, h, targets, o, {}, chunk).loss, whole.loss, tolerance);
    }
  }
}

TYPED_TEST(cross_entropy_of, chunks_hold_memory_of_a_chunk) {
  using S = TypeParam;
  const linear<S> output({4, 1000}, rng_key{1});
  const matrix<S> h = random_matrix<S>(4096, 4, 2);
  workspace work;
  context ctx;
  ctx.work = &work;
  (void)chunked_cross_entropy(output, h, random_targets(4096, 1000, 3), {}, ctx, 64);
  EXPECT_LT(work.bytes(), sizeof(S) * 4096 * 1000 / 8);
}

TYPED_TEST(cross_entropy_of, same_bits_with_any_number_of_workers) {
  using S = TypeParam;
  const matrix<S> x = random_matrix<S>(301, 257, 1), target = random_matrix<S>(301, 257, 2);
  const auto targets = random_targets(301, 257, 3);
  const linear<S> output({257, 90}, rng_key{1});
  struct outcome {
    double cross_entropy, square, chunked;
    matrix<S> d, e, dh;
    bool operator==(const outcome&) const = default;
  };
  const auto run = [&](const executor& exec) {
    workspace work(exec);
    context ctx;
    ctx.exec = &exec;
    ctx.work = &work;
    matrix<S> d(301, 257), e(301, 257), dh(301, 257);
    auto g = typename linear<S>::gradient{matrix<S>::Zero(90, 257), matrix<S>::Zero(1, 90)};
    outcome o{cross_entropy<S>(x, targets, {}, d, ctx).loss, mean_square<S>(x, target, reduction::mean, e, ctx).loss, 0, d, e, dh};
    o.chunked = chunked_cross_entropy(output, x, random_targets(301, 90, 4), {}, o.dh, g, ctx, 100).loss;
    return o;
  };
  const outcome serial = run(serial_executor);
  for (const index_t workers : {1, 2, 7}) EXPECT_TRUE(run(parallel_executor(workers)) == serial) << workers;
}

TEST(losses, long_float_sums_stay_close_to_double) {
  // 64K rows and 64K classes; one rounding of the largest term would be 6e-8.
  const matrix<float> tall = random_matrix<float>(65536, 3, 1), broad = random_matrix<float>(2, 65536, 2);
  const matrix<double> tall_double = tall.cast<double>(), broad_double = broad.cast<double>();
  const auto a = random_targets(65536, 3, 3), b = random_targets(2, 65536, 4);
  for (const double e : {0.0, 0.1}) {
    EXPECT_NEAR(cross_entropy<float>(tall, a, {e}, no_gradient<float>).loss, cross_entropy<double>(tall_double, a, {e}, no_gradient<double>).loss,
                1e-7);
    EXPECT_NEAR(cross_entropy<float>(broad, b, {e}, no_gradient<float>).loss, cross_entropy<double>(broad_double, b, {e}, no_gradient<double>).loss,
                1e-6);
  }
}

TEST(losses, mean_square) {
  matrix<double> p(2, 2), t(2, 2), d(2, 2), expected(2, 2);
  p << 1, 2, 3, 4;
  t << 1, 0, 0, 5;
  EXPECT_EQ(mean_square<double>(p, t, reduction::sum, d).loss, 14);
  expected << 0, 4, 6, -2;
  EXPECT_EQ(d, expected);
  const loss_result mean = mean_square<double>(p, t, reduction::mean, d);
  EXPECT_EQ(mean.loss, 3.5);
  EXPECT_EQ(mean.counted, 4);
  EXPECT_EQ(d, matrix<double>(expected / 4));
  EXPECT_EQ(mean_square<double>(p, t, reduction::mean, p).loss, 3.5) << "the gradient may replace the prediction";
  EXPECT_EQ(p, d);
  const matrix<double> none(0, 2);
  EXPECT_EQ(mean_square<double>(none, none, reduction::mean, no_gradient<double>).loss, 0);
  EXPECT_THROW(mean_square<double>(p, none, reduction::mean, d), shape_error);
  EXPECT_THROW(mean_square<double>(p, t, reduction::mean, matrix<double>(2, 3)), shape_error);
}

TEST(losses, errors_name_row_and_value) {
  const matrix<double> x = matrix<double>::Zero(3, 4);
  matrix<double> d(3, 4);
  const std::vector<token_t> good{0, 1, 2}, high{0, 4, 2}, negative{0, 1, -5}, few{0, 1};
  const auto message = [&](const std::vector<token_t>& targets) -> std::string {
    try {
      (void)cross_entropy<double>(x, targets, {}, d);
    } catch (const std::out_of_range& e) {
      return e.what();
    }
    return "nothing thrown";
  };
  EXPECT_EQ(message(high), "cross_entropy: target of row 1 must lie in [0, 4), got 4");
  EXPECT_EQ(message(negative), "cross_entropy: target of row 2 must lie in [0, 4), got -5");
  EXPECT_THROW(cross_entropy<double>(x, few, {}, d), shape_error);
  EXPECT_THROW(cross_entropy<double>(x, good, {}, matrix<double>(3, 5)), shape_error);
  std::vector<double> rows(2);
  EXPECT_THROW(cross_entropy<double>(x, good, {}, d, {}, rows), shape_error);
  for (const double e : {-0.1, 1.1, std::nan("")}) EXPECT_THROW(cross_entropy<double>(x, good, {.label_smoothing = e}, d), config_error);
  linear<double> output({4, 6}, rng_key{});
  EXPECT_THROW(chunked_cross_entropy(output, x, good, {}, {}, 0), config_error);
  EXPECT_THROW(chunked_cross_entropy(output, x, std::vector<token_t>{1, 2, 6}, {}), index_error);
}

TEST(losses, golden_files) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(__FILE__).parent_path() / "../../golden")) {
    if (entry.path().filename().string().rfind("loss_", 0) != 0) continue;
    ++files;
    SCOPED_TRACE(entry.path());
    const safetensors_file file(entry.path());
    const auto config = nlohmann::json::parse(file.metadata().at("config"));
    const auto load = [&](const std::string& name) {
      const auto numbers = file.read<double>(name);
      const auto& s = file.info(name).shape;
      return matrix<double>(Eigen::Map<const matrix<double>>(numbers.data(), index_t(s.at(0)), index_t(s.size() > 1 ? s[1] : 1)));
    };
    const reduction r = config.at("reduction") == "mean" ? reduction::mean : reduction::sum;
    loss_result got;
    matrix<double> d, expected;
    if (config.contains("width")) {
      d = load("input.prediction");
      expected = load("grad.input.prediction");
      got = mean_square<double>(d, load("input.target"), r, d);
    } else {
      std::vector<token_t> targets;
      for (const auto y : file.read<std::int64_t>("input.targets")) targets.push_back(static_cast<token_t>(y));
      std::vector<double> rows(targets.size());
      d = load("input.logits");
      expected = load("grad.input.logits");
      got = cross_entropy<double>(d, targets, {config.at("label_smoothing"), config.at("ignore_index"), r}, d, {}, rows);
      const matrix<double> token_loss = load("mid.token_loss");
      for (std::size_t t = 0; t < rows.size(); ++t) EXPECT_NEAR(rows[t], token_loss(index_t(t), 0), 1e-9);
    }
    EXPECT_NEAR(got.loss, load("output.loss")(0, 0), 1e-9);
    EXPECT_LT((d - expected).cwiseAbs().maxCoeff(), 1e-9);
  }
  EXPECT_EQ(files, 5);
}

}  // namespace losses_tests
