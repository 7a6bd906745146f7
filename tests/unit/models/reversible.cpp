// Reversible blocks against the plain residual stack of the same functions, their memory, and what they refuse.
#include "lithe/compose/reversible_stack.hpp"

#include <gtest/gtest.h>
#include <fstream>
#include <malloc.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lithe/compose/one_of.hpp"
#include "lithe/compose/pre_norm.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "lithe/training/gradient_check.hpp"
#include "lithe/training/losses.hpp"
#include "lithe/training/optimiser.hpp"

namespace reversible_tests {

using namespace lithe;

constexpr index_t D = 8;

template <class S = double>
matrix<S> random_matrix(index_t rows, index_t cols, std::uint64_t key) {
  matrix<S> x(rows, cols);
  fill_normal<S>(x, 1.0, rng_key{key});
  return x;
}

template <class S>
using attention_part = pre_norm<attention<S>>;
template <class S>
using feed_part = pre_norm<feed_forward<S>>;
template <class S>
using memory_part = pre_norm<product_key_memory<S>>;
template <class S>
using cross_part = pre_norm<cross_attention<S>>;
template <class S = double>
using plain_block = reversible<attention_part<S>, feed_part<S>>;
template <class S = double>
using memory_block = reversible<attention_part<S>, memory_part<S>>;
template <class S = double>
using decoder = reversible<attention_part<S>, cross_part<S>, feed_part<S>>;

static_assert(layer<plain_block<>> && layer<plain_block<float>> && reversible_block<plain_block<>> && cached_layer<plain_block<>>);
static_assert(layer<reversible_stack<plain_block<>>> && cached_layer<reversible_stack<plain_block<>>>);
static_assert(conditioned_layer<decoder<>> && !layer<decoder<>> && conditioned_layer<reversible_stack<decoder<>>> && !layer<reversible_stack<decoder<>>>);
static_assert(conditioned_layer<cross_part<double>> && layer<attention_part<double>>);

template <class S = double>
attention_part<S> attend(rng_key k, double rate = 0.2, index_t width = D) {
  return {layer_norm<S>(width), attention<S>({.inputs = width, .heads = 2, .causal = true}, k), rate};
}
template <class S = double>
feed_part<S> feed(rng_key k, double rate = 0.2, index_t width = D) {
  return {layer_norm<S>(width), feed_forward<S>({.features = width, .hidden = 2 * width, .kind = activation::gelu}, k), rate};
}
template <class S = double>
memory_part<S> remember(rng_key k, query_normalisation norm = query_normalisation::none) {
  product_key_memory_config c{.inputs = D, .heads = 2, .sub_keys = 6, .key_width = 8, .top_k = 3};
  c.query.norm = norm;
  return {layer_norm<S>(D), product_key_memory<S>(c, k), 0.2};
}
template <class S = double>
plain_block<S> make_plain(std::uint64_t i, index_t chunk = 0, double rate = 0.2, index_t width = D) {
  return plain_block<S>(attend<S>({2 * i}, rate, width), feed<S>({2 * i + 1}, rate, width), chunk);
}
memory_block<> make_memory(std::uint64_t i, index_t chunk = 0) { return memory_block<>(attend({2 * i}), remember({2 * i + 1}), chunk); }
decoder<> make_decoder(std::uint64_t i, index_t chunk = 0) {
  return decoder<>(attend({3 * i}), cross_part<double>(layer_norm<double>(D), cross_attention<double>({.inputs = D, .memory_inputs = 5, .heads = 2}, {3 * i + 1}), 0.2),
                   feed({3 * i + 2}), chunk);
}
template <class Make>
auto make_stack(std::size_t depth, Make make) {
  reversible_stack<decltype(make(0))> s;
  for (std::size_t i = 0; i < depth; ++i) s.blocks.push_back(make(i + 1));
  return s;
}

/// A training context with a key, a workspace and sequences of 5, 0 and 7 tokens.
struct training {
  std::vector<index_t> offsets{0, 5, 5, 12};
  workspace work;
  context ctx;
  static constexpr index_t tokens = 12;
  training() {
    ctx.work = &work;
    ctx.key = {17};
    ctx.rows = {offsets};
    ctx.train = true;
  }
};

double largest(const matrix<double>& m) { return m.size() == 0 ? 0 : m.cwiseAbs().maxCoeff(); }

/// The same functions without reversibility: each stores its input and record.
template <class Block>
struct plain_residual {
  const reversible_stack<Block>& model;
  struct saved {
    matrix<double> a, b;  // streams before
    record_of<std::remove_cvref_t<decltype(std::get<0>(Block{}.parts))>> f;
    record_of<std::remove_cvref_t<decltype(std::get<1>(Block{}.parts))>> g;
    matrix<double> y1;
  };
  std::vector<saved> blocks;

