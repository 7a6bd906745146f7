// The model of the example programs as a whole: no allocation in steady state, resuming, decoding, saving.
#include "../../../examples/train_language_model/language_model.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include "support/malloc_count.hpp"
#include "support/same_bits.hpp"

namespace language_model_tests {

using namespace lithe;

model_config small(const std::string& feed_forward = "memory", const std::string& placement = "replace") {
  model_config c;
  c.feed_forward = feed_forward;
  c.memory_placement = placement;
  c.layers = 2;
  c.features = 32;
  c.heads = 2;
  c.hidden = 48;
  c.context = 40;
  c.sub_keys = 12;
  c.memory_heads = 2;
  c.key_width = 16;
  c.top_k = 4;
  c.experts = 4;
  c.memory_at = {1};
  c.dropout = 0.1;
  return c;
}

std::vector<token_t> some_text(std::size_t n, std::uint64_t key) {
  std::vector<token_t> text(n);
  for (std::size_t i = 0; i < n; ++i) text[i] = static_cast<token_t>(uniform(rng_key{key}, i) * 256);
  return text;
}

struct run {
  language_model model;
  optimiser<real> adam{{.weight_decay = 0.01, .groups = {{.pattern = "*.values", .rate = 5}}}};
  gradient_of<language_model> gradient;
  language_model::record record;
  std::int64_t step = 0;

  explicit run(const model_config& c) : model(make_model(c)), gradient(make_gradient(model)) { adam.prepare(model, gradient); }
  void train(index_t steps, const executor& exec) {
    workspace work(exec);
    for (index_t i = 0; i < steps; ++i, ++step) {
      const auto text = some_text(81, static_cast<std::uint64_t>(step));
      const std::vector<index_t> offsets{0, 40, 80};
      const context ctx{.exec = &exec, .work = &work, .key = rng_key{9}.child(static_cast<std::uint64_t>(step)), .rows = {offsets}, .train = true};
      matrix<real> logits(80, byte_values);
      set_zero(model, gradient);
      model.forward(std::span(text).first(80), logits, record, ctx);
      cross_entropy<real>(logits, std::span(text).subspan(1), {}, logits, ctx);
      model.backward(std::span(text).first(80), record, logits, nothing{}, gradient, ctx);
      clip_by_global_norm(model, gradient, 1.0, ctx);
      adam.step(model, gradient, 1e-3, ctx);
    }
  }
};

TEST(language_model, resumed_training_gives_the_same_bits_as_uninterrupted) {
  const parallel_executor exec(2);
  const auto path = std::filesystem::temp_directory_path() / concat("lithe_resume_", ::getpid(), ".safetensors");
  run whole(small()), first(small()), second(small());
  whole.train(6, exec);
  first.train(3, exec);
  {
    state_writer file;
    file.metadata["config"] = config_text(small());
    file.add_model(first.model);
    file.add_training("optimizer", first.adam);
    file.add_training("step", first.step);
    file.write(path);
  }
  {
    state_reader file(path);
    file.add_model(second.model);
    file.add_training("optimizer", second.adam);
    file.add_training("step", second.step);
    file.load();
  }
  EXPECT_EQ(read_config(path).sub_keys, 12);
  second.train(3, serial_executor);
  expect_same_bits(whole.model, second.model);
  // one file is enough for inference, too
  language_model loaded = make_model(read_config(path));
  load_model(path, loaded);
  expect_same_bits(first.model, loaded);
  std::filesystem::remove(path);
}

TEST(language_model, a_checkpoint_of_another_shape_changes_nothing) {
  const auto path = std::filesystem::temp_directory_path() / concat("lithe_shape_", ::getpid(), ".safetensors");
  auto other = small();
  other.sub_keys = 13;
  save_model(path, make_model(other), {{"config", config_text(other)}});
  language_model model = make_model(small());
  const language_model before = model;
  EXPECT_THROW(load_model(path, model), io_error);
  expect_same_bits(model, before);
  std::filesystem::remove(path);
}

TEST(language_model, the_blocks_of_memories_are_checked_where_there_are_memories) {
  model_config c = small("dense");
  c.layers = 1;
  c.memory_at = model_config().memory_at;
  EXPECT_EQ(std::get<1>(make_model(c).layers).blocks.size(), 2U) << "attention and feed-forward";
  c.feed_forward = "memory";
  EXPECT_THROW((void)make_model(c), config_error);
}

TEST(language_model, no_allocation_in_steady_state_inference) {
#if defined(LITHE_COUNTS_MALLOC)
  const parallel_executor exec(2);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  for (const bool packed : {false, true})
    for (const char* kind : {"memory", "dense", "flat", "peer", "ultramem", "moe"}) {
      language_model model = make_model(small(kind, "after"));
      if (packed) prepack(model);
      const auto text = some_text(40, 1);
      matrix<real> logits(40, byte_values), one(1, byte_values);
      auto cache = model.make_cache(1, 64);
      generator<language_model> g(model, {.capacity = 64, .how = {.top_k = 20, .top_p = 0.9}});
      const std::vector<std::vector<token_t>> prompts{{1, 2, 3}, {4}};
      g.start(prompts, {}, ctx);
      g.reserve(64);
      const auto infer = [&] {
        g.step(ctx);
        model.forward(text, logits, ctx);
        model.truncate(cache, 0, 0);
        model.decode(std::span(text).first(20), matrix_view<real>(logits).slice_rows(0, 20), cache, ctx);
        model.decode(std::span(text).subspan(20, 1), one, cache, ctx);
      };
      infer();
      const long before = mallocs;
      for (int i = 0; i < 5; ++i) infer();
      EXPECT_EQ(mallocs - before, 0) << kind << packed;
    }
#else
  GTEST_LOG_(INFO) << "not counted under this allocator";
#endif
}

TEST(language_model, decoding_equals_the_full_pass) {
  for (const char* kind : {"memory", "flat", "peer", "dense", "ultramem", "moe"})
    for (const char* placement : {"replace", "after"}) {
      const language_model model = make_model(small(kind, placement));
      const auto text = some_text(30, 2);
      matrix<real> whole(30, byte_values), parts(30, byte_values);
      model.forward(text, whole, {});
      auto cache = model.make_cache(1, 40);
      index_t at = 0;
      for (const index_t n : {11, 1, 1, 5, 12}) {
        model.decode(std::span(text).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), matrix_view<real>(parts).slice_rows(at, n), cache, {});
        at += n;
      }
      EXPECT_LT((whole - parts).cwiseAbs().maxCoeff(), 1e-5F * whole.cwiseAbs().maxCoeff()) << kind << " " << placement;
    }
}

TEST(language_model, the_same_bits_with_any_number_of_workers) {
  const auto trained = [](index_t workers) {
    const parallel_executor exec(workers, workers);
    run r(small("memory", "after"));
    r.train(3, exec);
    return r.model;
  };
  const language_model one = trained(1);
  expect_same_bits(one, trained(2));
  expect_same_bits(one, trained(7));
}

TEST(language_model, samples_are_a_function_of_the_seed) {
  const auto c = small();
  const language_model model = make_model(c);
  const auto text = sample(model, c, "a", 100, {}, 1, {});  // longer than the context of 40
  EXPECT_EQ(text.size(), 100U);
  EXPECT_EQ(text, sample(model, c, "a", 100, {}, 1, {}));
  EXPECT_NE(text, sample(model, c, "a", 100, {}, 2, {}));
}

}  // namespace language_model_tests
