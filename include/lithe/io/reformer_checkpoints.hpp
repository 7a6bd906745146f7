#pragma once

#include "lithe/compose/reformer.hpp"
#include "lithe/io/published_config.hpp"
#include "lithe/io/published_tensors.hpp"
#include "lithe/layers/parameters.hpp"

// Hugging Face Reformer models (transformers, models/reformer): their config.json, and their tensors by name.

namespace lithe::inline LITHE_ABI {

/// What config.json says.
struct reformer_settings {
  reformer_config model;
  token_t pad_token = 0, end_token = 2;
  index_t head_chunk = 0;  ///< rows of logits at a time; 0: all
};

/// Reads config.json; what it leaves out has the default of the published code. `hash_seed` is of no use: directions of another generator
/// cannot be drawn again. Throws io_error that names the key.
[[nodiscard]] inline reformer_settings read_reformer_config(const nlohmann::json& json) {
  detail::require_model_type(json, "reformer config", {"reformer"});
  reformer_settings s;
  reformer_config& c = s.model;
  const auto read = [&](const char* key, auto& value) { detail::read_config_key(json, "reformer config", key, value); };
  bool axial = true;
  std::vector<std::string> layers;
  read("vocab_size", c.vocabulary);
  read("hidden_size", c.features);
  read("num_attention_heads", c.heads);
  read("attention_head_size", c.head_width);
  read("feed_forward_size", c.hidden);
  detail::read_activation(json, "reformer config", "hidden_act", c.kind);
  read("attn_layers", layers);
  read("axial_pos_embds", axial);
  read("axial_pos_shape", c.position_shape);
  read("axial_pos_embds_dim", c.position_widths);
  read("max_position_embeddings", c.most_positions);
  read("local_attn_chunk_length", c.local_chunk);
  read("local_num_chunks_before", c.local_before);
  read("local_num_chunks_after", c.local_after);
  read("lsh_attn_chunk_length", c.lsh_chunk);
  read("lsh_num_chunks_before", c.lsh_before);
  read("lsh_num_chunks_after", c.lsh_after);
  read("local_attention_probs_dropout_prob", c.local_dropout);
  read("lsh_attention_probs_dropout_prob", c.lsh_dropout);
  read("hidden_dropout_prob", c.dropout);
  read("num_hashes", c.rounds);
  read("is_decoder", c.causal);
  read("layer_norm_eps", c.norm_epsilon);
  read("initializer_range", c.deviation);
  read("axial_norm_std", c.position_deviation);
  read("chunk_size_feed_forward", c.feed_forward_chunk);
  read("chunk_size_lm_head", s.head_chunk);
  read("pad_token_id", s.pad_token);
  read("eos_token_id", s.end_token);

  if (const auto found = json.find("attn_layers"); found != json.end() && !found->is_null()) c.layers.clear();
  for (const std::string& layer : layers) {
    require<io_error>(layer == "local" || layer == "lsh", "reformer config: key 'attn_layers': expected local or lsh, found '", layer, "'");
    c.layers.push_back(layer == "local" ? reformer_layer::local : reformer_layer::lsh);
  }
  if (!axial) {
    c.position_shape = {c.most_positions};
    c.position_widths = {c.features};
    c.position_deviation = c.deviation;
  }
  const auto buckets = json.find("num_buckets");
  if (buckets != json.end() && !buckets->is_null()) {
    std::vector<index_t> factors(1);
    if (buckets->is_array())
      read("num_buckets", factors);
    else
      read("num_buckets", factors.front());
    require<io_error>(factors.size() <= c.buckets.factor.size(), "reformer config: key 'num_buckets': expected at most ", c.buckets.factor.size(),
                      " factors, found ", factors.size());
    c.buckets = bucket_factors(std::span<const index_t>(factors));
  }
  return s;
}

/// f(public name, public shape, tensors...) for every tensor of a model and of structs of the same tree (gradients). `prefix` stands before
/// the names of the model without its head: "reformer." in checkpoints of the whole.
template <class F, std::floating_point S, class... Structs>
void visit_reformer(const reformer<S>& model, const std::string& prefix, F&& f, Structs&... structs) {
  using dims = std::vector<index_t>;
  const auto norm = [&](const std::string& name, const layer_norm<S>& n, auto&... t) {
    f(name + ".weight", dims{n.weight.cols()}, t.weight...);
    f(name + ".bias", dims{n.weight.cols()}, t.bias...);
  };
  const auto weight = [&](const std::string& name, const linear<S>& l, auto&... t) { f(name + ".weight", dims{l.weight.rows(), l.weight.cols()}, t.weight...); };
  const auto bias = [&](const std::string& name, const linear<S>& l, auto&... t) { f(name, dims{l.weight.rows()}, t.bias...); };
  const std::string embeddings = prefix + "embeddings.", axes = embeddings + "position_embeddings.";
  f(embeddings + "word_embeddings.weight", dims{model.words.weight.rows(), model.words.weight.cols()}, structs.words.weight...);
  const std::size_t count = model.positions.weights.size();
  for (std::size_t k = 0; k < count; ++k) {
    const auto& table = model.positions.weights[k];
    dims shape(count, 1);
    shape[k] = table.rows();
    shape.push_back(table.cols());
    f(count == 1 ? axes + "embedding.weight" : axes + "weights." + std::to_string(k), shape, structs.positions.weights[k]...);
  }
  for (std::size_t i = 0; i < model.blocks.blocks.size(); ++i) {
    const std::string layer = prefix + "encoder.layers." + std::to_string(i), attention = layer + ".attention", feed = layer + ".feed_forward";
    const auto block = [&](const auto& b, auto&... t) {
      norm(attention + ".layer_norm", std::get<0>(b.parts).norm, std::get<0>(t.parts).norm...);
      const auto& a = std::get<0>(b.parts).inner;
      const std::string self = attention + ".self_attention.";
      if constexpr (requires { a.query_key; }) {
        weight(self + "query_key", a.query_key, std::get<0>(t.parts).inner.query_key...);
      } else {
        weight(self + "query", a.query, std::get<0>(t.parts).inner.query...);
        weight(self + "key", a.key, std::get<0>(t.parts).inner.key...);
      }
      weight(self + "value", a.value, std::get<0>(t.parts).inner.value...);
      weight(attention + ".output.dense", a.output, std::get<0>(t.parts).inner.output...);
      norm(feed + ".layer_norm", std::get<1>(b.parts).norm, std::get<1>(t.parts).norm...);
      const auto& n = std::get<1>(b.parts).inner;
      weight(feed + ".dense.dense", n.up, std::get<1>(t.parts).inner.up...);
      bias(feed + ".dense.dense.bias", n.up, std::get<1>(t.parts).inner.up...);
      weight(feed + ".output.dense", n.down, std::get<1>(t.parts).inner.down...);
      bias(feed + ".output.dense.bias", n.down, std::get<1>(t.parts).inner.down...);
    };
    const auto& value = model.blocks.blocks[i].value;
    if (value.index() == 0)
      block(std::get<0>(value), std::get<0>(structs.blocks.blocks[i].value)...);
    else
      block(std::get<1>(value), std::get<1>(structs.blocks.blocks[i].value)...);
  }
  norm(prefix + "encoder.layer_norm", std::get<0>(model.head.layers), std::get<0>(structs.head.layers)...);
  const auto& output = std::get<2>(model.head.layers);
  weight("lm_head.decoder", output, std::get<2>(structs.head.layers)...);
  bias("lm_head.bias", output, std::get<2>(structs.head.layers)...);
}

/// Loads a checkpoint by its public names into a model built with its configuration: all tensors under `prefix`; what
/// tools add to names (`module.`, `_orig_mod.`) does not matter. A checkpoint of the model without its head, or with
/// the head of another task, leaves the head's projection as it is. Left aside by name are the other task's head,
/// buffers of constants, and `lm_head.decoder.bias`, which must be `lm_head.bias` where both stand; `left_aside`, if
/// given, gets their names.
///
/// All or nothing. Throws io_error that names file and tensors: missing, unknown, of another shape or not of
/// floating-point numbers.
template <std::floating_point S>
void import_reformer(const safetensors_file& file, reformer<S>& model, std::string prefix = "",
                     std::vector<std::string>* left_aside = nullptr) {
  published_tensors from(file);
  prefix = detail::without_tools(prefix);
  const std::string alias = prefix + "lm_head.decoder.bias";
  const auto other_head = [](const std::string& name) {
    return name.starts_with("classifier.") || name.starts_with("qa_outputs.");
  };
  const bool bare = !from.contains(prefix + "reformer.embeddings.word_embeddings.weight") &&
                    from.contains(prefix + "embeddings.word_embeddings.weight");
  bool headless = bare;
  for (const auto& [name, stored] : from.names())
    headless = headless || (name.starts_with(prefix) && other_head(name.substr(prefix.size())));
  reformer<S> next = model;
  std::vector<std::function<void()>> reads;
  visit_reformer(
      std::as_const(next), prefix + (bare ? "" : "reformer."),
      [&](const std::string& tensor, const std::vector<index_t>& shape, matrix<S>& t) {
        const bool head = tensor.starts_with("lm_head.");
        if (head && headless) return;
        const std::string name = head ? prefix + tensor : tensor;
        const std::string found =
            tensor == "lm_head.bias" && !from.contains(name) && from.contains(alias) ? alias : name;
        from.template expect<S>(found, shape);
        reads.emplace_back([&file, &t, stored = from.stored(found)] {
          const auto numbers = file.template read<S>(stored);
          std::copy(numbers.begin(), numbers.end(), t.data());
        });
      },
      next);
  const bool both = !headless && from.contains(alias) && from.contains(prefix + "lm_head.bias");
  from.leave_aside(prefix, [&](const std::string& name) {
    return name.find(".self_attention.self_mask_value_float") != std::string::npos ||
           name.find(".self_attention.mask_value_float") != std::string::npos || (headless && other_head(name)) ||
           (both && name == "lm_head.decoder.bias");
  });
  from.require_all_taken(prefix);
  if (both)
    require<io_error>(file.template read<double>(from.stored(alias)) ==
                          file.template read<double>(from.stored(prefix + "lm_head.bias")),
                      from.who(alias), ": expected the numbers of 'lm_head.bias', found others");
  for (const auto& read : reads) read();
  refresh(next);
  model = std::move(next);
  from.report(left_aside);
}

/// Writes a model under its public names. `metadata`: by custom {"config": config.json}. The key of LSH attention's
/// directions has no public name: importing draws them from that of the model. Throws config_error rather than write
/// NaN or infinity.
template <std::floating_point S>
void export_reformer(const std::filesystem::path& path, const reformer<S>& model, metadata_map metadata = {}) {
  safetensors_writer file;
  file.metadata = std::move(metadata);
  visit_reformer(
      model, "reformer.",
      [&](const std::string& name, const std::vector<index_t>& shape, const matrix<S>& t) {
        require<config_error>(t.allFinite(), "export_reformer: expected finite numbers, got NaN or infinity in ",
                              detail::quoted(name));
        file.add<S>(name, shape, std::span<const S>(t.data(), static_cast<std::size_t>(t.size())));
      },
      model);
  file.write(path);
}

}  // namespace lithe::inline LITHE_ABI
