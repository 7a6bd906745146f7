#pragma once

#include "lithe/io/published_tensors.hpp"
#include "lithe/layers/memory/memory_presets.hpp"
#include "lithe/training/parameter_rows.hpp"

namespace lithe::inline LITHE_ABI {

/// Published codes whose memory layers can be imported by the names of their tensors.
enum class memory_code {
  xlm,              ///< facebookresearch/XLM, `memories.{layer}_{in|after}.`
  xlm_grouped,      ///< the same with grouped convolutions as query networks
  xlm_notebook,     ///< its notebook: `query_proj.0` and `query_proj.1`
  memory_layers,    ///< facebookresearch/memory (Memory+ and its PEER variant), `layers.{L}.feed_forward.`
  lucidrains_pkm,   ///< lucidrains/product-key-memory
  lucidrains_peer,  ///< lucidrains/PEER-pytorch
  ultra_mem,        ///< Memory+ of the UltraMem repository
};

/// What a tensor of ours is in a published file: some rows (or all) of the tensor `name`.
struct public_rows {
  std::string name;
  std::vector<index_t> shape;                          ///< of the whole public tensor
  std::function<index_t(index_t)> row = std::identity{};  ///< the public row of our row i, public tensors seen as [size / our columns x our columns]
  double offset = 0;                                   ///< ours = public + offset
};

/// f(public_rows, tensors...) for every tensor of a product-key memory under the names of a published code; `structs` are memories or
/// their gradients. Tensors that the layer does not have are empty.
template <class F, std::floating_point S, class Table, class... T>
void visit_public(memory_code code, const product_key_memory<S, Table>& layer, F&& f, T&... structs) {
  const auto& c = layer.config;
  const index_t H = c.heads, n = c.sub_keys, halves = layer.keys.halves(), h = layer.keys.config.width, d = c.inputs;
  const bool lucidrains = code == memory_code::lucidrains_pkm || code == memory_code::lucidrains_peer;
  const bool xlm = code == memory_code::xlm || code == memory_code::xlm_grouped || code == memory_code::xlm_notebook;

  // Keys: canonical rows are [head][half][key], those of lucidrains [head][key][half].
  std::vector<index_t> keys_shape{H, 2, n, h};
  if (c.flat) keys_shape = {H, n, h};
  if (c.share_keys) keys_shape = {n, h};
  if (code == memory_code::memory_layers) keys_shape = {2 * H * n, h};
  if (lucidrains)
    f(public_rows{"keys", {H, n, 2, h}, [=](index_t r) { return (r / (2 * n) * n + r % n) * 2 + r / n % 2; }}, structs.keys.keys...);
  else
    f(public_rows{"keys", keys_shape}, structs.keys.keys...);

  // Query network: canonical rows are [head][half][h], those of lucidrains [half][head][h].
  const index_t nets = static_cast<index_t>(layer.query.networks.size());
  for (index_t g = 0; g < nets; ++g) {
    const auto gi = static_cast<std::size_t>(g);
    const auto& net = layer.query.networks[gi];
    for (std::size_t i = 0; i < net.maps.size(); ++i) {
      const index_t out = net.maps[i].weight.rows(), in = net.maps[i].weight.cols();
      const auto modules = static_cast<index_t>(net.norms.empty() ? 1 : 2);  // of one layer, beside its ReLU
      const auto at = static_cast<index_t>(i) * (modules + 1);
      const bool grouped = code == memory_code::xlm_grouped || net.maps.size() == 1;  // without hidden layers all networks are one map
      const auto name = [&](index_t module) {
        if (code == memory_code::ultra_mem) return std::string("query_proj.");
        if (lucidrains) return std::string(code == memory_code::lucidrains_peer ? "to_queries.0." : "to_queries.");
        if (code == memory_code::xlm_notebook) return concat("query_proj.", at + module, ".");
        if (grouped) return concat("query_proj.query_mlps.", at + module, i > 0 && module == 0 ? ".layer." : ".");
        return concat("query_proj.query_mlps.", g, ".", at + module, ".");
      };
      const index_t all = grouped ? nets * out : out, first = grouped ? g * out : 0;
      std::vector<index_t> weight_shape{all, in};
      if (grouped && i > 0) weight_shape.push_back(1);
      const auto row = [=](index_t r) { return lucidrains ? (r / h % halves * H + r / (h * halves)) * h + r % h : first + r; };
      const auto one = [&](const std::string& part, index_t module) {  // [1 x out] of ours is row g of the public [groups x out]
        return public_rows{name(module) + part, {all}, [=](index_t) { return grouped ? g : 0; }};
      };
      f(public_rows{name(0) + "weight", weight_shape, row}, structs.query.networks[gi].maps[i].weight...);
      f(one("bias", 0), structs.query.networks[gi].maps[i].bias...);
      if (net.norms.empty()) continue;
      f(one("weight", 1), structs.query.networks[gi].norms[i].weight...);
      f(one("bias", 1), structs.query.networks[gi].norms[i].bias...);
      f(one("running_mean", 1), structs.query.networks[gi].norms[i].running_mean...);
      f(one("running_var", 1), structs.query.networks[gi].norms[i].running_var...);
    }
  }
  f(public_rows{"norm.weight", {h}}, structs.query.layer.weight...);
  f(public_rows{"norm.bias", {h}}, structs.query.layer.bias...);
  f(public_rows{code == memory_code::ultra_mem ? "query_norm.weight" : "norm.weight", {h}}, structs.query.rms.weight...);
  f(public_rows{"pre_layernorm.weight", {d}}, structs.layer.weight...);
  f(public_rows{"pre_layernorm.bias", {d}}, structs.layer.bias...);
  f(public_rows{"norm.gamma", {d}, std::identity{}, 1}, structs.rms.weight...);
  f(public_rows{"head_permutations", {H, layer.keys.slots()}}, structs.permutation...);

  // Values and read-out.
  const bool experts = c.readout.kind == memory_readout_kind::experts;
  const std::string up = code == memory_code::ultra_mem          ? "full_memory_layer.values_for_look_up"
                         : !experts                              ? "values.weight"
                         : code == memory_code::lucidrains_peer ? "weight_up_embed.weight"
                                                                 : "values_v.weight";
  const std::string down = code == memory_code::lucidrains_peer ? "weight_down_embed.weight" : "values_u.weight";
  f(public_rows{up, {layer.values.rows(), layer.values.cols()}}, structs.values...);
  f(public_rows{down, {layer.down.rows(), layer.down.cols()}}, structs.down...);
  const auto& r = layer.readout;
  const std::string projection = code == memory_code::ultra_mem ? "values_proj." : lucidrains ? "maybe_concat_combine.2." : "value_proj.";
  if (xlm) return;
  f(public_rows{"swilu_projection.weight", {r.silu.weight.rows(), d}}, structs.readout.silu.weight...);
  f(public_rows{"swilu_projection.bias", {r.silu.weight.rows()}}, structs.readout.silu.bias...);
  f(public_rows{projection + "weight", {r.projection.weight.rows(), r.projection.weight.cols()}}, structs.readout.projection.weight...);
  f(public_rows{projection + "bias", {r.projection.weight.rows()}}, structs.readout.projection.bias...);
  f(public_rows{"gating.weight", {1, d}}, structs.readout.scalar_gate.weight...);
  f(public_rows{"gating.bias", {1}}, structs.readout.scalar_gate.bias...);
  f(public_rows{"output_norm.weight", {c.outputs}}, structs.readout.norm.weight...);
  f(public_rows{"output_norm.bias", {c.outputs}}, structs.readout.norm.bias...);
}

namespace detail {

/// Tensors of published codes that say nothing about the layer.
inline bool ignorable(memory_code code, const std::string& name, bool experts) {
  if (name.ends_with("num_batches_tracked")) return true;
  if (code == memory_code::ultra_mem) return name == "keys_norm.weight";  // computed there, but not used
  return code == memory_code::memory_layers && experts && (name.starts_with("swilu_projection.") || name.starts_with("value_proj."));
}

}  // namespace detail

/// Loads a product-key memory from a published checkpoint: all tensors under `prefix`, by the names of `code`; what
/// tools add to names (`module.`, `_orig_mod.`) does not matter. All or nothing. Throws io_error for a missing tensor
/// or another shape, for head_permutations that are none, and, unless strict is false, for tensors under the prefix
/// that the layer does not have. `values` = false leaves the tables alone (a pool that was loaded before).
/// `left_aside`, if given, gets the names of tensors that were known and not needed, or let pass.
///
/// Constants of the code that no tensor holds are those of the presets; the epsilon of lucidrains_peer's norm is set
/// here, too.
template <std::floating_point S, class Table>
void import_memory(memory_code code, const safetensors_file& file, const std::string& prefix,
                   product_key_memory<S, Table>& layer, bool strict = true, bool values = true,
                   std::vector<std::string>* left_aside = nullptr) {
  published_tensors from(file);
  const auto is_table = [](const auto& t) { return requires { t.read_row(index_t{}, std::span<S>{}); }; };
  visit_public(
      code, layer,
      [&](const public_rows& p, const auto& t) {
        if (t.rows() * t.cols() == 0) return;
        if (is_table(t) && !values)
          from.take(prefix + p.name);
        else
          from.template expect<typename detail::number_of<std::remove_cvref_t<decltype(t)>>::type>(prefix + p.name,
                                                                                                   p.shape);
      },
      layer);
  const bool experts = layer.config.readout.kind == memory_readout_kind::experts;
  from.leave_aside(prefix, [&](const std::string& name) { return !strict || detail::ignorable(code, name, experts); });
  from.require_all_taken(prefix);
  if (layer.permutation.size() != 0) {
    const std::string shuffle = prefix + "head_permutations";
    const auto order = file.template read<std::int64_t>(from.stored(shuffle));
    detail::check_permutations<io_error>(std::span<const std::int64_t>(order), layer.keys.slots(), from.who(shuffle));
  }

  visit_public(
      code, layer,
      [&](const public_rows& p, auto& t) {
        if (t.rows() * t.cols() == 0 || (is_table(t) && !values)) return;
        using N = typename detail::number_of<std::remove_cvref_t<decltype(t)>>::type;
        if constexpr (requires { t.read_row(index_t{}, std::span<S>{}); }) {  // large: row by row
          matrix<S> block(std::min<index_t>(1024, t.rows()), t.cols());
          for (index_t first = 0; first < t.rows(); first += block.rows()) {
            const index_t m = std::min(block.rows(), t.rows() - first);
            file.template read_rows<S>(from.stored(prefix + p.name), first, matrix_view<S>(block).slice_rows(0, m));
            for (index_t i = 0; i < m; ++i) t.write_row(first + i, std::span<const S>(block.data() + i * t.cols(), static_cast<std::size_t>(t.cols())));
          }
        } else {
          const auto numbers = file.template read<N>(from.stored(prefix + p.name));
          for (index_t i = 0; i < t.rows(); ++i)
            for (index_t j = 0; j < t.cols(); ++j)
              t(i, j) = numbers[static_cast<std::size_t>(p.row(i) * t.cols() + j)] + static_cast<N>(p.offset);
        }
      },
      layer);
  if (code == memory_code::lucidrains_peer) layer.set_input_epsilon(peer_experts(layer.config.inputs).input_epsilon);
  refresh(layer);
  from.report(left_aside);
}

}  // namespace lithe::inline LITHE_ABI