  matrix<double> forward(const matrix<double>& x, const context& ctx) {
    matrix<double> a = x.leftCols(D), b = x.rightCols(D), t(x.rows(), D);
    for (std::size_t i = 0; i < model.blocks.size(); ++i) {
      const context c = ctx.child(i);
      saved& s = blocks.emplace_back();
      s.a = a;
      s.b = b;
      std::get<0>(model.blocks[i].parts).forward(b, t, s.f, c.child(0));
      a += t;
      s.y1 = a;
      std::get<1>(model.blocks[i].parts).forward(a, t, s.g, c.child(1));
      b += t;
    }
    matrix<double> y(x.rows(), 2 * D);
    y << a, b;
    return y;
  }
  matrix<double> backward(const matrix<double>& dy, gradient_of<reversible_stack<Block>>& g, const context& ctx) {
    matrix<double> d1 = dy.leftCols(D), d2 = dy.rightCols(D), t(dy.rows(), D);
    for (std::size_t i = model.blocks.size(); i-- > 0;) {
      const context c = ctx.child(i);
      std::get<1>(model.blocks[i].parts).backward(blocks[i].y1, blocks[i].g, d2, t, std::get<1>(g.blocks[i].parts), c.child(1));
      d1 += t;
      std::get<0>(model.blocks[i].parts).backward(blocks[i].b, blocks[i].f, d1, t, std::get<0>(g.blocks[i].parts), c.child(0));
      d2 += t;
    }
    matrix<double> dx(dy.rows(), 2 * D);
    dx << d1, d2;
    return dx;
  }
};

template <class L>
double gradient_difference(const L& model, const gradient_of<L>& a, const gradient_of<L>& b) {
  double difference = 0, size = 0;
  for_each_tensor(
      [&](const std::string&, role kind, const auto& p, const auto& q, const auto& r) {
        if constexpr (requires { q(0, 0); })
          for (index_t i = 0; kind == role::parameter && i < p.rows(); ++i)
            for (index_t j = 0; j < p.cols(); ++j) {
              difference = std::max(difference, std::abs(static_cast<double>(q(i, j) - r(i, j))));
              size = std::max(size, std::abs(static_cast<double>(q(i, j))));
            }
      },
      model, a, b);
  EXPECT_GT(size, 1e-2);
  return difference / size;
}

template <class Stack>
void expect_equal_to_plain(const Stack& model) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * D, 3), dy = random_matrix(t.tokens, 2 * D, 4);
  matrix<double> y(t.tokens, 2 * D), dx(t.tokens, 2 * D);
  record_of<Stack> r;
  model.forward(x, y, r, t.ctx);
  auto g = make_gradient(model), h = make_gradient(model);
  model.backward(x, r, dy, dx, g, t.ctx);
  plain_residual<std::remove_cvref_t<decltype(model.blocks[0])>> plain{model, {}};
  EXPECT_LT(largest(y - plain.forward(x, t.ctx)), 1e-13);  // the same sums
  const matrix<double> dz = plain.backward(dy, h, t.ctx);
  // Inputs are reconstructed to about 1e-15 a block; the task asks for 1e-10.
  EXPECT_LT(largest(dx - dz), 1e-10 * largest(dz));
  EXPECT_LT(gradient_difference(model, g, h), 1e-10);
  EXPECT_GT(largest(dz), 0.1);
}

