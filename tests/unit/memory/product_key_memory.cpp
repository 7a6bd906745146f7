#include "lithe/layers/memory/product_key_memory.hpp"

#include <gtest/gtest.h>

#include "lithe/training/gradient_check.hpp"
#include "lithe/training/optimiser.hpp"
#include "support/same_bits.hpp"

namespace product_key_memory_tests {

using namespace lithe;
using memory = product_key_memory<double>;

product_key_memory_config small() { return {.inputs = 12, .outputs = 10, .heads = 2, .sub_keys = 7, .key_width = 8, .top_k = 4}; }

matrix<double> input(index_t rows, index_t cols = 12, std::uint64_t key = 7) {
  matrix<double> x(rows, cols);
  fill_uniform<double>(x, 1.0, rng_key{key});
  return x;
}

matrix<double> output_of(const memory& m, const matrix<double>& x, const context& ctx = {}) {
  const shape s = m.output_shape(x);
  matrix<double> y(s.rows, s.cols);
  m.forward(x, y, ctx);
  return y;
}

context training() {
  context ctx;
  ctx.train = true;
  ctx.key = {3};
  return ctx;
}

/// Gradients by central differences: 1e-5 as the specification asks, with a step of 1e-5 in double.
void expect_gradients(const product_key_memory_config& c, std::initializer_list<const char*> zero = {}) {
  const memory m(c, {5});
  const auto report = gradient_check(m, input(9, c.inputs), training());
  EXPECT_LT(report.worst(), 1e-5) << report.where();
  for (const auto& t : report.tensors) {
    const bool is_zero = std::any_of(zero.begin(), zero.end(), [&](const char* name) { return t.name == name; });
    if (is_zero)
      EXPECT_LT(t.largest, 1e-12) << t.name;
    else
      EXPECT_GT(t.largest, 1e-3) << t.name;
  }
}

/// The layer by plain loops over all slots: the specification's steps 2 to 9, plain read-out.
matrix<double> reference(const memory& m, const matrix<double>& x) {
  const auto& c = m.config;
  const index_t n = c.sub_keys, h = c.key_width / 2;
  const linear<double>& q = m.query.networks[0].maps[0];
  matrix<double> y = matrix<double>::Zero(x.rows(), c.outputs);
  for (index_t t = 0; t < x.rows(); ++t)
    for (index_t head = 0; head < c.heads; ++head) {
      std::vector<std::pair<double, index_t>> all;
      for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j) {
          double s = 0;
          for (index_t e = 0; e < h; ++e) {
            const index_t r0 = (head * 2) * h + e, r1 = (head * 2 + 1) * h + e;
            s += (q.weight.row(r0).dot(x.row(t)) + q.bias(0, r0)) * m.keys.keys((head * 2) * n + i, e);
            s += (q.weight.row(r1).dot(x.row(t)) + q.bias(0, r1)) * m.keys.keys((head * 2 + 1) * n + j, e);
          }
          all.emplace_back(s, i * n + j);
        }
      std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
      double sum = 0;
      for (index_t k = 0; k < c.top_k; ++k) sum += std::exp(all[static_cast<std::size_t>(k)].first - all[0].first);
      for (index_t k = 0; k < c.top_k; ++k) {
        const auto [s, slot] = all[static_cast<std::size_t>(k)];
        for (index_t e = 0; e < c.outputs; ++e) y(t, e) += std::exp(s - all[0].first) / sum * m.values.view()(slot, e);
      }
    }
  return y;
}

TEST(product_key_memory, equals_brute_force_over_all_slots) {
  for (const index_t k : {1, 4, 7}) {
    auto c = small();
    c.top_k = k;
    const memory m(c, {5});
    const auto x = input(6);
    EXPECT_LT((output_of(m, x) - reference(m, x)).cwiseAbs().maxCoeff(), 1e-12) << k;  // sums of a few dozen numbers near 1
  }
}

TEST(product_key_memory, gradients_of_the_plain_layer) { expect_gradients(small()); }

