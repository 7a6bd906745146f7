#include <gtest/gtest.h>

#include "lithe/compose/reversible.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "lithe/layers/memory/ultra_mem.hpp"
#include "lithe/layers/mixture_of_experts.hpp"
#include "lithe/training/clip.hpp"
#include "lithe/training/losses.hpp"

// Losses that layers add of their own accord, in parts that go in chunks and in batches that go in parts.
namespace own_losses_tests {

using namespace lithe;

constexpr index_t T = 64, D = 6;

mixture_of_experts<double> experts() {
  return {{.features = D, .hidden = 5, .experts = 4, .top_k = 2, .balance = 0.01, .z_loss = 0.002}, rng_key{1}};
}
ultra_mem<double> memory() {
  ultra_mem_config c{
      .features = D, .sub_keys = 8, .key_width = 4, .top_k = 3, .value_width = 4, .rank_loss = 0.3, .balance = 0.01};
  c.query_conv = 0;
  return {c, rng_key{2}};
}
matrix<double> input(index_t rows, index_t cols) {
  matrix<double> x(rows, cols);
  fill_normal<double>(x, 1.0, rng_key{3});
  return x;
}

/// Loss and gradients of the second part alone, whose output is not looked at.
template <class Part>
struct outcome {
  double loss;
  gradient_of<Part> g;
};
template <class Part>
outcome<Part> run(const Part& part, index_t chunk, std::span<const std::uint8_t> mask = {}) {
  using block_type = reversible<linear<double>, Part>;
  const block_type block(linear<double>({D, D}, rng_key{4}), part, chunk);
  matrix<double> xy = input(T, 2 * D), dxy = matrix<double>::Zero(T, 2 * D);
  context ctx;
  ctx.mask = mask;
  record_of<block_type> r;
  auto g = make_gradient(block);
  block.forward_in_place(xy, &r, ctx);
  block.reverse(xy, dxy, r, g, ctx);
  return {auxiliary_loss(r), std::get<1>(g.parts)};
}

TEST(own_losses, the_balance_of_experts_does_not_grow_with_the_number_of_chunks) {
  const auto layer = experts();
  const auto whole = run(layer, 0);
  EXPECT_GT(whole.loss, 0.01);
  const auto size = whole.g.router.weight.norm();
  EXPECT_GT(size, 1e-4);
  for (const index_t chunk : {63, 32, 16, 7, 4}) {
    const auto parts = run(layer, chunk);
    // Balance within chunks differs a little from that of all rows.
    EXPECT_NEAR(parts.loss, whole.loss, 0.1 * whole.loss) << chunk;
    EXPECT_NEAR(parts.g.router.weight.norm(), size, 0.5 * size) << chunk;
  }
}

TEST(own_losses, means_over_rows_and_losses_of_parameters_are_the_same_in_chunks) {
  auto layer = experts();
  layer.config.balance = 0;  // leaves the z-loss, a plain mean
  std::vector<std::uint8_t> mask(T, 1);
  for (std::size_t t = 40; t < 62; ++t) mask[t] = t % 3 == 0;
  const auto near = [](const matrix<double>& a, const matrix<double>& b) {
    return (a - b).cwiseAbs().maxCoeff() < 1e-13;
  };
  for (const auto& rows : {std::span<const std::uint8_t>{}, std::span<const std::uint8_t>(mask)}) {
    const auto whole = run(layer, 0, rows);
    EXPECT_GT(whole.g.router.weight.norm(), 1e-5);
    for (const index_t chunk : {63, 16, 7, 1}) {
      const auto parts = run(layer, chunk, rows);
      EXPECT_NEAR(parts.loss, whole.loss, 1e-14) << chunk;
      EXPECT_TRUE(near(parts.g.router.weight, whole.g.router.weight)) << chunk;
    }
  }
  const auto keys = memory();
  const auto whole = run(keys, 0);
  EXPECT_GT(whole.g.search.cores.norm(), 1e-3);
  for (const index_t chunk : {32, 5}) {
    const auto parts = run(keys, chunk);
    EXPECT_NEAR(parts.loss, whole.loss, 0.05 * whole.loss) << "the balance of keys within chunks";
    EXPECT_TRUE(near(parts.g.search.cores, whole.g.search.cores)) << "the loss of the cores' singular values";
  }
}

TEST(own_losses, an_output_layer_in_chunks_trains_its_own_loss_as_a_mean) {
  auto layer = experts();
  layer.config.balance = 0;
  const matrix<double> h = input(T, D);
  const std::vector<token_t> none(T, -100);  // no other loss
  matrix<double> dh(T, D);
  auto whole = make_gradient(layer), parts = make_gradient(layer);
  chunked_cross_entropy(layer, h, none, {}, dh, whole, {}, T);
  chunked_cross_entropy(layer, h, none, {}, dh, parts, {}, 7);
  EXPECT_GT(whole.router.weight.norm(), 1e-5);
  EXPECT_LT((whole.router.weight - parts.router.weight).cwiseAbs().maxCoeff(), 1e-15);
}

TEST(own_losses, micro_batches) {
  auto layer = experts();
  layer.config.balance = 0;
  const matrix<double> x = input(T, D), dy = matrix<double>::Constant(T, D, 0.1);
  matrix<double> y(T, D), dx(T, D);
  const auto backward = [&](index_t first, index_t n, double rows_share, double scale, auto& g) {
    context ctx;
    ctx.auxiliary = rows_share;
    record_of<mixture_of_experts<double>> r;
    const matrix<double> part = scale * dy;
    layer.forward(view(x).slice_rows(first, n), view(y).slice_rows(first, n), r, ctx);
    layer.backward(view(x).slice_rows(first, n), r, view(part).slice_rows(first, n), view(dx).slice_rows(first, n), g,
                   ctx);
    return rows_share * auxiliary_loss(r);
  };
  auto whole = make_gradient(layer), summed = make_gradient(layer), averaged = make_gradient(layer);
  const double loss = backward(0, T, 1, 1, whole);
  // The parts' losses are shares of the whole loss: auxiliary = rows / all rows.
  EXPECT_NEAR(backward(0, 48, 0.75, 1, summed) + backward(48, 16, 0.25, 1, summed), loss, 1e-15);
  EXPECT_LT((whole.router.weight - summed.router.weight).cwiseAbs().maxCoeff(), 1e-14);
  // The parts' losses are means of their own, and the gradient is scaled at the end: auxiliary = 1.
  for (const index_t first : {0, 32}) backward(first, 32, 1, 2, averaged);
  scale_gradient(layer, averaged, 0.5);
  EXPECT_LT((whole.router.weight - averaged.router.weight).cwiseAbs().maxCoeff(), 1e-14);
}

TEST(picks, are_written_into_views_whose_rows_lie_apart) {
  const matrix<double> x = input(5, D);
  matrix<double> y(5, D);
  const product_key_memory<double> l({.inputs = D, .heads = 2, .sub_keys = 4, .key_width = 4, .top_k = 2}, rng_key{5});
  record_of<product_key_memory<double>> r;
  l.forward(x, y, r, {});
  matrix<slot_t> slots(5, 4), wide_slots = matrix<slot_t>::Constant(5, 7, 77);
  matrix<double> weights(5, 4), wide = matrix<double>::Constant(5, 7, 77);
  l.picked(r, slots, weights, {});
  l.picked(r, view(wide_slots).slice_cols(2, 4), view(wide).slice_cols(2, 4), {});
  EXPECT_EQ(wide.middleCols(2, 4), weights);
  EXPECT_EQ(wide_slots.middleCols(2, 4), slots);
  EXPECT_TRUE((wide.leftCols(2).array() == 77).all() && (wide.rightCols(1).array() == 77).all());
  EXPECT_TRUE((wide_slots.leftCols(2).array() == 77).all() && (wide_slots.rightCols(1).array() == 77).all());
  EXPECT_THROW(l.picked(r, slots, wide, {}), shape_error);

  const auto m = memory();
  record_of<ultra_mem<double>> rm;
  m.forward(x, y, rm, {});
  const index_t K = rm.addresses.value.cols();
  matrix<slot_t> rows(5, K), groups(5, K), all = matrix<slot_t>::Constant(5, 2 * K + 1, 77);
  m.picked(rm, rows, groups, {});
  m.picked(rm, view(all).slice_cols(0, K), view(all).slice_cols(K + 1, K), {});
  EXPECT_EQ(all.leftCols(K), rows);
  EXPECT_EQ(all.rightCols(K), groups);
  EXPECT_TRUE((all.col(K).array() == 77).all());
  EXPECT_THROW(m.picked(rm, rows, all, {}), shape_error);
}

}  // namespace own_losses_tests
