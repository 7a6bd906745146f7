#include "decoder_block.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "skip_stack.hpp"
#include "trial.hpp"

namespace {

using namespace trials;

constexpr index_t features = 6, memory_features = 4;
using self_part = residual<sequential<layer_norm<double>, attention<double>>>;
using feed_part = residual<sequential<layer_norm<double>, feed_forward<double>>>;

attention<double> make_attention(rng_key key) { return attention<double>({.inputs = features, .heads = 2, .causal = true, .bias = false}, key); }
feed_forward<double> make_feed_forward(rng_key key) { return feed_forward<double>({features, 8, activation::gelu}, key); }
self_part make_self(rng_key key) { return {sequential<layer_norm<double>, attention<double>>(layer_norm<double>(features), make_attention(key))}; }
feed_part make_feed(rng_key key) { return {sequential<layer_norm<double>, feed_forward<double>>(layer_norm<double>(features), make_feed_forward(key))}; }

// --- a second input -------------------------------------------------------------------------------------------------------------------------

using decoder = decoder_block<self_part, cross_attention<double>, feed_part>;
static_assert(conditioned_layer<decoder> && conditioned_layer<conditioned_stack<decoder>> && cached_layer<decoder> && !layer<decoder>);

conditioned_stack<decoder> make_decoder() {
  conditioned_stack<decoder> s;
  for (std::uint64_t i = 0; i < 2; ++i)
    s.blocks.push_back({make_self({i}), layer_norm<double>(features),
                        cross_attention<double>({.inputs = features, .memory_inputs = memory_features, .heads = 2, .bias = false}, rng_key{i + 10}), make_feed({i + 20})});
  return s;
}

TEST(decoder_block, gradients_of_both_inputs) {
  training t;
  const std::vector<index_t> memory_offsets{0, 3, 5, 9};
  const auto x = random_matrix(t.tokens, features, 2), m = random_matrix(9, memory_features, 3);
  const auto model = make_decoder();
  expect_right_gradients(model.blocks[0], x, memory_view<double>{m, {memory_offsets}}, t.ctx);
  expect_right_gradients(model, x, memory_view<double>{m, {memory_offsets}}, t.ctx);
}

TEST(decoder_block, decodes_what_it_remembers) {
  const auto block = make_decoder().blocks[0];
  const std::vector<index_t> memory_offsets{0, 3, 8}, offsets{0, 5, 12};
  const auto x = random_matrix(12, features, 2), m = random_matrix(8, memory_features, 3);
  matrix<double> y(12, features), z = y;
  context ctx;
  ctx.rows = {offsets};
  block.forward(x, memory_view<double>{m, {memory_offsets}}, y, ctx);

  auto c = block.make_cache(2, 8);
  const std::vector<index_t> turned{1, 0}, prefix{0, 4, 8};  // the first sequence stands in slot 1
  context step;
  step.slots = turned;
  block.remember({m, {memory_offsets}}, c, step);
  step.rows = {prefix};
  matrix<double> in(8, features), out = in;
  in << x.topRows(4), x.middleRows(5, 4);
  block.decode(in, out, c, step);
  z.topRows(4) = out.topRows(4);
  z.middleRows(5, 4) = out.bottomRows(4);
  const std::vector<index_t> ones{0, 1, 2}, rest{0, 2}, only{0};
  matrix<double> in2(2, features), out2 = in2;
  step.rows = {ones};
  in2 << x.row(4), x.row(9);
  block.decode(in2, out2, c, step);
  z.row(4) = out2.row(0);
  z.row(9) = out2.row(1);
  block.permute(c, turned);  // the second sequence goes on in slot 1
  const std::vector<index_t> one{1};
  step.slots = one;
  step.rows = {rest};
  block.decode(x.bottomRows(2), out2, c, step);
  z.bottomRows(2) = out2;
  EXPECT_LT(largest_difference(y, z), 1e-12);  // the same sums, grouped otherwise
}

// --- a unit that reads inside a block -------------------------------------------------------------------------------------------------------

using memory = product_key_memory<double, shared_table<dense_table<double>>>;
using block = tapped_block<self_part, feed_forward<double>>;
static_assert(tapped_layer<block> && layer<skip_stack<block, memory>>);

skip_stack<block, memory> make_skip_stack() {
  skip_stack<block, memory> s;
  const shared_table<dense_table<double>> pool(dense_table<double>(16, features, rng_key{40}));
  for (std::uint64_t i = 0; i < 4; ++i) s.blocks.push_back({make_self({i}), layer_norm<double>(features), make_feed_forward({i + 20})});
  for (std::uint64_t i = 0; i < 2; ++i)
    s.units.push_back(memory({.inputs = features, .heads = 2, .sub_keys = 4, .key_width = 4, .top_k = 3}, pool, {}, rng_key{i + 30}));
  s.ranges = {{0, 2}, {1, 3}};  // they overlap
  return s;
}

TEST(skip_stack, gradients_with_overlapping_units_and_a_shared_table) {
  training t;
  expect_right_gradients(make_skip_stack(), random_matrix(t.tokens, features, 2), t.ctx);
}

TEST(skip_stack, without_units_it_is_a_stack) {
  auto skips = make_skip_stack();
  skips.units.clear();
  skips.ranges.clear();
  const stack<block> plain{skips.blocks};
  training t;
  const auto x = random_matrix(t.tokens, features, 2);
  matrix<double> y(t.tokens, features), z = y, w = y;
  skips.forward(x, y, t.ctx);
  plain.forward(x, z, t.ctx);
  make_skip_stack().forward(x, w, t.ctx);
  EXPECT_EQ(y, z);
  EXPECT_GT(largest_difference(y, w), 1e-3);
}

// --- one parameter, two uses ----------------------------------------------------------------------------------------------------------------

/// logits = trunk(E[ids]) Eᵀ. The gradient of E is dense, for every row of it makes a logit.
struct tied_model {
  using scalar = double;
  using trunk_type = stack<sequential<self_part, feed_part>>;
  using input_type = std::span<const token_t>;
  using input_gradient_type = nothing;
  struct record {
    record_of<trunk_type> trunk;
    matrix<double> embedded, h;
  };
  struct gradient {
    matrix<double> weight;
    gradient_of<trunk_type> trunk;
  };

