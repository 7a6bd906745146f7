#pragma once

#include "lithe/layers/memory/ultra_mem.hpp"

// The settings of published UltraMem layers, as configurations to start from.
namespace lithe::inline LITHE_ABI {

/// `ultramem_v1` of the authors' code (ZihaoHuang-notabot/Ultra-Sparse-Memory-Network): the defaults.
inline ultra_mem_config ultra_mem_v1(index_t features) { return {.features = features}; }

/// UltraMem as its paper describes it (arXiv 2411.12364): layer norms, the convolution before the query, the loss on lesser singular
/// values, and its start; `blocks` is the depth of the model.
inline ultra_mem_config ultra_mem_paper(index_t features, index_t blocks) {
  return {.features = features, .norm = score_norm_kind::layer, .query_conv = 5, .rank_loss = 0.001,
          .start = {.kind = ultra_mem_start_kind::paper, .blocks = blocks}};
}

/// UltraMemV2 (arXiv 2508.18756): a memory in every block, a query for each rank, one projection, linear pre-values.
inline ultra_mem_config ultra_mem_v2(index_t features) {
  const index_t width = std::max<index_t>(2, features / 4 / 2 * 2);
  return {.features = features, .heads = 1, .sub_keys = 360, .key_width = width, .top_k = 32, .query = tucker_query::per_rank, .expansion = 1, .groups = 1,
          .value_width = width, .pre_width = width, .start = {.kind = ultra_mem_start_kind::released_v2}};
}

/// Where the layers of a model read the table that they share (UltraMemV2): layer i sees rows² physical rows, sub_keys is rows times the key
/// expansion, of a table of layers x rows_of_each² rows, from its own part on.
struct ultra_mem_share {
  index_t rows = 0;        ///< √ of the rows that a layer sees
  index_t table_rows = 0;  ///< of all layers
  index_t offset = 0;
};
/// rows = ⌊√(layers own² share)⌋. Throws config_error unless 0 < share <= 1 and 0 <= layer < layers.
inline ultra_mem_share share_ultra_mem_table(index_t own, index_t layers, index_t layer, double share) {
  require<config_error>(share > 0 && share <= 1, "ultra_mem: expected a share of the table in (0, 1], got ", share);
  require<config_error>(own >= 1 && layer >= 0 && layer < layers, "ultra_mem: expected a layer below ", layers, ", got ", layer);
  const index_t all = layers * own * own;
  const double visible = static_cast<double>(all) * share;
  auto rows = static_cast<index_t>(std::sqrt(visible));
  if (static_cast<double>((rows + 1) * (rows + 1)) <= visible * (1 + 1e-12)) ++rows;  // a root that came out as 3.999...
  return {rows, all, layer * own * own};
}

}  // namespace lithe::inline LITHE_ABI