TEST(reversible, gradients_equal_those_of_the_plain_residual_stack_with_dropout) {
  expect_equal_to_plain(make_stack(12, [](std::size_t i) { return make_plain(i); }));
  expect_equal_to_plain(make_stack(6, [](std::size_t i) { return make_memory(i); }));
}

/// Central differences with h = 1e-5 are good to 1e-10 of numbers of size 1; divided by gradients of down to the checker's floor of 1e-3.
void expect_right(const gradient_check_report& report) {
  EXPECT_LT(report.worst(), 2e-6) << report.where();
  for (const auto& tensor : report.tensors)
    if (!tensor.name.ends_with("key.bias")) {  // which adds the same to all scores of a query
      EXPECT_GT(tensor.largest, 1e-3) << tensor.name;
    }
}

TEST(reversible, gradient_check_of_a_block_and_of_a_stack) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * D, 3);
  expect_right(gradient_check(make_plain(1, 5), x, t.ctx));
  expect_right(gradient_check(make_stack(2, [](std::size_t i) { return make_memory(i, 4); }), x, t.ctx));
}

TEST(reversible_decoder, gradient_check_with_a_memory_of_several_sequences) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * D, 3), m = random_matrix(9, 5, 5);
  const std::vector<index_t> offsets{0, 4, 6, 9};
  for (const index_t chunk : {0, 5}) {
    const auto report = gradient_check(make_stack(3, [&](std::size_t i) { return make_decoder(i, chunk); }), x, {m, {offsets}}, t.ctx);
    expect_right(report);
    EXPECT_GT(report.at("memory").largest, 1e-2);
  }
}

TEST(reversible_decoder, is_self_attention_cross_attention_and_feed_forward_on_alternating_streams) {
  const auto block = make_decoder(1);
  const auto x = random_matrix(6, 2 * D, 3), m = random_matrix(4, 5, 5);
  matrix<double> y(6, 2 * D), t(6, D);
  block.forward(x, {m}, y, {});
  matrix<double> a = x.leftCols(D), b = x.rightCols(D);
  std::get<0>(block.parts).forward(b, t, {});
  a += t;
  std::get<1>(block.parts).forward(a, {m}, t, {});
  b += t;
  std::get<2>(block.parts).forward(b, t, {});
  a += t;
  EXPECT_LT(largest(y.leftCols(D) - b), 1e-14);
  EXPECT_LT(largest(y.rightCols(D) - a), 1e-14);
}

TEST(reversible, chunks_of_rows_change_no_value) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * D, 3), dy = random_matrix(t.tokens, 2 * D, 4);
  const auto run = [&](index_t chunk) {
    const auto model = make_stack(3, [&](std::size_t i) { return make_memory(i, chunk); });
    matrix<double> y(t.tokens, 2 * D), dx(t.tokens, 2 * D);
    record_of<std::remove_cvref_t<decltype(model)>> r;
    model.forward(x, y, r, t.ctx);
    auto g = make_gradient(model);
    model.backward(x, r, dy, dx, g, t.ctx);
    return std::tuple(y, dx, g, model);
  };
  const auto [y, dx, g, model] = run(0);
  for (const index_t chunk : {1, 5, 12, 100}) {
    const auto [z, dz, h, same] = run(chunk);
    EXPECT_LT(largest(y - z), 1e-13) << chunk;  // products of other sizes round differently
    EXPECT_LT(largest(dx - dz), 1e-12) << chunk;
    EXPECT_LT(gradient_difference(model, g, h), 1e-12) << chunk;
  }
}

TEST(reversible, reverse_restores_the_input_and_replays_the_same_bits) {
  training t;
  const auto model = make_stack(4, [](std::size_t i) { return make_memory(i, 5); });
  const auto x = random_matrix(t.tokens, 2 * D, 3), dy = random_matrix(t.tokens, 2 * D, 4);
  matrix<double> xy = x, dxy = dy, first;
  record_of<std::remove_cvref_t<decltype(model)>> r;
  model.forward_in_place(xy, &r, t.ctx);
  const matrix<double> y = xy;
  EXPECT_GT(largest(y - x), 0.1);
  auto g = make_gradient(model), h = make_gradient(model);
  model.reverse(xy, dxy, r, g, t.ctx);
  EXPECT_LT(largest(xy - x), 1e-13);
  first = dxy;
  xy = y;
  dxy = dy;
  context other = t.ctx;
  other.key = {4711};  // the record knows its key
  model.reverse(xy, dxy, r, h, other);
  EXPECT_EQ(first, dxy);
  EXPECT_EQ(gradient_difference(model, g, h), 0);
}

