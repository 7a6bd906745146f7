#include "lithe/training/reparametrise.hpp"

#include <gtest/gtest.h>

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/training/captured_variance.hpp"
#include "lithe/training/head_pruning.hpp"
#include "support/matrices.hpp"

namespace reparametrise_tests {

using namespace lithe;

template <class L>
matrix<typename L::scalar> run(const L& l, const matrix<typename L::scalar>& x) {
  const shape s = l.output_shape(x);
  matrix<typename L::scalar> y(s.rows, s.cols);
  l.forward(x, y, {});
  return y;
}

template <class S>
void full_width(double tolerance) {
  for (const attention_config& c : {attention_config{.inputs = 24, .heads = 4, .causal = true},
                                    {.inputs = 24, .heads = 3, .head_width = 5, .outputs = 7, .scale = 0.7},
                                    {.inputs = 24, .heads = 4, .key_value_heads = 2},
                                    {.inputs = 24, .heads = 4, .bias = false}}) {
    const attention<S> from(c, rng_key{1});
    const index_t width = from.config.heads * from.config.head_width;
    collaborative_attention<S> to;
    for (const index_t rank : {width, width + 3}) {
      const auto d = reparametrise(from, to, {.rank = rank});
      EXPECT_EQ(d.errors.size(), 1U);  // nothing was iterated
      EXPECT_EQ(to.config.key_width, rank);
      EXPECT_EQ(to.config.scale, from.config.scale);
      const matrix<S> x = random<S>(50, 24, 2);
      EXPECT_LT(difference(run(to, x), run(from, x)), tolerance);
    }
  }
}
TEST(reparametrise, full_width_equals_the_original_with_its_biases_and_no_iterations) {
  full_width<double>(1e-13);
  full_width<float>(2e-6);  // rounding of scores and sums of 50 weights
}

TEST(reparametrise, a_reduced_rank_keeps_the_biases_exact_and_improves_with_the_rank) {
  attention<double> from({.inputs = 24, .heads = 4}, rng_key{1});
  const matrix<double> x = random(50, 24, 2), y = run(from, x);
  collaborative_attention<double> to;
  to.config.dropout = 0.25;
  double last = 1;
  for (const index_t rank : {4, 8, 16, 22}) {
    const auto d = reparametrise(from, to, {.rank = rank});
    for (index_t h = 0; h < 4; ++h)
      EXPECT_LT(difference(to.content_bias.weight.row(h), (from.query.bias.row(0).segment(6 * h, 6) * from.key.weight.middleRows(6 * h, 6)).eval()),
                1e-15);
    EXPECT_LT(d.error(), last);
    last = d.error();
    EXPECT_EQ(to.config.dropout, 0.25);
    EXPECT_EQ(to.query.weight.rows(), rank);
    // The scores' error is that of the tensor up to the spread of x: here E x xᵀ = I / 3, so within sampling noise.
    const auto shown = run(to, x);
    EXPECT_LT(difference(shown, y), 3 * d.error() * y.cwiseAbs().maxCoeff() + 1e-12);
  }
}

TEST(reparametrise, cross_attention) {
  const cross_attention<double> from({.inputs = 12, .memory_inputs = 9, .heads = 3}, rng_key{1});
  collaborative_cross_attention<double> to;
  const matrix<double> x = random(7, 12, 1), m = random(11, 9, 2);
  matrix<double> y(7, 12), z(7, 12);
  from.forward(x, {m, {}}, y, {});
  EXPECT_EQ(reparametrise(from, to, {.rank = 12}).error(), 0);
  to.forward(x, {m, {}}, z, {});
  EXPECT_LT(difference(y, z), 1e-14);
  EXPECT_GT(reparametrise(from, to, {.rank = 4}).error(), 0);
  to.forward(x, {m, {}}, z, {});
  EXPECT_TRUE(z.allFinite());
}

TEST(reparametrise, rotary_positions_are_refused) {
  const attention<double> from({.inputs = 12, .heads = 3, .rotary_width = 2}, rng_key{1});
  collaborative_attention<double> to;
  EXPECT_THROW(reparametrise(from, to, {.rank = 6}), config_error);
  EXPECT_THROW(static_cast<void>(key_query_weights_of<double>(random(12, 5, 1), random(5, 5, 2), {}, 3, 1)), shape_error);
}

template <class A>
using block = sequential<residual<sequential<layer_norm<double>, A>>, residual<sequential<layer_norm<double>, feed_forward<double>>>>;
template <class A>
using model = sequential<stack<block<A>>, linear<double>>;

TEST(reparametrise, a_whole_model_is_walked_layer_by_layer) {
  const index_t D = 12;
  const auto blocks = [&]<class A>(auto&& attend, A*) {
    stack<block<A>> out;
    for (std::uint64_t i = 0; i < 3; ++i)
      out.blocks.emplace_back(residual<sequential<layer_norm<double>, A>>{sequential<layer_norm<double>, A>(layer_norm<double>(D), attend(i))},
                              residual<sequential<layer_norm<double>, feed_forward<double>>>{sequential<layer_norm<double>, feed_forward<double>>(
                                  layer_norm<double>(D), feed_forward<double>({.features = D, .hidden = 20}, rng_key{10 + i}))});
    return out;
  };
  using separate = attention<double>;
  using shared = collaborative_attention<double>;
  const model<separate> from(
      blocks([&](std::uint64_t i) { return separate({.inputs = D, .heads = 3}, rng_key{i}); }, static_cast<separate*>(nullptr)),
      linear<double>({D, 5}, rng_key{99}));
  model<shared> to(blocks([&](std::uint64_t) { return shared(); }, static_cast<shared*>(nullptr)), linear<double>({D, 5}, rng_key{98}));
  const matrix<double> x = random(9, D, 1);
  std::vector<std::string> names;
  const auto note = [&](const std::string& name, const auto&, const auto&, const decomposition& d) {
    names.push_back(name);
    EXPECT_TRUE(d.converged);
  };
  reparametrise_model(from, to, {.rank = D}, {}, note);
  EXPECT_EQ(names, (std::vector<std::string>{"0.0.0.1", "0.1.0.1", "0.2.0.1"}));
  EXPECT_LT(difference(run(to, x), run(from, x)), 1e-13);
  names.clear();
  for_each_attention(from, [&](const std::string& name, const separate&) { names.push_back(name); });
  EXPECT_EQ(names, (std::vector<std::string>{"0.0.0.1", "0.1.0.1", "0.2.0.1"}));
  reparametrise_model(from, to, {.rank = 4, .max_sweeps = 500}, {}, [](const auto&...) {});
  EXPECT_GT(difference(run(to, x), run(from, x)), 1e-6);
  EXPECT_LT(count_parameters(to), count_parameters(from));
}

TEST(head_pruning, importance_is_the_derivative_of_the_heads_masks) {
  attention<double> l({.inputs = 12, .heads = 3, .causal = true}, rng_key{1});
  const matrix<double> x = random(20, 12, 1), dy = random(20, 12, 2);
  matrix<double> y(20, 12), dx(20, 12);
  attention<double>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, {});
  l.backward(x, r, dy, dx, g, {});
  const auto importance = head_importance(l, g);
  for (index_t h = 0; h < 3; ++h) {
    const auto loss = [&](double mask) {
      attention<double> masked = l;
      masked.output.weight.middleCols(4 * h, 4) *= mask;
      return (run(masked, x).array() * dy.array()).sum();
    };
    EXPECT_NEAR(importance[static_cast<std::size_t>(h)], std::abs(loss(1.5) - loss(0.5)), 1e-12);  // linear in the mask
  }
}

