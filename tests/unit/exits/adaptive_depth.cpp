#include "lithe/compose/adaptive_depth.hpp"

#include <gtest/gtest.h>

#include "lithe/compose/decoder_block.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/training/exit_training.hpp"
#include "lithe/training/gradient_check.hpp"
#include "lithe/training/optimiser.hpp"

namespace adaptive_depth_tests {

using namespace lithe;

constexpr index_t features = 6, classes = 5;
using attention_part = residual<sequential<layer_norm<double>, attention<double>>>;
using feed_part = residual<sequential<layer_norm<double>, feed_forward<double>>>;
using pre_block = sequential<attention_part, feed_part>;
using post_block = sequential<residual<attention<double>>, layer_norm<double>, residual<feed_forward<double>>, layer_norm<double>>;
using cross_block = decoder_block<attention_part, feed_part>;
static_assert(layer<adaptive_stack<pre_block>> && layer<adaptive_depth<pre_block>> && layer<exit_classifiers<double>>);
static_assert(conditioned_layer<cross_block> && conditioned_layer<adaptive_stack<cross_block>> && !layer<adaptive_stack<cross_block>>);

// Central differences with h = 1e-5 of functions of size 1 are good to about 1e-10, divided by gradients of at least the checker's floor 1e-3.
const double gradient_tolerance = 2e-6;

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}
template <class B>
B make_block(rng_key key) {
  const attention<double> look({.inputs = features, .heads = 2, .causal = true, .rotary_width = 2}, key.child(0));
  const feed_forward<double> feed({features, 8, activation::gelu}, key.child(1));
  if constexpr (std::same_as<B, post_block>)
    return B(residual<attention<double>>{look}, layer_norm<double>(features), residual<feed_forward<double>>{feed}, layer_norm<double>(features));
  else if constexpr (std::same_as<B, cross_block>)
    return {attention_part{sequential(layer_norm<double>(features), look)}, layer_norm<double>(features),
            cross_attention<double>({.inputs = features, .memory_inputs = 4, .heads = 2}, key.child(2)), dropout<double>(0.2),
            feed_part{sequential(layer_norm<double>(features), feed)}};
  else
    return B({sequential(layer_norm<double>(features), look)}, {sequential(layer_norm<double>(features), feed)});
}
template <class B>
adaptive_stack<B> make_stack(index_t depth, bool tied = false) {
  adaptive_stack<B> s;
  for (index_t n = 0; n < (tied ? 1 : depth); ++n) s.blocks.push_back(make_block<B>(rng_key{static_cast<std::uint64_t>(n + 1)}));
  s.depth = tied ? depth : 0;
  return s;
}
template <class B>
adaptive_depth<B> make_model(index_t depth, exit_classifiers_config c = {}) {
  adaptive_depth<B> m;
  m.stack = make_stack<B>(depth);
  c.exits = depth;
  c.features = features;
  c.classes = classes;
  m.answers = exit_classifiers<double>(c, {5});
  return m;
}
template <class... A>
void expect_right_gradients(const A&... a) {
  const auto report = gradient_check(a...);
  EXPECT_LT(report.worst(), gradient_tolerance) << report.where();
  for (const auto& tensor : report.tensors) {
    if (tensor.name.ends_with("cross.key.bias")) continue;  // it adds the same to all scores of a query
    EXPECT_GT(tensor.largest, 1e-3) << tensor.name;
  }
}
/// Sequences of 4, 0 and 3 tokens.
struct ragged {
  std::vector<index_t> offsets{0, 4, 4, 7}, memory_offsets{0, 2, 3, 6};
  workspace work;
  context ctx;
  ragged() {
    ctx.rows = {offsets};
    ctx.work = &work;
    ctx.key = {9};
  }
};
/// The largest difference of two gradients of one model, and the largest number in the first.
template <class L>
std::pair<double, double> compare(const L& model, const gradient_of<L>& a, const gradient_of<L>& b) {
  double difference = 0, largest = 0;
  for_each_tensor(
      [&](const std::string&, role, const auto&, const auto& p, const auto& q) {
        difference = std::max(difference, (p - q).cwiseAbs().maxCoeff());
        largest = std::max(largest, p.cwiseAbs().maxCoeff());
      },
      model, a, b);
  return {difference, largest};
}

