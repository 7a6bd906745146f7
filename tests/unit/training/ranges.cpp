#include <gtest/gtest.h>

#include "lithe/layers/halting_distributions.hpp"
#include "lithe/layers/linear.hpp"
#include "lithe/layers/memory/memory_gate.hpp"
#include "lithe/layers/memory/score_norm.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/training/captured_variance.hpp"
#include "lithe/training/clip.hpp"
#include "lithe/training/exit_losses.hpp"
#include "lithe/training/gradient_check.hpp"
#include "lithe/training/optimiser.hpp"

// What happens far from 1: logits with a large common offset, weights of any magnitude, settings that leave the range
// of their scalar.
namespace ranges_tests {

using namespace lithe;

constexpr double offsets[] = {0, 1e5, 1e6, 1e8};

/// Logits that float holds with every one of the offsets (at 1e8 its numbers are 8 apart), and no two rows alike.
matrix<double> logits(index_t rows, index_t cols) {
  matrix<double> m(rows, cols);
  for (index_t i = 0; i < rows; ++i)
    for (index_t j = 0; j < cols; ++j)
      m(i, j) = static_cast<double>(8 * ((3 * i + 5 * j + i * j) % 4) - (j == i ? 8 : 0));
  return m;
}
matrix<float> shifted(const matrix<double>& m, double offset) { return (m.array() + offset).matrix().cast<float>(); }

TEST(ranges, log_softmax_with_a_large_common_offset) {
  const matrix<double> z = logits(5, 7);
  matrix<double> expected(5, 7);
  for (index_t i = 0; i < 5; ++i) {
    long double sum = 0;
    for (index_t j = 0; j < 7; ++j) sum += std::exp(static_cast<long double>(z(i, j)));
    for (index_t j = 0; j < 7; ++j)
      expected(i, j) = static_cast<double>(static_cast<long double>(z(i, j)) - std::log(sum));
  }
  for (const double offset : offsets) {
    const matrix<float> x = shifted(z, offset);
    matrix<float> log_q(5, 7);
    multinomial_exits<float>(x, log_q, {});
    EXPECT_LT((log_q.cast<double>() - expected).cwiseAbs().maxCoeff(), 4e-6) << offset;  // an ulp of numbers near 32
    const double sum = log_q.row(0).cast<double>().array().exp().sum();
    EXPECT_NEAR(sum, 1, 1e-5) << offset;
  }
}

TEST(ranges, losses_with_a_large_common_offset) {
  const index_t T = 4, N = 3, V = 6;
  const matrix<double> z = logits(N * T, V);
  const std::vector<token_t> targets{0, 3, 1, 5}, three_times{0, 3, 1, 5, 0, 3, 1, 5, 0, 3, 1, 5};
  const std::vector<double> weights{1, 2, 3};
  matrix<double> d(N * T, V), ds(N * T, V), da(N * T, V);
  const double distilled = distillation_exit_loss<double>(z, N, reduction::mean, d).loss;
  const double smooth = cross_entropy<double>(z, three_times, {.label_smoothing = 0.1}, ds).loss;
  const double aligned = aligned_exit_loss<double>(z, targets, weights, reduction::mean, -100, da).loss;
  EXPECT_GT(distilled, 0.01);
  for (const double offset : offsets) {
    const matrix<float> x = shifted(z, offset);
    matrix<float> g(N * T, V);
    EXPECT_NEAR(distillation_exit_loss<float>(x, N, reduction::mean, g).loss / distilled, 1, 2e-6) << offset;
    EXPECT_LT((g.cast<double>() - d).cwiseAbs().maxCoeff(), 1e-6) << offset;
    EXPECT_NEAR(cross_entropy<float>(x, three_times, {.label_smoothing = 0.1}, g).loss / smooth, 1, 2e-6) << offset;
    EXPECT_LT((g.cast<double>() - ds).cwiseAbs().maxCoeff(), 1e-6) << offset;
    EXPECT_NEAR(aligned_exit_loss<float>(x, targets, weights, reduction::mean, -100, g).loss / aligned, 1, 2e-6)
        << offset;
    EXPECT_LT((g.cast<double>() - da).cwiseAbs().maxCoeff(), 1e-6) << offset;
  }
}

TEST(ranges, views_whose_rows_lie_apart) {
  const auto inside = [](matrix<double>& m) { return view(m).slice_cols(1, m.cols() - 3); };
  const index_t T = 4, N = 3;
  matrix<double> z = matrix<double>::Random(T, N), zs = matrix<double>::Constant(T, N + 3, 7), out(T, N), outs = zs;
  inside(zs).map() = z;
  multinomial_exits<double>(z, out, {});
  multinomial_exits<double>(inside(zs), inside(outs), {});
  EXPECT_EQ(inside(outs).map(), out);
  matrix<double> s = matrix<double>::Random(N - 1, T), ss = matrix<double>::Constant(N - 1, T + 3, 7);
  inside(ss).map() = s;
  stick_breaking<double>(s, out, {});
  stick_breaking<double>(inside(ss), inside(outs), {});
  EXPECT_EQ(inside(outs).map(), out);
  const memory_gate<double> gate({.temperature = 0.5});
  gate.forward(z, out, {});
  gate.forward(inside(zs), inside(outs), {});
  EXPECT_EQ(inside(outs).map(), out);
  EXPECT_TRUE((outs.col(0).array() == 7).all() && (outs.rightCols(2).array() == 7).all());
  EXPECT_EQ(view(z).cut_rows(1).rows(), T * N);
  EXPECT_THROW((void)inside(zs).cut_rows(1), shape_error);
  EXPECT_THROW((void)view(z).cut_rows(2), shape_error);
}

template <class S>
class ranges_of : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(ranges_of, scalars);

TYPED_TEST(ranges_of, temperatures_of_a_memory_gate) {
  using S = TypeParam;
  const double least = std::numeric_limits<S>::min(), nan = std::nan("");
  for (const double t : {0.0, -1.0, least / 6, std::numeric_limits<double>::denorm_min(), 6 / least,
                         std::numeric_limits<double>::infinity(), nan})
    EXPECT_THROW(memory_gate<S>({.temperature = t}), config_error) << t;
  const matrix<S> scores{{S(1), S(3), S(2), S(3)}, {S(-100), S(-2), S(-2), S(-3)}}, dw = matrix<S>::Ones(2, 4);
  matrix<S> w(2, 4), ds(2, 4);
  for (const double t : {least, 1e-30, 1.0, 1e30, 1 / least}) {
    const memory_gate<S> gate({.temperature = t});
    gate.forward(scores, w, {});
    EXPECT_NEAR(w.row(0).sum(), 1, 1e-6) << t;
    EXPECT_NEAR(w(0, 1), t < 1e-3 ? 0.5 : t > 1e3 ? 0.25 : w(0, 3), 1e-6) << t;
    gate.backward(scores, dw, ds, {});
    EXPECT_TRUE(ds.allFinite()) << t;
  }
}

TYPED_TEST(ranges_of, settings_that_vanish_in_the_scalar_are_refused) {
  using S = TypeParam;
  const double gone = std::numeric_limits<S>::denorm_min() / 4,
               infinite = static_cast<double>(std::numeric_limits<S>::max()) * 4;
  for (const double epsilon : {0.0, -1e-5, gone, std::nan("")}) {
    EXPECT_THROW(layer_norm<S>(4, static_cast<S>(epsilon)), config_error) << epsilon;
    EXPECT_THROW(rms_norm<S>(4, static_cast<S>(epsilon)), config_error) << epsilon;
    EXPECT_THROW(score_norm<S>(score_norm_kind::rms, 4, false, epsilon, 1), config_error) << epsilon;
    EXPECT_THROW(optimiser<S>({.epsilon = epsilon}), config_error) << epsilon;
  }
  linear<S> l({3, 2}, rng_key{1});
  auto g = make_gradient(l);
  optimiser<S> o;
  EXPECT_THROW(o.step(l, g, infinite), config_error);
  EXPECT_EQ(o.steps(), 0);
}

TEST(ranges, a_gradient_check_wants_a_step) {
  const linear<double> l({3, 2}, rng_key{1});
  const matrix<double> x = matrix<double>::Random(2, 3);
  EXPECT_THROW((void)gradient_check(l, x, {}, {.step = 0}), config_error);
  EXPECT_THROW((void)gradient_check(l, x, {}, {.floor = 0}), config_error);
  EXPECT_THROW((void)gradient_check(l, x, {}, {.entries = 0}), config_error);
}

TYPED_TEST(ranges_of, what_was_moved_from_or_never_made_says_so) {
  using S = TypeParam;
  linear<S> l({3, 2}, rng_key{1});
  auto g = make_gradient(l);
  optimiser<S> a;
  a.step(l, g, 0.1);
  optimiser<S> b = std::move(a);
  b.step(l, g, 0.1);
  EXPECT_EQ(b.steps(), 2);
  try {
    a.step(l, g, 0.1);  // NOLINT(bugprone-use-after-move)
    FAIL();
  } catch (const state_error& e) {
    EXPECT_NE(std::string(e.what()).find("moved from"), std::string::npos) << e.what();
  }
  typename linear<S>::gradient empty;
  EXPECT_THROW(b.step(l, empty, 0.1), state_error);
  EXPECT_THROW((void)global_norm(l, empty), state_error);
  EXPECT_THROW((void)clip_by_global_norm(l, empty, 1.0), state_error);
  EXPECT_THROW(scale_gradient(l, empty, 1.0), state_error);
}

TEST(ranges, a_decomposition_of_weights_of_any_magnitude) {
  const index_t heads = 2, d = 3;
  const matrix<double> q = matrix<double>::Random(heads * d, 5), k = matrix<double>::Random(heads * d, 4);
  using method = decomposition_method;
  for (const auto how : {method::alternating, method::head_svd, method::product_svd})
    for (const index_t rank : {3, 6}) {
      const decomposition_options o{.rank = rank, .method = how, .max_sweeps = 20};
      const decomposition plain = decompose(q, k, heads, o);
      for (const auto& [a, b] : {std::pair{1e-90, 1e-90},
                                 {1e-160, 1e-160},
                                 {1e-300, 1.0},
                                 {1e120, 1e120},
                                 {1e-200, 1e200},
                                 {1e300, 1e-10}}) {
        const decomposition s = decompose(matrix<double>(a * q), matrix<double>(b * k), heads, o);
        SCOPED_TRACE(concat(a, " ", b, " rank ", rank));
        EXPECT_NEAR(s.error(), plain.error(), 1e-6);  // what the tolerance of the iterations leaves open
        // T of head h at scale 1, from factors whose product has the scale a b
        for (index_t h = 0; h < heads; ++h) {
          const auto tensor = [&](const decomposition& x, double sq, double sk) -> matrix<double> {
            return (x.factors.query * sq).transpose() * x.factors.mixing.row(h).asDiagonal() * (x.factors.key * sk);
          };
          const double largest_q = s.factors.query.cwiseAbs().maxCoeff(),
                       largest_k = s.factors.key.cwiseAbs().maxCoeff();
          const double rest = largest_q / a * (largest_k / b);
          const matrix<double> found = tensor(s, 1 / largest_q, 1 / largest_k) * rest;
          EXPECT_LT((found - tensor(plain, 1, 1)).cwiseAbs().maxCoeff(), 1e-3);
        }
      }
    }
  const decomposition zero = decompose(matrix<double>::Zero(6, 5).eval(), k, heads, {.rank = 3});
  EXPECT_EQ(zero.error(), 0);
  EXPECT_THROW((void)decompose(q, k, heads, {.rank = 3, .method = method::head_svd, .restarts = 2}), config_error);
  const auto given = decompose(q, k, heads, {.rank = 3}).factors;
  EXPECT_THROW((void)decompose(q, k, heads, {.rank = 3, .method = method::product_svd}, {}, &given), config_error);
}

TEST(ranges, singular_values_of_any_magnitude) {
  const matrix<double> q = matrix<double>::Random(4, 6), k = matrix<double>::Random(4, 5);
  const auto plain = spectrum_of("", {q, k, {}}, 2);
  for (const double scale : {1e-170, 1e-90, 1e90, 1e150}) {
    const auto s = spectrum_of("", {q * scale, k / scale, {}}, 2);
    for (std::size_t i = 0; i < plain.all.size(); ++i) EXPECT_NEAR(s.all[i], plain.all[i], 1e-12) << scale;
  }
  for (const double scale : {1e-300, 1e-160, 1.0, 1e200}) {
    const std::vector<double> sigma{2 * scale, scale, scale};
    const auto c = captured_variance(sigma);
    EXPECT_NEAR(c[0], 4.0 / 6, 1e-15) << scale;
    EXPECT_NEAR(c[1], 5.0 / 6, 1e-15) << scale;
  }
  EXPECT_EQ(captured_variance(std::vector<double>{0, 0}), (std::vector<double>{1, 1}));
}

}  // namespace ranges_tests