TEST(head_pruning, a_pruned_layer_is_the_layer_without_those_heads) {
  const attention<double> l({.inputs = 12, .heads = 4}, rng_key{1});
  const matrix<double> x = random(9, 12, 1);
  const std::vector<index_t> keep{1, 3}, all{0, 1, 2, 3};
  const auto pruned = prune_heads<double>(l, keep);
  attention<double> masked = l;
  masked.output.weight.middleCols(0, 3).setZero();
  masked.output.weight.middleCols(6, 3).setZero();
  EXPECT_LT(difference(run(pruned, x), run(masked, x)), 1e-14);
  EXPECT_EQ(run(prune_heads<double>(l, all), x), run(l, x));
  EXPECT_LT(count_parameters(pruned), count_parameters(l));
  const std::vector<index_t> beyond{1, 4}, twice{1, 1};
  EXPECT_THROW(static_cast<void>(prune_heads<double>(l, beyond)), index_error);
  EXPECT_THROW(static_cast<void>(prune_heads<double>(l, twice)), index_error);
  EXPECT_THROW(static_cast<void>(prune_heads<double>(l, {})), config_error);
}

TEST(captured_variance, of_known_spectra) {
  const auto c = captured_variance(std::vector<double>{4, 2, 1, 0.5});
  EXPECT_NEAR(c[0], 0.7529411765, 1e-10);
  EXPECT_NEAR(c[1], 0.9411764706, 1e-10);
  EXPECT_NEAR(c[2], 0.9882352941, 1e-10);
  EXPECT_EQ(c[3], 1);
  EXPECT_EQ(captured_variance(std::vector<double>{0, 0}), (std::vector<double>{1, 1}));

  const auto fill = [](index_t a) {
    matrix<double> m(4, 4);
    for (index_t k = 0; k < 16; ++k) m.data()[k] = static_cast<double>((3 * k * k + 5 * k + a) % 13 - 6) / 10;
    return m;
  };
  const auto s = spectrum_of("layer", key_query_weights{fill(1), fill(2), {}}, 2);
  EXPECT_NEAR(s.heads[0][0], 1.0192153845, 1e-10);
  EXPECT_NEAR(s.heads[0][1], 0.1, 1e-10);
  EXPECT_NEAR(s.heads[1][0], 1.0223214771, 1e-10);
  EXPECT_NEAR(s.heads[1][1], 0.6591348856, 1e-10);
  const double all[4] = {1.4202777360, 0.7094853602, 0.3743294751, 0.0109142336};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(s.all[i], all[i], 1e-10);
  const std::vector<key_query_spectrum> layers{s, s};
  EXPECT_NE(to_json(layers).find("\"all\": [0.75"), std::string::npos);
  const std::string svg = to_svg(layers);
  std::size_t curves = 0;
  for (std::size_t at = svg.find("<polyline"); at != std::string::npos; at = svg.find("<polyline", at + 1)) ++curves;
  EXPECT_EQ(curves, 4U);
  // Two panels of 300 x 220, each curve from its lower left corner; the first layer light, the last dark.
  for (const char* part : {R"svg(stroke="rgb(100,200,220)" points="50,260 )svg", R"svg(stroke="rgb(15,30,135)" points="50,260 )svg",
                           R"svg(points="410,260 )svg", R"svg( 710,40"/>)svg", R"svg(<text x="724" y="66" fill="rgb(15,30,135)">layer 2</text>)svg"})
    EXPECT_NE(svg.find(part), std::string::npos) << part;
}

}  // namespace reparametrise_tests