TEST(adaptive_stack, gradients_of_all_depths) {
  ragged t;
  expect_right_gradients(make_stack<pre_block>(3), random_matrix(7, features, 2), t.ctx);
  expect_right_gradients(make_stack<post_block>(2), random_matrix(7, features, 2), t.ctx);
}
TEST(adaptive_stack, gradients_of_tied_blocks) {
  ragged t;
  const auto s = make_stack<pre_block>(3, true);
  EXPECT_EQ(s.exits(), 3);
  EXPECT_EQ(count_parameters(s), count_parameters(s.blocks[0]));
  expect_right_gradients(s, random_matrix(7, features, 2), t.ctx);
}
TEST(adaptive_stack, gradients_with_cross_attention) {
  ragged t;
  t.ctx.train = true;  // dropout
  const auto memory = random_matrix(6, 4, 3);
  expect_right_gradients(make_block<cross_block>({1}), random_matrix(7, features, 2), memory_view<double>{memory, {t.memory_offsets}}, t.ctx);
  expect_right_gradients(make_stack<cross_block>(2), random_matrix(7, features, 2), memory_view<double>{memory, {t.memory_offsets}}, t.ctx);
}
TEST(adaptive_stack, gradients_with_stochastic_depth) {
  ragged t;
  t.ctx.train = true;
  auto s = make_stack<pre_block>(3);
  s.drop_rates = {0.5, 0.5, 0.5};
  for (std::uint64_t key = 1;; ++key) {  // a draw in which some, but not all, of the two sequences skip
    t.ctx.key = {key};
    record_of<adaptive_stack<pre_block>> r;
    matrix<double> y(21, features);
    s.forward(random_matrix(7, features, 2), y, r, t.ctx);
    const auto& skipped = r.skipped.value;
    if (skipped[0] != skipped[4] && skipped[7] != skipped[11] && skipped[14] == 0) break;
  }
  expect_right_gradients(s, random_matrix(7, features, 2), t.ctx);
}
TEST(adaptive_stack, each_depth_is_a_truncated_stack_in_value_and_gradient) {
  ragged t;
  const auto x = random_matrix(7, features, 2);
  const auto model = make_stack<pre_block>(4);
  matrix<double> y(28, features);
  model.forward(x, y, t.ctx);
  for (index_t n = 1; n <= 4; ++n) {
    const auto shorter = make_stack<pre_block>(n);
    matrix<double> z(n * 7, features), dx(7, features), dz(7, features), dy = matrix<double>::Zero(28, features);
    record_of<adaptive_stack<pre_block>> r, s;
    shorter.forward(x, z, s, t.ctx);
    EXPECT_EQ(y.topRows(n * 7), z);
    dy.middleRows((n - 1) * 7, 7) = random_matrix(7, features, 3);
    model.forward(x, y, r, t.ctx);
    auto g = make_gradient(model);
    auto h = make_gradient(shorter);
    model.backward(x, r, dy, dx, g, t.ctx);
    shorter.backward(x, s, dy.topRows(n * 7).eval(), dz, h, t.ctx);
    EXPECT_EQ(dx, dz);
    for (index_t k = 0; k < 4; ++k) {
      const auto& block = model.blocks[static_cast<std::size_t>(k)];
      const auto zero = make_gradient(block);
      const auto [difference, largest] = compare(block, g.blocks[static_cast<std::size_t>(k)], k < n ? h.blocks[static_cast<std::size_t>(k)] : zero);
      EXPECT_EQ(difference, 0);
      EXPECT_TRUE(k >= n || largest > 1e-3);
    }
  }
}

/// Mixed training with given exits, as a layer that a gradient check can take.
template <class B>
struct mixed_layer {
  using scalar = double;
  using record = record_of<adaptive_stack<B>>;
  using gradient = gradient_of<adaptive_stack<B>>;
  adaptive_stack<B> stack;
  std::vector<std::int32_t> exits;
  void prepare(gradient& g) const { stack.prepare(g); }
  shape output_shape(matrix_view<const double> x) const { return stack.output_shape(x); }
  void forward(matrix_view<const double> x, matrix_view<double> y, const context& ctx) const {
    record r;
    forward(x, y, r, ctx);
  }
  void forward(matrix_view<const double> x, matrix_view<double> y, record& r, const context& ctx) const {
    stack.forward_mixed(x, {}, exits, y, r, ctx);
  }
  void backward(matrix_view<const double> x, const record& r, matrix_view<const double> dy, matrix_view<double> dx, gradient& g,
                const context& ctx) const {
    stack.backward(x, r, dy, dx, g, ctx);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    adaptive_stack<B>::visit(f, stack_of(s)...);
  }
  static auto& stack_of(auto& s) {
    if constexpr (requires { s.stack; })
      return s.stack;
    else
      return s;
  }
};

