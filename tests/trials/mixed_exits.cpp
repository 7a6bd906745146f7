#include "exit_stack.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "trial.hpp"

namespace {

using namespace trials;

constexpr index_t features = 6;
using block = sequential<residual<sequential<layer_norm<double>, attention<double>, dropout<double>>>,
                         residual<sequential<layer_norm<double>, feed_forward<double>>>>;
static_assert(layer<mixed_exit_stack<block>> && layer<aligned_stack<block>>);

template <class Container>
Container make_blocks(std::size_t depth, double rate = 0.2) {
  Container c;
  for (std::uint64_t i = 0; i < depth; ++i) {
    const rng_key key{i + 1};
    c.blocks.push_back(block({sequential<layer_norm<double>, attention<double>, dropout<double>>(
                                 layer_norm<double>(features), attention<double>({.inputs = features, .heads = 2, .causal = true, .bias = false}, key.child(0)), dropout<double>(rate))},
                             {sequential<layer_norm<double>, feed_forward<double>>(
                                 layer_norm<double>(features), feed_forward<double>({features, 8, activation::gelu}, key.child(1)))}));
  }
  return c;
}
using mixed = mixed_exit_stack<block>;

TEST(mixed_exits, gradients_with_sampled_exits) {
  training t(19);
  const auto model = make_blocks<mixed>(4);
  const auto x = random_matrix(t.tokens, features, 2);
  expect_right_gradients(model, x, t.ctx);

  matrix<double> y(t.tokens, features);
  record_of<mixed> r;
  model.forward(x, y, r, t.ctx);
  const auto [least, most] = std::minmax_element(r.exits.value.begin(), r.exits.value.end());
  EXPECT_EQ(*least, 1);
  EXPECT_EQ(*most, 4);
}

TEST(mixed_exits, a_fixed_exit_is_a_shorter_stack) {
  // In value and gradient; the blocks above have no gradient at all, though they ran.
  training t;
  const auto x = random_matrix(t.tokens, features, 2), dy = random_matrix(t.tokens, features, 3);
  for (std::size_t exit = 1; exit <= 4; ++exit) {
    auto model = make_blocks<mixed>(4);
    model.exit = static_cast<index_t>(exit);
    const auto shorter = make_blocks<stack<block>>(exit);
    matrix<double> y(t.tokens, features), z = y, dx = y, dz = y;
    record_of<mixed> r;
    record_of<stack<block>> s;
    model.forward(x, y, r, t.ctx);
    shorter.forward(x, z, s, t.ctx);
    EXPECT_EQ(y, z);
    auto g = make_gradient(model);
    auto h = make_gradient(shorter);
    model.backward(x, r, dy, dx, g, t.ctx);
    shorter.backward(x, s, dy, dz, h, t.ctx);
    EXPECT_EQ(dx, dz);
    for (std::size_t k = 0; k < 4; ++k) {
      const auto zero = make_gradient(model.blocks[k]);
      const auto [difference, largest] = compare_gradients(model.blocks[k], g.blocks[k], k < exit ? h.blocks[k] : zero);
      EXPECT_EQ(difference, 0);
      EXPECT_TRUE(k >= exit || largest > 0.1);
    }
  }
}

TEST(mixed_exits, inference_uses_the_full_model) {
  training t;
  t.ctx.train = false;
  const auto x = random_matrix(t.tokens, features, 2);
  matrix<double> y(t.tokens, features), z = y;
  make_blocks<mixed>(3).forward(x, y, t.ctx);
  make_blocks<stack<block>>(3).forward(x, z, t.ctx);
  EXPECT_EQ(y, z);
}

TEST(mixed_exits, training_sees_what_decoding_with_exits_computes) {
  // One token at a time, each through its own number of blocks; a block that it does not reach fills its cache from the copied state.
  const auto model = make_blocks<mixed>(4, 0);
  context ctx;
  ctx.train = true;
  ctx.key = {5};
  const auto x = random_matrix(10, features, 2);
  matrix<double> y(10, features), z = y, next(1, features);
  record_of<mixed> r;
  model.forward(x, y, r, ctx);

  std::vector<cache_of<block>> caches;
  for (const block& b : model.blocks) caches.push_back(make_cache(b, 1, 10));
  for (index_t j = 0; j < 10; ++j) {
    matrix<double> h = x.row(j);
    for (std::size_t k = 0; k < 4; ++k)
      if (k < static_cast<std::size_t>(r.exits.value[static_cast<std::size_t>(j)])) {
        decode(model.blocks[k], h, next, caches[k], ctx);
        h = next;
      } else {
        fill(model.blocks[k], h, caches[k], ctx);
      }
    z.row(j) = h;
  }
  EXPECT_LT(largest_difference(y, z), 1e-12);  // the same sums, grouped otherwise
}

TEST(aligned_exits, gradients_of_all_exits) {
  training t;
  expect_right_gradients(make_blocks<aligned_stack<block>>(3), random_matrix(t.tokens, features, 2), t.ctx);
}

TEST(aligned_exits, each_slice_is_a_shorter_stack) {
  training t;
  const auto x = random_matrix(t.tokens, features, 2);
  matrix<double> y(t.tokens, 3 * features), z(t.tokens, features);
  make_blocks<aligned_stack<block>>(3).forward(x, y, t.ctx);
  for (index_t n = 1; n <= 3; ++n) {
    make_blocks<stack<block>>(static_cast<std::size_t>(n)).forward(x, z, t.ctx);
    EXPECT_EQ(y.middleCols((n - 1) * features, features), z);
  }
}

}  // namespace