TEST(reversible, dropout_and_seeds_change_the_output) {
  training t;
  const auto model = make_plain(1, 5);
  const auto x = random_matrix(t.tokens, 2 * D, 3);
  matrix<double> y(t.tokens, 2 * D), z = y, w = y;
  model.forward(x, y, t.ctx);
  context other = t.ctx;
  other.key = {4711};
  model.forward(x, z, other);
  other.train = false;
  model.forward(x, w, other);
  EXPECT_GT(largest(y - z), 1e-2);
  EXPECT_GT(largest(y - w), 1e-2);
}

/// Worst absolute error of the reconstructed input, for the model of the drift table: 64 features, hidden 256, 128 tokens, 2 heads.
template <class S>
double drift(std::size_t depth, double deviation) {
  reversible_stack<plain_block<S>> model;
  for (std::size_t i = 0; i < depth; ++i) {
    plain_block<S> b(pre_norm<attention<S>>(layer_norm<S>(64), attention<S>({.inputs = 64, .heads = 2, .causal = true}, {i})),
                     pre_norm<feed_forward<S>>(layer_norm<S>(64), feed_forward<S>({.features = 64, .hidden = 256, .kind = activation::gelu}, {i})));
    for_each_tensor(
        [&, n = std::uint64_t{0}](const std::string& name, role, auto& p) mutable {
          if (!name.ends_with("weight") || name.find("norm") != std::string::npos) return;
          const double sigma = deviation > 0 ? deviation : 1 / std::sqrt(static_cast<double>(p.cols()));
          fill_normal<S>(p, sigma, rng_key{i}.child(++n));
        },
        b);
    model.blocks.push_back(std::move(b));
  }
  const auto x = random_matrix<S>(128, 128, 1);
  matrix<S> xy = x, dxy = x;
  record_of<reversible_stack<plain_block<S>>> r;
  auto g = make_gradient(model);
  model.forward_in_place(xy, &r, {});
  model.reverse(xy, dxy, r, g, {});
  return static_cast<double>((xy - x).cwiseAbs().maxCoeff());
}

TEST(reversible, reconstruction_stays_near_the_reference_drift) {
  // Ten times what the reference measured, which another order of the sums may cost.
  EXPECT_LT(drift<double>(12, 0.02), 10 * 9e-16);
  EXPECT_LT(drift<float>(12, 0.02), 10 * 5e-7);
  EXPECT_LT(drift<double>(12, 0), 10 * 2e-14);
  EXPECT_LT(drift<double>(48, 0), 10 * 5e-14);
  EXPECT_LT(drift<float>(12, 0), 10 * 8e-6);
  EXPECT_LT(drift<float>(48, 0), 10 * 4e-5);
  EXPECT_GT(drift<float>(12, 0.02), 0);
}

