#include "golden_runner/golden_case.hpp"
#include "lithe/io/memory_checkpoints.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

namespace {

std::vector<index_t> sizes(const nlohmann::json& j) {
  if (j.is_array()) return j.get<std::vector<index_t>>();
  std::vector<index_t> out;
  std::istringstream text(j.get<std::string>());
  for (std::string part; std::getline(text, part, ',');) out.push_back(std::stoll(part));
  return out;
}

struct settings {
  product_key_memory_config config;
  memory_code code;
};

/// The sizes, which both of Meta's codes name alike.
void read_sizes(const nlohmann::json& j, product_key_memory_config& c) {
  c.inputs = j.at("input_dim");
  c.outputs = j.at("output_dim");
  c.heads = j.at("mem_heads");
  c.sub_keys = j.at("mem_n_keys");
  c.key_width = j.at("mem_k_dim");
  c.top_k = j.at("mem_knn");
}

settings xlm(const nlohmann::json& j) {
  settings s{.config = {}, .code = memory_code::xlm};
  auto& c = s.config;
  for (const char* never : {"mem_input2d", "mem_query_residual"})
    if (option(j, never, false)) throw skipped(std::string(never) + " is not part of the layer");
  read_sizes(j, c);
  c.flat = !j.at("mem_product_quantization").get<bool>();
  c.share_keys = !j.at("mem_use_different_keys").get<bool>();
  const auto layers = sizes(j.at("mem_query_layer_sizes"));
  if (layers.empty()) {
    c.query.source = j.at("mem_shuffle_query") ? query_source::shuffled : query_source::identity;
  } else {
    for (std::size_t i = 1; i + 1 < layers.size(); ++i) c.query.hidden.push_back(layers[i]);
    c.query.bias = j.at("mem_query_bias");
    c.query.per_group = j.at("mem_multi_query_net");
    if (option(j, "mem_grouped_conv", false)) s.code = memory_code::xlm_grouped;
  }
  if (j.at("mem_query_batchnorm")) c.query.norm = query_normalisation::batch;
  c.query.unit_length = j.at("mem_normalize_query");
  c.gate.temperature = j.at("mem_temperature");
  c.gate.kind = j.at("mem_score_softmax") ? memory_gate_kind::softmax : memory_gate_kind::identity;
  const std::string subtract = j.at("mem_score_subtract");
  c.gate.subtract = subtract == "min"      ? score_shift::minimum
                    : subtract == "mean"   ? score_shift::mean
                    : subtract == "median" ? score_shift::median
                                           : score_shift::none;
  c.gate.divide_by_sum = j.at("mem_score_normalize");
  c.shuffle_slots = j.at("mem_shuffle_indices");
  c.modulo = std::max(index_t{0}, j.at("mem_modulo_size").get<index_t>());
  c.detach_input = option(j, "mem_query_detach_input", false);
  if (const auto width = option<index_t>(j, "mem_v_dim", -1); width > 0) c.outputs = width;
  return s;
}

settings lucidrains(const nlohmann::json& j) {
  settings s{.config = {}, .code = memory_code::lucidrains_pkm};
  auto& c = s.config;
  c.inputs = j.at("dim");
  c.heads = j.at("heads");
  c.sub_keys = j.at("num_keys");
  c.key_width = 2 * j.at("dim_head").get<index_t>();
  c.top_k = j.at("topk");
  c.query.bias = false;
  c.query.norm = query_normalisation::layer;
  if (!option(j, "use_layernorm", true)) throw skipped("queries without their layer norm are not specified");
  if (option(j, "non_competitive_gates", false)) c.gate.kind = memory_gate_kind::relu;
  if (option(j, "pre_layernorm", false)) c.input_norm = memory_input_norm::layer;
  c.readout.output_norm = option(j, "norm_output", false);
  if (option(j, "concat_values_and_combine", false)) {
    c.concat_heads = true;
    c.weighted = false;
    c.value_width = c.key_width / 2;
    c.readout.kind = memory_readout_kind::linear;
    c.readout.bias = false;
  }
  return s;
}

settings memory_layers(const nlohmann::json& j) {
  settings s{.config = {}, .code = memory_code::memory_layers};
  auto& c = s.config;
  read_sizes(j, c);
  c.query.bias = option(j, "mem_query_bias", true);
  c.share_keys = option(j, "mem_share_keys", false);
  const auto width = option<index_t>(j, "mem_v_dim", -1);
  if (option(j, "peer_variant", false)) {
    c.readout.kind = memory_readout_kind::experts;
  } else if (option(j, "swilu_projection", true)) {
    c.readout.kind = memory_readout_kind::silu_gated;
    c.value_width = std::max(index_t{0}, width);
  } else if (width > 0) {
    c.readout.kind = memory_readout_kind::linear;
    c.value_width = width;
  }
  c.readout.scalar_gate = option(j, "mem_gated", false);
  return s;
}

/// The shapes of the file say what its configuration leaves out.
template <class S>
settings product_keys_of_ultra_mem(const golden_case<S>& g) {
  settings s{.config = {}, .code = memory_code::ultra_mem};
  auto& c = s.config;
  const auto& keys = g.file.info("param.keys").shape;
  const auto& projection = g.file.info("param.values_proj.weight").shape;
  c.inputs = g.file.info("param.query_proj.weight").shape.at(1);
  c.outputs = projection.at(0);
  c.value_width = projection.at(1);
  c.heads = keys.at(0);
  c.sub_keys = keys.at(2);
  c.key_width = 2 * keys.at(3);
  for (const char* name : {"knn", "mem_knn", "topk"})
    if (g.config.contains(name)) c.top_k = g.config.at(name);
  c.final_k = c.top_k * option<index_t>(g.config, "mem_final_top_expand_time", 1);
  c.query.bias = false;
  c.query.norm = query_normalisation::rms;
  c.readout = {.kind = memory_readout_kind::silu_gated, .bias = false};
  return s;
}

template <class S>
settings settings_of(const golden_case<S>& g) {
  const std::string name = g.file.metadata().at("case");
  if (name.starts_with("xlm_")) return xlm(g.config);
  if (name.starts_with("lucid_")) return lucidrains(g.config);
  if (name.starts_with("fbmem_")) return memory_layers(g.config);
  return product_keys_of_ultra_mem(g);
}

}  // namespace

