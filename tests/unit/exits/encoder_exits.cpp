#include "lithe/compose/encoder_exits.hpp"

#include <gtest/gtest.h>

#include <set>

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/exit_losses.hpp"

namespace encoder_exits_tests {

using namespace lithe;

constexpr index_t features = 6, depth = 4;
using block = sequential<residual<sequential<layer_norm<double>, attention<double>>>, residual<sequential<layer_norm<double>, feed_forward<double>>>>;
using model_type = encoder_exits<block>;

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}
model_type make_model(index_t classes = 3, bool shared_pooler = false) {
  adaptive_stack<block> s;
  for (index_t n = 0; n < depth; ++n) {
    const rng_key key{static_cast<std::uint64_t>(n + 1)};
    s.blocks.push_back(block({sequential(layer_norm<double>(features), attention<double>({.inputs = features, .heads = 2}, key.child(0)))},
                             {sequential(layer_norm<double>(features), feed_forward<double>({features, 12, activation::gelu}, key.child(1)))}));
  }
  return model_type(std::move(s), {.exits = depth, .features = features, .classes = classes, .shared_pooler = shared_pooler}, {9});
}
/// Twelve sequences of 1 to 4 rows.
struct batch {
  std::vector<index_t> offsets{0};
  matrix<double> x;
  context ctx;
  batch() {
    for (index_t i = 0; i < 12; ++i) offsets.push_back(offsets.back() + 1 + i % 4);
    x = random_matrix(offsets.back(), features, 3);
    ctx.rows = {offsets};
  }
};
struct result {
  matrix<double> logits;
  std::vector<std::int32_t> exits;
};
result classify(const model_type& m, matrix_view<const double> x, const encoder_exit_rule& rule, const context& ctx) {
  result r{matrix<double>(ctx.rows.count(), m.classes()), std::vector<std::int32_t>(static_cast<std::size_t>(ctx.rows.count()))};
  m.classify(x, r.logits, r.exits, rule, ctx);
  return r;
}

TEST(encoder_exits, same_bits_with_any_number_of_workers) {
  const batch b;
  const auto m = make_model();
  result first;
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    context ctx = b.ctx;
    ctx.exec = &exec;
    ctx.work = &work;
    auto r = classify(m, b.x, {.patience = 2}, ctx);
    if (workers == 1) first = std::move(r);
    else EXPECT_TRUE(r.logits == first.logits && r.exits == first.exits) << workers;
  }
}

TEST(encoder_exits, a_batch_is_its_sequences_one_by_one_and_agrees_with_the_full_pass) {
  const batch b;
  for (const bool shared : {false, true}) {
    const auto m = make_model(3, shared);
    matrix<double> all(depth * 12, 3);
    record_of<model_type> r;
    m.forward(b.x, all, r, b.ctx);
    for (const encoder_exit_rule& rule : {encoder_exit_rule{.kind = encoder_confidence::entropy, .thresholds = {1.04}},
                                          encoder_exit_rule{.kind = encoder_confidence::relative_entropy, .thresholds = {0.9, 0.95, 0.97}},
                                          encoder_exit_rule{.kind = encoder_confidence::patience, .patience = 1}, encoder_exit_rule{}}) {
      const auto out = classify(m, b.x, rule, b.ctx);
      std::set<std::int32_t> seen(out.exits.begin(), out.exits.end());
      EXPECT_EQ(seen.size() > 1, rule.kind != encoder_confidence::never);
      for (index_t s = 0; s < 12; ++s) {
        const index_t begin = b.offsets[static_cast<std::size_t>(s)], n = b.offsets[static_cast<std::size_t>(s) + 1] - begin;
        const auto one = classify(m, matrix_view<const double>(b.x).slice_rows(begin, n), rule, {});
        EXPECT_EQ(one.exits[0], out.exits[static_cast<std::size_t>(s)]);
        // Rows grouped otherwise are summed otherwise.
        EXPECT_LT((one.logits.row(0) - out.logits.row(s)).cwiseAbs().maxCoeff(), 1e-12);
        EXPECT_LT((all.row(12 * (out.exits[static_cast<std::size_t>(s)] - 1) + s) - out.logits.row(s)).cwiseAbs().maxCoeff(), 1e-12);
      }
    }
  }
}

TEST(encoder_exits, padding_changes_nothing_whoever_leaves) {
  const auto m = make_model();
  const batch b;
  const encoder_exit_rule rule{.kind = encoder_confidence::entropy, .thresholds = {1.04}};
  const auto plain = classify(m, b.x, rule, b.ctx);
  // The same sequences, each with two rows of padding behind it.
  matrix<double> x = random_matrix(b.x.rows() + 24, features, 8);
  std::vector<index_t> offsets{0};
  std::vector<std::uint8_t> mask;
  for (index_t s = 0; s < 12; ++s) {
    const index_t begin = b.offsets[static_cast<std::size_t>(s)], n = b.offsets[static_cast<std::size_t>(s) + 1] - begin;
    x.middleRows(offsets.back(), n) = b.x.middleRows(begin, n);
    mask.insert(mask.end(), static_cast<std::size_t>(n), 1);
    mask.insert(mask.end(), 2, 0);
    offsets.push_back(offsets.back() + n + 2);
  }
  context ctx;
  ctx.rows = {offsets};
  ctx.mask = mask;
  const auto padded = classify(m, x, rule, ctx);
  EXPECT_GT(std::set<std::int32_t>(plain.exits.begin(), plain.exits.end()).size(), 1U);
  EXPECT_EQ(padded.exits, plain.exits);
  EXPECT_LT((padded.logits - plain.logits).cwiseAbs().maxCoeff(), 1e-12);
}

