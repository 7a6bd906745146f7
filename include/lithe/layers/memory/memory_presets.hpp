#pragma once

#include "lithe/layers/memory/product_key_memory.hpp"

// The settings of published product-key memories, as configurations to start from.
namespace lithe::inline LITHE_ABI {

/// facebookresearch/XLM and its notebook, with batch norm on the queries, the authors' best setting (arXiv 1907.05242 section 4.3).
inline product_key_memory_config xlm_memory(index_t features) {
  product_key_memory_config c{.inputs = features, .heads = 4, .sub_keys = 512, .key_width = 256, .top_k = 32};
  c.query.norm = query_normalisation::batch;
  return c;
}

/// Memory+ of facebookresearch/memory (arXiv 2412.09764): a SiLU gate on the read-out; share one table between layers by `shared_table`.
inline product_key_memory_config memory_plus(index_t features) {
  product_key_memory_config c{.inputs = features, .heads = 4, .sub_keys = 1024, .key_width = 512, .top_k = 32};
  c.readout.kind = memory_readout_kind::silu_gated;
  return c;
}

/// lucidrains/product-key-memory: layer norm on the queries, no bias.
inline product_key_memory_config lucidrains_memory(index_t features) {
  product_key_memory_config c{.inputs = features, .heads = 4, .sub_keys = 128, .key_width = 256, .top_k = 32};
  c.query.bias = false;
  c.query.norm = query_normalisation::layer;
  return c;
}

/// PEER (arXiv 2407.04153) as in lucidrains/PEER-pytorch with competing scores: a million experts of one neuron, 16 for
/// each of 8 heads. Its norm x √D / max(|x|, 1e-12) is the root-mean-square norm x / √(mean square + ε) with
/// ε = 1e-24 / D: the same for every x that is much longer than 1e-12, and 0 for x = 0.
inline product_key_memory_config peer_experts(index_t features) {
  product_key_memory_config c{.inputs = features, .heads = 8, .sub_keys = 1000, .key_width = features / 2 * 2, .top_k = 16};
  c.query.bias = false;
  c.input_norm = memory_input_norm::rms;
  c.input_epsilon = 1e-24 / static_cast<double>(std::max<index_t>(features, 1));
  c.readout.kind = memory_readout_kind::experts;
  return c;
}

}  // namespace lithe::inline LITHE_ABI