TEST(product_key_memory, gradients_of_memory_plus) {
  auto c = small();
  c.value_width = 6;
  c.query.norm = query_normalisation::layer;
  c.readout = {.kind = memory_readout_kind::silu_gated, .scalar_gate = true};
  expect_gradients(c);
}

TEST(product_key_memory, gradients_of_peer_experts) {
  auto c = small();
  c.readout.kind = memory_readout_kind::experts;
  c.input_norm = memory_input_norm::layer;
  c.gate.kind = memory_gate_kind::sigmoid;
  expect_gradients(c);
}

TEST(product_key_memory, gradients_of_flat_keys_with_batch_norm) {
  auto c = small();
  c.flat = true;
  c.sub_keys = 30;
  c.query.hidden = {9};
  c.query.norm = query_normalisation::batch;
  expect_gradients(c, {"query.network.linear.0.bias", "query.network.linear.1.bias"});  // a batch norm takes constants out
}

TEST(product_key_memory, gradients_of_shared_keys_unit_queries_and_rescored_gates) {
  auto c = small();
  c.share_keys = true;
  c.query.unit_length = true;
  c.query.per_group = true;
  c.query.hidden = {5};
  c.gate = {.kind = memory_gate_kind::identity, .subtract = score_shift::median, .divide_by_sum = true};
  expect_gradients(c);
}

TEST(product_key_memory, gradients_under_all_dropouts_shuffle_and_modulo) {
  auto c = small();
  c.modulo = 20;
  c.shuffle_slots = c.separate_values = true;
  c.input_dropout = c.weight_dropout = c.query.dropout = c.readout.dropout = 0.2;
  c.final_k = 3;
  c.readout.output_norm = true;
  expect_gradients(c);
}

TEST(product_key_memory, gradients_of_concatenated_heads) {
  auto c = small();
  c.concat_heads = true;
  c.value_width = 5;
  c.readout = {.kind = memory_readout_kind::linear, .bias = false};
  expect_gradients(c);
}

TEST(product_key_memory, gradients_of_shuffled_identity_queries) {
  auto c = small();
  c.key_width = 12;
  c.query.source = query_source::shuffled;
  c.query.norm = query_normalisation::rms;
  c.input_norm = memory_input_norm::rms;
  c.gate = {.kind = memory_gate_kind::relu, .temperature = 0.7};
  expect_gradients(c);
}

TEST(product_key_memory, every_option_changes_the_output) {
  const auto x = input(9);
  const auto base = output_of(memory(small(), {5}), x, training());
  const auto differs = [&](const char* what, auto&& change) {
    auto c = small();
    change(c);
    EXPECT_GT((output_of(memory(c, {5}), x, training()) - base).norm(), 1e-3) << what;
  };
  differs("heads", [](auto& c) { c.heads = 3; });
  differs("sub_keys", [](auto& c) { c.sub_keys = 8; });
  differs("key_width", [](auto& c) { c.key_width = 10; });
  differs("top_k", [](auto& c) { c.top_k = 2; });
  differs("final_k", [](auto& c) { c.final_k = 2; });
  differs("flat", [](auto& c) { c.flat = true; });
  differs("share_keys", [](auto& c) { c.share_keys = true; });
  differs("hidden", [](auto& c) { c.query.hidden = {6}; });
  differs("per_group", [](auto& c) { c.query.per_group = true; });
  differs("query bias", [](auto& c) { c.query.bias = false; });
  differs("batch norm", [](auto& c) { c.query.norm = query_normalisation::batch; });
  differs("layer norm", [](auto& c) { c.query.norm = query_normalisation::layer; });
  differs("rms norm", [](auto& c) { c.query.norm = query_normalisation::rms; });
  differs("unit_length", [](auto& c) { c.query.unit_length = true; });
  differs("query dropout", [](auto& c) { c.query.dropout = 0.5; });
  differs("relu gate", [](auto& c) { c.gate.kind = memory_gate_kind::relu; });
  differs("sigmoid gate", [](auto& c) { c.gate.kind = memory_gate_kind::sigmoid; });
  differs("identity gate", [](auto& c) { c.gate.kind = memory_gate_kind::identity; });
  differs("temperature", [](auto& c) { c.gate.temperature = 0.5; });
  differs("subtract minimum", [](auto& c) { c.gate.subtract = score_shift::minimum; });
  differs("subtract mean", [](auto& c) { c.gate.subtract = score_shift::mean; });
  differs("subtract median", [](auto& c) { c.gate.subtract = score_shift::median; });
  differs("divide_by_sum", [](auto& c) { c.gate = {.subtract = score_shift::minimum, .divide_by_sum = true}; });
  differs("experts", [](auto& c) { c.readout.kind = memory_readout_kind::experts; });
  differs("silu_gated", [](auto& c) { c.readout.kind = memory_readout_kind::silu_gated; });
  differs("linear", [](auto& c) { c.readout.kind = memory_readout_kind::linear; });
  differs("scalar_gate", [](auto& c) { c.readout.scalar_gate = true; });
  differs("output_norm", [](auto& c) { c.readout.output_norm = true; });
  differs("value dropout", [](auto& c) { c.readout.dropout = 0.5; });
  differs("input layer norm", [](auto& c) { c.input_norm = memory_input_norm::layer; });
  differs("input rms norm", [](auto& c) { c.input_norm = memory_input_norm::rms; });
  differs("shuffle_slots", [](auto& c) { c.shuffle_slots = true; });
  differs("modulo", [](auto& c) { c.modulo = 20; });
  differs("separate_values", [](auto& c) { c.separate_values = true; });
  differs("weighted", [](auto& c) { c.weighted = false; });
  differs("input_dropout", [](auto& c) { c.input_dropout = 0.5; });
  differs("weight_dropout", [](auto& c) { c.weight_dropout = 0.5; });
}