TEST(encoder_exits, rules_that_never_and_always_leave) {
  const batch b;
  const auto m = make_model();
  const std::vector<std::int32_t> top(12, depth), first(12, 1);
  EXPECT_EQ(classify(m, b.x, {}, b.ctx).exits, top);
  EXPECT_EQ(classify(m, b.x, {.kind = encoder_confidence::entropy, .thresholds = {-1}}, b.ctx).exits, top);
  EXPECT_EQ(classify(m, b.x, {.kind = encoder_confidence::patience, .patience = 0}, b.ctx).exits, top);
  EXPECT_EQ(classify(m, b.x, {.kind = encoder_confidence::patience, .patience = depth}, b.ctx).exits, top);
  EXPECT_EQ(classify(m, b.x, {.kind = encoder_confidence::entropy, .thresholds = {std::log(3) + 1e-9}}, b.ctx).exits, first);
  EXPECT_EQ(classify(m, b.x, {.kind = encoder_confidence::relative_entropy, .thresholds = {1 + 1e-9}}, b.ctx).exits, first);
}

TEST(encoder_exits, patience_counts_each_sequence_for_itself) {
  // Against the definition, on the answers of all exits.
  const batch b;
  for (const index_t classes : {3, 1}) {
    const auto m = make_model(classes);
    matrix<double> all(depth * 12, classes);
    record_of<model_type> r;
    m.forward(b.x, all, r, b.ctx);
    for (const index_t patience : {1, 2}) {
      const auto out = classify(m, b.x, {.kind = encoder_confidence::patience, .patience = patience, .difference = 0.4}, b.ctx);
      for (index_t s = 0; s < 12; ++s) {
        std::int32_t exit = depth;
        index_t count = 0;
        for (index_t n = 1; n < depth && exit == depth; ++n) {
          index_t here = 0, before = 0;
          all.row(12 * n + s).maxCoeff(&here);
          all.row(12 * (n - 1) + s).maxCoeff(&before);
          const bool same = classes == 1 ? std::abs(all(12 * n + s, 0) - all(12 * (n - 1) + s, 0)) < 0.4 : here == before;
          count = same ? count + 1 : 0;
          if (count == patience) exit = static_cast<std::int32_t>(n + 1);
        }
        EXPECT_EQ(out.exits[static_cast<std::size_t>(s)], exit);
      }
    }
  }
}

TEST(encoder_exits, the_weighted_loss_of_all_exits_has_the_gradient_of_its_equation) {
  batch b;
  auto m = make_model();
  std::vector<token_t> targets;
  for (token_t i = 0; i < 12; ++i) targets.push_back(i % 3);
  const auto weights = exit_weights(exit_weighting::linear, depth);
  matrix<double> logits(depth * 12, 3), dx(b.x.rows(), features);
  record_of<model_type> r;
  auto g = make_gradient(m);
  m.forward(b.x, logits, r, b.ctx);
  (void)aligned_exit_loss<double>(logits, targets, weights, reduction::mean, -100, logits);
  m.backward(b.x, r, logits, dx, g, b.ctx);
  const auto loss = [&] {
    record_of<model_type> again;
    m.forward(b.x, logits, again, b.ctx);
    return aligned_exit_loss<double>(logits, targets, weights, reduction::mean, -100, {}).loss;
  };
  const auto check = [&](double& number, double gradient) {
    const double before = number;
    number = before + 1e-5;
    const double up = loss();
    number = before - 1e-5;
    const double down = loss();
    number = before;
    EXPECT_NEAR((up - down) / 2e-5, gradient, 1e-9);  // central differences of a loss of size 1
  };
  for (index_t i = 0; i < b.x.size(); i += 17) check(b.x.data()[i], dx.data()[i]);
  for_each_tensor([&](const std::string&, role, auto& p, auto& q) { check(p.data()[p.size() / 2], q.data()[p.size() / 2]); }, m, g);
  EXPECT_GT(dx.cwiseAbs().maxCoeff(), 1e-3);
}

TEST(encoder_exits, bad_input_is_refused) {
  const auto m = make_model();
  const batch b;
  EXPECT_THROW((void)classify(m, b.x, {.kind = encoder_confidence::patience, .patience = -1}, b.ctx), config_error);
  EXPECT_THROW((void)classify(m, b.x, {.kind = encoder_confidence::entropy, .thresholds = {0.1, 0.2}}, b.ctx), config_error);
  EXPECT_THROW((void)classify(m, b.x, {.kind = encoder_confidence::entropy, .thresholds = {std::nan("")}}, b.ctx), config_error);
  context empty;
  const std::vector<index_t> offsets{0, 3, 3};
  empty.rows = {offsets};
  EXPECT_THROW((void)classify(m, random_matrix(3, features, 1), {}, empty), shape_error);
  EXPECT_THROW(model_type(m.stack, {.exits = 3, .features = features, .classes = 2}, {}), config_error);
}

}  // namespace encoder_exits_tests