TEST(mixed_training, gradients_for_given_exits_pre_and_post_norm) {
  const std::vector<std::int32_t> exits{2, 1, 4, 3, 1, 4};
  const auto x = random_matrix(6, features, 2);
  expect_right_gradients(mixed_layer<pre_block>{make_stack<pre_block>(4), exits}, x);
  expect_right_gradients(mixed_layer<post_block>{make_stack<post_block>(4), exits}, x);
}
TEST(mixed_training, everybody_at_the_top_is_aligned_training_of_the_top) {
  ragged t;
  const auto model = make_model<pre_block>(3);
  const auto x = random_matrix(7, features, 2);
  const std::vector<token_t> targets{1, 2, -100, 0, 4, 4, 3};
  using model_type = adaptive_depth<pre_block>;
  exit_training_record<model_type> r, s;
  auto g = make_gradient(model);
  auto h = make_gradient(model);
  matrix<double> dx(7, features), dz(7, features);
  const auto mixed = mixed_exit_step(model, matrix_view<const double>(x), nothing{}, targets, 2, reduction::sum, -100, r, matrix_view<double>(dx),
                                     nothing{}, g, t.ctx, std::vector<std::int32_t>(14, 3));
  const auto aligned = aligned_exit_step(model, matrix_view<const double>(x), nothing{}, targets, {.weights = {0, 0, 1}}, 0, s,
                                         matrix_view<double>(dz), nothing{}, h, t.ctx);
  EXPECT_NEAR(mixed.total, aligned.total, 1e-12);  // the same sum in two halves
  EXPECT_LT((dx - dz).cwiseAbs().maxCoeff(), 1e-13);
  const auto [difference, largest] = compare(model, g, h);
  EXPECT_LT(difference, 1e-12);
  EXPECT_GT(largest, 0.1);
}
TEST(mixed_training, draws_are_uniform_and_differ_between_passes) {
  std::vector<std::int32_t> exits(4000), others(4000);
  draw_exits(4, {1}, exits);
  draw_exits(4, {2}, others);
  EXPECT_NE(exits, others);
  for (int n = 1; n <= 4; ++n) EXPECT_NEAR(static_cast<double>(std::count(exits.begin(), exits.end(), n)), 1000, 110);  // four standard deviations
}

TEST(exit_classifiers, gradients_of_shared_independent_and_no_norms) {
  const auto x = random_matrix(3 * 4, features, 2);
  for (const auto norm : {exit_sharing::shared, exit_sharing::independent, exit_sharing::none})
    for (const auto classifier : {exit_sharing::shared, exit_sharing::independent})
      expect_right_gradients(exit_classifiers<double>({3, features, classes, norm, classifier, true}, {5}), x);
}
TEST(exit_classifiers, one_exit_for_each_row) {
  const std::vector<std::int32_t> exits{3, 1, 1, 2};
  const auto h = random_matrix(4, features, 2), d = random_matrix(4, classes, 3);
  for (const auto sharing : {exit_sharing::shared, exit_sharing::independent}) {
    const exit_classifiers<double> l({3, features, classes, sharing, sharing}, {5});
    matrix<double> logits(4, classes), one(1, classes), dh(4, features);
    record_of<exit_classifiers<double>> r;
    l.forward_mixed(h, exits, logits, r, {});
    auto g = make_gradient(l);
    l.backward(h, r, d, dh, g, {});
    for (index_t t = 0; t < 4; ++t) {
      l.answer(exits[static_cast<std::size_t>(t)], matrix_view<const double>(h).slice_rows(t, 1), one, {});
      EXPECT_LT((one.row(0) - logits.row(t)).cwiseAbs().maxCoeff(), 1e-14);  // one row alone takes a matrix-vector path
    }
    // Against aligned gradients that are zero everywhere but at each row's exit.
    matrix<double> all(12, features), dall = matrix<double>::Zero(12, classes), unused(12, classes), dx(12, features);
    for (index_t n = 0; n < 3; ++n) all.middleRows(4 * n, 4) = h;
    for (index_t t = 0; t < 4; ++t) dall.row(4 * (exits[static_cast<std::size_t>(t)] - 1) + t) = d.row(t);
    record_of<exit_classifiers<double>> s;
    auto k = make_gradient(l);
    l.forward(all, unused, s, {});
    l.backward(all, s, dall, dx, k, {});
    const auto [difference, largest] = compare(l, g, k);
    EXPECT_LT(difference, 1e-13);
    EXPECT_GT(largest, 0.1);
    for (index_t t = 0; t < 4; ++t) EXPECT_LT((dh.row(t) - dx.row(4 * (exits[static_cast<std::size_t>(t)] - 1) + t)).cwiseAbs().maxCoeff(), 1e-14);
  }
}