TEST(product_key_memory, detached_input_has_no_gradient) {
  auto c = small();
  c.detach_input = true;
  const memory m(c, {5});
  const auto x = input(4);
  matrix<double> y(4, 10), dx(4, 12);
  memory::record r;
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, y, dx, g, {});
  EXPECT_EQ(dx.norm(), 0);
  EXPECT_GT(g.query.networks[0].maps[0].weight.norm(), 0);
}

TEST(product_key_memory, softmax_weights_add_up_to_the_heads) {
  const memory m(small(), {5});
  const auto x = input(6);
  memory::record r;
  matrix<double> y(6, 10), w(6, m.keys.picks());
  matrix<slot_t> slots(6, m.keys.picks());
  m.forward(x, y, r, {});
  m.picked(r, slots, w, {});
  for (index_t t = 0; t < 6; ++t) EXPECT_NEAR(w.row(t).sum(), 2, 1e-12);
  EXPECT_GE(slots.minCoeff(), 0);
  EXPECT_LT(slots.maxCoeff(), 49);
}

TEST(product_key_memory, flat_keys_with_every_slot_are_dense_attention_over_the_table) {
  auto c = small();
  c.flat = true;
  c.sub_keys = c.top_k = 20;
  const memory m(c, {5});
  const auto x = input(5);
  const linear<double>& q = m.query.networks[0].maps[0];
  matrix<double> expected = matrix<double>::Zero(5, 10);
  for (index_t t = 0; t < 5; ++t)
    for (index_t head = 0; head < 2; ++head) {
      const Eigen::VectorXd query = q.weight.middleRows(head * 8, 8) * x.row(t).transpose() + q.bias.middleCols(head * 8, 8).transpose();
      Eigen::ArrayXd s = m.keys.keys.middleRows(head * 20, 20) * query;
      s = (s - s.maxCoeff()).exp();
      s /= s.sum();
      expected.row(t) += s.matrix().transpose() * m.values.view().map();
    }
  EXPECT_LT((output_of(m, x) - expected).cwiseAbs().maxCoeff(), 1e-12);
}

