#pragma once

#include "lithe/io/published_tensors.hpp"
#include "lithe/training/reparametrise.hpp"

namespace lithe::inline LITHE_ABI {

/// Published encoders (and decoders) whose attention can be imported by the names of its tensors.
enum class encoder_code {
  bert,        ///< `encoder.layer.{i}.`
  distilbert,  ///< `transformer.layer.{i}.`
  albert,      ///< `encoder.albert_layer_groups.{g}.albert_layers.{j}.`, each group once, however many layers share it
  whisper,     ///< `{encoder,decoder}.layers.{i}.`, self_attn and encoder_attn
};

/// Where one attention stands in a checkpoint: full names, without ".weight" and ".bias". What comes before a block
/// (`bert.`, `model.`) is part of them; what tools add (`module.`, `_orig_mod.`) is taken off, and importers find the
/// tensor with or without it.
struct attention_names {
  encoder_code code{};
  std::string block;                       ///< "bert.encoder.layer.3."
  std::string query, key, value, output;   ///< of separate heads
  std::string norm;                        ///< the layer norm of the attention
  std::string shared;                      ///< of epfml/collaborative-attention: what stands before "mixing"
  std::string shared_output, shared_norm;  ///< its output projection and norm: its own, or those of the block
  std::string up, down, output_norm;       ///< the block's feed-forward and its norm
  bool collaborative = false;              ///< the file holds the shared layer
  std::string place;                       ///< "bert.encoder.layer.": where the blocks stand
  std::vector<index_t> numbers;            ///< of the block there; of ALBERT: of the group, and in the group
};

namespace detail {

struct code_names {
  encoder_code code;
  const char *at, *query, *key, *value, *output, *norm, *shared, *shared_output, *shared_norm, *up, *down, *output_norm;
};
inline constexpr code_names code_table[] = {
    {encoder_code::bert, "encoder.layer.", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
     "attention.output.LayerNorm", "attention.self.", "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
     "output.LayerNorm"},
    {encoder_code::distilbert, "transformer.layer.", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
     "attention.collab_layer.", "attention.collab_layer.dense", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"},
    {encoder_code::albert, "encoder.albert_layer_groups.", "attention.query", "attention.key", "attention.value", "attention.dense",
     "attention.LayerNorm", "attention.", "attention.dense", "attention.layer_norm", "ffn", "ffn_output", "full_layer_layer_norm"},
    {encoder_code::whisper, "layers.", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "self_attn_layer_norm",
     "self_attn.", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"},
    {encoder_code::whisper, "layers.", "encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.out_proj",
     "encoder_attn_layer_norm", "encoder_attn.", "encoder_attn.out_proj", "encoder_attn_layer_norm", "fc1", "fc2", "final_layer_norm"},
};

/// Old checkpoints spell a norm's weight and bias "gamma" and "beta".
inline std::string present(const published_tensors& from, const std::string& name, const char* part) {
  const std::string other = name + (std::string(part) == "weight" ? ".gamma" : ".beta");
  return !from.contains(name + "." + part) && from.contains(other) ? other : name + "." + part;
}

template <class S>
void read_linear(published_tensors& from, const std::string& name, linear<S>& l, index_t rows, index_t cols,
                 bool bias) {
  l = {};
  l.weight = from.read_matrix<S>(name + ".weight", rows, cols);
  l.bias.setZero(bias ? 1 : 0, l.weight.rows());
  if (bias) l.bias = from.read_matrix<S>(name + ".bias", 1, l.weight.rows());
}

/// "encoder.layer." of "encoder.layer.3.".
[[nodiscard]] inline std::string parent_of(const std::string& name) {
  const std::size_t dot = name.find_last_of('.', name.size() - 2);
  return dot == std::string::npos ? "" : name.substr(0, dot + 1);
}

/// The numbers between the place of the blocks and the attention: 3 of "3.", 0 and 2 of "0.albert_layers.2."; none if
/// it is anything else.
[[nodiscard]] inline std::vector<index_t> block_numbers(encoder_code code, std::string_view text) {
  std::vector<index_t> numbers;
  const auto take = [&](std::string_view tail) {
    const std::size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
    if (digits == 0 || digits > 9 || !text.substr(digits).starts_with(tail)) return false;
    numbers.push_back(std::stoll(std::string(text.substr(0, digits))));
    text.remove_prefix(digits + tail.size());
    return true;
  };
  const bool whole = (code != encoder_code::albert || take(".albert_layers.")) && take(".") && text.empty();
  return whole ? numbers : std::vector<index_t>{};
}

[[nodiscard]] inline std::vector<attention_names> find_attention(const published_tensors& from) {
  std::vector<attention_names> found;
  for (const auto& [name, stored] : from.names())
    for (const auto& c : code_table)
      for (const bool collaborative : {false, true}) {
        const std::string key = collaborative ? std::string(c.shared) + "mixing" : std::string(c.query) + ".weight";
        const auto at = name.rfind(c.at);
        if (!name.ends_with(key) || at == std::string::npos || (at > 0 && name[at - 1] != '.')) continue;
        const std::string b = name.substr(0, name.size() - key.size()), place = name.substr(0, at) + c.at;
        const auto numbers = b.size() > place.size() ? block_numbers(c.code, std::string_view(b).substr(place.size()))
                                                     : std::vector<index_t>{};
        if (numbers.empty()) continue;
        if (!collaborative && from.contains(b + c.shared + "mixing"))
          continue;  // its shared query is called like a head's
        found.push_back({c.code, b, b + c.query, b + c.key, b + c.value, b + c.output, b + c.norm, b + c.shared,
                         b + c.shared_output, b + c.shared_norm, b + c.up, b + c.down, b + c.output_norm, collaborative,
                         place, numbers});
      }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return std::tie(a.place, a.numbers) < std::tie(b.place, b.numbers);
  });
  return found;
}

/// Takes the four projections. Biases are those of all or of none; Whisper's keys have none.
template <std::floating_point S>
void read_attention(published_tensors& from, const attention_names& n, index_t heads, attention_base<S>& to) {
  require<io_error>(!n.collaborative, from.who(n.shared + "mixing"),
                    ": expected separate heads, found shared ones (collaborative_attention)");
  const auto has_bias = [&](const std::string& name) { return from.contains(name + ".bias"); };
  const bool bias = has_bias(n.query) || has_bias(n.key) || has_bias(n.value) || has_bias(n.output);
  attention_base<S> l;
  read_linear(from, n.query, l.query, 0, 0, bias);
  const index_t width = l.query.weight.rows();
  require<config_error>(heads >= 1 && width >= 1 && width % heads == 0, "import_attention: expected heads that divide ", width, ", got ", heads);
  const bool key_bias = bias && (n.code != encoder_code::whisper || has_bias(n.key));
  read_linear(from, n.key, l.key, width, 0, key_bias);
  if (!key_bias) l.key.bias.setZero(bias ? 1 : 0, width);
  read_linear(from, n.value, l.value, width, l.key.weight.cols(), bias);
  read_linear(from, n.output, l.output, 0, width, bias);
  l.config = {.inputs = l.query.weight.cols(),
              .heads = heads,
              .head_width = width / heads,
              .outputs = l.output.weight.rows(),
              .causal = to.config.causal,
              .bias = bias,
              .scale = 1 / std::sqrt(static_cast<double>(width / heads)),
              .key_value_heads = heads};
  to = std::move(l);
}

template <std::floating_point S>
void read_collaborative(published_tensors& from, const attention_names& n, collaborative_base<S>& to, double scale) {
  collaborative_base<S> l;
  l.mixing = from.read_matrix<S>(n.shared + "mixing", 0, 0);
  const index_t H = l.mixing.rows(), r = l.mixing.cols();
  require<io_error>(H >= 1 && r >= 1, from.who(n.shared + "mixing"),
                    ": expected a row for each head and at least 1 column, found ", to_text(H, r));
  const auto has_bias = [&](const std::string& name) { return from.contains(name + ".bias"); };
  read_linear(from, n.shared + "query", l.query, r, 0, has_bias(n.shared + "query"));
  read_linear(from, n.shared + "key", l.key, r, 0, has_bias(n.shared + "key"));
  l.key.bias.resize(0, r);
  const index_t E = l.key.weight.cols();
  const bool content = from.contains(n.shared + "content_bias.weight");
  if (content) l.content_bias.weight = from.read_matrix<S>(n.shared + "content_bias.weight", H, E);
  read_linear(from, n.shared + "value", l.value, 0, E, has_bias(n.shared + "value"));
  const index_t V = l.value.weight.rows();
  require<io_error>(V % H == 0, from.who(n.shared + "value.weight"), ": expected rows that ", H,
                    " heads divide, found ", V);
  const bool projected = from.contains(n.shared_output + ".weight");
  if (projected) read_linear(from, n.shared_output, l.output, 0, V, has_bias(n.shared_output));
  l.config = {.inputs = l.query.weight.cols(),
              .heads = H,
              .key_width = r,
              .value_width = V,
              .outputs = projected ? l.output.weight.rows() : V,
              .causal = to.config.causal,
              .content_bias = content,
              .query_bias = l.query.bias.size() != 0,
              .value_bias = l.value.bias.size() != 0,
              .projected = projected,
              .scale = scale != 0 ? scale : std::sqrt(static_cast<double>(H) / static_cast<double>(r)),
              .dropout = to.config.dropout};
  to = std::move(l);
}

/// Throws io_error if the attention has tensors that were not taken: relative positions, adapters.
inline void require_attention_taken(published_tensors& from, const attention_names& n, const std::string& scope,
                                    const std::string& output) {
  for (const std::string& norm : {n.norm, n.shared_norm})
    for (const char* part : {".weight", ".bias", ".gamma", ".beta"}) from.take(norm + part);
  if (!scope.empty()) from.require_all_taken(scope);
  from.require_all_taken(output + ".");
}

}  // namespace detail

/// Every attention in a checkpoint, in the order of its blocks.
[[nodiscard]] inline std::vector<attention_names> find_attention(const safetensors_file& file) {
  return detail::find_attention(published_tensors(file));
}

/// Attention of separate heads. Biases are those of all four projections or of none; Whisper's keys have none, which
/// counts as zero. Throws io_error that names what is missing, of another shape, or stands beside the projections and
/// would change the result (relative positions, adapters); config_error for heads that do not divide the weights.
template <std::floating_point S>
void import_attention(const safetensors_file& file, const attention_names& n, index_t heads,
                      detail::attention_base<S>& to) {
  published_tensors from(file);
  detail::attention_base<S> l = to;
  detail::read_attention(from, n, heads, l);
  detail::require_attention_taken(from, n, detail::parent_of(n.query), n.output);
  to = std::move(l);
}

/// A shared layer of epfml/collaborative-attention: {query,key,content_bias,value}.weight, value.bias, mixing, and the
/// output projection. `scale` 0: that of its code, 1/√(r / heads), which its mixing was trained with. A key's bias,
/// which no softmax sees, is dropped. Throws as `import_attention`.
template <std::floating_point S>
void import_collaborative(const safetensors_file& file, const attention_names& n, detail::collaborative_base<S>& to,
                          double scale = 0) {
  published_tensors from(file);
  detail::collaborative_base<S> l = to;
  detail::read_collaborative(from, n, l, scale);
  detail::require_attention_taken(from, n, n.shared, n.shared_output);
  to = std::move(l);
}

/// The same scores at another scale: mixing and content bias are multiplied by old / new.
template <std::floating_point S>
void rescale(detail::collaborative_base<S>& l, double scale) {
  require<config_error>(scale > 0 && std::isfinite(scale), "rescale: expected a positive, finite scale, got ", scale);
  const auto factor = static_cast<S>(l.config.scale / scale);
  l.mixing *= factor;
  l.content_bias.weight *= factor;
  l.config.scale = scale;
}

namespace detail {

/// The writer gets numbers of its own, so nothing else must live until it writes.
template <class S>
void export_matrix(safetensors_writer& out, const std::string& name, matrix_view<const S> m) {
  if (m.size() == 0) return;
  require<config_error>(m.map().allFinite(), "export: expected finite numbers, got NaN or infinity in ", quoted(name));
  const auto own = std::make_shared<const matrix<S>>(m.map());
  out.add_rows<S>(name, own->rows(), own->cols(), [own](index_t i, std::span<S> row) { std::copy_n(own->row(i).data(), row.size(), row.begin()); });
}
template <class S>
void export_linear(safetensors_writer& out, const std::string& name, const linear<S>& l) {
  export_matrix<S>(out, name + ".weight", l.weight);
  export_matrix<S>(out, name + ".bias", l.bias);
}

}  // namespace detail

/// Adds attention of separate heads to a file, under its public names. Throws config_error rather than write NaN or infinity.
template <std::floating_point S>
void export_attention(safetensors_writer& out, const attention_names& n, const detail::attention_base<S>& l) {
  detail::export_linear(out, n.query, l.query);
  detail::export_linear(out, n.key, l.key);
  detail::export_linear(out, n.value, l.value);
  detail::export_linear(out, n.output, l.output);
}
/// Adds a shared layer under the names of epfml/collaborative-attention, rescaled to that code's 1/√(r / heads); a head mask, which has no
/// public name, goes into the values.
template <std::floating_point S>
void export_collaborative(safetensors_writer& out, const attention_names& n, detail::collaborative_base<S> l) {
  rescale(l, std::sqrt(static_cast<double>(l.config.heads) / static_cast<double>(l.config.key_width)));
  for (index_t h = 0; h < l.head_mask.cols(); ++h) {
    const index_t width = l.config.value_width / l.config.heads;
    l.value.weight.middleRows(h * width, width) *= l.head_mask(0, h);
    if (l.value.bias.size() != 0) l.value.bias.middleCols(h * width, width) *= l.head_mask(0, h);
  }
  detail::export_matrix<S>(out, n.shared + "mixing", l.mixing);
  detail::export_linear(out, n.shared + "query", l.query);
  detail::export_linear(out, n.shared + "key", l.key);
  detail::export_linear(out, n.shared + "content_bias", l.content_bias);
  detail::export_linear(out, n.shared + "value", l.value);
  if (l.config.projected) detail::export_linear(out, n.shared_output, l.output);
}

}  // namespace lithe::inline LITHE_ABI