TEST(gradient_scales, forward_is_unchanged_and_backward_scaled) {
  EXPECT_EQ(exit_gradient_scales(4, 0.5), (std::vector<double>{1.5, 1, 0.5, 1}));
  // With blocks of slope 1 (zero residual branches) and classifiers of slope 1 the gradient at the input is known: d = Σₙ gₙ / (g₁ ... gₙ).
  auto s = make_stack<pre_block>(3);
  for (auto& b : s.blocks) {
    std::get<1>(std::get<0>(b.layers).inner.layers).output.weight.setZero();
    std::get<1>(std::get<1>(b.layers).inner.layers).down.weight.setZero();
  }
  const auto x = random_matrix(2, features, 1);
  const auto of = [&](const std::vector<double>& scales, matrix<double>& y) {
    s.gradient_scales = scales;
    matrix<double> dy(6, features), dx(2, features);
    for (index_t n = 0; n < 3; ++n) dy.middleRows(2 * n, 2).setConstant(scales.empty() ? 1 : scales[static_cast<std::size_t>(n)]);
    record_of<adaptive_stack<pre_block>> r;
    auto g = make_gradient(s);
    s.forward(x, y, r, {});
    s.backward(x, r, dy, dx, g, {});
    return dx(0, 0);
  };
  matrix<double> y(6, features), z(6, features);
  EXPECT_NEAR(of({}, y), 3, 1e-15);
  EXPECT_NEAR(of({1.5, 0.3, 1}, z), 1 + 1 / 1.5 + 1 / (1.5 * 0.3), 1e-14);
  EXPECT_EQ(y, z);
  // The classifier's own factor: x = 2, g = 0.3 -> value 2, derivative 0.3.
  exit_classifiers<double> c({1, 1, 1, exit_sharing::none}, {1});
  c.classifiers[0].weight(0, 0) = 1;
  c.gradient_scales = {0.3};
  const matrix<double> two = matrix<double>::Constant(1, 1, 2), one = matrix<double>::Ones(1, 1);
  matrix<double> value(1, 1), slope(1, 1);
  record_of<exit_classifiers<double>> r;
  auto g = make_gradient(c);
  c.forward(two, value, r, {});
  c.backward(two, r, one, slope, g, {});
  EXPECT_EQ(value(0, 0), 2);
  EXPECT_EQ(slope(0, 0), 0.3);
}

TEST(stochastic_depth, probability_one_is_the_identity_and_nought_the_plain_block) {
  ragged t;
  t.ctx.train = true;
  auto s = make_stack<pre_block>(2);
  const auto x = random_matrix(7, features, 2);
  matrix<double> plain(14, features), y(14, features);
  s.forward(x, plain, t.ctx);
  s.drop_rates = {0, 0};
  s.forward(x, y, t.ctx);
  EXPECT_EQ(y, plain);
  s.drop_rates = {1, 1};
  s.forward(x, y, t.ctx);
  EXPECT_EQ(y.topRows(7), x);
  EXPECT_EQ(y.bottomRows(7), x);
  t.ctx.train = false;
  s.forward(x, y, t.ctx);
  EXPECT_EQ(y, plain);
}