TEST(product_key_memory, one_head_with_one_pick_returns_a_row_and_gives_keys_no_gradient) {
  auto c = small();
  c.heads = c.top_k = 1;
  const memory m(c, {5});
  const auto x = input(5);
  memory::record r;
  matrix<double> y(5, 10), dx(5, 12);
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, y, dx, g, {});
  for (index_t t = 0; t < 5; ++t) EXPECT_TRUE(y.row(t) == m.values.view().map().row(r.pairs.value(t, 0)));
  EXPECT_EQ(g.keys.keys.norm(), 0);
  EXPECT_EQ(dx.norm(), 0);
}

TEST(product_key_memory, permuting_sub_keys_with_their_rows_changes_nothing) {
  const memory m(small(), {5});
  auto c = small();
  c.heads = 1;
  memory one(c, {5});
  const auto x = input(6);
  const auto before = output_of(one, x);
  memory moved = one;
  for (index_t i = 0; i < 7; ++i) {
    const index_t to = (i + 3) % 7;
    moved.keys.keys.row(to) = one.keys.keys.row(i);
    for (index_t j = 0; j < 7; ++j) moved.values.view().map().row(to * 7 + j) = one.values.view().map().row(i * 7 + j);
  }
  EXPECT_LT((output_of(moved, x) - before).cwiseAbs().maxCoeff(), 1e-14);
}

TEST(product_key_memory, zero_values_give_zero_but_have_a_gradient) {
  memory m(small(), {5});
  m.values.view().map().setZero();
  const auto x = input(5), dy = input(5, 10, 9);
  matrix<double> y(5, 10), dx(5, 12);
  memory::record r;
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, dy, dx, g, {});
  EXPECT_EQ(y.norm(), 0);
  EXPECT_EQ(g.keys.keys.norm(), 0);
  EXPECT_GT(g.values.values().map().norm(), 0.1);
}

TEST(product_key_memory, keys_start_as_in_the_authors_code) {
  auto c = small();
  const memory m(c, {5});
  const double bound = 1 / std::sqrt(4.0);
  // Table 3 (head 1, half 1) is drawn with seed 3.
  EXPECT_EQ(m.keys.keys(3 * 7, 0), -bound + 2 * bound * 0.5507979025745755);
  EXPECT_EQ(m.keys.keys(3 * 7, 1), -bound + 2 * bound * 0.7081478226181048);
  EXPECT_EQ(m.keys.keys(3 * 7, 2), -bound + 2 * bound * 0.29090473891294433);
}

TEST(product_key_memory, several_layers_share_one_table_and_its_gradient) {
  using table = shared_table<dense_table<double>>;
  using shared = product_key_memory<double, table>;
  const auto c = small();
  const table pool(dense_table<double>(49, 10, rng_key{1}));
  const shared a(c, pool, {}, {2}), b(c, pool, {}, {4});
  const auto x = input(6), dy = input(6, 10, 9);
  matrix<double> y(6, 10), dx(6, 12);
  shared::gradient ga = make_gradient(a), gb = make_gradient(b), both = make_gradient(a);
  shared::gradient other = make_gradient(b);
  other.values.target = both.values.target;
  for (auto [l, own, common] : {std::tuple{&a, &ga, &both}, std::tuple{&b, &gb, &other}}) {
    shared::record r;
    l->forward(x, y, r, {});
    l->backward(x, r, dy, dx, *own, {});
    l->backward(x, r, dy, dx, *common, {});
  }
  for (index_t i = 0; i < 49; ++i)
    for (index_t j = 0; j < 10; ++j) EXPECT_NEAR(rows_of(both.values)(i, j), rows_of(ga.values)(i, j) + rows_of(gb.values)(i, j), 1e-14);
}

