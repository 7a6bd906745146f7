#pragma once

#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/collaborative_attention.hpp"
#include "lithe/layers/attention/collaborative_cross_attention.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/tensor_decomposition.hpp"

// Trained attention of separate heads becomes collaborative attention (arXiv 2006.16362, section 4).
namespace lithe::inline LITHE_ABI {

/// The stored query and key weights of separate heads in double, each query head beside the key head it uses, and the content biases
/// B_h = bq_h Wk_h (the other biases change no output: they add the same to all scores of a query).
struct key_query_weights {
  matrix<double> query, key;  ///< [H d x inputs], [H d x memory inputs]
  matrix<double> content;     ///< [H x memory inputs]
};

/// Of any weights: wq [H d x D], wk [G d x E] (each key head shared by H / G query heads), bq [1 x H d] or empty. Throws shape_error.
template <class S>
[[nodiscard]] key_query_weights key_query_weights_of(matrix_view<const S> wq, matrix_view<const S> wk, matrix_view<const S> bq, index_t heads,
                                                     index_t key_heads) {
  require<shape_error>(heads >= 1 && key_heads >= 1 && wq.rows() % heads == 0 && heads % key_heads == 0 &&
                           wk.rows() * heads == wq.rows() * key_heads &&
                           (bq.size() == 0 || (bq.rows() == 1 && bq.cols() == wq.rows())),
                       "reparametrise: expected query and key weights of ", heads, " and ", key_heads,
                       " heads of one width, and a row of query biases or none, got ", to_text(wq.rows(), wq.cols()),
                       ", ", to_text(wk.rows(), wk.cols()), " and ", to_text(bq.rows(), bq.cols()));
  const index_t d = wq.rows() / heads, shared = heads / key_heads;
  key_query_weights w{wq.map().template cast<double>(), matrix<double>(wq.rows(), wk.cols()), matrix<double>::Zero(heads, wk.cols())};
  for (index_t h = 0; h < heads; ++h) {
    w.key.middleRows(h * d, d) = wk.slice_rows(h / shared * d, d).map().template cast<double>();
    for (index_t i = 0; bq.size() != 0 && i < d; ++i) w.content.row(h) += static_cast<double>(bq.data()[h * d + i]) * w.key.row(h * d + i);
  }
  return w;
}
/// Of a layer. Throws config_error for rotary positions, which shared dimensions cannot carry.
template <std::floating_point S>
[[nodiscard]] key_query_weights key_query_weights_of(const detail::attention_base<S>& l) {
  require<config_error>(l.config.rotary_width == 0, "reparametrise: expected attention without rotary positions, got a rotary_width of ",
                        l.config.rotary_width);
  return key_query_weights_of<S>(l.query.weight, l.key.weight, l.query.bias, l.config.heads, l.config.key_value_heads);
}

namespace detail {

/// Writes factors and content biases into a layer that has all else already.
template <std::floating_point S>
void assign_factors(const key_query_factors& f, const matrix<double>& content, collaborative_base<S>& to) {
  to.config.key_width = f.query.rows();
  to.query.weight = f.query.cast<S>();
  to.query.bias.resize(0, f.query.rows());
  to.key.weight = f.key.cast<S>();
  to.key.bias.resize(0, f.key.rows());
  to.mixing = f.mixing.cast<S>();
  to.content_bias.weight = content.cast<S>();
}

template <std::floating_point S>
decomposition reparametrise_base(const attention_base<S>& from, collaborative_base<S>& to, const decomposition_options& o, const context& ctx) {
  const key_query_weights w = key_query_weights_of(from);
  decomposition d = decompose(w.query, w.key, from.config.heads, o, ctx);
  const auto& c = from.config;
  const double dropout = to.config.dropout;
  to = {};
  to.config = {.inputs = c.inputs,
               .heads = c.heads,
               .value_width = c.heads * c.head_width,
               .outputs = c.outputs,
               .causal = c.causal,
               .content_bias = from.query.bias.size() != 0,
               .mixing = mixing_start::concatenate,
               .scale = c.scale,
               .dropout = dropout};
  assign_factors(d.factors, to.config.content_bias ? w.content : matrix<double>(0, 0), to);
  const index_t shared = c.heads / c.key_value_heads, width = c.head_width;
  to.value.weight.resize(c.heads * width, from.value.weight.cols());
  to.value.bias.resize(from.value.bias.rows(), c.heads * width);
  to.config.value_bias = from.value.bias.size() != 0;
  for (index_t h = 0; h < c.heads; ++h) {
    to.value.weight.middleRows(h * width, width) = from.value.weight.middleRows(h / shared * width, width);
    if (to.config.value_bias) to.value.bias.middleCols(h * width, width) = from.value.bias.middleCols(h / shared * width, width);
  }
  to.output = from.output;
  return d;
}

}  // namespace detail

/// The collaborative layer made from a trained one, and how close it is. The scale stays that of the source (what keeps the temperature
/// of the softmax), values and the output projection are copied, and the content biases are exact at any rank. At rank >= heads *
/// head_width the layer equals its source to rounding, with no iterations. `to` keeps its dropout rate. Throws what `decompose` and
/// `key_query_weights_of` throw.
template <std::floating_point S>
decomposition reparametrise(const attention<S>& from, collaborative_attention<S>& to, const decomposition_options& o, const context& ctx = {}) {
  return detail::reparametrise_base<S>(from, to, o, ctx);
}
template <std::floating_point S>
decomposition reparametrise(const cross_attention<S>& from, collaborative_cross_attention<S>& to, const decomposition_options& o,
                            const context& ctx = {}) {
  return detail::reparametrise_base<S>(from, to, o, ctx);
}

namespace detail {

template <class From, class To>
concept reparametrisable = requires(const From& from, To& to, const decomposition_options& o, const context& ctx) {
  lithe::reparametrise(from, to, o, ctx);
};

template <class From, class To, class Report>
void reparametrise_walk(const std::string& prefix, const From& from, To& to, const decomposition_options& o, const context& ctx, Report& report) {
  if constexpr (reparametrisable<From, To>) {
    report(prefix, from, to, lithe::reparametrise(from, to, o, ctx));
  } else {
    From::visit(
        [&](const field& f, const auto& a, auto& b) {
          const std::string name = detail::join_names(prefix, f.name);
          if constexpr (has_parameters<std::remove_cvref_t<decltype(a)>>)
            reparametrise_walk(name, a, b, o, ctx, report);
          else
            b = a;
        },
        from, to);
  }
}

}  // namespace detail

/// A whole model, layer by layer: `to` is a model of the same make in which collaborative layers stand where `from` has separate heads.
/// Those are decomposed, everything else is copied; report(name, from layer, to layer, decomposition) after each. A layer that the model
/// applies several times (tied blocks) stands in it once and is decomposed once.
template <class From, class To, class Report>
void reparametrise_model(const From& from, To& to, const decomposition_options& o, const context& ctx, Report&& report) {
  detail::reparametrise_walk("", from, to, o, ctx, report);
  refresh(to);
}

/// f(name, layer) for every attention of separate heads in a model.
template <class L, class F>
void for_each_attention(const L& model, F&& f) {
  walk(
      [&](const std::string& name, const auto& l) {
        if constexpr (requires {
                        l.query.weight;
                        l.config.key_value_heads;
                      })
          f(name, l);
      },
      [](const auto&...) {}, "", model);
}

}  // namespace lithe::inline LITHE_ABI
