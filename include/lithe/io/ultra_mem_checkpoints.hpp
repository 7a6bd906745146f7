#pragma once

#include <functional>

#include "lithe/io/published_tensors.hpp"
#include "lithe/layers/memory/ultra_mem.hpp"
#include "lithe/training/parameter_rows.hpp"

namespace lithe::inline LITHE_ABI {

/// What a tensor of an UltraMem layer is in a file of the authors' code (ZihaoHuang-notabot/Ultra-Sparse-Memory-Network).
struct ultra_mem_tensor {
  std::string name;
  std::vector<index_t> shape;                                ///< of the public tensor
  bool table = false;                                        ///< under the prefix of the tables
  std::function<index_t(index_t row, index_t col)> at = {};  ///< where our number (row, col) stands in it; none: in our order
};

/// f(ultra_mem_tensor, tensors...) for every tensor under its public name; `structs` are layers or their gradients. Cores come one by
/// one, as views. Tensors that the layer does not have are empty.
template <class F, std::floating_point S, class Table, class... T>
void visit_ultra_mem(const ultra_mem<S, Table>& layer, F&& f, T&... structs) {
  const auto& c = layer.config;
  const index_t H = c.heads, n = c.sub_keys, d = c.key_width, r = c.rank, D = c.features, taps = c.query_conv;
  f(ultra_mem_tensor{"query_conv.weight", {D, taps}, false, [=](index_t i, index_t j) { return j * taps + i; }}, structs.query.convolution.weight...);
  f(ultra_mem_tensor{"query_proj.weight", {layer.query.outputs(), D}}, structs.query.projection.weight...);
  f(ultra_mem_tensor{"query_norm.weight", {d}}, structs.query.norm.weight...);
  f(ultra_mem_tensor{"query_norm.bias", {d}}, structs.query.norm.bias...);
  f(ultra_mem_tensor{"keys", {H, 2, n, d, r}, false, [=](index_t i, index_t j) { return (i * d + j % d) * r + j / d; }}, structs.search.keys...);
  f(ultra_mem_tensor{"keys_norm.weight", {d}}, structs.search.norm.weight...);
  f(ultra_mem_tensor{"keys_norm.bias", {d}}, structs.search.norm.bias...);
  for (index_t core = 0; core < c.cores; ++core) {
    const auto of_core = [&](auto& cores) { return view(cores).slice_rows(core * H * r, H * r); };
    [&](auto... part) { f(ultra_mem_tensor{concat("tucker_core.", core), {H, r, r}}, part...); }(of_core(structs.search.cores)...);
  }
  f(ultra_mem_tensor{"tucker_core_u", {1, H, 1, r}}, structs.search.u...);
  f(ultra_mem_tensor{"tucker_core_v", {1, H, 1, r}}, structs.search.t...);
  const auto& e = layer.expansion.config;
  f(ultra_mem_tensor{"shuffle_index", {e.expansion * e.rows}}, structs.expansion.permutation...);
  f(ultra_mem_tensor{"values_for_look_up", {e.table_rows, e.value_width}, true}, structs.expansion.values...);
  f(ultra_mem_tensor{"pre_values_for_look_up", {e.table_rows, e.pre_width}, true}, structs.expansion.pre_values...);
  f(ultra_mem_tensor{"pre_values_proj.weight", {e.pre_width, D}}, structs.expansion.pre_projection.weight...);
  f(ultra_mem_tensor{"values_proj.weight", {D, e.groups * e.value_width}}, structs.expansion.projection.weight...);
}

/// Where the tensors of a unit stand in a checkpoint, and how strictly they are read.
struct ultra_mem_import {
  std::string prefix{};           ///< of the unit: "transformer.mem_blocks.{unit}."
  std::string table_prefix{};     ///< of the tables: "transformer.full_memory_layer." (V2); empty = prefix (V1)
  bool strict = true;             ///< a tensor under `prefix` that the layer does not have is an error
  bool values = true;             ///< false leaves the tables alone (loaded before by another unit)
  bool derive_vectors = true;     ///< singular vectors that are stored all zero are derived from the cores; false: an error
  std::vector<std::string>* left_aside = nullptr;  ///< if given, gets the names under `prefix` that were let pass
};

/// Loads an UltraMem layer from a checkpoint of the authors' code; what tools add to names (`module.`, `_orig_mod.`)
/// does not matter. All or nothing. The singular vectors are read, not derived: their sign is state and decides what is
/// chosen. Throws io_error for a missing tensor or another shape, for a shuffle_index that is no permutation, and as
/// `options` say.
template <std::floating_point S, class Table>
void import_ultra_mem(const safetensors_file& file, ultra_mem<S, Table>& layer, ultra_mem_import options) {
  if (options.table_prefix.empty()) options.table_prefix = options.prefix;
  published_tensors from(file);
  const auto full = [&](const ultra_mem_tensor& p) {
    return (p.table ? options.table_prefix : options.prefix) + p.name;
  };
  visit_ultra_mem(
      layer,
      [&](const ultra_mem_tensor& p, const auto& t) {
        if (t.rows() * t.cols() == 0) return;
        if (p.table && !options.values) return from.take(full(p));
        const bool vectors = p.name == "tucker_core_u" || p.name == "tucker_core_v";
        from.template expect<typename detail::number_of<std::remove_cvref_t<decltype(t)>>::type>(
            full(p), p.shape,
            vectors ? " (the leading singular vectors are state: their sign cannot be had from the cores)" : "");
      },
      std::as_const(layer));
  from.leave_aside(options.prefix,
                   [&](const std::string& name) { return !options.strict || name.starts_with("full_memory_layer."); });
  from.require_all_taken(options.prefix);

  // What may be refused is looked at before anything is changed.
  const std::string shuffle = options.prefix + "shuffle_index";
  const auto order = file.template read<std::int64_t>(from.stored(shuffle));
  detail::check_permutation<io_error>(std::span<const std::int64_t>(order), from.who(shuffle));
  const auto zero = [&](const char* name) {
    const auto v = file.template read<double>(from.stored(options.prefix + name));
    return std::all_of(v.begin(), v.end(), [](double x) { return x == 0; });
  };
  const bool fresh = zero("tucker_core_u") && zero("tucker_core_v");
  require<io_error>(!fresh || options.derive_vectors, from.who(options.prefix + "tucker_core_u"),
                    ": expected singular vectors, found zeros, in tucker_core_v too: their sign is not known");

  visit_ultra_mem(
      layer,
      [&](const ultra_mem_tensor& p, auto&& t) {
        if (t.rows() * t.cols() == 0 || (p.table && !options.values)) return;
        if constexpr (requires { t.write_row(index_t{}, std::span<const S>{}); }) {
          // Rows of ours are slices of public ones; some at a time, because tables are large.
          const index_t slices = p.shape.back() / t.cols(), most = 1024;
          matrix<S> block(most, p.shape.back());
          for (index_t first = 0; first < p.shape.front(); first += most) {
            const index_t rows = std::min(most, p.shape.front() - first);
            file.template read_rows<S>(from.stored(full(p)), first, matrix_view<S>(block).slice_rows(0, rows));
            for (index_t i = 0; i < rows * slices; ++i)
              t.write_row(first * slices + i, std::span<const S>(block.data() + i * t.cols(), static_cast<std::size_t>(t.cols())));
          }
        } else {
          using N = std::remove_cvref_t<decltype(t(0, 0))>;
          const auto numbers = file.template read<N>(from.stored(full(p)));
          for (index_t i = 0; i < t.rows(); ++i)
            for (index_t j = 0; j < t.cols(); ++j) t(i, j) = numbers[static_cast<std::size_t>(p.at ? p.at(i, j) : i * t.cols() + j)];
        }
      },
      layer);
  if (fresh) layer.search.follow();
  refresh(layer);
  from.report(options.left_aside);
}

}  // namespace lithe::inline LITHE_ABI