/// A model with a halting head, its loss for given parameters, and the gradient.
TEST(aligned_training, the_whole_loss_has_the_gradient_of_its_equation) {
  ragged t;
  auto model = make_model<pre_block>(3);
  model.halt = halting<double>({.exits = 3, .features = features}, {6});
  auto x = random_matrix(7, features, 2);
  const std::vector<token_t> targets{1, 2, -100, 0, 4, 4, 3};
  const std::vector<std::int32_t> exits{1, 2, 0, 3, 2, 1, 3};
  exit_training_record<adaptive_depth<pre_block>> r;
  matrix<double> dx(7, features), unused(7, features);
  auto g = make_gradient(model), h = g;
  const exit_training_config c{.weights = {1, 2, 3}, .alpha = 0.7, .reduce = reduction::mean};
  const auto loss = [&](matrix<double>& d, auto& gradient, const exit_training_config& config) {
    return aligned_exit_step(model, matrix_view<const double>(x), nothing{}, targets, config, 5, r, matrix_view<double>(d), nothing{}, gradient,
                             t.ctx, exits);
  };
  const auto losses = loss(dx, g, c);
  EXPECT_NEAR(losses.total, losses.decoder + 0.7 * losses.exit, 1e-14);
  EXPECT_EQ(losses.counted, 6);
  for (index_t i = 0; i < x.size(); i += 5) {
    const double kept_value = x.data()[i];
    x.data()[i] = kept_value + 1e-5;
    const double up = loss(unused, h, c).total;
    x.data()[i] = kept_value - 1e-5;
    const double down = loss(unused, h, c).total;
    x.data()[i] = kept_value;
    EXPECT_NEAR((up - down) / 2e-5, dx.data()[i], 1e-8);
  }
  exit_training_config later = c;
  later.start_step = 6;
  EXPECT_EQ(loss(dx, g, later).exit, 0);
  EXPECT_GT(losses.exit, 0.1);
}
TEST(aligned_training, detached_the_exit_loss_trains_the_head_alone) {
  ragged t;
  auto model = make_model<pre_block>(3);
  model.halt = halting<double>({.exits = 3, .features = features}, {6});
  const auto x = random_matrix(7, features, 2);
  const std::vector<token_t> targets{1, 2, -100, 0, 4, 4, 3};
  const auto run = [&](double alpha, bool detach, matrix<double>& dx) {
    exit_training_record<adaptive_depth<pre_block>> r;
    auto g = make_gradient(model);
    (void)aligned_exit_step(model, matrix_view<const double>(x), nothing{}, targets, {.alpha = alpha, .detach = detach}, 0, r,
                            matrix_view<double>(dx), nothing{}, g, t.ctx);
    return g;
  };
  matrix<double> without(7, features), detached(7, features), attached(7, features);
  const auto g0 = run(0, false, without), g1 = run(1, true, detached), g2 = run(1, false, attached);
  EXPECT_EQ(without, detached);
  EXPECT_GT((without - attached).cwiseAbs().maxCoeff(), 1e-3);
  EXPECT_EQ(compare(model.stack, g0.stack, g1.stack).first, 0);
  EXPECT_EQ(g0.halt.heads[0].output.weight.cwiseAbs().maxCoeff(), 0);
  EXPECT_GT(g1.halt.heads[0].output.weight.cwiseAbs().maxCoeff(), 1e-3);
}
TEST(aligned_training, an_oracle_for_sequences_leaves_its_choice_to_the_caller) {
  ragged t;
  const auto model = make_model<pre_block>(3);
  const auto x = random_matrix(7, features, 2);
  exit_training_record<adaptive_depth<pre_block>> r;
  auto g = make_gradient(model);
  matrix<double> dx(7, features);
  (void)aligned_exit_step(model, matrix_view<const double>(x), nothing{}, std::vector<token_t>(7, 1),
                          {.alpha = 1, .targets = {.granularity = exit_granularity::sequence}}, 0, r, matrix_view<double>(dx), nothing{}, g, t.ctx);
  EXPECT_EQ(r.exits.size(), 3U);
}
TEST(aligned_training, a_step_without_an_exit_loss_leaves_no_exits) {
  ragged t;
  const auto x = random_matrix(7, features, 2);
  exit_training_record<adaptive_depth<pre_block>> r;
  matrix<double> dx(7, features);
  exit_training_config c{.alpha = 1, .start_step = 5, .targets = {.granularity = exit_granularity::sequence}};
  const auto exits_after = [&](index_t blocks, index_t step) {
    const auto model = make_model<pre_block>(blocks);
    auto g = make_gradient(model);
    (void)aligned_exit_step(model, matrix_view<const double>(x), nothing{}, std::vector<token_t>(7, 1), c, step, r, matrix_view<double>(dx), nothing{}, g,
                            t.ctx);
    return r.exits.size();
  };
  EXPECT_EQ(exits_after(3, 5), 3U);
  EXPECT_EQ(exits_after(3, 4), 0U);
  EXPECT_EQ(exits_after(3, 5), 3U);
  EXPECT_EQ(exits_after(1, 5), 0U);
  EXPECT_EQ(exits_after(3, 5), 3U);
  c.alpha = 0;
  EXPECT_EQ(exits_after(3, 5), 0U);
}
TEST(aligned_training, all_targets_ignored_give_no_loss_and_no_gradient) {
  ragged t;
  auto model = make_model<pre_block>(3);
  model.halt = halting<double>({.exits = 3, .features = features}, {6});
  const auto x = random_matrix(7, features, 2);
  exit_training_record<adaptive_depth<pre_block>> r;
  auto g = make_gradient(model);
  matrix<double> dx(7, features);
  const auto l = aligned_exit_step(model, matrix_view<const double>(x), nothing{}, std::vector<token_t>(7, -100),
                                   {.alpha = 1, .reduce = reduction::mean}, 0, r, matrix_view<double>(dx), nothing{}, g, t.ctx);
  EXPECT_EQ(l.total, 0);
  EXPECT_EQ(dx.cwiseAbs().maxCoeff(), 0);
}
TEST(meta_training, the_loss_has_the_gradient_of_its_equation_and_trains_the_head_alone) {
  ragged t;
  auto model = make_model<pre_block>(3);
  model.meta = halting_head<double>({.features = features, .hidden_layers = 1}, {6});
  const auto x = random_matrix(7, features, 2);
  exit_training_record<adaptive_depth<pre_block>> r;
  auto g = make_gradient(model), untouched = g, unused = g;
  const auto loss = [&](auto& gradient) {
    return meta_exit_step(model, matrix_view<const double>(x), nothing{}, reduction::mean, r, gradient, t.ctx).loss;
  };
  EXPECT_GT(loss(g), 0.1);
  EXPECT_EQ(compare(model.stack, g.stack, untouched.stack).first, 0);
  EXPECT_EQ(compare(model.answers, g.answers, untouched.answers).first, 0);
  for_each_tensor(
      [&](const std::string& name, role, auto& parameter, const auto& d) {
        for (index_t i = 0; i < parameter.size(); i += 3) {
          const double kept_value = parameter.data()[i];
          parameter.data()[i] = kept_value + 1e-5;
          const double up = loss(unused);
          parameter.data()[i] = kept_value - 1e-5;
          const double down = loss(unused);
          parameter.data()[i] = kept_value;
          EXPECT_NEAR((up - down) / 2e-5, d.data()[i], 1e-8) << name;
        }
      },
      model.meta, g.meta);
}
TEST(meta_training, learns_where_an_exit_answers_as_the_last_does) {
  auto model = make_model<pre_block>(3);
  model.meta = halting_head<double>({.features = features}, {6});
  const auto x = random_matrix(200, features, 2);
  exit_training_record<adaptive_depth<pre_block>> r;
  auto g = make_gradient(model);
  optimiser<double> adam({.weight_decay = 0});
  double first = 0, last = 0;
  for (int step = 0; step < 100; ++step) {
    set_zero(model, g);
    last = meta_exit_step(model, matrix_view<const double>(x), nothing{}, reduction::mean, r, g, {}).loss;
    if (step == 0) first = last;
    adam.step(model.meta, g.meta, 5e-2, {});
  }
  matrix<double> answers(2, 200);
  meta_targets<double>(r.logits, 3, answers);
  const double share = answers.mean();  // what a head that does not look at the states can know
  EXPECT_LT(last, -share * std::log(share) - (1 - share) * std::log(1 - share) - 0.02);
  EXPECT_LT(last, first);
}
TEST(meta_training, one_exit_has_nothing_to_learn_and_a_model_without_a_head_is_refused) {
  const auto x = random_matrix(7, features, 2);
  exit_training_record<adaptive_depth<pre_block>> r;
  const auto one = make_model<pre_block>(1), three = make_model<pre_block>(3);
  auto g = make_gradient(one), h = make_gradient(three);
  EXPECT_EQ(meta_exit_step(one, matrix_view<const double>(x), nothing{}, reduction::mean, r, g, {}).loss, 0);
  EXPECT_THROW((void)meta_exit_step(three, matrix_view<const double>(x), nothing{}, reduction::mean, r, h, {}), config_error);
}
TEST(adaptive_depth, same_bits_with_any_number_of_workers) {
  auto model = make_model<pre_block>(3);
  model.halt = halting<double>({.exits = 3, .features = features}, {6});
  const auto x = random_matrix(200, features, 2);
  const std::vector<index_t> offsets{0, 90, 200};
  std::vector<token_t> targets(200);
  for (std::size_t i = 0; i < 200; ++i) targets[i] = static_cast<token_t>(i % classes);
  matrix<double> first;
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    context ctx{.exec = &exec, .work = &work};
    ctx.rows = {offsets};
    exit_training_record<adaptive_depth<pre_block>> r;
    auto g = make_gradient(model);
    matrix<double> dx(200, features);
    (void)aligned_exit_step(model, matrix_view<const double>(x), nothing{}, targets, {.alpha = 1}, 0, r, matrix_view<double>(dx), nothing{}, g, ctx);
    if (workers == 1) first = dx;
    EXPECT_EQ(first, dx);
  }
}

