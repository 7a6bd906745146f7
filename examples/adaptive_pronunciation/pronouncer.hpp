#pragma once

// Letters to phones: an encoder, and a decoder that can answer at every depth.

#include <lithe/lithe.hpp>

#include "../support/files.hpp"
#include "dictionary.hpp"

using real = float;
using lithe::matrix;
using lithe::matrix_view;

/// What a pronouncer is built from; saved in its file.
struct model_config {
  index_t encoder_blocks = 1, decoder_blocks = 6, features = 128, heads = 4, hidden = 256, phones = 0;
  std::string classifiers = "shared";      ///< shared or independent
  std::string distribution = "geometric";  ///< geometric, multinomial, sequence; or meta: no distribution, a learned confidence
  double dropout = 0.2;
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(model_config, encoder_blocks, decoder_blocks, features, heads, hidden, phones, classifiers, distribution, dropout,
                                   seed)

using attention_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, lithe::attention<real>, lithe::dropout<real>>>;
using feed_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, lithe::feed_forward<real>, lithe::dropout<real>>>;
using encoder_block = lithe::sequential<attention_part, feed_part>;
using decoder_block = lithe::decoder_block<attention_part, feed_part>;
using decoder_type = lithe::adaptive_depth<decoder_block>;
using encoder_type = lithe::sequential<lithe::embedding<real>, lithe::dropout<real>, lithe::stack<encoder_block>, lithe::layer_norm<real>>;

struct pronouncer {
  using scalar = real;
  struct record {
    lithe::record_of<encoder_type> encoder;
    lithe::exit_training_record<decoder_type> decoder;
    lithe::record_of<lithe::sequence_halting<real>> whole;
  };
  struct gradient {
    lithe::gradient_of<encoder_type> encoder;
    lithe::gradient_of<lithe::embedding<real>> phones;
    lithe::gradient_of<decoder_type> decoder;
    lithe::gradient_of<lithe::sequence_halting<real>> whole;
  };

  encoder_type encoder;
  lithe::embedding<real> phones;
  decoder_type decoder;
  lithe::sequence_halting<real> whole;  ///< the sequence-level distribution over exits

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("encoder", s.encoder...);
    f("phones", s.phones...);
    f("decoder", s.decoder...);
    f("whole", s.whole...);
  }
};

inline void set_distribution(pronouncer& p, const std::string& kind, index_t exits, index_t features, lithe::rng_key key) {
  using namespace lithe;
  p.decoder.halt = {};
  p.decoder.meta = {};
  p.whole = {};
  if (kind == "meta")
    p.decoder.meta = halting_head<real>({.features = features}, key);
  else if (kind == "sequence")
    p.whole = sequence_halting<real>({.features = features, .outputs = exits}, key);
  else
    p.decoder.halt = halting<real>(
        {.kind = kind == "geometric" ? exit_distribution::geometric : exit_distribution::multinomial, .exits = exits, .features = features}, key);
}

inline pronouncer make_pronouncer(const model_config& c) {
  using namespace lithe;
  const rng_key key{c.seed};
  const index_t D = c.features;
  const auto attend = [&](bool causal, rng_key k) {
    return attention_part{
        sequential(layer_norm<real>(D), attention<real>({.inputs = D, .heads = c.heads, .causal = causal}, k), dropout<real>(c.dropout))};
  };
  const auto feed = [&](rng_key k) {
    return feed_part{sequential(layer_norm<real>(D), feed_forward<real>({.features = D, .hidden = c.hidden, .kind = activation::gelu}, k),
                                dropout<real>(c.dropout))};
  };
  pronouncer p;
  stack<encoder_block> blocks;
  for (index_t i = 0; i < c.encoder_blocks; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    blocks.blocks.emplace_back(attend(false, k.child(0)), feed(k.child(1)));
  }
  p.encoder = encoder_type(embedding<real>({.tokens = letters, .features = D, .positions = longest_word, .deviation = 1}, key.child(0)),
                           dropout<real>(c.dropout), std::move(blocks), layer_norm<real>(D));
  p.phones = embedding<real>({.tokens = c.phones, .features = D, .positions = longest_answer, .deviation = 1}, key.child(1));
  for (index_t i = 0; i < c.decoder_blocks; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(200 + i));
    p.decoder.stack.blocks.push_back({attend(true, k.child(0)), layer_norm<real>(D),
                                      cross_attention<real>({.inputs = D, .memory_inputs = D, .heads = c.heads}, k.child(1)),
                                      dropout<real>(c.dropout), feed(k.child(2))});
  }
  p.decoder.answers = exit_classifiers<real>({.exits = c.decoder_blocks,
                                              .features = D,
                                              .classes = c.phones,
                                              .norm = c.classifiers == "shared" ? exit_sharing::shared : exit_sharing::independent,
                                              .classifier = c.classifiers == "shared" ? exit_sharing::shared : exit_sharing::independent},
                                             key.child(2));
  set_distribution(p, c.distribution, c.decoder_blocks, D, key.child(3));
  return p;
}