TEST(product_key_memory, hidden_rows_give_zero_and_touch_nothing) {
  const memory m(small(), {5});
  const auto x = input(6), dy = input(6, 10, 9);
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 0, 0};
  context ctx;
  ctx.mask = mask;
  matrix<double> y(6, 10), dx(6, 12), y2(2, 10), dx2(2, 12);
  memory::record r;
  auto g = make_gradient(m), expected = make_gradient(m);
  m.forward(x, y, r, ctx);
  m.backward(x, r, dy, dx, g, ctx);
  for (const index_t t : {2, 4, 5}) {
    EXPECT_EQ(y.row(t).norm(), 0);
    EXPECT_EQ(dx.row(t).norm(), 0);
  }
  memory::record r2;
  m.forward(x.topRows(2), y2, r2, {});
  EXPECT_TRUE(y.topRows(2) == y2);
  m.backward(x.topRows(2), r2, dy.topRows(2), dx2, expected, {});
  memory::record r3;
  matrix<double> y3(1, 10), dx3(1, 12);
  m.forward(x.middleRows(3, 1), y3, r3, {});
  m.backward(x.middleRows(3, 1), r3, dy.middleRows(3, 1), dx3, expected, {});
  EXPECT_EQ(g.values.rows, expected.values.rows);
  EXPECT_LT((g.keys.keys - expected.keys.keys).cwiseAbs().maxCoeff(), 1e-13);
}

TEST(product_key_memory, not_a_number_stays_in_its_row) {
  for (const auto kind : {memory_gate_kind::softmax, memory_gate_kind::relu}) {
    auto c = small();
    c.gate.kind = kind;
    const memory m(c, {5});
    auto x = input(5);
    const auto clean = output_of(m, x);
    x(2, 3) = std::numeric_limits<double>::quiet_NaN();
    const auto y = output_of(m, x);
    for (index_t t = 0; t < 5; ++t)
      if (t == 2)
        EXPECT_TRUE(y.row(t).array().isNaN().all());
      else
        EXPECT_TRUE(y.row(t) == clean.row(t));
  }
}

TEST(product_key_memory, no_tokens_touch_nothing) {
  const memory m(small(), {5});
  matrix<double> x(0, 12), y(0, 10), dx(0, 12);
  memory::record r;
  auto g = make_gradient(m);
  m.forward(x, y, {});
  m.forward(x, y, r, {});
  m.backward(x, r, y, dx, g, {});
  EXPECT_TRUE(g.values.rows.empty());
}

TEST(product_key_memory, folded_batch_norm_and_packed_weights_change_only_the_rounding) {
  auto c = small();
  c.query.norm = query_normalisation::batch;
  c.query.hidden = {9};
  memory m(c, {5});
  const auto x = input(30);
  matrix<double> y(30, 10), dx(30, 12);
  memory::record r;
  auto g = make_gradient(m);
  m.forward(x, y, r, training());
  m.backward(x, r, y, dx, g, training());
  after_step(m, g);  // running statistics of some batch
  const auto before = output_of(m, x);
  prepack(m);
  EXPECT_LT((output_of(m, x) - before).cwiseAbs().maxCoeff(), 1e-12);
  // What was folded in follows a step: its own running statistics, not those of the step before.
  const matrix<double> other = x * 3;
  m.forward(other, y, r, training());
  set_zero(m, g);
  m.backward(other, r, y, dx, g, training());
  after_step(m, g);
  const auto packed = output_of(m, x);
  EXPECT_GT((packed - before).cwiseAbs().maxCoeff(), 1e-3);
  refresh(m);
  EXPECT_EQ(output_of(m, x), packed);
}

TEST(product_key_memory, one_token_at_a_time_equals_the_batch) {
  const memory m(small(), {5});
  const auto x = input(8);
  const auto whole = output_of(m, x);
  for (index_t t = 0; t < 8; ++t) EXPECT_LT((output_of(m, x.middleRows(t, 1)) - whole.row(t)).cwiseAbs().maxCoeff(), 1e-12);
}

TEST(product_key_memory, the_same_bits_with_any_number_of_workers) {
  product_key_memory_config c{.inputs = 40, .heads = 3, .sub_keys = 24, .key_width = 32, .top_k = 9};
  c.query.norm = query_normalisation::batch;
  const product_key_memory<float> m(c, {5});
  matrix<float> x(300, 40);
  fill_uniform<float>(x, 1.0, {1});
  expect_same_bits_for_any_workers(m, x, {.train = true});
}