TEST(reversible, record_is_one_output_and_the_choices) {
  training t;
  const auto x = random_matrix(t.tokens, 2 * D, 3);
  std::size_t scratch_of_depth_6 = 0;
  for (const std::size_t depth : {6U, 24U}) {
    training u;
    const auto model = make_stack(depth, [](std::size_t i) { return make_plain(i, 5); });
    matrix<double> y(t.tokens, 2 * D), dx = y;
    record_of<std::remove_cvref_t<decltype(model)>> r;
    model.forward(x, y, r, u.ctx);
    // A key and the rows of the block, of the dropout behind attention, and of that behind each of 3 chunks.
    EXPECT_EQ(bytes(r), static_cast<std::size_t>(x.size()) * sizeof(double) + depth * (2 + 3) * (sizeof(std::uint64_t) + sizeof(index_t)));
    auto g = make_gradient(model);
    model.backward(x, r, y, dx, g, u.ctx);
    if (depth == 6)
      scratch_of_depth_6 = u.work.bytes();
    else
      EXPECT_EQ(u.work.bytes(), scratch_of_depth_6);
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // whose memory is their own
/// Peak resident bytes of one training step in a process of its own, less what stood before the activations.
double peak_of_depth(std::size_t depth) {
  int ends[2];
  EXPECT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    using block = plain_block<float>;
    reversible_stack<block> model;
    for (std::size_t i = 0; i < depth; ++i) model.blocks.push_back(make_plain<float>(i, 512, 0.1, 64));
    auto g = make_gradient(model);
    ::malloc_trim(0);  // what earlier tests have given back would hide what is asked for now
    std::ofstream("/proc/self/clear_refs") << "5";  // forgets the peak of the parent
    const auto peak = [] {
      std::ifstream status("/proc/self/status");
      double kib = 0;
      for (std::string word; status >> word;)
        if (word == "VmHWM:") status >> kib;
      return kib;
    };
    const double before = peak();
    context ctx;
    ctx.train = true;
    matrix<float> xy = random_matrix<float>(8192, 128, 1), dxy = xy;
    std::vector<index_t> offsets;
    for (index_t i = 0; i <= 8192; i += 64) offsets.push_back(i);
    ctx.rows = {offsets};
    record_of<reversible_stack<block>> r;
    model.forward_in_place(xy, &r, ctx);
    model.reverse(xy, dxy, r, g, ctx);
    const double used = peak() - before;
    const bool sent = ::write(ends[1], &used, sizeof(used)) == sizeof(used);
    ::_exit(sent ? 0 : 1);
  }
  double used = 0;
  EXPECT_EQ(::read(ends[0], &used, sizeof(used)), static_cast<ssize_t>(sizeof(used)));
  int status = 0;
  ::waitpid(child, &status, 0);
  ::close(ends[0]);
  ::close(ends[1]);
  return used;
}

TEST(reversible, peak_memory_does_not_depend_on_depth) {
  const double six = peak_of_depth(6), twenty_four = peak_of_depth(24);
  EXPECT_LT(twenty_four, 1.1 * six);
  EXPECT_GT(six, 8192.0 * 128 * 2 * 4 / 1024);  // at least the streams and their gradients, in KiB
}
#endif

/// Targets that a model of one layer would miss: the next token is a sum of the last two.
struct toy_text {
  std::vector<token_t> ids, targets;
  explicit toy_text(std::uint64_t key) {
    token_t a = static_cast<token_t>(uniform({key}, 0) * 7), b = static_cast<token_t>(uniform({key}, 1) * 7);
    for (int i = 0; i < 24; ++i) {
      ids.push_back(b);
      const token_t next = (a + b) % 7;
      a = b;
      b = next;
      targets.push_back(next);
    }
  }
};

TEST(reversible, the_loss_curve_of_12_blocks_is_that_of_the_plain_stack) {
  // Both take 200 steps of Adam; 1e-3 is what the specification allows, and rounding that training amplifies stays far below.
  using reversed = reversible_stack<plain_block<>>;
  using stored = stack<plain_block<>>;  // keeps every block's input and so never reconstructs through the stack
  const auto losses = [](auto blocks) {
    using model_type = sequential<embedding<double>, decltype(blocks), layer_norm<double>, linear<double>>;
    model_type model(embedding<double>({.tokens = 7, .features = 2 * D, .deviation = 1}, {1}), std::move(blocks), layer_norm<double>(2 * D),
                     linear<double>({2 * D, 7}, {2}));
    optimiser<double> adam;
    auto g = make_gradient(model);
    record_of<model_type> r;
    workspace work;
    std::vector<double> out;
    for (std::uint64_t step = 0; step < 200; ++step) {
      const toy_text text(step % 50);
      context ctx{.work = &work, .key = rng_key{5}.child(step), .train = true};
      matrix<double> logits(24, 7);
      set_zero(model, g);
      model.forward(text.ids, logits, r, ctx);
      out.push_back(cross_entropy<double>(logits, text.targets, {}, logits, ctx).loss);
      model.backward(text.ids, r, logits, nothing{}, g, ctx);
      adam.step(model, g, 3e-3, ctx);
    }
    return out;
  };
  const reversed model = make_stack(12, [](std::size_t i) { return make_plain(i, 0, 0.05); });
  const auto a = losses(model), b = losses(stored{model.blocks});
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  EXPECT_LT(worst, 1e-3);
  EXPECT_LT(a.back(), 0.8 * a.front());  // it trains
}

template <class Model, class... M>
void expect_decoding_equals_forward(const Model& model, const M&... m) {
  const auto x = random_matrix(14, 2 * D, 3);
  matrix<double> whole(14, 2 * D), parts(14, 2 * D), refilled(14, 2 * D);
  model.forward(x, m..., whole, {});
  auto c = model.make_cache(2, 20);
  index_t at = 0;
  for (const index_t n : {6, 1, 1, 4, 2}) {
    const matrix<double> in = x.middleRows(at, n);
    model.decode(in, m..., matrix_view<double>(parts).slice_rows(at, n), c, {});
    at += n;
  }
  EXPECT_LT(largest(whole - parts), 1e-12);  // other shapes of products
  // filled, truncated and moved to another slot
  auto d = model.make_cache(2, 20);
  const matrix<double> head = x.topRows(10), tail = x.bottomRows(6);
  model.fill(head, m..., d, {});
  model.truncate(d, 0, 8);
  const std::vector<index_t> order{1, 0}, slot{1};
  model.permute(d, order);
  context ctx;
  ctx.slots = slot;
  matrix<double> last(6, 2 * D);
  model.decode(tail, m..., last, d, ctx);
  EXPECT_LT(largest(whole.bottomRows(6) - last), 1e-12);
}

TEST(reversible, decoding_equals_the_full_pass) {
  expect_decoding_equals_forward(make_plain(1, 5));
  expect_decoding_equals_forward(make_stack(3, [](std::size_t i) { return make_memory(i); }));
}

TEST(reversible_decoder, decoding_equals_the_full_pass) {
  const auto m = random_matrix(9, 5, 5);
  expect_decoding_equals_forward(make_stack(3, [](std::size_t i) { return make_decoder(i); }), memory_view<double>{m});
}

TEST(reversible, the_same_bits_with_any_number_of_workers) {
  const auto x = random_matrix(300, 2 * D, 3), dy = random_matrix(300, 2 * D, 4);
  const auto run = [&](index_t workers) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    context ctx{.exec = &exec, .work = &work, .key = {5}, .train = true};
    const auto model = make_stack(2, [](std::size_t i) { return make_memory(i, 70); });
    matrix<double> xy = x, dxy = dy;
    record_of<std::remove_cvref_t<decltype(model)>> r;
    auto g = make_gradient(model);
    model.forward_in_place(xy, &r, ctx);
    model.reverse(xy, dxy, r, g, ctx);
    return std::tuple(xy, dxy, std::get<1>(g.blocks[0].parts).norm.weight);
  };
  const auto one = run(1);
  EXPECT_EQ(one, run(2));
  EXPECT_EQ(one, run(7));
}

