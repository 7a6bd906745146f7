#pragma once

// One byte-level language model out of all systems: what it is described by, and how it is built.

#include <lithe/lithe.hpp>
#include <nlohmann/json.hpp>

using lithe::index_t;
using lithe::token_t;

// The model in ten lines. The kinds of a block's two parts are chosen innermost, so that all around them is compiled once; a program that
// wants one kind alone writes it in the place of the choice: model_of<float, lithe::lsh_attention<float>, lithe::ultra_mem<float>>.
template <class S>
using any_attention = lithe::one_of<lithe::lsh_attention<S>, lithe::bucket_attention<S>, lithe::local_attention<S>, lithe::collaborative_attention<S>>;
template <class S>
using any_feed_forward = lithe::one_of<lithe::feed_forward<S>, lithe::product_key_memory<S>, lithe::ultra_mem<S>>;
template <class Attention, class Feed>
using blocks_of = lithe::reversible_stack<lithe::reversible<lithe::pre_norm<Attention>, lithe::pre_norm<Feed>>>;
template <class S, class Attention = any_attention<S>, class Feed = any_feed_forward<S>>
using model_of = lithe::sequential<lithe::embedding<S>, lithe::adaptive_depth<blocks_of<Attention, Feed>>>;

inline constexpr index_t byte_values = 256;

/// What a model is built from: a JSON object with these keys, those that are left out as here; saved in the model's file.
struct model_config {
  std::vector<std::string> attention{"local", "lsh"};             ///< of each block: lsh, bucket, local or collaborative
  std::vector<std::string> feed_forward{"chunked", "memory"};     ///< of each block: chunked, memory or ultramem
  index_t blocks_per_exit = 1;
  index_t features = 64, heads = 4, context = 256;                ///< features of one of the two streams
  index_t window = 32, rounds = 2;                                ///< tokens in a window of local and LSH attention; rounds of hashing
  index_t hidden = 256;                                           ///< of the feed-forward, 64 tokens at a time
  index_t sub_keys = 64, top_k = 8;                               ///< of both memories: sub_keys² slots
  double dropout = 0, exit_loss = 0.1;                            ///< exit_loss: weight of the loss that trains the predictor of exits
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(model_config, attention, feed_forward, blocks_per_exit, features, heads, context, window, rounds,
                                                hidden, sub_keys, top_k, dropout, exit_loss, seed)

/// Throws config_error unless a model can be built; where(key) says where that is written.
template <class Where>
void check(const model_config& c, const Where& where) {
  using lithe::config_error;
  const auto within = [&](const char* key, auto value, auto least, auto most) {
    lithe::require<config_error>(value >= least && value <= most, where(key), key, ": expected ", least, " to ", most, ", got ", value);
  };
  const auto known = [&](const char* key, const std::vector<std::string>& kinds, std::initializer_list<const char*> all, const char* names) {
    for (const std::string& kind : kinds)
      lithe::require<config_error>(std::find(all.begin(), all.end(), kind) != all.end(), where(key), key, ": expected ", names, ", got '", kind, "'");
  };
  const auto divides = [&](const char* key, index_t divisor, const char* of, index_t number) {
    lithe::require<config_error>(number % divisor == 0, where(key), key, ": expected a divisor of the ", number, " ", of, ", got ", divisor);
  };
  const auto blocks = static_cast<index_t>(c.attention.size());
  lithe::require<config_error>(blocks >= 1 && blocks <= 256, where("attention"), "attention: expected a kind for each of 1 to 256 blocks, got ", blocks);
  lithe::require<config_error>(c.feed_forward.size() == c.attention.size(), where("feed_forward"), "feed_forward: expected a kind for each of ", blocks,
                               " blocks, got ", c.feed_forward.size());
  known("attention", c.attention, {"lsh", "bucket", "local", "collaborative"}, "lsh, bucket, local or collaborative");
  known("feed_forward", c.feed_forward, {"chunked", "memory", "ultramem"}, "chunked, memory or ultramem");
  within("blocks_per_exit", c.blocks_per_exit, index_t{1}, blocks);
  within("features", c.features, index_t{2}, index_t{8192});
  within("heads", c.heads, index_t{1}, c.features);
  within("context", c.context, index_t{2}, index_t{1} << 24);
  within("window", c.window, index_t{1}, c.context);
  within("rounds", c.rounds, index_t{1}, index_t{64});
  within("hidden", c.hidden, index_t{1}, index_t{65536});
  within("sub_keys", c.sub_keys, index_t{2}, index_t{8192});
  within("top_k", c.top_k, index_t{1}, c.sub_keys);
  within("dropout", c.dropout, 0.0, 0.95);
  within("exit_loss", c.exit_loss, 0.0, 100.0);
  divides("blocks_per_exit", c.blocks_per_exit, "blocks", blocks);
  divides("heads", c.heads, "features", c.features);
  lithe::require<config_error>(c.sub_keys % 2 == 0, where("sub_keys"), "sub_keys: expected an even number, got ", c.sub_keys);
}
inline void check(const model_config& c) {
  check(c, [](const char*) { return "configuration: "; });
}

/// A configuration from JSON text. Throws config_error that names the file, or whatever `name` says, the line, the key, and
/// what was expected.
inline model_config parse_config(const std::string& text, const std::string& name = "configuration") {
  using lithe::config_error;
  const auto line = [&](std::size_t at) {
    const auto end = text.begin() + static_cast<std::ptrdiff_t>(std::min(at, text.size()));
    return lithe::concat(name, ":", 1 + std::count(text.begin(), end, '\n'), ": ");
  };
  const auto where = [&](const std::string& key) { return line(std::min(text.find('"' + key + '"'), text.size())); };
  nlohmann::json given;
  try {
    given = nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    const std::string what = e.what();  // "[...] parse error at line ..., column ...: what is wrong"
    const auto begin = what.find(": ");
    throw config_error(line(e.byte == 0 ? 0 : e.byte - 1) + "expected a JSON object, found a " +
                       (begin == what.npos ? what : what.substr(begin + 2)));
  }
  const nlohmann::json known = model_config{};
  lithe::require<config_error>(given.is_object(), line(0), "expected a JSON object, got a JSON ", given.type_name());
  for (const auto& [key, value] : given.items()) {
    lithe::require<config_error>(known.contains(key), where(key), "there is no key '", key, "'");
    const auto& like = known[key];
    const bool strings = value.is_array() && std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_string(); });
    const bool fits = like.is_array()          ? strings
                      : like.is_number_float() ? value.is_number()
                                               : value.is_number_integer() && (key != "seed" || value.is_number_unsigned());
    lithe::require<config_error>(fits, where(key), key, ": expected ",
                                 like.is_array()          ? "a list of strings"
                                 : like.is_number_float() ? "a number"
                                 : key == "seed"          ? "a whole number of at least 0"
                                                          : "a whole number",
                                 ", got a JSON ", value.type_name(), value.is_number() ? " " + value.dump() : "");
  }
  const auto config = given.get<model_config>();
  check(config, where);
  return config;
}

