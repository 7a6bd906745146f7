#pragma once

#include <algorithm>
#include <numeric>

#include "lithe/compose/one_of.hpp"
#include "lithe/compose/pre_norm.hpp"
#include "lithe/compose/reversible_language_model.hpp"
#include "lithe/layers/attention/local_attention.hpp"
#include "lithe/layers/attention/lsh_attention.hpp"
#include "lithe/layers/feed_forward.hpp"

namespace lithe::inline LITHE_ABI {

enum class reformer_layer { local, lsh };

/// The defaults are those of the Hugging Face model.
struct reformer_config {
  index_t vocabulary = 320, features = 256, heads = 12, head_width = 64, hidden = 512;
  activation kind = activation::relu;
  std::vector<reformer_layer> layers{reformer_layer::local, reformer_layer::lsh,   reformer_layer::local,
                                     reformer_layer::lsh,   reformer_layer::local, reformer_layer::lsh};
  std::vector<index_t> position_shape{64, 64}, position_widths{64, 192};  ///< one axis: a plain table
  index_t most_positions = 4096;
  bool causal = false;
  index_t local_chunk = 64, local_before = 1, local_after = 0;
  index_t lsh_chunk = 64, lsh_before = 1, lsh_after = 0;
  index_t rounds = 1;
  bucket_factors buckets{};  ///< empty: from the length
  double dropout = 0.05, local_dropout = 0.05, lsh_dropout = 0;
  double norm_epsilon = 1e-12;
  double deviation = 0.02, position_deviation = 1;  ///< of the normal numbers that weights and position tables start at
  index_t feed_forward_chunk = 0;  ///< rows of a block's feed-forward computed at a time; 0: all
};

template <std::floating_point S>
using reformer_feed_forward = pre_norm<feed_forward<S>>;
template <std::floating_point S>
using reformer_lsh_block = reversible<pre_norm<lsh_attention<S>>, reformer_feed_forward<S>>;
template <std::floating_point S>
using reformer_local_block = reversible<pre_norm<local_attention<S>>, reformer_feed_forward<S>>;
/// The Reformer of Hugging Face (arXiv 2001.04451): reversible blocks of local or LSH attention.
template <std::floating_point S>
using reformer = reversible_language_model<one_of<reformer_local_block<S>, reformer_lsh_block<S>>>;

/// The least common multiple of the chunks that the model has: what its published code pads sequences to that are longer than the shorter chunk.
[[nodiscard]] inline index_t reformer_padding(const reformer_config& c) {
  index_t n = 1;
  for (const reformer_layer l : c.layers) n = std::lcm(n, l == reformer_layer::local ? c.local_chunk : c.lsh_chunk);
  return n;
}

/// Builds the model with random weights: normal numbers of `deviation`, biases 0, gains 1. Throws config_error.
template <std::floating_point S>
[[nodiscard]] reformer<S> make_reformer(const reformer_config& c, rng_key key) {
  const auto set_normal = [&](linear<S>& l, rng_key k) {
    fill_normal<S>(l.weight, c.deviation, k);
    l.bias.setZero();
  };
  const auto norm = [&](index_t width) { return layer_norm<S>(width, static_cast<S>(c.norm_epsilon)); };
  const auto& widths = c.position_widths;
  require<config_error>(std::all_of(widths.begin(), widths.end(), [&](index_t w) { return w >= 1 && w <= c.features; }) &&
                            std::accumulate(widths.begin(), widths.end(), index_t{0}) == c.features,
                        "reformer: expected position widths of at least 1 whose sum is the ", c.features, " features; they are not");
  reformer<S> m;
  m.words = embedding<S>({.tokens = c.vocabulary, .features = c.features, .deviation = c.deviation}, key.child(0));
  m.drop = dropout<S>(c.dropout);
  m.positions = axial_positions<S>(
      {.shape = c.position_shape, .widths = c.position_widths, .deviation = c.position_deviation, .dropout = c.dropout}, key.child(1));
  require<config_error>(c.local_chunk >= 1 && c.lsh_chunk >= 1, "reformer: expected chunks of at least 1 token, got ", c.local_chunk, " and ", c.lsh_chunk);
  for (std::size_t i = 0; i < c.layers.size(); ++i) {
    const rng_key k = key.child(100 + i);
    feed_forward<S> inner({.features = c.features, .hidden = c.hidden, .kind = c.kind, .dropout = c.dropout}, k);
    set_normal(inner.up, k.child(0));
    set_normal(inner.down, k.child(1));
    reformer_feed_forward<S> feed(norm(c.features), std::move(inner), c.dropout);
    if (c.layers[i] == reformer_layer::local) {
      local_attention<S> a({.inputs = c.features, .heads = c.heads, .head_width = c.head_width, .chunk = c.local_chunk, .before = c.local_before,
                            .after = c.local_after, .causal = c.causal, .pad_to = reformer_padding(c), .dropout = c.local_dropout}, k);
      std::uint64_t n = 2;
      for (linear<S>* l : {&a.query, &a.key, &a.value, &a.output}) set_normal(*l, k.child(n++));
      m.blocks.blocks.emplace_back(reformer_local_block<S>({norm(c.features), std::move(a), c.dropout}, std::move(feed), c.feed_forward_chunk));
    } else {
      lsh_attention_config lsh{.inputs = c.features, .heads = c.heads, .head_width = c.head_width, .causal = c.causal, .chunk = c.lsh_chunk,
                               .before = c.lsh_before, .after = c.lsh_after, .dropout = c.lsh_dropout, .output_dropout = c.dropout};
      lsh.hash.rounds = c.rounds;
      lsh.hash.buckets = c.buckets;
      lsh.hash.most_positions = c.most_positions;
      lsh.pad_to = reformer_padding(c);
      if (lsh.pad_to != c.lsh_chunk) lsh.exact_up_to = std::min(c.local_chunk, c.lsh_chunk);  // longer ones the published code pads, and hashes
      lsh_attention<S> a(lsh, k);
      std::uint64_t n = 2;
      for (linear<S>* l : {&a.query_key, &a.value, &a.output}) set_normal(*l, k.child(n++));
      m.blocks.blocks.emplace_back(reformer_lsh_block<S>({norm(c.features), std::move(a)}, std::move(feed), c.feed_forward_chunk));
    }
  }
  linear<S> output({2 * c.features, c.vocabulary}, key.child(2));
  set_normal(output, key.child(2));
  m.head = typename reformer<S>::head_type(norm(2 * c.features), dropout<S>(c.dropout), std::move(output));
  return m;
}

}  // namespace lithe::inline LITHE_ABI