TEST(adaptive_stack, same_bits_with_any_number_of_workers_and_a_memory) {
  const auto stack = make_stack<cross_block>(3);
  const auto x = random_matrix(200, features, 2), rows = random_matrix(150, 4, 3), dy = random_matrix(600, features, 4);
  const std::vector<index_t> offsets{0, 90, 200}, memory_offsets{0, 100, 150};
  const memory_view<double> memory{rows, {memory_offsets}};
  std::vector<matrix<double>> first;
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    const context ctx{.exec = &exec, .work = &work, .key = {9}, .rows = {offsets}, .train = true};
    record_of<adaptive_stack<cross_block>> r;
    auto g = make_gradient(stack);
    matrix<double> y(600, features), dx(200, features), dm(150, 4);
    dm.setZero();
    stack.forward(x, memory, y, r, ctx);
    stack.backward(x, memory, r, dy, dx, dm, g, ctx);
    std::vector<matrix<double>> all{y, dx, dm};
    for_each_tensor(
        [&](const std::string&, role, const auto&, const auto& q) {
          if constexpr (std::same_as<std::remove_cvref_t<decltype(q)>, matrix<double>>) all.push_back(q);
        },
        stack, g);
    if (workers == 1) first = all;
    EXPECT_GT(all.size(), 40U);
    for (std::size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(all[i] == first[i]) << i << " with " << workers;
  }
}

