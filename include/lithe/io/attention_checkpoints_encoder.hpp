#pragma once

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/io/attention_checkpoints.hpp"
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

/// What a checkpoint of an encoder does not say itself.
struct encoder_import {
  index_t heads = 0;       ///< of separate heads; a shared layer says it itself
  double epsilon = 1e-12;  ///< of layer norms: 1e-12 for the BERTs, 1e-5 for Whisper
  activation kind = activation::gelu;
};

namespace detail {

template <class S>
layer_norm<S> read_norm(const safetensors_file& file, const std::string& name, index_t width, double epsilon) {
  layer_norm<S> n(width, static_cast<S>(epsilon));
  n.weight = read_as<S>(file, present(file, name, "weight"), 1, width);
  n.bias = read_as<S>(file, present(file, name, "bias"), 1, width);
  return n;
}
template <class A>
A read_encoder_attention(const safetensors_file& file, const attention_names& n, const encoder_import& o) {
  A a;
  if constexpr (requires { a.mixing; })
    import_collaborative(file, n, a);
  else
    import_attention(file, n, o.heads, a);
  return a;
}
template <class S>
feed_forward<S> read_feed_forward(const safetensors_file& file, const attention_names& n, index_t width, activation kind) {
  feed_forward<S> f;
  f.kind = kind;
  read_linear(file, n.up, f.up, 0, width, true);
  read_linear(file, n.down, f.down, width, f.up.weight.rows(), true);
  return f;
}

}  // namespace detail

/// One block with attention A: `attention`, or `collaborative_attention` for a file of shared layers.
template <class A>
[[nodiscard]] post_norm_block<A> import_post_norm_block(const safetensors_file& file, const attention_names& n, const encoder_import& o) {
  using S = typename A::scalar;
  A a = detail::read_encoder_attention<A>(file, n, o);
  const index_t D = a.config.inputs;
  return post_norm_block<A>(residual<A>{std::move(a)}, detail::read_norm<S>(file, n.collaborative ? n.shared_norm : n.norm, D, o.epsilon),
                            residual<feed_forward<S>>{detail::read_feed_forward<S>(file, n, D, o.kind)},
                            detail::read_norm<S>(file, n.output_norm, D, o.epsilon));
}
template <class A>
[[nodiscard]] pre_norm_encoder_block<A> import_pre_norm_block(const safetensors_file& file, const attention_names& n, const encoder_import& o) {
  using S = typename A::scalar;
  A a = detail::read_encoder_attention<A>(file, n, o);
  const index_t D = a.config.inputs;
  return pre_norm_encoder_block<A>(
      residual<sequential<layer_norm<S>, A>>{sequential<layer_norm<S>, A>(detail::read_norm<S>(file, n.norm, D, o.epsilon), std::move(a))},
      residual<sequential<layer_norm<S>, feed_forward<S>>>{sequential<layer_norm<S>, feed_forward<S>>(
          detail::read_norm<S>(file, n.output_norm, D, o.epsilon), detail::read_feed_forward<S>(file, n, D, o.kind))});
}
/// All blocks of a BERT or DistilBERT, or the shared groups of an ALBERT (a group once), as a stack.
template <class A>
[[nodiscard]] stack<post_norm_block<A>> import_encoder(const safetensors_file& file, const encoder_import& o) {
  stack<post_norm_block<A>> out;
  for (const attention_names& n : find_attention(file))
    if (n.code != encoder_code::whisper) out.blocks.push_back(import_post_norm_block<A>(file, n, o));
  require<io_error>(!out.blocks.empty(), file.path().string(), ": expected encoder blocks of BERT, DistilBERT or ALBERT, found none");
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

/// A checkpoint of separate heads becomes one of shared heads, in the layout of epfml/collaborative-attention (for Whisper: the same
/// names in the place of q_proj and k_proj): each attention is decomposed once, in double; every other tensor is copied. report(names,
/// decomposition) after each. Nothing is written unless all went well. Throws io_error, config_error.
template <class Report>
void reparametrise_checkpoint(const safetensors_file& from, const std::filesystem::path& to, index_t heads, const decomposition_options& o,
                              const context& ctx, Report&& report) {
  const auto all = find_attention(from);
  require<io_error>(!all.empty(), from.path().string(), ": expected attention under the names of BERT, DistilBERT, ALBERT or Whisper, found none");
  std::set<std::string> replaced;
  std::map<std::string, std::string> renamed;
  safetensors_writer out;
  out.metadata = from.metadata();
  for (const attention_names& n : all) {
    require<config_error>(!n.collaborative, from.path().string(), ": ", detail::quoted(n.block), " is collaborative already");
    cross_attention<float> source;  // whatever attends to what: the names tell, the weights do not
    import_attention(from, n, heads, source);
    collaborative_cross_attention<float> made;
    const decomposition d = reparametrise(source, made, o, ctx);
    export_collaborative(out, n, made);
    for (const std::string& part : {n.query, n.key, n.value, n.output})
      for (const char* tail : {".weight", ".bias"}) replaced.insert(part + tail);
    if (n.norm != n.shared_norm)
      for (const char* part : {"weight", "bias"}) renamed[detail::present(from, n.norm, part)] = n.shared_norm + "." + part;
    report(n, d);
  }
  std::vector<std::shared_ptr<void>> keep;
  for (const std::string& name : from.names())
    if (!replaced.contains(name)) detail::copy_tensor(from, name, renamed.contains(name) ? renamed[name] : name, out, keep);
  out.write(to);
}

}  // namespace lithe::inline LITHE_ABI