/// The two parts of a block, by the names of their kinds.
template <class S>
any_attention<S> make_attention(const model_config& c, const std::string& kind, double output_dropout, lithe::rng_key key) {
  using namespace lithe;
  const token_hash_config hash{.rounds = c.rounds, .buckets = automatic_buckets(bucket_rule::power_of_two, c.context, c.window)};
  if (kind == "lsh")
    return lsh_attention<S>(
        {.inputs = c.features, .heads = c.heads, .causal = true, .hash = hash, .chunk = c.window, .output_dropout = output_dropout}, key);
  if (kind == "bucket") return bucket_attention<S>({.inputs = c.features, .heads = c.heads, .causal = true, .hash = hash}, key);
  if (kind == "local") return local_attention<S>({.inputs = c.features, .heads = c.heads, .chunk = c.window, .causal = true}, key);
  return collaborative_attention<S>({.inputs = c.features, .heads = c.heads, .key_width = std::max<index_t>(1, c.features / 2), .causal = true}, key);
}
template <class S>
any_feed_forward<S> make_feed_forward(const model_config& c, const std::string& kind, lithe::rng_key key) {
  using namespace lithe;
  const index_t heads = 2, width = std::max<index_t>(2, c.features / 2 * 2 / heads);
  if (kind == "memory")
    return product_key_memory<S>({.inputs = c.features, .heads = heads, .sub_keys = c.sub_keys, .key_width = width / 2 * 2, .top_k = c.top_k}, key);
  if (kind == "ultramem")
    return ultra_mem<S>({.features = c.features, .heads = heads, .sub_keys = c.sub_keys, .key_width = width, .top_k = c.top_k,
                         .value_width = std::max<index_t>(2, c.features / 2 / 2 * 2)}, key);
  return lithe::feed_forward<S>({.features = c.features, .hidden = c.hidden, .kind = activation::gelu, .chunk = 64}, key);
}

/// Builds the model that a configuration describes. Throws config_error for one that names kinds other than `Attention` and `Feed`.
template <class S, class Attention = any_attention<S>, class Feed = any_feed_forward<S>>
model_of<S, Attention, Feed> make_model(const model_config& c) {
  using namespace lithe;
  check(c);
  const rng_key key{c.seed};
  // The part of a block: norm, the layer, dropout. LSH attention as the only kind is computed again head by head and drops its output itself.
  constexpr bool fused = fused_part<Attention>;
  const auto part = [&]<class Part>(auto chosen, const std::string& kind, std::type_identity<Part>) {
    const double rate = fused_part<Part> ? 0 : c.dropout;
    if constexpr (std::same_as<Part, decltype(chosen)>) {
      return pre_norm<Part>(layer_norm<S>(c.features), std::move(chosen), rate);
    } else {
      require<config_error>(std::holds_alternative<Part>(chosen.value), "configuration: this program is built without ", kind);
      return pre_norm<Part>(layer_norm<S>(c.features), std::get<Part>(std::move(chosen.value)), rate);
    }
  };
  adaptive_depth<blocks_of<Attention, Feed>> decoder;
  for (std::size_t i = 0; i < c.attention.size(); ++i) {
    const rng_key k = key.child(100 + i);
    if (i % static_cast<std::size_t>(c.blocks_per_exit) == 0) decoder.stack.blocks.emplace_back();
    const std::string &attention = c.attention[i], &feed = c.feed_forward[i];
    decoder.stack.blocks.back().blocks.emplace_back(
        part(make_attention<S>(c, attention, fused ? c.dropout : 0, k.child(0)), attention, std::type_identity<Attention>{}),
        part(make_feed_forward<S>(c, feed, k.child(1)), feed, std::type_identity<Feed>{}));
  }
  const index_t width = 2 * c.features, exits = decoder.exits();
  decoder.answers = exit_classifiers<S>({.exits = exits, .features = width, .classes = byte_values}, key.child(1));
  if (c.exit_loss > 0) decoder.halt = halting<S>({.exits = exits, .features = width}, key.child(2));
  // An embedding for each of the two streams, side by side.
  return model_of<S, Attention, Feed>(embedding<S>({.tokens = byte_values, .features = width, .positions = c.context, .deviation = 1}, key.child(0)),
                                      std::move(decoder));
}
