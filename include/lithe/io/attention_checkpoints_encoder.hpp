#pragma once

#include <optional>

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/io/attention_checkpoints.hpp"
#include "lithe/io/published_config.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"

// Whole encoder blocks of published checkpoints, and checkpoints turned collaborative from file to file.
namespace lithe::inline LITHE_ABI {

/// LayerNorm(h + ffn(h)) with h = LayerNorm(x + attention(x)): BERT, DistilBERT, ALBERT.
template <class A, class S = typename A::scalar>
using post_norm_block = sequential<residual<A>, layer_norm<S>, residual<feed_forward<S>>, layer_norm<S>>;
/// h + ffn(LayerNorm(h)) with h = x + attention(LayerNorm(x)): the encoder of Whisper.
template <class A, class S = typename A::scalar>
using pre_norm_encoder_block = sequential<residual<sequential<layer_norm<S>, A>>, residual<sequential<layer_norm<S>, feed_forward<S>>>>;

/// What a checkpoint of an encoder does not say itself, and what its importer says.
struct encoder_import {
  index_t heads = 0;  ///< of separate heads; a shared layer says it itself
  std::optional<double>
      epsilon{};  ///< of layer norms; none: 1e-12, below `roberta.` and for Whisper 1e-5, as published
  std::optional<activation> kind{};  ///< none: as published, gelu, for ALBERT gelu_tanh
  std::string prefix{};              ///< what lies below it is imported ("encoder."), and nothing else is looked at
  /// If given, gets the names of the tensors that are known and not part of the blocks.
  std::vector<std::string>* left_aside = nullptr;
};

/// What the config.json of a BERT, RoBERTa, ELECTRA, DistilBERT or ALBERT says about its blocks; what it leaves out has
/// the default of the published code. Throws io_error that names a key of another type, a model of another kind, and
/// settings that change the result and are not understood: relative positions, a decoder, cross attention.
[[nodiscard]] inline encoder_import read_encoder_config(const nlohmann::json& json) {
  constexpr const char* who = "encoder config";
  detail::require_model_type(json, who,
                             {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert"});
  std::string type, positions = "absolute";
  bool decoder = false, cross = false;
  double epsilon = 1e-12;
  detail::read_config_key(json, who, "model_type", type);
  activation kind = type == "albert" ? activation::gelu_tanh : activation::gelu;
  encoder_import o;
  const bool distil = type == "distilbert";
  detail::read_config_key(json, who, distil ? "n_heads" : "num_attention_heads", o.heads);
  require<io_error>(o.heads >= 1, who, ": expected a number of heads of at least 1, found ", o.heads);
  if (!distil) detail::read_config_key(json, who, "layer_norm_eps", epsilon);
  detail::read_activation(json, who, distil ? "activation" : "hidden_act", kind);
  detail::read_config_key(json, who, "position_embedding_type", positions);
  detail::read_config_key(json, who, "is_decoder", decoder);
  detail::read_config_key(json, who, "add_cross_attention", cross);
  require<io_error>(positions == "absolute", who, ": key 'position_embedding_type': expected absolute, found '",
                    positions, "'");
  require<io_error>(!decoder, who, ": key 'is_decoder': expected false, found true");
  require<io_error>(!cross, who, ": key 'add_cross_attention': expected false, found true");
  o.epsilon = epsilon;
  o.kind = kind;
  return o;
}

namespace detail {

/// Whether a tensor of an encoder, by its name behind the model's prefix, is known and not part of the blocks:
/// embeddings, which are the caller's, heads of tasks, buffers.
[[nodiscard]] inline bool beside_the_blocks(const std::string& name) {
  constexpr std::string_view parts[] = {"embeddings",
                                        "embeddings_project",
                                        "pooler",
                                        "position_ids",
                                        "cls",
                                        "lm_head",
                                        "classifier",
                                        "pre_classifier",
                                        "score",
                                        "qa_outputs",
                                        "predictions",
                                        "sop_classifier",
                                        "sequence_summary",
                                        "vocab_transform",
                                        "vocab_layer_norm",
                                        "vocab_projector",
                                        "generator_lm_head",
                                        "discriminator_predictions",
                                        "generator_predictions"};
  const std::string_view first = std::string_view(name).substr(0, name.find('.'));
  return std::find(std::begin(parts), std::end(parts), first) != std::end(parts) ||
         name.starts_with("encoder.embedding_hidden_mapping_in.");
}

/// The blocks below a prefix, which must be one stack of a BERT, DistilBERT or ALBERT, numbered from 0 without a hole.
[[nodiscard]] inline std::vector<attention_names> find_encoder(const published_tensors& from,
                                                               const std::string& prefix) {
  const std::string path = from.file().path().string(), below = without_tools(prefix);
  std::vector<std::string> cross, some;
  for (const auto& [name, stored] : from.names())
    if (name.starts_with(below)) {
      if (some.size() < 3) some.push_back(stored);
      if (is_cross_attention(stored)) cross.push_back(stored);
    }
  require<io_error>(cross.empty(), path, ": ", published_tensors::list(cross),
                    ": expected an encoder, found attention to another sequence; the prefix of the encoder chooses it "
                    "in an encoder-decoder");
  std::vector<attention_names> all = find_attention(from);
  std::erase_if(
      all, [&](const attention_names& n) { return n.code == encoder_code::whisper || !n.block.starts_with(below); });
  require<io_error>(!all.empty(), path, ": expected encoder blocks of BERT, DistilBERT or ALBERT",
                    below.empty() ? "" : " below " + quoted(prefix), ", found none; ",
                    some.empty() ? "there is no tensor" : "it begins with " + published_tensors::list(some));
  const attention_names& first = all.front();
  std::vector<index_t> next(first.numbers.size());  // the number that has to come
  for (const attention_names& n : all) {
    require<io_error>(n.place == first.place, path, ": expected one stack of blocks, found ", quoted(first.place),
                      " and ", quoted(n.place), "; a prefix chooses one");
    const bool group = n.numbers.size() == 2 && n.numbers[0] == next[0] + 1;
    if (group) next = {n.numbers[0], 0};
    require<io_error>(n.numbers == next, path, ": expected blocks numbered from 0 without a hole, found ",
                      quoted(n.block), " where number ", next.back(), " has to come");
    ++next.back();
  }
  return all;
}

template <class S>
layer_norm<S> read_norm(published_tensors& from, const std::string& name, index_t width, double epsilon) {
  layer_norm<S> n(width, static_cast<S>(epsilon));
  n.weight = from.read_matrix<S>(present(from, name, "weight"), 1, width);
  n.bias = from.read_matrix<S>(present(from, name, "bias"), 1, width);
  return n;
}
template <class S>
feed_forward<S> read_feed_forward(published_tensors& from, const attention_names& n, index_t width, activation kind) {
  feed_forward<S> f;
  f.kind = kind;
  const bool bias = from.contains(n.up + ".bias") || from.contains(n.down + ".bias");
  read_linear(from, n.up, f.up, 0, width, bias);
  read_linear(from, n.down, f.down, width, f.up.weight.rows(), bias);
  if (!bias) f.up.bias.setZero(1, f.up.weight.rows());
  if (!bias) f.down.bias.setZero(1, width);
  return f;
}

/// The four parts of a block, each with the constants of the published code.
template <class A, class S = typename A::scalar>
struct encoder_parts {
  A attention;
  layer_norm<S> norm;
  feed_forward<S> inner;
  layer_norm<S> output_norm;

  encoder_parts(published_tensors& from, const attention_names& n, const encoder_import& o) {
    if constexpr (requires { attention.mixing; })
      read_collaborative(from, n, attention, 0);
    else
      read_attention(from, n, o.heads, attention);
    const auto& c = attention.config;
    require<io_error>(c.outputs == c.inputs, from.who(n.output + ".weight"), ": expected as many rows as inputs, ",
                      c.inputs, ", found ", c.outputs);
    const bool coarse =
        n.code == encoder_code::whisper || from.stored(n.query + ".weight").find("roberta.") != std::string::npos;
    const double epsilon = o.epsilon.value_or(coarse ? 1e-5 : 1e-12);
    norm = read_norm<S>(from, n.collaborative ? n.shared_norm : n.norm, c.inputs, epsilon);
    inner = read_feed_forward<S>(
        from, n, c.inputs, o.kind.value_or(n.code == encoder_code::albert ? activation::gelu_tanh : activation::gelu));
    output_norm = read_norm<S>(from, n.output_norm, c.inputs, epsilon);
    from.require_all_taken(n.block);
  }
};
template <class A>
post_norm_block<A> post_norm_of(encoder_parts<A> p) {
  using S = typename A::scalar;
  return post_norm_block<A>(residual<A>{std::move(p.attention)}, std::move(p.norm),
                            residual<feed_forward<S>>{std::move(p.inner)}, std::move(p.output_norm));
}

}  // namespace detail

/// One block with attention A: `attention`, or `collaborative_attention` for a file of shared layers. Throws io_error
/// that names a tensor of the block that is missing, of another shape, or of no use: relative positions, adapters,
/// cross attention.
template <class A>
[[nodiscard]] post_norm_block<A> import_post_norm_block(const safetensors_file& file, const attention_names& n, const encoder_import& o) {
  published_tensors from(file);
  return detail::post_norm_of(detail::encoder_parts<A>(from, n, o));
}
/// A block of Whisper's encoder. Throws as `import_post_norm_block`.
template <class A>
[[nodiscard]] pre_norm_encoder_block<A> import_pre_norm_block(const safetensors_file& file, const attention_names& n, const encoder_import& o) {
  using S = typename A::scalar;
  published_tensors from(file);
  detail::encoder_parts<A> p(from, n, o);
  return pre_norm_encoder_block<A>(
      residual<sequential<layer_norm<S>, A>>{sequential<layer_norm<S>, A>(std::move(p.norm), std::move(p.attention))},
      residual<sequential<layer_norm<S>, feed_forward<S>>>{
          sequential<layer_norm<S>, feed_forward<S>>(std::move(p.output_norm), std::move(p.inner))});
}
/// All blocks of a BERT, RoBERTa or DistilBERT, or the shared groups of an ALBERT (a group once), as a stack.
/// Embeddings, poolers, heads of tasks and buffers are left aside by name (`left_aside`). Throws io_error that names
/// every other tensor below the prefix: what is not understood (relative positions, adapters, cross attention of an
/// encoder-decoder) would change the result; and for several stacks, for a hole in the numbers of the blocks, for
/// shapes that do not go together.
template <class A>
[[nodiscard]] stack<post_norm_block<A>> import_encoder(const safetensors_file& file, const encoder_import& o) {
  published_tensors from(file);
  const auto all = detail::find_encoder(from, o.prefix);
  stack<post_norm_block<A>> out;
  index_t width = 0;
  for (const attention_names& n : all) {
    detail::encoder_parts<A> parts(from, n, o);
    const index_t inputs = parts.attention.config.inputs;
    require<io_error>(width == 0 || inputs == width, file.path().string(), ": block ", detail::quoted(n.block),
                      ": expected the ", width, " features of the blocks before it, found ", inputs);
    width = inputs;
    out.blocks.push_back(detail::post_norm_of(std::move(parts)));
  }
  const std::string& place = all.front().place;
  const std::string model =
      place.substr(0, place.rfind(all.front().code == encoder_code::distilbert ? "transformer." : "encoder."));
  for (const std::string& scope : {detail::without_tools(o.prefix), model})
    from.leave_aside(scope, detail::beside_the_blocks);
  from.require_all_taken(o.prefix);
  from.report(o.left_aside);
  return out;
}

namespace detail {

/// A tensor as it is; F16 becomes F32, small integers I32, because the writer knows no others.
inline void copy_tensor(const safetensors_file& from, const std::string& name, const std::string& as, safetensors_writer& to,
                        std::vector<std::shared_ptr<void>>& keep) {
  const tensor_info& i = from.info(name);
  const auto copy = [&]<class T>(T, dtype type) {
    const auto numbers = std::make_shared<std::vector<T>>(from.read<T>(name));
    keep.push_back(numbers);
    to.add<T>(as, i.shape, *numbers, type);
  };
  switch (i.type) {
    case dtype::f64:
      return copy(double{}, dtype::f64);
    case dtype::i64:
      return copy(std::int64_t{}, dtype::i64);
    case dtype::u8:
      return copy(std::uint8_t{}, dtype::u8);
    case dtype::bf16:
      return copy(float{}, dtype::bf16);
    case dtype::f32:
    case dtype::f16:
      return copy(float{}, dtype::f32);
    default:
      return copy(std::int32_t{}, dtype::i32);
  }
}

}  // namespace detail

/// A checkpoint of separate heads becomes one of shared heads, in the layout of epfml/collaborative-attention (for
/// Whisper: the same names in the place of q_proj and k_proj): each attention is decomposed once, in double; every
/// other tensor is copied. What tools add to names is taken off. report(names, decomposition) after each. Nothing is
/// written unless all went well. Throws io_error, config_error.
template <class Report>
void reparametrise_checkpoint(const safetensors_file& from, const std::filesystem::path& to, index_t heads, const decomposition_options& o,
                              const context& ctx, Report&& report) {
  const published_tensors source(from);
  const auto all = detail::find_attention(source);
  require<io_error>(!all.empty(), from.path().string(), ": expected attention under the names of BERT, DistilBERT, ALBERT or Whisper, found none");
  std::vector<std::string> cross;
  for (const auto& [name, stored] : source.names())
    if (detail::is_cross_attention(name) &&
        std::none_of(all.begin(), all.end(), [&, &tensor = name](const attention_names& n) {
          return tensor.starts_with(detail::parent_of(n.query)) || tensor.starts_with(n.norm);
        }))
      cross.push_back(stored);
  require<io_error>(cross.empty(), from.path().string(), ": ", published_tensors::list(cross),
                    ": expected attention under the names of BERT, DistilBERT, ALBERT or Whisper alone; these would "
                    "keep separate heads");
  std::set<std::string> replaced;
  std::map<std::string, std::string> renamed;
  safetensors_writer out;
  out.metadata = from.metadata();
  for (const attention_names& n : all) {
    require<config_error>(!n.collaborative, from.path().string(), ": ", detail::quoted(n.block), " is collaborative already");
    cross_attention<float> separate;  // whatever attends to what: the names tell, the weights do not
    import_attention(from, n, heads, separate);
    collaborative_cross_attention<float> made;
    const decomposition d = reparametrise(separate, made, o, ctx);
    export_collaborative(out, n, made);
    for (const std::string& part : {n.query, n.key, n.value, n.output})
      for (const char* tail : {".weight", ".bias"}) replaced.insert(part + tail);
    if (n.norm != n.shared_norm)
      for (const char* part : {"weight", "bias"})
        renamed[detail::present(source, n.norm, part)] = n.shared_norm + "." + part;
    report(n, d);
  }
  std::vector<std::shared_ptr<void>> keep;
  for (const auto& [name, stored] : source.names())
    if (!replaced.contains(name))
      detail::copy_tensor(from, stored, renamed.contains(name) ? renamed[name] : name, out, keep);
  out.write(to);
}

}  // namespace lithe::inline LITHE_ABI
