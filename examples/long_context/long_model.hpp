#pragma once

// A byte-level language model of reversible blocks for long sequences; how it is described, built and saved.

#include <lithe/lithe.hpp>

#include "../support/files.hpp"

using real = float;
using lithe::index_t;
using lithe::token_t;

template <class Attention>
using block_of = lithe::reversible<lithe::pre_norm<Attention>, lithe::pre_norm<lithe::feed_forward<real>>>;
using block = lithe::one_of<block_of<lithe::lsh_attention<real>>, block_of<lithe::bucket_attention<real>>, block_of<lithe::local_attention<real>>,
                            block_of<lithe::attention<real>>>;
using long_model = lithe::reversible_language_model<block>;

inline constexpr index_t byte_values = 256;

/// What a model is built from; saved in its file.
struct long_config {
  std::string attention = "lsh";  ///< lsh, bucket, local or exact
  index_t length = 4096, layers = 4, features = 256, heads = 4, head_width = 64;
  index_t rounds = 4, chunk = 64;
  double dropout = 0.05;
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(long_config, attention, length, layers, features, heads, head_width, rounds, chunk, dropout, seed)

inline long_model make_model(const long_config& c) {
  using namespace lithe;
  const rng_key key{c.seed};
  long_model m;
  index_t last_axis = 1;
  while (last_axis * last_axis < c.length) last_axis *= 2;
  m.words = embedding<real>({.tokens = byte_values, .features = c.features, .deviation = 1}, key.child(0));
  m.positions = axial_positions<real>({.shape = {(c.length + last_axis - 1) / last_axis, last_axis},
                                       .widths = {c.features / 4, c.features - c.features / 4},
                                       .deviation = 0.1,
                                       .dropout = c.dropout},
                                      key.child(1));
  m.drop = dropout<real>(c.dropout);
  m.head = long_model::head_type(layer_norm<real>(2 * c.features), dropout<real>(c.dropout), linear<real>({2 * c.features, byte_values}, key.child(2)));
  for (index_t i = 0; i < c.layers; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    const auto add = [&](auto attention, double rate) {
      using kind = block_of<decltype(attention)>;
      pre_norm<feed_forward<real>> feed(
          layer_norm<real>(c.features),
          feed_forward<real>({.features = c.features, .hidden = 4 * c.features, .kind = activation::relu, .dropout = c.dropout}, k.child(1)), c.dropout);
      m.blocks.blocks.emplace_back(kind({layer_norm<real>(c.features), std::move(attention), rate}, std::move(feed), 1024));
    };
    token_hash_config hash{.rounds = c.rounds, .buckets = automatic_buckets(bucket_rule::power_of_two, c.length, c.chunk)};
    if (c.attention == "lsh")
      add(lsh_attention<real>({.inputs = c.features, .heads = c.heads, .head_width = c.head_width, .causal = true, .hash = hash, .chunk = c.chunk,
                               .output_dropout = c.dropout},
                              k.child(0)),
          0);
    else if (c.attention == "bucket")
      add(bucket_attention<real>({.inputs = c.features, .heads = c.heads, .head_width = c.head_width, .causal = true, .hash = hash}, k.child(0)), c.dropout);
    else if (c.attention == "local")
      add(local_attention<real>({.inputs = c.features, .heads = c.heads, .head_width = c.head_width, .chunk = c.chunk, .causal = true}, k.child(0)),
          c.dropout);
    else if (c.attention == "exact")
      add(lithe::attention<real>({.inputs = c.features, .heads = c.heads, .head_width = c.head_width, .causal = true, .bias = false}, k.child(0)),
          c.dropout);
    else
      throw config_error("attention: expected lsh, bucket, local or exact, got " + c.attention);
  }
  return m;
}

inline void save(const std::filesystem::path& path, const long_model& model, const long_config& c) {
  lithe::save_model(path, model, {{"program", "long_context"}, {"config", nlohmann::json(c).dump()}});
}
/// The configuration in a saved file; build the model from it, then `lithe::load_model`.
inline long_config read_config(const std::string& path) {
  return support::read_settings<long_config>(path, support::read_saved(path, {"long_context"}), "config");
}

inline std::vector<token_t> read_text(const std::string& path) {
  std::vector<token_t> out;
  for (const char c : support::read_file(path)) out.push_back(static_cast<unsigned char>(c));
  lithe::require<lithe::io_error>(!out.empty(), path, ": expected a text, found none");
  return out;
}
