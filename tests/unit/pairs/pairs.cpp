// Every pair of systems in one model of reversible blocks with exits, the model of examples/all_together: it learns, its gradients are right,
// it is saved, its bits do not depend on workers, and it decodes and generates what the full pass gives. And what does not go together says so.
#include "../../../examples/all_together/trainer.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include "support/malloc_count.hpp"
#include "support/matrices.hpp"
#include "support/same_bits.hpp"

namespace pairs_tests {

using namespace lithe;
using model_type = model_of<double>;
using kinds = std::vector<std::string>;

static_assert(layer<model_type> && layer<model_of<double, lsh_attention<double>, ultra_mem<double>>>);

const std::string text =
    "In the beginning was the Word, and the Word was with God, and the Word was God. The same was in the beginning with God. All things were made by him; "
    "and without him was not any thing made that was made. In him was life; and the life was the light of men. And the light shineth in darkness; and the "
    "darkness comprehended it not. There was a man sent from God, whose name was John. The same came for a witness, to bear witness of the Light, that "
    "all men through him might believe.";

/// Two blocks for a pair of kinds: an attention and a feed-forward stand in both, two of the same role in one each.
std::vector<model_config> pairs() {
  const kinds attention{"lsh", "bucket", "local", "collaborative"}, feed{"chunked", "memory", "ultramem"};
  model_config c{.features = 16, .heads = 2, .context = 32, .window = 8, .rounds = 2, .hidden = 32, .sub_keys = 8, .top_k = 3, .dropout = 0.05};
  std::vector<model_config> all;
  const auto add = [&](kinds a, kinds f) {
    c.attention = std::move(a);
    c.feed_forward = std::move(f);
    all.push_back(c);
  };
  for (const auto& a : attention)
    for (const auto& f : feed) add({a, a}, {f, f});
  for (std::size_t i = 0; i < attention.size(); ++i)
    for (std::size_t j = i + 1; j < attention.size(); ++j) add({attention[i], attention[j]}, {"chunked", "chunked"});
  for (std::size_t i = 0; i < feed.size(); ++i)
    for (std::size_t j = i + 1; j < feed.size(); ++j) add({"local", "local"}, {feed[i], feed[j]});
  return all;
}
std::string name_of(const model_config& c) {
  return concat(c.attention[0], " ", c.attention[1], ", ", c.feed_forward[0], " ", c.feed_forward[1]);
}
bool has_lsh(const model_config& c) { return std::find(c.attention.begin(), c.attention.end(), "lsh") != c.attention.end(); }

/// Sequences first, first + every, ... of the text.
batch sequences(const model_config& c, std::size_t first = 0, std::size_t every = 1) {
  batch b;
  const auto tokens = to_tokens(text);
  const auto T = static_cast<std::size_t>(c.context);
  for (std::size_t at = first * T; at + T < tokens.size(); at += every * T) b.add(tokens, at, T);
  return b;
}
double unigram_entropy(const std::vector<token_t>& tokens) {
  std::map<token_t, double> counts;
  for (const token_t t : tokens) ++counts[t];
  double entropy = 0;
  const auto n = static_cast<double>(tokens.size());
  for (const auto& [token, count] : counts) entropy -= count / n * std::log(count / n);
  return entropy;
}

TEST(pairs, learn_more_than_the_frequencies_of_bytes_in_50_steps) {
  workspace work;
  for (const model_config& c : pairs()) {
    trainer<model_type> t(c, make_model<double>(c));
    const batch all = sequences(c);
    for (std::size_t i = 0; i < 50; ++i) t.train(sequences(c, i % 4, 4), 1e-2, {.work = &work});
    const auto losses = t.evaluate(all, {.work = &work});
    for (const double loss : losses) EXPECT_LT(loss, unigram_entropy(all.targets)) << name_of(c);
    std::printf("%-40s %.3f nats a byte, frequencies alone %.3f\n", name_of(c).c_str(), losses.back(), unigram_entropy(all.targets));
  }
}

TEST(pairs, gradients_of_every_tensor) {
  const auto tokens = to_tokens(text);
  const std::vector<index_t> offsets{0, 11, 11, 14};
  workspace work;
  for (model_config c : pairs()) {
    c.features = 8;
    c.window = 4;
    const auto report = gradient_check(make_model<double>(c), std::span(tokens).first(14), {.work = &work, .key = {5}, .rows = {offsets}, .train = true},
                                       {.entries = 4});
    // Central differences with h = 1e-5 are good to 1e-10 of numbers of size 1; divided by gradients of down to the checker's floor of 1e-3.
    EXPECT_LT(report.worst(), 5e-6) << name_of(c) << report.where();
    for (const auto& tensor : report.tensors)
      if (!tensor.name.starts_with("1.exit")) {  // the predictor of exits is no part of the answers; the next test has it
        EXPECT_GT(tensor.largest, 1e-5) << name_of(c) << tensor.name;
      }
    EXPECT_GT(report.tensors.size(), 20U);
  }
}

/// The loss of the predictor of exits, whose targets are what the answers are right about.
TEST(pairs, gradients_of_the_predictor_of_exits) {
  for (const model_config& c : pairs()) {
    auto model = make_model<double>(c);
    auto& decoder = std::get<1>(model.layers);
    using decoder_type = std::remove_reference_t<decltype(decoder)>;
    const matrix<double> x = random(12, decoder.features(), 3);
    const batch b = sequences(c);
    const auto wanted = std::span(b.targets).first(12);
    const auto loss = [&](gradient_of<decoder_type>& g) {
      exit_training_record<decoder_type> record;
      matrix<double> dx(12, decoder.features());
      return aligned_exit_step(decoder, x, nothing{}, wanted, {.alpha = 1, .reduce = reduction::mean}, 0, record, dx, nothing{}, g, {}).exit;
    };
    auto g = make_gradient(decoder);
    (void)loss(g);
    index_t checked = 0;
    for_each_tensor(
        [&](const std::string& name, role, auto& p, const auto& dp) {
          if constexpr (requires { dp(0, 0); p(0, 0); })
            for (index_t j = 0; j < p.cols(); j += 5) {
              const double was = p(0, j), h = 1e-5;
              auto scrap = make_gradient(decoder);
              p(0, j) = was + h;
              const double more = loss(scrap);
              p(0, j) = was - h;
              const double less = loss(scrap);
              p(0, j) = was;
              EXPECT_NEAR(dp(0, j), (more - less) / (2 * h), 1e-8) << name_of(c) << " " << name;
              checked += std::abs(dp(0, j)) > 1e-6;
            }
        },
        decoder.halt, g.halt);
    EXPECT_GT(checked, 3) << name_of(c);
  }
}

TEST(pairs, the_same_bits_with_any_number_of_workers_and_after_a_resume) {
  const auto path = (std::filesystem::temp_directory_path() / concat("lithe_pairs_", ::getpid(), ".safetensors")).string();
  for (const model_config& c : pairs()) {
    SCOPED_TRACE(name_of(c));
    const batch b = sequences(c, 0, 3);
    const auto trained = [&](int workers) {
      const parallel_executor exec(workers, workers);
      trainer<model_type> t(c, make_model<double>(c));
      for (int i = 0; i < 2; ++i) t.train(b, 1e-2, {.exec = &exec});
      return t;
    };
    auto one = trained(1);
    expect_same_bits(one.model, trained(2).model);
    expect_same_bits(one.model, trained(7).model);

    one.save(path);
    model_config other = read_saved_config(path);
    EXPECT_EQ(nlohmann::json(other), nlohmann::json(c));
    other.seed = 2;
    trainer<model_type> again(c, make_model<double>(other));
    again.resume(path);
    expect_same_bits(one.model, again.model);
    one.train(b, 1e-2, {});
    again.train(b, 1e-2, {});
    expect_same_bits(one.model, again.model);
  }
  std::filesystem::remove(path);
}

/// The logits of the full pass over x whose rows leave at the given exits.
template <class Decoder>
matrix<double> full_pass(const Decoder& decoder, const matrix<double>& x, std::span<const std::int32_t> exits) {
  const index_t T = x.rows();
  matrix<double> states(2 * T, x.cols()), logits(T, byte_values);
  record_of<std::remove_cvref_t<decltype(decoder.stack)>> record;
  record_of<std::remove_cvref_t<decltype(decoder.answers)>> answers;
  decoder.stack.forward_mixed(x, nothing{}, exits, states, record, {});
  decoder.answers.forward_mixed(view(states).slice_rows(T, T), exits, logits, answers, {});
  return logits;
}

TEST(pairs, decode_what_the_full_pass_gives_whatever_the_exits) {
  const auto tokens = to_tokens(text);
  for (const model_config& c : pairs()) {
    const model_type model = make_model<double>(c);
    const auto& [words, decoder] = model.layers;
    // Chunks of LSH attention move with later tokens: the two are the same up to one chunk.
    const index_t T = has_lsh(c) ? c.window : 27;
    const auto ids = std::span(tokens).first(static_cast<std::size_t>(T));
    std::vector<std::int32_t> exits;
    for (index_t t = 0; t < T; ++t) exits.push_back(t < 3 ? 2 : 1 + static_cast<std::int32_t>(philox({7}, static_cast<std::uint64_t>(t))[0] % 2));
    matrix<double> x(T, 32), step(1, byte_values);
    words.forward(ids, x, {});
    const matrix<double> full = full_pass(decoder, x, exits);

    auto cache = make_adaptive_cache(decoder, 1, T);
    prefill(decoder, view(x).slice_rows(0, 3), nothing{}, cache, {});
    for (index_t t = 3; t < T; ++t) {
      std::int32_t left = 0;
      adaptive_step(decoder, view(x).slice_rows(t, 1), nothing{}, step, {&left, 1}, cache, {.exits = {exits[static_cast<std::size_t>(t)]}}, {});
      EXPECT_EQ(left, exits[static_cast<std::size_t>(t)]);
      EXPECT_LT(difference(step, full.row(t)), 1e-12 * full.cwiseAbs().maxCoeff()) << name_of(c) << " at " << t;
    }
    EXPECT_LT(cache.visited, 2 * T);
  }
}

/// Every way to leave; thresholds between the confidences of models that have learned nothing yet.
std::vector<exit_rule> rules() {
  return {{},
          {.exits = {1}},
          {.kind = exit_confidence::geometric, .thresholds = {0.5}},
          {.kind = exit_confidence::max_prob, .thresholds = {0.035}},
          {.kind = exit_confidence::softmax_diff, .thresholds = {0.004}},
          {.kind = exit_confidence::entropy, .thresholds = {0.085}, .eager = true},
          {.kind = exit_confidence::state, .thresholds = {0.0}}};
}

// Texts of different lengths side by side: what is generated is what the full pass, told the exits, gives to the texts.
TEST(pairs, generate_what_the_full_pass_gives_by_every_exit_rule_and_with_any_number_of_workers) {
  const auto tokens = to_tokens(text);
  std::map<exit_confidence, std::set<std::int32_t>> seen;
  for (const model_config& c : pairs()) {
    const model_type model = make_model<double>(c);
    const auto& [words, decoder] = model.layers;
    const std::vector<std::vector<token_t>> prompts{{tokens.begin(), tokens.begin() + 2}, {tokens.begin() + 40, tokens.begin() + 45}};
    const index_t most = has_lsh(c) ? c.window - 5 : 20;
    for (const exit_rule& rule : rules()) {
      generation out;
      std::vector<std::vector<double>> rows[2];
      for (const int workers : {1, 2}) {
        const parallel_executor exec(workers, workers);
        std::vector<std::vector<double>> all[2];
        const auto g = generate(exit_decoder(words, decoder, {}, rule), prompts, {.how = {.temperature = 0}, .most = most}, {}, {.exec = &exec},
                                [&](index_t i, std::span<const double> row) { all[i].emplace_back(row.begin(), row.end()); });
        for (std::size_t i = 0; i < 2; ++i) {
          EXPECT_TRUE(workers == 1 || (rows[i] == all[i] && out.tokens == g.tokens)) << name_of(c) << " with " << workers << " workers";
          rows[i] = all[i];
        }
        out = g;
      }
      for (std::size_t i = 0; i < 2; ++i) {
        std::vector<token_t> ids = prompts[i];
        std::vector<std::int32_t> exits(ids.size() - 1, 2);  // prompts go through all blocks but for their last token
        ids.insert(ids.end(), out.tokens[i].begin(), out.tokens[i].end() - 1);
        exits.insert(exits.end(), out.exits[i].begin(), out.exits[i].end());
        seen[rule.kind].insert(out.exits[i].begin(), out.exits[i].end());
        matrix<double> x(static_cast<index_t>(ids.size()), 32);
        words.forward(ids, x, {});
        const matrix<double> full = full_pass(decoder, x, exits);
        for (index_t n = 0; n < most; ++n) {
          const index_t t = static_cast<index_t>(prompts[i].size()) - 1 + n;
          const auto& row = rows[i][static_cast<std::size_t>(n)];
          index_t best = 0;
          full.row(t).maxCoeff(&best);
          EXPECT_EQ(out.tokens[i][static_cast<std::size_t>(n)], best) << name_of(c);
          EXPECT_LT(difference(Eigen::Map<const matrix<double>>(row.data(), 1, byte_values), full.row(t)), 1e-12 * full.cwiseAbs().maxCoeff()) << name_of(c);
        }
      }
    }
  }
  for (const auto& [kind, exits] : seen)
    EXPECT_EQ(exits.size(), kind == exit_confidence::state ? 1U : 2U) << "confidence " << static_cast<int>(kind);  // a state needs one below it
}

TEST(pairs, generate_without_allocation) {
#if !defined(LITHE_COUNTS_MALLOC)
  GTEST_SKIP() << "malloc is not ours to count here";
#else
  const parallel_executor exec(2);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  for (const model_config& c : pairs()) {
    const model_type model = make_model<double>(c);
    const auto& [words, decoder] = model.layers;
    const exit_decoder exits(words, decoder, {}, {.kind = exit_confidence::max_prob, .thresholds = {0.035}});
    generator g(exits, {.capacity = c.context});
    const std::vector<std::vector<token_t>> prompts{{1, 2, 3}, {4}};
    const auto steps = [&] {
      g.start(prompts, rng_key{1}, ctx);
      g.reserve(c.context);
      for (int i = 0; i < 10; ++i) g.step(ctx);
      const long before = mallocs;
      for (int i = 0; i < 10; ++i) g.step(ctx);
      return mallocs - before;
    };
    steps();
    EXPECT_EQ(steps(), 0) << name_of(c);
  }
#endif
}

TEST(pairs, one_kind_alone_is_a_type_of_its_own) {
  model_config c = pairs().front();
  c.attention = {"lsh", "lsh"};
  c.feed_forward = {"ultramem", "ultramem"};
  c.dropout = 0.1;
  const auto model = make_model<double, lsh_attention<double>, ultra_mem<double>>(c);
  const auto& part = std::get<0>(std::get<1>(model.layers).stack.blocks[0].blocks[0].parts);
  EXPECT_EQ(part.inner.config.output_dropout, 0.1);
  EXPECT_EQ(count_parameters(model), count_parameters(make_model<double>(c)));
  const auto tokens = to_tokens(text);
  matrix<double> one(24, byte_values), other(24, byte_values);
  model.forward(std::span(tokens).first(12), one, {});
  make_model<double>(c).forward(std::span(tokens).first(12), other, {});
  EXPECT_TRUE(one == other);
  c.attention[1] = "local";
  EXPECT_THROW((make_model<double, lsh_attention<double>, ultra_mem<double>>(c)), config_error);
}

/// Whether f throws an error of this type whose sentence holds `part`.
template <class Error, class F>
void expect_refused(F&& f, const std::string& part) {
  try {
    f();
    FAIL() << "not refused: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(pairs, that_do_not_go_together_are_refused_in_a_sentence) {
  matrix<double> x = random(6, 16, 1), y(6, 16);
  model_config c = pairs().front();

  // Batch norm in training inside a reversible block; running statistics are welcome.
  product_key_memory_config with_batch_norm{.inputs = 16, .heads = 2, .sub_keys = 8, .key_width = 8, .top_k = 3};
  with_batch_norm.query.norm = query_normalisation::batch;
  model_type model = make_model<double>(c);
  std::get<1>(std::get<1>(model.layers).stack.blocks[0].blocks[0].parts).inner = product_key_memory<double>(with_batch_norm, {1});
  const auto tokens = to_tokens(text);
  matrix<double> logits(12, byte_values);
  expect_refused<config_error>([&] { model.forward(std::span(tokens).first(6), logits, {.train = true}); }, "batch norm cannot train inside a reversible block");
  model.forward(std::span(tokens).first(6), logits, {});

  // Exits inside a reversible part: there is more than one state for a row.
  adaptive_stack<linear<double>> exits;
  for (int i = 0; i < 2; ++i) exits.blocks.emplace_back(linear_config{8, 8}, rng_key{1});
  expect_refused<shape_error>([&] { reversible<adaptive_stack<linear<double>>>(exits).forward(x, y, {}); }, "x + f(x) needs the same shape");

  // Dropout beside a part that is computed again head by head, and drops its output itself.
  expect_refused<config_error>(
      [&] { pre_norm<lsh_attention<double>>(layer_norm<double>(16), lsh_attention<double>({.inputs = 16, .heads = 2}, {1}), 0.1); },
      "this inner layer drops its output itself");

  // Buckets whose number follows from the length, or whose ids or directions are those of other sequences, and decoding.
  expect_refused<config_error>([] { bucket_attention<double>({.inputs = 8, .causal = true}, {1}); }, "buckets");
  expect_refused<config_error>(
      [] { (void)lsh_attention<double>({.inputs = 8, .causal = true, .hash = {.family = hash_family::external}}, {1}).make_cache(1, 8); },
      "decoding needs a hash of its own");
  expect_refused<config_error>([] { (void)lsh_attention<double>({.inputs = 8}, {1}).make_cache(1, 8); }, "expected a causal layer to decode with");
  expect_refused<config_error>([] { (void)local_attention<double>({.inputs = 8}, {1}).make_cache(1, 8); }, "expected a causal layer to decode with");

  // A rule that asks a predictor of exits, and a model without one.
  c.exit_loss = 0;
  const auto silent = make_model<double>(c);
  const auto& decoder = std::get<1>(silent.layers);
  auto cache = make_adaptive_cache(decoder, 1, 4);
  matrix<double> row = random(1, 32, 2), answer(1, byte_values);
  std::int32_t left = 0;
  expect_refused<config_error>([&] { adaptive_step(decoder, row, nothing{}, answer, {&left, 1}, cache, {.kind = exit_confidence::geometric}, {}); },
                               "the model has no halting head");

  expect_refused<config_error>([&] { (void)exit_decoder(std::get<0>(silent.layers), decoder, {}, {.kind = exit_confidence::geometric}); },
                               "the model has no halting head");
  const exit_decoder by_confidence(std::get<0>(silent.layers), decoder, {}, {.kind = exit_confidence::max_prob});
  expect_refused<config_error>([&] { generator(by_confidence, {.most = 4, .drafts = 2}); }, "no exit rule goes with drafts");

  // Kinds, numbers of them, and keys that are not there.
  expect_refused<config_error>([] { parse_config(R"({"attention": ["exact", "lsh"]})"); }, "attention: expected lsh, bucket, local or collaborative, got 'exact'");
  expect_refused<config_error>([] { parse_config(R"({"feed_forward": ["chunked"]})"); }, "feed_forward: expected a kind for each of 2 blocks, got 1");
  expect_refused<config_error>([] { parse_config(R"({"layers": 2})"); }, "there is no key 'layers'");
  expect_refused<config_error>([] { parse_config(R"({"heads": 2.5})"); }, "heads: expected a whole number, got a JSON number");
  expect_refused<config_error>([] { parse_config("{"); }, "expected a JSON object");
}

TEST(pairs, a_skip_unit_inside_one_part_of_a_reversible_block_is_right) {
  using mix = residual<sequential<layer_norm<double>, local_attention<double>>>;
  using skips = skip_stack<tapped_block<mix, layer_norm<double>, feed_forward<double>>, ultra_mem<double>>;
  skips s;
  for (std::uint64_t i = 0; i < 2; ++i)
    s.blocks.push_back({mix{sequential(layer_norm<double>(8), local_attention<double>({.inputs = 8, .chunk = 4, .causal = true}, {i}))},
                        layer_norm<double>(8), feed_forward<double>({.features = 8, .hidden = 12, .kind = activation::gelu}, {i + 9})});
  s.units.emplace_back(ultra_mem_config{.features = 8, .heads = 1, .sub_keys = 8, .key_width = 4, .top_k = 3, .value_width = 6}, rng_key{3});
  s.ranges = {{0, 1}};
  const auto report = gradient_check(reversible<skips, feed_forward<double>>(s, s.blocks[0].feed), random(9, 16, 4), {.key = {5}, .train = true}, {.entries = 10});
  EXPECT_LT(report.worst(), 5e-6) << report.where();  // as above
  EXPECT_GT(report.at("0.units.0.expansion.values").largest, 1e-5);
}

}  // namespace pairs_tests
