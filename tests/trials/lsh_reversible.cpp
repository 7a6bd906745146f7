#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "lsh_attention.hpp"
#include "reversible.hpp"
#include "trial.hpp"

namespace {

using namespace trials;

constexpr index_t features = 6;

/// Chooses again, with another key, where it should keep its choice.
template <layer L>
struct forgetful : L {
  using record = record_of<L>;
  using gradient = gradient_of<L>;
  using scalar = typename L::scalar;
  explicit forgetful(L l) : L(std::move(l)) {}
  void forward(matrix_view<const scalar> x, matrix_view<scalar> y, const context& ctx) const { L::forward(x, y, ctx); }
  void forward(matrix_view<const scalar> x, matrix_view<scalar> y, record& r, context ctx) const {
    if (ctx.replay) ctx.key = ctx.key.child(99);
    ctx.replay = false;
    L::forward(x, y, r, ctx);
  }
};

template <class Attention>
using attention_part = sequential<layer_norm<double>, Attention, dropout<double>>;
using feed_part = sequential<layer_norm<double>, feed_forward<double>, dropout<double>>;
template <class Attention>
using block = reversible<attention_part<Attention>, feed_part>;
static_assert(layer<lsh_attention<double>> && layer<lsh_attention<float>> && layer<block<lsh_attention<double>>>);
static_assert(layer<reversible_stack<block<lsh_attention<double>>>>);

lsh_attention<double> make_attention(std::uint64_t seed) {
  lsh_attention<double> a({.features = features, .heads = 2, .head_size = 3, .buckets = 4, .rounds = 2, .chunk = 2}, rng_key{seed});
  for (auto* l : {&a.query_key, &a.value, &a.output}) l->weight *= 2;  // scores far from 0, so that buckets matter
  return a;
}
template <class Attention = lsh_attention<double>>
block<Attention> make_block(std::uint64_t seed, double rate = 0.2) {
  return {attention_part<Attention>(layer_norm<double>(features), Attention(make_attention(seed)), dropout<double>(rate)),
          feed_part(layer_norm<double>(features), feed_forward<double>({features, 8, activation::gelu}, rng_key{seed + 100}), dropout<double>(rate))};
}
template <class Attention = lsh_attention<double>>
reversible_stack<block<Attention>> make_stack(std::size_t depth) {
  reversible_stack<block<Attention>> s;
  for (std::size_t i = 0; i < depth; ++i) s.blocks.push_back(make_block<Attention>(i + 1));
  return s;
}
std::size_t choice_bytes(std::size_t tokens) { return 2 * 2 * tokens * sizeof(std::uint16_t); }  // heads x rounds

TEST(lsh_attention, gradients_with_the_hash_held) {
  training t;
  expect_right_gradients(make_attention(1), random_matrix(t.tokens, features, 2), t.ctx);
}

TEST(lsh_attention, one_bucket_of_one_chunk_is_exact_attention) {
  // All tokens in one chunk: every round sees all pairs, and the rounds' equal weights are those of one round.
  auto a = make_attention(1);
  a.config.chunk = 64;
  auto one = a;
  one.config.rounds = 1;
  training t;
  const auto x = random_matrix(t.tokens, features, 2);
  matrix<double> y(t.tokens, features), z(t.tokens, features);
  a.forward(x, y, t.ctx);
  one.forward(x, z, t.ctx);
  EXPECT_LT(largest_difference(y, z), 1e-12);  // sums of 12 numbers of size 1, in another order
  const matrix<double> q = x * one.query_key.weight.transpose(), v = x * one.value.weight.transpose();
  matrix<double> o = matrix<double>::Zero(t.tokens, features);
  for (index_t s = 0; s < 3; ++s)
    for (index_t i = t.offsets[static_cast<std::size_t>(s)]; i < t.offsets[static_cast<std::size_t>(s) + 1]; ++i)
      for (index_t h = 0; h < 2; ++h) {
        double sum = 0;
        Eigen::RowVector3d out = Eigen::RowVector3d::Zero();
        const index_t begin = t.offsets[static_cast<std::size_t>(s)];
        for (index_t j = begin; j <= i; ++j) {
          const Eigen::RowVector3d qi = q.row(i).segment<3>(3 * h), qj = q.row(j).segment<3>(3 * h);
          const double e = i == begin ? 1 : i == j ? 0 : std::exp(qi.dot(qj) / std::sqrt(3) / std::sqrt(qj.squaredNorm() / 3 + 1e-6));
          sum += e;
          out += e * v.row(j).segment<3>(3 * h);
        }
        o.row(i).segment<3>(3 * h) = out / sum;
      }
  EXPECT_LT(largest_difference(z, o * one.output.weight.transpose()), 1e-12);
}

TEST(lsh_attention, keeps_its_bucket_ids_and_nothing_else) {
  const auto a = make_attention(1);
  training t;
  const auto x = random_matrix(t.tokens, features, 2);
  matrix<double> y(t.tokens, features), z(t.tokens, features), w(t.tokens, features);
  record_of<lsh_attention<double>> r;
  a.forward(x, y, r, t.ctx);
  const auto ids = r.buckets.value;
  EXPECT_GT(ids.maxCoeff(), ids.minCoeff());
  forget(r);
  EXPECT_EQ(bytes(r), choice_bytes(12));
  EXPECT_EQ(r.buckets.value, ids);

  context other = t.ctx;
  other.key = {4711};
  other.replay = true;
  a.forward(x, z, r, other);
  EXPECT_EQ(y, z);  // never hashed again, whatever the key
  other.replay = false;
  a.forward(x, w, r, other);
  EXPECT_NE(r.buckets.value, ids);
  EXPECT_GT(largest_difference(y, w), 1e-3);

  record_of<lsh_attention<double>> empty;
  other.replay = true;
  EXPECT_THROW(a.forward(x, w, empty, other), state_error);
}

TEST(reversible, gradients_of_a_block_and_of_a_stack) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * features, 3);
  expect_right_gradients(make_block(1), x, t.ctx);
  expect_right_gradients(make_stack(3), x, t.ctx);
}

