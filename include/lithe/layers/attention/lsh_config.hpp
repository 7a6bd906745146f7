#pragma once

#include "lithe/kernels/chunk_window.hpp"
#include "lithe/kernels/key_norm.hpp"
#include "lithe/layers/attention/token_hash.hpp"
#include "lithe/layers/dropout.hpp"

namespace lithe::inline LITHE_ABI {

/// The defaults are those of the Hugging Face model, whose checkpoints the layer reads; the other published variants follow as presets.
struct lsh_attention_config {
  index_t inputs = 0, heads = 1;
  index_t head_width = 0;  ///< 0: inputs / heads
  index_t outputs = 0;     ///< 0: inputs
  bool causal = false;
  token_hash_config hash{};
  index_t chunk = 64, before = 1, after = 0;  ///< sorted tokens in a chunk, and chunks seen around one's own
  chunk_wrap wrap = chunk_wrap::circular;
  index_t pad_to = 0;         ///< sequences count as filled up to a multiple of so many tokens, itself one of `chunk`; 0: of `chunk`
  index_t exact_up_to = -1;   ///< sequences of at most so many tokens see all of their keys; -1: `chunk`
  key_norm norm = key_norm::rms;
  mask_rule self{-1e5};       ///< a token's score with itself: it sees itself only if nothing else is allowed
  mask_rule hidden{-1e9};     ///< of keys that come later (causal) and of padding
  mask_rule other_bucket{0, false};  ///< of keys in the window from another bucket; {0, false}: seen
  bool count_once = false;    ///< a key met N times over all rounds weighs as if met once (its scores lose log N)
  round_merge merge = round_merge::softmax;
  bool padding_apart = true;  ///< padding is sorted behind all buckets; else it is hashed as it comes, and only no key
  double dropout = 0, output_dropout = 0;  ///< of the weights, of y
};

/// google/trax, trax/layers/research/efficient_attention.py.
[[nodiscard]] inline lsh_attention_config trax_v2_lsh(lsh_attention_config c) {
  c.self = {-1e5, false};
  c.hidden = {-1e9, false};
  c.hash.sharing = direction_sharing::head_and_sequence;
  c.hash.rule = bucket_rule::trax;
  c.exact_up_to = 0;
  return c;
}
/// The paper's own code, the class LSHCausalAttention that google/trax had: same-bucket mask, keys counted once.
[[nodiscard]] inline lsh_attention_config trax_v1_lsh(lsh_attention_config c) {
  c = trax_v2_lsh(c);
  c.norm = key_norm::unit;
  c.other_bucket = {-1e7, false};
  c.count_once = true;
  c.hash.rule = bucket_rule::two_per_chunk;
  return c;
}
/// lucidrains/reformer-pytorch.
[[nodiscard]] inline lsh_attention_config lucidrains_lsh(lsh_attention_config c) {
  c.norm = key_norm::unit;
  c.self = {-5e4, true};
  c.hidden = {-std::numeric_limits<float>::max(), true};
  c.hash.sharing = direction_sharing::all;
  c.hash.rule = bucket_rule::one_per_chunk;
  c.padding_apart = false;
  return c;
}

namespace detail {

/// The configuration with every 0 replaced by what it stands for. Throws config_error.
[[nodiscard]] inline lsh_attention_config resolved(lsh_attention_config c) {
  constexpr const char* who = "lsh_attention";
  require<config_error>(c.inputs >= 1 && c.heads >= 1, who, ": expected at least 1 input and 1 head, got ", c.inputs, " and ", c.heads);
  require<config_error>(c.head_width > 0 || (c.head_width == 0 && c.inputs % c.heads == 0), who,
                        ": expected inputs divisible by heads (or a head_width of at least 1), got ", c.inputs, " inputs, ", c.heads,
                        " heads and a head_width of ", c.head_width);
  if (c.head_width == 0) c.head_width = c.inputs / c.heads;
  if (c.outputs == 0) c.outputs = c.inputs;
  require<config_error>(c.outputs >= 1, who, ": expected at least 1 output, got ", c.outputs);
  require<config_error>(c.chunk >= 1, who, ": expected a chunk of at least 1 token, got ", c.chunk);
  require<config_error>(c.before >= 0 && c.after >= 0, who, ": expected 0 or more chunks before and after, got ", c.before, " and ", c.after);
  if (c.pad_to == 0) c.pad_to = c.chunk;
  require<config_error>(c.pad_to >= 1 && c.pad_to % c.chunk == 0, who, ": expected pad_to to be a multiple of the chunk ", c.chunk, ", got ", c.pad_to);
  if (c.exact_up_to == -1) c.exact_up_to = c.chunk;
  require<config_error>(c.exact_up_to >= 0, who, ": expected exact_up_to of 0 or more tokens (-1: a chunk), got ", c.exact_up_to);
  checked_rate(who, c.dropout);
  checked_rate(who, c.output_dropout);
  return c;
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
