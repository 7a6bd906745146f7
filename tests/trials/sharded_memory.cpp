#include <thread>

#include "lithe/layers/memory/product_key_memory.hpp"
#include "sharded_table.hpp"
#include "trial.hpp"

namespace {

using namespace trials;

using table = sharded_table<double>;
using sharded_memory = product_key_memory<double, table>;
using dense_memory = product_key_memory<double>;
static_assert(value_table<table> && layer<sharded_memory>);

constexpr index_t features = 6, slots = 16;

product_key_memory_config config(bool experts) {
  return {.inputs = features, .heads = 2, .sub_keys = 4, .key_width = 4, .top_k = 3,
          .readout = {.kind = experts ? memory_readout_kind::experts : memory_readout_kind::plain}};
}
std::shared_ptr<shard_world<double>> split(const dense_table<double>& whole, std::size_t ranks) {
  const index_t n = whole.rows() / static_cast<index_t>(ranks);
  std::vector<dense_table<double>> shards(ranks, dense_table<double>(n, whole.cols()));
  for (index_t i = 0; i < whole.rows(); ++i) shards[static_cast<std::size_t>(i / n)].view().map().row(i % n) = whole.view().map().row(i);
  return std::make_shared<shard_world<double>>(std::move(shards));
}

/// What one rank sees of a training step, and the whole of it.
template <class L>
struct step {
  matrix<double> y, dx;
  gradient_of<L> g;
  void run(const L& l, matrix_view<const double> x, matrix_view<const double> dy) {
    workspace work;
    context ctx;
    ctx.work = &work;
    y.resize(x.rows(), features);
    dx.resize(x.rows(), features);
    g = make_gradient(l);
    record_of<L> r;
    l.forward(x, y, r, ctx);
    l.backward(x, r, dy, dx, g, ctx);
  }
};

void expect_equal_to_the_dense_table(bool experts, std::size_t ranks) {
  constexpr index_t tokens = 6;  // of a rank
  const auto n = static_cast<index_t>(ranks);
  const dense_table<double> values(slots, features, rng_key{1}), down(slots, features, rng_key{2});
  const matrix<double> x = random_matrix(tokens * n, features, 3), dy = random_matrix(tokens * n, features, 4);
  const dense_memory whole(config(experts), values, experts ? down : dense_table<double>(), rng_key{5});
  step<dense_memory> expected;
  expected.run(whole, x, dy);

  const auto value_world = split(values, ranks), down_world = split(down, ranks);
  std::vector<step<sharded_memory>> got(ranks);
  {
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < ranks; ++r)
      threads.emplace_back([&, r] {
        const sharded_memory mine(config(experts), table(value_world, r), experts ? table(down_world, r) : table(), rng_key{5});
        const index_t first = static_cast<index_t>(r) * tokens;
        got[r].run(mine, x.middleRows(first, tokens), dy.middleRows(first, tokens));
      });
    for (auto& t : threads) t.join();
  }
  // The same sums, in another order where they cross ranks.
  matrix<double> keys = matrix<double>::Zero(expected.g.keys.keys.rows(), expected.g.keys.keys.cols());
  double most = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    const index_t first = static_cast<index_t>(r) * tokens, own = slots / n, first_row = static_cast<index_t>(r) * own;
    EXPECT_LT(largest_difference(got[r].y, expected.y.middleRows(first, tokens)), 1e-12);
    EXPECT_LT(largest_difference(got[r].dx, expected.dx.middleRows(first, tokens)), 1e-12);
    keys += got[r].g.keys.keys;
    EXPECT_EQ(rows_of(got[r].g.values).total_rows, own);
    for (index_t i = 0; i < own; ++i)
      for (index_t j = 0; j < features; ++j) {
        EXPECT_NEAR(got[r].g.values(i, j), expected.g.values(first_row + i, j), 1e-12);
        if (experts) {
          EXPECT_NEAR(got[r].g.down(i, j), expected.g.down(first_row + i, j), 1e-12);
        }
        most = std::max(most, std::abs(got[r].g.values(i, j)));
      }
  }
  EXPECT_LT(largest_difference(keys, expected.g.keys.keys), 1e-12);
  EXPECT_GT(most, 0.1);
}

TEST(sharded_table, equals_the_dense_table) {
  for (const std::size_t ranks : {1U, 2U, 4U}) expect_equal_to_the_dense_table(false, ranks);
}
TEST(sharded_table, equals_the_dense_tables_of_experts) {
  for (const std::size_t ranks : {1U, 2U, 4U}) expect_equal_to_the_dense_table(true, ranks);
}

TEST(sharded_table, gradients_of_a_lone_rank) {
  const dense_table<double> values(slots, features, rng_key{1});
  const sharded_memory alone(config(false), table(split(values, 1), 0), table(), rng_key{5});
  expect_right_gradients(alone, random_matrix(9, features, 3));
}

TEST(sharded_table, a_rank_moves_its_own_rows) {
  const dense_table<double> values(slots, features, rng_key{1});
  const auto world = split(values, 2);
  table second(world, 1);
  std::vector<double> row(features);
  second.read_row(3, row);
  EXPECT_EQ(row[2], values.view()(8 + 3, 2));
  row[2] = 7;
  second.write_row(3, row);
  matrix<double> y(1, features);
  const std::vector<slot_t> slot{8 + 3};
  const std::vector<double> weight{2};
  table(world, 0).gather_sum({slot, weight, 1}, y, {});  // the other rank sees it
  EXPECT_EQ(y(0, 2), 14);
}

}  // namespace