  matrix<double> weight;  // [tokens x D]
  trunk_type trunk;

  shape output_shape(input_type ids) const { return {static_cast<index_t>(ids.size()), weight.rows()}; }
  void forward(input_type ids, matrix_view<double> y, const context& ctx) const {
    record r;
    forward(ids, y, r, ctx);
  }
  void forward(input_type ids, matrix_view<double> y, record& r, const context& ctx) const {
    r.embedded.resize(static_cast<index_t>(ids.size()), weight.cols());
    r.h.resize(r.embedded.rows(), r.embedded.cols());
    for (std::size_t t = 0; t < ids.size(); ++t) r.embedded.row(static_cast<index_t>(t)) = weight.row(ids[t]);
    trunk.forward(r.embedded, r.h, r.trunk, ctx);
    gemm_nt<double>(r.h, weight, y, ctx);
  }
  void backward(input_type ids, const record& r, matrix_view<const double> dy, nothing, gradient& g, const context& ctx) const {
    const scratch<double> dh(ctx, r.h.rows(), r.h.cols()), de(ctx, r.h.rows(), r.h.cols());
    gemm_tn<double>(dy, r.h, g.weight, ctx, update::add);
    gemm_nn<double>(dy, weight, dh, ctx);
    trunk.backward(r.embedded, r.trunk, dh, de, g.trunk, ctx);
    for (std::size_t t = 0; t < ids.size(); ++t) g.weight.row(ids[t]) += de.map().row(static_cast<index_t>(t));
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("trunk", s.trunk...);
  }
};
static_assert(layer<tied_model>);

TEST(tied_embeddings, gradients_of_both_uses_add_up) {
  tied_model model{random_matrix(7, features, 1), {}};
  model.trunk.blocks.push_back(sequential<self_part, feed_part>(make_self({1}), make_feed({2})));
  const std::vector<token_t> ids{1, 4, 2, 2, 0, 3, 1, 1, 6, 2, 5, 5};
  training t;
  expect_right_gradients(model, std::span<const token_t>(ids), t.ctx);
  EXPECT_EQ(count_parameters(model), 7 * features + count_parameters(model.trunk));
}

}  // namespace
