#pragma once

#include "lithe/layers/attention/attention.hpp"
#include "lithe/training/accumulate.hpp"

namespace lithe::inline LITHE_ABI {

/// |dL/d mask_h| of each head of an attention layer, mask_h the factor on the head's output (arXiv 1905.10650, equation 2), from the
/// gradient that backward gives anyway: Σ_t <dO_h, O_h> = <Wo_h, dWo_h>. Sum it over batches; a larger number is a head that matters more.
template <std::floating_point S>
[[nodiscard]] std::vector<double> head_importance(const attention<S>& l, const typename attention<S>::gradient& g) {
  require_shape<const S>("head_importance", "an output gradient", g.output.weight, l.output.weight.rows(), l.output.weight.cols());
  std::vector<double> out;
  for (index_t h = 0; h < l.config.heads; ++h) {
    double sum = 0;
    for (index_t i = 0; i < l.output.weight.rows(); ++i) {
      const S *w = l.output.weight.row(i).data() + h * l.config.head_width, *d = g.output.weight.row(i).data() + h * l.config.head_width;
      sum += detail::accumulate(l.config.head_width, [&](index_t j) { return static_cast<double>(w[j]) * static_cast<double>(d[j]); });
    }
    out.push_back(std::abs(sum));
  }
  return out;
}

/// A layer of the heads named in `keep` (ascending) alone. Throws config_error unless keys and values have a head for each query head,
/// index_error for a head that is not there.
template <std::floating_point S>
[[nodiscard]] attention<S> prune_heads(const attention<S>& l, std::span<const index_t> keep) {
  require<config_error>(l.config.key_value_heads == l.config.heads && !keep.empty(),
                        "prune_heads: expected at least 1 head to keep of a layer whose heads all ", "have keys of their own, got ", keep.size(),
                        " of ", l.config.heads, " with ", l.config.key_value_heads, " heads of keys");
  const index_t d = l.config.head_width, n = static_cast<index_t>(keep.size());
  attention<S> out = l;
  out.config.heads = out.config.key_value_heads = n;
  const linear<S>* const from[3] = {&l.query, &l.key, &l.value};
  linear<S>* const to[3] = {&out.query, &out.key, &out.value};
  for (int p = 0; p < 3; ++p) {
    *to[p] = {};
    to[p]->weight.resize(n * d, from[p]->weight.cols());
    to[p]->bias.resize(from[p]->bias.rows(), n * d);
  }
  out.output.packed.clear();
  out.output.weight.resize(l.output.weight.rows(), n * d);
  for (index_t i = 0; i < n; ++i) {
    const index_t h = keep[static_cast<std::size_t>(i)];
    require<index_error>(h >= 0 && h < l.config.heads && (i == 0 || h > keep[static_cast<std::size_t>(i) - 1]),
                         "prune_heads: expected ascending heads below ", l.config.heads, ", got ", h);
    for (int p = 0; p < 3; ++p) {
      to[p]->weight.middleRows(i * d, d) = from[p]->weight.middleRows(h * d, d);
      if (from[p]->bias.size() != 0) to[p]->bias.middleCols(i * d, d) = from[p]->bias.middleCols(h * d, d);
    }
    out.output.weight.middleCols(i * d, d) = l.output.weight.middleCols(h * d, d);
  }
  return out;
}

}  // namespace lithe::inline LITHE_ABI