template <class S>
void run_memory(golden_case<S>& g) {
  const auto [config, code] = settings_of(g);
  using memory = product_key_memory<S>;
  memory l(config, {});
  if (code == memory_code::ultra_mem) l.query.rms.epsilon = static_cast<S>(option(g.config, "layer_norm_eps", 1e-5));
  import_memory(code, g.file, "param.", l);

  const matrix<S> x = g.tensor("input.x"), dy = g.tensor("grad_output.y");
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  context ctx;
  ctx.train = option(g.config, "train", false);
  typename memory::record r;
  auto gradient = make_gradient(l);
  l.forward(x, y, r, ctx);
  l.backward(x, r, dy, dx, gradient, ctx);
  after_step(l, gradient);
  g.compare("output.y", matrix_view<const S>(y));
  if (g.has("grad.input.x"))
    g.compare("grad.input.x", matrix_view<const S>(dx));
  else if (!config.detach_input || dx.cwiseAbs().maxCoeff() != 0)
    g.failures.push_back("the file has no gradient of x, ours is not zero");

  // Tensors of the file that several of ours make up are gathered first.
  std::map<std::string, std::vector<double>> gathered;
  const auto gather = [&](const std::string& name, const public_rows& p, const auto& t, index_t rows, index_t cols) {
    if (!g.has(name)) return;
    auto& out = gathered[name];
    out.resize(static_cast<std::size_t>(g.file.info(name).size()), std::numeric_limits<double>::quiet_NaN());
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols; ++j) out[static_cast<std::size_t>(p.row(i) * cols + j)] = static_cast<double>(t(i, j));
  };
  visit_public(
      code, l,
      [&](const public_rows& p, const auto& parameter, const auto& d) {
        if (parameter.rows() * parameter.cols() == 0) return;
        if constexpr (requires { d(0, 0); }) gather("grad." + p.name, p, d, parameter.rows(), parameter.cols());
        if constexpr (requires { parameter(0, 0); }) gather("after." + p.name, p, parameter, parameter.rows(), parameter.cols());
      },
      l, gradient);
  for (const auto& [name, values] : gathered) g.compare(name, values);
  for (const auto& name : g.file.names())  // one step was taken
    if (name.starts_with("after.") && name.ends_with("num_batches_tracked"))
      g.compare(name, std::vector<double>{static_cast<double>(g.file.template read<std::int64_t>("param." + name.substr(6))[0] + (ctx.train ? 1 : 0))});
  if (g.has("grad.keys_norm.weight"))  // computed there, but used nowhere
    g.compare("grad.keys_norm.weight", std::vector<double>(static_cast<std::size_t>(g.file.info("grad.keys_norm.weight").size()), 0.0));
}

template void run_memory(golden_case<float>&);
template void run_memory(golden_case<double>&);

}  // namespace golden
