#pragma once

// A byte-level language model whose blocks hold a dense feed-forward, a memory layer, or both; how it is described, saved and sampled.

#include <lithe/lithe.hpp>

#include "../support/files.hpp"

using real = float;
using lithe::index_t;
using lithe::matrix;
using lithe::token_t;

// A block is an attention part and one or two others, in a row with those of all blocks. The choice stands innermost: what is around it is compiled once.
using part_layer = lithe::one_of<lithe::attention<real>, lithe::feed_forward<real>, lithe::product_key_memory<real>, lithe::ultra_mem<real>,
                                 lithe::mixture_of_experts<real>>;
using model_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, part_layer, lithe::dropout<real>>>;
using language_model = lithe::sequential<lithe::embedding<real>, lithe::stack<model_part>, lithe::layer_norm<real>, lithe::linear<real>>;

inline constexpr index_t byte_values = 256;
inline constexpr token_t mask_token = 256;

/// What a model is built from; saved in its file.
struct model_config {
  std::string feed_forward = "memory";       ///< dense, memory, flat, peer, ultramem or moe
  std::string memory_placement = "replace";  ///< replace the feed-forward, or after it
  std::string objective = "causal";          ///< causal or masked
  std::vector<index_t> memory_at{1};         ///< blocks, counted from 0, that hold a memory
  index_t layers = 3, features = 128, heads = 4, hidden = 512, context = 256;
  index_t sub_keys = 256, memory_heads = 4, key_width = 64, top_k = 16;  ///< ultramem: as many table rows, half as wide
  index_t experts = 16;                                                  ///< 2 of a token, each half as wide as the feed-forward
  bool batch_norm = true;                                                ///< of the memory's queries
  double dropout = 0;
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(model_config, feed_forward, memory_placement, objective, memory_at, layers, features, heads, hidden,
                                                context, sub_keys, memory_heads, key_width, top_k, experts, batch_norm, dropout, seed)

inline lithe::product_key_memory_config memory_config(const model_config& c) {
  lithe::product_key_memory_config m{
      .inputs = c.features, .heads = c.memory_heads, .sub_keys = c.sub_keys, .key_width = c.key_width, .top_k = c.top_k};
  if (c.batch_norm) m.query.norm = lithe::query_normalisation::batch;
  if (c.feed_forward == "flat") {  // as many slots, each with a key of its own
    m.flat = true;
    m.sub_keys = c.sub_keys * c.sub_keys;
  }
  if (c.feed_forward == "peer") m.readout.kind = lithe::memory_readout_kind::experts;
  return m;
}

inline bool has_slots(const model_config& c) { return c.feed_forward == "memory" || c.feed_forward == "flat" || c.feed_forward == "peer"; }
inline index_t slots_of(const model_config& c) { return c.sub_keys * c.sub_keys; }

inline language_model make_model(const model_config& c) {
  using namespace lithe;
  const bool dense = c.feed_forward == "dense";  // then nobody asks where memories stand
  for (const index_t at : c.memory_at)
    require<config_error>(dense || (at >= 0 && at < c.layers), "memory-at: expected blocks from 0 to ", c.layers - 1, ", got ", at);
  const rng_key key{c.seed};
  stack<model_part> parts;
  for (index_t i = 0; i < c.layers; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    const auto add = [&](part_layer layer) {
      parts.blocks.push_back({sequential(layer_norm<real>(c.features), std::move(layer), dropout<real>(c.dropout))});
    };
    const bool here = !dense && std::find(c.memory_at.begin(), c.memory_at.end(), i) != c.memory_at.end();
    add(attention<real>({.inputs = c.features, .heads = c.heads, .causal = c.objective == "causal"}, k.child(0)));
    if (!here || c.memory_placement == "after")
      add(feed_forward<real>({.features = c.features, .hidden = c.hidden, .kind = activation::gelu}, k.child(1)));
    if (!here) continue;
    if (c.feed_forward == "ultramem")
      add(ultra_mem<real>({.features = c.features, .sub_keys = 2 * c.sub_keys, .key_width = c.key_width / 2, .top_k = c.top_k}, k.child(2)));
    else if (c.feed_forward == "moe")
      add(mixture_of_experts<real>({.features = c.features, .hidden = c.hidden / 2, .experts = c.experts}, k.child(2)));
    else
      add(product_key_memory<real>(memory_config(c), k.child(2)));
  }
  return language_model(embedding<real>({.tokens = byte_values + 1, .features = c.features, .positions = c.context, .deviation = 1}, key.child(0)),
                        std::move(parts), layer_norm<real>(c.features), linear<real>({c.features, byte_values}, key.child(1)));
}

/// f(memory, its record) for every product-key memory of a model.
template <class F>
void for_each_memory(const language_model& model, const language_model::record& r, F&& f) {
  using memory = lithe::product_key_memory<real>;
  const auto& parts = std::get<1>(model.layers).blocks;
  const auto& records = std::get<1>(r.layers).blocks;
  for (std::size_t i = 0; i < parts.size(); ++i)
    if (const auto* m = std::get_if<memory>(&std::get<1>(parts[i].inner.layers).value))
      f(*m, std::get<memory::record>(std::get<1>(records[i].layers).value));
}

inline std::string config_text(const model_config& c) { return nlohmann::json(c).dump(); }
/// The model's settings in a file of one of these programs.
inline model_config read_config(const std::string& path,
                                std::initializer_list<const char*> programs = {"train_language_model"}) {
  return support::read_settings<model_config>(path, support::read_saved(path, programs), "config");
}

inline std::vector<token_t> to_tokens(const std::string& text) {
  std::vector<token_t> out;
  for (const char c : text) out.push_back(static_cast<unsigned char>(c));
  return out;
}
inline std::vector<token_t> read_text(const std::string& path) { return to_tokens(support::read_file(path)); }

/// Continues a prompt byte by byte; the model sees at most its context.
template <class Model>
std::string sample(const Model& model, const model_config& c, const std::string& prompt, index_t length, const lithe::sampling& how,
                          std::uint64_t seed, const lithe::context& ctx) {
  const std::vector<token_t> bytes = to_tokens(prompt.empty() ? "\n" : prompt);
  const auto g = lithe::generate(model, {&bytes, 1}, {.capacity = c.context, .how = how, .most = length}, lithe::rng_key{seed}, ctx);
  return {g.tokens[0].begin(), g.tokens[0].end()};
}