TEST(product_key_memory, training_lowers_the_loss_and_moves_touched_rows_alone) {
  memory m(small(), {5});
  const auto start = m;
  optimiser<double> adam;
  auto g = make_gradient(m);
  const auto x = input(4), target = input(4, 10, 11);
  matrix<double> y(4, 10), dx(4, 12);
  memory::record r;
  double first = 0, last = 0;
  std::vector<bool> touched(49);
  for (int step = 0; step < 60; ++step) {
    m.forward(x, y, r, {});
    last = (y - target).squaredNorm();
    if (step == 0) first = last;
    set_zero(m, g);
    m.backward(x, r, matrix<double>(2 * (y - target)), dx, g, {});
    for (const slot_t s : g.values.rows) touched[static_cast<std::size_t>(s)] = true;
    adam.step(m, g, 1e-2);
  }
  EXPECT_LT(last, 0.1 * first);
  EXPECT_GT(std::count(touched.begin(), touched.end(), false), 0);
  for (index_t i = 0; i < 49; ++i)
    EXPECT_EQ(m.values.view().map().row(i) == start.values.view().map().row(i), !touched[static_cast<std::size_t>(i)]) << i;
}

TEST(product_key_memory, bad_configurations_are_refused_in_a_sentence) {
  const auto message = [](auto&& change) -> std::string {
    auto c = small();
    change(c);
    try {
      const memory m(c, {5});
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message([](auto& c) { c.top_k = 8; }), "product keys: expected top_k from 1 to the 7 sub-keys, got 8");
  EXPECT_EQ(message([](auto& c) { c.top_k = 0; }), "product keys: expected top_k from 1 to the 7 sub-keys, got 0");
  EXPECT_EQ(message([](auto& c) { c.key_width = 7; }), "product_key_memory: key_width is cut into two halves, so it must be even, got 7");
  EXPECT_EQ(message([](auto& c) { c.heads = 0; }), "product_key_memory: expected at least 1 head, got 0");
  EXPECT_EQ(message([](auto& c) { c.modulo = 49; }), "product_key_memory: expected modulo from 1 to 48, got 49");
  const std::string temperature = message([](auto& c) { c.gate.temperature = 0; });
  EXPECT_TRUE(temperature.starts_with("memory gate: expected a temperature from ") && temperature.ends_with(", got 0")) << temperature;
  EXPECT_EQ(message([](auto& c) { c.gate.divide_by_sum = true; }),
            "memory gate: softmax weights already sum to 1; divide_by_sum needs a shift or another gate");
  EXPECT_EQ(message([](auto& c) { c.query.source = query_source::identity; }),
            "query network: identity queries need key_width = inputs, got 8 and 12");
  EXPECT_EQ(message([](auto& c) { c.sub_keys = 50000; }), "product_key_memory: expected fewer than 2^31 slots, got 2500000000");
  const std::string no_projection = "product_key_memory: concat_heads needs a linear or silu_gated read-out, which takes the heads side by side";
  EXPECT_EQ(message([](auto& c) { c.concat_heads = true; }), no_projection);
  EXPECT_EQ(message([](auto& c) {
              c.concat_heads = true;
              c.readout.kind = memory_readout_kind::experts;
            }),
            no_projection);
  EXPECT_THROW(product_keys<float>({.heads = 1, .sub_keys = 46341, .width = 1, .top_k = 1}), config_error);  // 46341² > 2^31
  EXPECT_EQ(message([](auto& c) { c.input_dropout = 2; }), "product_key_memory: expected a dropout rate in [0, 1], got 2");
  const memory m(small(), {5});
  matrix<double> y(3, 10);
  EXPECT_THROW(m.forward(input(3, 11), y, {}), shape_error);
  EXPECT_THROW(m.forward(input(4), y, {}), shape_error);
  context replay;
  replay.replay = true;
  memory::record empty;
  EXPECT_THROW(m.forward(input(3), y, empty, replay), state_error);
  auto c = small();
  c.query.norm = query_normalisation::batch;
  matrix<double> one(1, 10);
  EXPECT_THROW(memory(c, {5}).forward(input(1), one, training()), shape_error);
}

}  // namespace product_key_memory_tests
