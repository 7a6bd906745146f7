// A model is its configuration and its file: a layer built with another key gives the same bits in inference once the
// file is loaded.
#include <gtest/gtest.h>
#include <unistd.h>

#include "lithe/io/state.hpp"
#include "lithe/lithe.hpp"

namespace state_of_layers_tests {

using namespace lithe;
using S = double;

constexpr index_t tokens = 48, features = 16;

struct state_of_layers : testing::Test {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / concat("lithe_state_of_layers_", ::getpid(), ".safetensors");
  void TearDown() override { std::filesystem::remove(path); }
};

template <class L>
matrix<S> output_of(const L& l) {
  matrix<S> x(tokens, features), y(tokens, features);
  fill_normal<S>(x, 1.0, {3});
  l.forward(x, y, {});
  return y;
}

/// Three steps of training, with dropout and running statistics if the layer has them.
template <class L>
void train(L& l) {
  matrix<S> x(tokens, features), y(tokens, features), dy(tokens, features), dx(tokens, features);
  auto g = make_gradient(l);
  record_of<L> r;
  optimiser<S> adam;
  for (std::uint64_t step = 0; step < 3; ++step) {
    const context ctx{.key = {step}, .train = true};
    fill_normal<S>(x, 2.0, rng_key{7}.child(step));
    fill_normal<S>(dy, 1.0, rng_key{8}.child(step));
    set_zero(l, g);
    l.forward(x, y, r, ctx);
    l.backward(x, r, dy, dx, g, ctx);
    adam.step(l, g, 0.05);
  }
}

/// make(key) builds the layer.
template <class Make>
void expect_whole_state(const std::filesystem::path& path, const char* name, Make&& make) {
  auto saved = make(rng_key{1}), loaded = make(rng_key{2});
  train(saved);
  save_model(path, saved);
  EXPECT_NE(output_of(loaded), output_of(saved)) << name << ": the test shows nothing";
  load_model(path, loaded);
  EXPECT_EQ(output_of(loaded), output_of(saved)) << name;
  auto packed = make(rng_key{2});
  prepack(packed);
  load_model(path, packed);
  auto also = saved;
  prepack(also);
  EXPECT_EQ(output_of(packed), output_of(also)) << name << ", packed";
}

token_hash_config four_buckets(hash_family family) {
  token_hash_config c;
  c.family = family;
  c.rounds = 2;
  c.buckets = {4};
  return c;
}

TEST_F(state_of_layers, position_wise_layers) {
  expect_whole_state(path, "linear", [](rng_key k) { return linear<S>({features, features}, k); });
  expect_whole_state(path, "layer_norm", [](rng_key) { return layer_norm<S>(features); });
  expect_whole_state(path, "rms_norm", [](rng_key) { return rms_norm<S>(features); });
  expect_whole_state(path, "batch_norm", [](rng_key) { return batch_norm<S>(features); });
  expect_whole_state(path, "feed_forward", [](rng_key k) {
    return feed_forward<S>({.features = features, .hidden = 24, .gated = true, .dropout = 0.1}, k);
  });
  expect_whole_state(path, "mixture_of_experts", [](rng_key k) {
    return mixture_of_experts<S>({.features = features, .hidden = 8, .experts = 4, .gated = true}, k);
  });
}

TEST_F(state_of_layers, attention_layers) {
  expect_whole_state(path, "attention",
                     [](rng_key k) { return attention<S>({.inputs = features, .heads = 4, .rotary_width = 2}, k); });
  expect_whole_state(path, "collaborative_attention", [](rng_key k) {
    return collaborative_attention<S>({.inputs = features, .heads = 4, .key_width = 6, .query_bias = true}, k);
  });
  expect_whole_state(path, "local_attention",
                     [](rng_key k) { return local_attention<S>({.inputs = features, .heads = 2, .chunk = 8}, k); });
  for (const auto family : {hash_family::rotation, hash_family::sign}) {
    for (const auto sharing : {direction_sharing::head, direction_sharing::all})
      expect_whole_state(path, "lsh_attention", [&](rng_key k) {
        lsh_attention_config c{
            .inputs = features, .heads = 2, .causal = true, .hash = four_buckets(family), .chunk = 4};
        c.hash.sharing = sharing;
        return lsh_attention<S>(c, k);
      });
    expect_whole_state(path, "bucket_attention", [&](rng_key k) {
      return bucket_attention<S>({.inputs = features, .heads = 2, .causal = true, .hash = four_buckets(family)}, k);
    });
  }
}

TEST_F(state_of_layers, memory_layers) {
  for (const auto norm :
       {query_normalisation::none, query_normalisation::batch, query_normalisation::layer, query_normalisation::rms})
    expect_whole_state(path, "product_key_memory", [&](rng_key k) {
      product_key_memory_config c{
          .inputs = features, .heads = 2, .sub_keys = 8, .key_width = 8, .top_k = 4, .shuffle_slots = true};
      c.query.norm = norm;
      c.query.hidden = {10};
      c.readout.kind = memory_readout_kind::silu_gated;
      return product_key_memory<S>(c, k);
    });
  expect_whole_state(path, "experts", [](rng_key k) {
    auto c = peer_experts(features);
    c.heads = 2;
    c.sub_keys = 8;
    c.top_k = 4;
    return product_key_memory<S>(c, k);
  });
  for (const auto& c : {ultra_mem_v1(features), ultra_mem_paper(features, 2), ultra_mem_v2(features)})
    expect_whole_state(path, "ultra_mem", [&](rng_key k) {
      auto small = c;
      small.sub_keys = 8;
      small.top_k = 4;
      return ultra_mem<S>(small, k);
    });
}

TEST_F(state_of_layers, composed_layers) {
  using block = sequential<residual<pre_norm<lsh_attention<S>>>, residual<product_key_memory<S>>,
                           residual<pre_norm<feed_forward<S>>>>;
  expect_whole_state(path, "stack", [](rng_key k) {
    stack<block> s;
    for (std::uint64_t i = 0; i < 2; ++i)
      s.blocks.emplace_back(
          residual<pre_norm<lsh_attention<S>>>{
              {layer_norm<S>(features), lsh_attention<S>({.inputs = features, .heads = 2, .chunk = 4}, k.child(i))}},
          residual<product_key_memory<S>>{product_key_memory<S>(
              {.inputs = features, .heads = 2, .sub_keys = 8, .key_width = 8, .top_k = 4}, k.child(9 + i))},
          residual<pre_norm<feed_forward<S>>>{
              {layer_norm<S>(features), feed_forward<S>({.features = features, .hidden = 8}, k.child(20 + i))}});
    return s;
  });
}

// ---- keys ----

lsh_attention<float> hashed(rng_key k) { return {{.inputs = features, .heads = 2, .causal = true, .chunk = 4}, k}; }

TEST(lsh_directions, a_key_of_64_bits_is_kept_exactly_in_float_and_double) {
  for (const std::uint64_t bits : {std::uint64_t{0}, ~std::uint64_t{0}, std::uint64_t{0xFEDC'BA98'7654'3210},
                                   std::uint64_t{0x8000'0000'0000'0001}}) {
    token_hash<float> single;
    token_hash<double> wide;
    single.set_key({bits});
    wide.set_key({bits});
    EXPECT_EQ(single.drawn_from().value, bits);
    EXPECT_EQ(wide.drawn_from().value, bits);
  }
  EXPECT_EQ(token_hash<float>().drawn_from().value, 0U);
}

TEST_F(state_of_layers, a_file_without_the_key_leaves_the_layers_own) {
  const auto saved = hashed({1});
  auto loaded = hashed({2});
  safetensors_writer old;  // as version 0.1 wrote it
  old.metadata["lithe.format"] = "1";
  for_each_tensor(
      [&](const std::string& name, role kind, const auto& t) {
        if (kind == role::parameter) old.add<float>(name, view(t));
      },
      saved);
  old.write(path);
  EXPECT_FALSE(safetensors_file(path).contains("hash.key"));
  const rng_key own = loaded.hash.drawn_from();
  load_model(path, loaded);
  EXPECT_EQ(loaded.hash.drawn_from(), own);
  EXPECT_EQ(loaded.query_key.weight, saved.query_key.weight);
}

TEST_F(state_of_layers, a_key_of_other_numbers_is_refused_and_nothing_is_loaded) {
  const auto saved = hashed({1});
  for (const float piece : {0.5F, -1.0F, 65536.0F, std::numeric_limits<float>::quiet_NaN()}) {
    auto spoiled = saved;
    spoiled.hash.key(0, 2) = piece;
    save_model(path, spoiled, {}, false);
    auto loaded = hashed({2});
    const auto before = loaded.query_key.weight;
    try {
      load_model(path, loaded);
      ADD_FAILURE() << piece;
    } catch (const io_error& e) {
      EXPECT_NE(std::string(e.what()).find("tensor 'hash.key': expected whole numbers from 0 to 65535"),
                std::string::npos)
          << e.what();
    }
    EXPECT_EQ(loaded.query_key.weight, before);
  }
}

TEST_F(state_of_layers, given_directions_are_saved) {
  auto saved = hashed({1}), loaded = hashed({2});
  const index_t rows = 2 * saved.hash.directions(saved.hash.buckets("test", tokens, 4));
  saved.hash.given.resize(rows, features / 2);
  fill_normal<float>(saved.hash.given, 1.0, {5});
  save_model(path, saved);
  EXPECT_THROW(load_model(path, loaded), io_error);  // directions that this layer would not use
  loaded.hash.given.setZero(rows, features / 2);
  load_model(path, loaded);
  EXPECT_EQ(loaded.hash.given, saved.hash.given);
  save_model(path, hashed({1}));
  EXPECT_THROW(load_model(path, loaded), io_error);  // directions that the saved layer did not use
}

}  // namespace state_of_layers_tests