TEST(reversible, equals_the_stack_that_stores_everything) {
  // reversible::backward computes its record again from x; the stack of blocks stores every x, the reversible one none.
  training t;
  const auto x = random_matrix(t.tokens, 2 * features, 3), dy = random_matrix(t.tokens, 2 * features, 4);
  const auto model = make_stack(4);
  const stack<block<lsh_attention<double>>> stored{model.blocks};
  matrix<double> y(t.tokens, 2 * features), z = y, dx = y, dz = y;
  record_of<decltype(model)> r;
  record_of<decltype(stored)> s;
  model.forward(x, y, r, t.ctx);
  stored.forward(x, z, s, t.ctx);
  EXPECT_EQ(y, z);
  auto g = make_gradient(model);
  auto h = make_gradient(stored);
  model.backward(x, r, dy, dx, g, t.ctx);
  stored.backward(x, s, dy, dz, h, t.ctx);
  EXPECT_LT(largest_difference(dx, dz), 1e-11);  // inputs are reconstructed to about 1e-15 a block
  for (std::size_t i = 0; i < 4; ++i) {
    const auto [difference, largest] = compare_gradients(model.blocks[i], g.blocks[i], h.blocks[i]);
    EXPECT_LT(difference, 1e-11 * largest);
    EXPECT_GT(largest, 0.1);
  }
}

TEST(reversible, memory_is_one_output_and_the_choices) {
  const auto x = random_matrix(12, 2 * features, 3);
  std::size_t scratch_of_depth_2 = 0;
  for (const std::size_t depth : {2U, 8U}) {
    training t;
    const auto model = make_stack(depth);
    matrix<double> y(12, 2 * features), dx = y;
    record_of<decltype(model)> r;
    model.forward(x, y, r, t.ctx);
    const std::size_t keys = 3 * sizeof(std::uint64_t) + 2 * sizeof(index_t);  // of the block and of its two dropouts, and the rows of these
    EXPECT_EQ(bytes(r), static_cast<std::size_t>(x.size()) * sizeof(double) + depth * (choice_bytes(12) + keys));
    auto g = make_gradient(model);
    model.backward(x, r, y, dx, g, t.ctx);
    if (depth == 2)
      scratch_of_depth_2 = t.work.bytes();
    else
      EXPECT_EQ(t.work.bytes(), scratch_of_depth_2);
  }
}

TEST(reversible, forgotten_choices_break_the_gradient) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * features, 3), dy = random_matrix(t.tokens, 2 * features, 4);
  const auto model = make_stack(3);
  const auto wrong = make_stack<forgetful<lsh_attention<double>>>(3);
  matrix<double> y(t.tokens, 2 * features), z = y, dx = y, dz = y;
  record_of<decltype(model)> r;
  record_of<decltype(wrong)> s;
  model.forward(x, y, r, t.ctx);
  wrong.forward(x, z, s, t.ctx);
  EXPECT_EQ(y, z);
  auto g = make_gradient(model);
  auto h = make_gradient(wrong);
  model.backward(x, r, dy, dx, g, t.ctx);
  wrong.backward(x, s, dy, dz, h, t.ctx);
  EXPECT_GT(largest_difference(dx, dz), 1e-2 * largest_number(dx));
  EXPECT_GT(gradient_check(wrong, x, t.ctx).worst(), 1e-2);
}

}  // namespace