TEST(adaptive_depth, bad_input_is_refused) {
  auto model = make_model<pre_block>(3);
  const auto x = random_matrix(4, features, 2);
  matrix<double> y(12, features), dx(4, features);
  record_of<adaptive_stack<pre_block>> r;
  EXPECT_THROW(model.stack.forward_mixed(x, {}, std::vector<std::int32_t>{1, 2, 3}, y, r, {}), shape_error);      // wrong length
  EXPECT_THROW(model.stack.forward_mixed(x, {}, std::vector<std::int32_t>{1, 2, 3, 4}, y, r, {}), config_error);  // more exits than blocks
  EXPECT_THROW(model.stack.forward_mixed(x, {}, std::vector<std::int32_t>{0, 2, 3, 1}, y, r, {}), config_error);
  EXPECT_THROW((void)exit_gradient_scales(3, 0), config_error);
  exit_training_record<adaptive_depth<pre_block>> record;
  auto g = make_gradient(model);
  const std::vector<token_t> targets(4, 1);
  const auto step = [&](const exit_training_config& c) {
    return aligned_exit_step(model, matrix_view<const double>(x), nothing{}, targets, c, 0, record, matrix_view<double>(dx), nothing{}, g, {});
  };
  EXPECT_THROW(step({.alpha = 1}), config_error);  // no head
  EXPECT_THROW(step({.alpha = -1}), config_error);
  EXPECT_THROW(step({.weights = {1, 1}}), config_error);
  EXPECT_THROW(step({.weights = {0, 0, 0}}), config_error);
  EXPECT_THROW((void)mixed_exit_step(model, matrix_view<const double>(x), nothing{}, targets, 0, reduction::sum, -100, record,
                                     matrix_view<double>(dx), nothing{}, g, {}),
               config_error);
  model.answers.exits = 2;
  EXPECT_THROW(model.output_shape(x), config_error);
  adaptive_stack<pre_block> empty;
  EXPECT_THROW(empty.output_shape(x), config_error);
}

}  // namespace adaptive_depth_tests