TEST(reversible, zero_tokens_one_token_and_no_blocks) {
  for (const index_t chunk : {0, 4}) {
    const auto model = make_stack(2, [&](std::size_t i) { return make_plain(i, chunk); });
    for (const index_t n : {0, 1}) {
      const auto x = random_matrix(n, 2 * D, 3);
      matrix<double> y(n, 2 * D), dx(n, 2 * D);
      record_of<std::remove_cvref_t<decltype(model)>> r;
      auto g = make_gradient(model);
      model.forward(x, y, r, {});
      model.backward(x, r, y, dx, g, {});
      EXPECT_TRUE(dx.allFinite());
    }
  }
  const reversible_stack<plain_block<>> none;
  const auto x = random_matrix(3, 2 * D, 3);
  matrix<double> y(3, 2 * D), dx(3, 2 * D);
  record_of<reversible_stack<plain_block<>>> r;
  gradient_of<reversible_stack<plain_block<>>> g;
  none.forward(x, y, r, {});
  none.backward(x, r, x, dx, g, {});
  EXPECT_EQ(x, y);
  EXPECT_EQ(x, dx);
}

TEST(reversible, nan_neither_hangs_nor_reaches_another_sequence) {
  const auto model = make_stack(2, [](std::size_t i) { return make_memory(i, 3); });
  auto x = random_matrix(8, 2 * D, 3);
  x(5, 3) = std::numeric_limits<double>::quiet_NaN();
  x(6, 12) = std::numeric_limits<double>::infinity();
  matrix<double> y(8, 2 * D), dx(8, 2 * D);
  const std::vector<index_t> offsets{0, 4, 8};
  const context ctx{.rows = {offsets}};
  record_of<std::remove_cvref_t<decltype(model)>> r;
  auto g = make_gradient(model);
  model.forward(x, y, r, ctx);
  model.backward(x, r, random_matrix(8, 2 * D, 4), dx, g, ctx);
  EXPECT_TRUE(y.topRows(4).allFinite());
  EXPECT_TRUE(dx.topRows(4).allFinite());
  EXPECT_FALSE(y.bottomRows(4).allFinite());
}

template <class E, class F>
void expect_message(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "expected: " << part;
  } catch (const E& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(reversible, refusals_are_sentences) {
  const auto model = make_plain(1);
  matrix<double> odd(3, 2 * D + 1), x = random_matrix(3, 2 * D, 1), y = x, narrow(3, 6);
  expect_message<shape_error>([&] { model.forward(odd, odd, {}); }, "reversible: expected two streams side by side, got 17 columns");
  expect_message<shape_error>([&] { model.forward(narrow, narrow, {}); }, "layer_norm: expected 8 features, got 3");
  expect_message<shape_error>([&] { model.forward(x, narrow, {}); }, "reversible: expected y of shape [3 x 16], got [3 x 6]");
  const reversible<linear<double>> other(linear<double>({D, D + 1}, {1}));
  expect_message<shape_error>([&] { other.forward(x, y, {}); }, "reversible: part 0 turns [3 x 8] into [3 x 9]");
  expect_message<config_error>([&] { make_plain(1, -1); }, "reversible: expected a chunk of 0 (all) or more rows, got -1");

  const memory_block<> batch(attend({1}), remember({2}, query_normalisation::batch));
  context train;
  train.train = true;
  expect_message<config_error>([&] { batch.forward(x, y, train); }, "reversible: batch norm cannot train inside a reversible block");
  batch.forward(x, y, {});  // evaluation uses running statistics
  make_memory(1).forward(x, y, train);

  record_of<plain_block<>> r;
  auto g = make_gradient(model);
  expect_message<state_error>([&] { model.reverse(x, y, r, g, {}); }, "reversible: the record is of another call, or was never filled: expected 3 rows");
  const auto deep = make_stack(2, [](std::size_t i) { return make_plain(i); });
  record_of<std::remove_cvref_t<decltype(deep)>> s;
  auto h = make_gradient(deep);
  expect_message<state_error>([&] { deep.reverse(x, y, s, h, {}); }, "reversible_stack: the record is of another call, or was never filled: expected 2 parts, got 0");
  expect_message<state_error>([&] { deep.backward(x, s, x, y, h, {}); }, "reversible_stack: the record is of another call, or was never filled: expected [3 x 16], got [0 x 0]");
}

TEST(reversible, cost_is_that_of_its_parts) {
  const auto block = make_plain(1);
  const cost whole = make_stack(3, [](std::size_t i) { return make_plain(i); }).forward_cost(10);
  const cost f = std::get<0>(block.parts).forward_cost(10), g = std::get<1>(block.parts).forward_cost(10);
  EXPECT_DOUBLE_EQ(whole.parameters, 3 * (f.parameters + g.parameters));
  EXPECT_DOUBLE_EQ(whole.flops, 3 * (f.flops + g.flops));
  EXPECT_EQ(whole.parameters, static_cast<double>(count_parameters(make_stack(3, [](std::size_t i) { return make_plain(i); }))));
}

}  // namespace reversible_tests
