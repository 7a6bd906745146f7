#pragma once

#include "lithe/kernels/activation.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/linear.hpp"
#include "lithe/layers/norms.hpp"

namespace lithe::inline LITHE_ABI {

/// How queries are made from the input: by a learned network, as the input itself for every head, or as the input with its blocks
/// shuffled differently for each head.
enum class query_source { network, identity, shuffled };
/// The norm of queries: batch norm after every linear map of the network, or a layer or root-mean-square norm over each half.
enum class query_normalisation { none, batch, layer, rms };

struct query_config {
  query_source source = query_source::network;
  std::vector<index_t> hidden{};  ///< widths of hidden layers (ReLU between); none: one linear map
  bool per_group = false;         ///< a network of its own for every head and half
  bool bias = true;
  query_normalisation norm = query_normalisation::none;
  double epsilon = 1e-5;          ///< of the norm, added to the variance or mean square
  bool unit_length = false;       ///< divide each half by its length, after the norm and dropout
  double dropout = 0;
};

/// Linear maps with ReLU between them and, if wanted, batch norm after each (also after the last, before ReLU).
template <std::floating_point S>
struct query_mlp {
  using scalar = S;
  struct record {
    std::vector<matrix<S>> inputs;       // of all maps but the first
    std::vector<matrix<S>> before_norm;  // outputs of the maps, if they are normalised
    std::vector<record_of<batch_norm<S>>> norms;
  };
  struct gradient {
    std::vector<gradient_of<linear<S>>> maps;
    std::vector<gradient_of<batch_norm<S>>> norms;
  };

  std::vector<linear<S>> maps;
  std::vector<batch_norm<S>> norms;  // one for each map, or none
  std::vector<linear<S>> folded;     // maps with the running norm multiplied in, for inference; made by `prepack`

  query_mlp() = default;
  /// Maps from `inputs` over c.hidden to `outputs` numbers; they start as `linear`. Throws config_error for sizes below 1.
  query_mlp(index_t inputs, index_t outputs, const query_config& c, rng_key key) {
    std::vector<index_t> widths{inputs};
    widths.insert(widths.end(), c.hidden.begin(), c.hidden.end());
    widths.push_back(outputs);
    for (std::size_t i = 0; i + 1 < widths.size(); ++i) {
      maps.emplace_back(linear_config{widths[i], widths[i + 1], c.bias}, key.child(i));
      if (c.norm == query_normalisation::batch) norms.emplace_back(widths[i + 1]).epsilon = static_cast<S>(c.epsilon);
    }
  }

  void prepare(gradient& g) const {
    g.maps.resize(maps.size());
    g.norms.resize(norms.size());
  }
  shape output_shape(matrix_view<const S> x) const {
    require_features("query network", maps.front().weight.cols(), x);
    return {x.rows(), maps.back().weight.rows()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    const bool fold = !folded.empty() && !ctx.train;
    apply(fold ? folded : maps, fold || norms.empty() ? nullptr : norms.data(), x, y, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const std::size_t n = maps.size();
    r.inputs.resize(n - 1);
    r.before_norm.resize(norms.size());
    r.norms.resize(norms.size());
    for (std::size_t i = 0; i < n; ++i) {
      const index_t width = maps[i].weight.rows();
      if (i + 1 < n) r.inputs[i].resize(x.rows(), width);
      const matrix_view<const S> in = i == 0 ? x : matrix_view<const S>(r.inputs[i - 1]);
      const matrix_view<S> out = i + 1 < n ? matrix_view<S>(r.inputs[i]) : y;
      if (norms.empty()) {
        maps[i].forward(in, out, ctx);
      } else {
        r.before_norm[i].resize(x.rows(), width);
        maps[i].forward(in, r.before_norm[i], ctx);
        norms[i].forward(r.before_norm[i], out, r.norms[i], ctx);
      }
      if (i + 1 < n) activate<S>(activation::relu, out, out, ctx);
    }
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    constexpr const char* who = "query network";
    check_backward(who, *this, x, dy, dx, g, ctx);
    recorded(who, r.norms, norms.size());
    for (std::size_t i = 0; i < recorded(who, r.inputs, maps.size() - 1).size(); ++i) recorded(who, r.inputs[i], x.rows(), maps[i].weight.rows());
    for (std::size_t i = 0; i < recorded(who, r.before_norm, norms.size()).size(); ++i) recorded(who, r.before_norm[i], x.rows(), maps[i].weight.rows());
    back(maps.size() - 1, x, r, dy, dx, g, ctx);
  }

  void prepack() {
    folded.clear();
    for (std::size_t i = 0; i < norms.size(); ++i) folded.push_back(fold(maps[i], norms[i]));
  }
  void refresh() {
    if (!folded.empty()) prepack();
  }
  void after_step(const gradient&) { refresh(); }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto& m : maps) sum += m.forward_cost(length);
    for (const auto& n : norms) sum += n.forward_cost(length);
    return sum;
  }
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    visit_parts(f, {"linear."}, s.maps, rest.maps...);
    visit_parts(f, {"norm."}, s.norms, rest.norms...);
  }

 private:
  /// Batch norm with running statistics is affine: W' = γρ W, b' = γρ (b - μ) + β.
  static linear<S> fold(const linear<S>& map, const batch_norm<S>& norm) {
    linear<S> out;
    const Eigen::Array<S, 1, Eigen::Dynamic> scale = norm.weight.array() * (norm.running_var.array() + norm.epsilon).rsqrt();
    out.weight = map.weight.array().colwise() * scale.transpose();
    out.bias = norm.bias.array() - norm.running_mean.array() * scale;
    if (map.bias.size() != 0) out.bias.array() += map.bias.array() * scale;
    out.prepack();
    return out;
  }
  /// Without a record; `norm` is that of the first map, null if there is none (or it is folded in).
  static void apply(std::span<const linear<S>> chain, const batch_norm<S>* norm, matrix_view<const S> x, matrix_view<S> y, const context& ctx) {
    const linear<S>& map = chain.front();
    const bool last = chain.size() == 1;
    const scratch<S> hidden(ctx, last ? 0 : x.rows(), map.weight.rows());
    const matrix_view<S> out = last ? y : hidden.view();
    map.forward(x, out, ctx);
    if (norm != nullptr) norm->forward(out, out, ctx);
    if (last) return;
    activate<S>(activation::relu, out, out, ctx);
    apply(chain.subspan(1), norm == nullptr ? nullptr : norm + 1, out, y, ctx);
  }
  void back(std::size_t i, matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
            const context& ctx) const {
    const scratch<S> before(ctx, norms.empty() ? 0 : x.rows(), dy.cols());
    matrix_view<const S> dz = dy;
    if (!norms.empty()) {
      norms[i].backward(r.before_norm[i], r.norms[i], dy, before, g.norms[i], ctx);
      dz = before;
    }
    if (i == 0) return maps[0].backward(x, {}, dz, dx, g.maps[0], ctx);
    const matrix_view<const S> in = r.inputs[i - 1];
    const scratch<S> dh(ctx, in.rows(), in.cols());
    maps[i].backward(in, {}, dz, dh, g.maps[i], ctx);
    activate_backward<S>(activation::relu, in, dh, dh, ctx);  // a ReLU's output is positive where its input was
    back(i - 1, x, r, dh, dx, g, ctx);
  }
};

/// The queries of a memory layer: x [T x D] -> q [T x groups width], `groups` = heads times halves in the order [head][half]. Network (or
/// the input itself), then norm, dropout and unit length (specification: arXiv 1907.05242 section 3.1).
template <std::floating_point S>
struct query_network {
  using scalar = S;
  struct record {
    std::vector<record_of<query_mlp<S>>> networks;
    matrix<S> before_norm;  // of the layer or rms norm
    record_of<detail::row_norm<S, true>> norm;
    matrix<S> lengths;      // [T x groups], for unit length
    std::uint64_t key = 0;  // of dropout
  };
  struct gradient {
    std::vector<gradient_of<query_mlp<S>>> networks;
    gradient_of<layer_norm<S>> layer;
    gradient_of<rms_norm<S>> rms;
  };

  std::vector<query_mlp<S>> networks;  // none (identity), one, or one for each group
  layer_norm<S> layer;                 // over the width of one group; one of the two, or none
  rms_norm<S> rms;
  index_t inputs = 0, heads = 0, groups = 0, width = 0;
  query_source source = query_source::network;
  bool unit_length = false;
  double dropout_rate = 0;

  query_network() = default;
  /// Networks start as `query_mlp`. Throws config_error for settings that do not go together.
  query_network(index_t inputs_, index_t heads_, index_t halves, index_t width_, const query_config& c, rng_key key)
      : inputs(inputs_), heads(heads_), groups(heads_ * halves), width(width_), source(c.source), unit_length(c.unit_length),
        dropout_rate(checked_rate("query network", c.dropout)) {
    if (source == query_source::network) {
      const index_t n = c.per_group ? groups : 1;
      for (index_t i = 0; i < n; ++i)
        networks.emplace_back(inputs, groups / n * width, c, key.child(static_cast<std::uint64_t>(i)));
    } else {
      require<config_error>(halves * width == inputs, "query network: identity queries need key_width = inputs, got ", halves * width, " and ",
                            inputs);
      require<config_error>(source != query_source::shuffled || inputs % (index_t{1} << heads) == 0,
                            "query network: shuffled queries need inputs divisible by 2^heads, got ", inputs, " and ", heads, " heads");
      require<config_error>(c.norm != query_normalisation::batch, "query network: batch norm follows linear maps, identity queries have none");
    }
    const auto epsilon = static_cast<S>(c.epsilon);
    require<config_error>(epsilon > 0 && std::isfinite(epsilon),
                          "query network: expected a positive, finite epsilon, got ", c.epsilon);
    if (c.norm == query_normalisation::layer) layer = layer_norm<S>(width, epsilon);
    if (c.norm == query_normalisation::rms) rms = rms_norm<S>(width, epsilon);
  }

  void prepare(gradient& g) const { g.networks.resize(networks.size()); }
  [[nodiscard]] index_t outputs() const { return groups * width; }  ///< columns of q

  void forward(matrix_view<const S> x, matrix_view<S> q, const context& ctx) const {
    make(x, q, ctx, [&](const query_mlp<S>& net, std::size_t, matrix_view<S> out) { net.forward(x, out, ctx); });
    if (normed()) {
      const matrix_view<S> g = by_group(q);
      const scratch<S> statistics(ctx, g.rows(), 2);
      normalise(g, g, statistics, ctx);
    }
    if (ctx.train && dropout_rate > 0) drop<S>(q, q, dropout_rate, ctx.key, ctx);
    const scratch<S> lengths(ctx, unit_length ? q.rows() : 0, groups);
    if (unit_length) make_unit(q, lengths, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> q, record& r, const context& ctx) const {
    r.networks.resize(networks.size());
    make(x, q, ctx, [&](const query_mlp<S>& net, std::size_t i, matrix_view<S> out) { net.forward(x, out, r.networks[i], ctx); });
    if (normed()) {
      r.before_norm = q.map();
      r.norm.statistics.resize(q.rows() * groups, 2);
      normalise(by_group(matrix_view<S>(r.before_norm)), by_group(q), r.norm.statistics, ctx);
    }
    r.key = ctx.key.value;
    if (ctx.train && dropout_rate > 0) drop<S>(q, q, dropout_rate, ctx.key, ctx);
    if (unit_length) {
      r.lengths.resize(q.rows(), groups);
      make_unit(q, r.lengths, ctx);
    }
  }
  /// q is what forward gave; dq is overwritten on the way; dx is overwritten.
  void backward(matrix_view<const S> x, matrix_view<const S> q, const record& r, matrix_view<S> dq, matrix_view<S> dx, gradient& g,
                const context& ctx) const {
    recorded(who, r.networks, networks.size());
    if (normed()) {
      recorded(who, r.before_norm, q.rows(), outputs());
      recorded(who, r.norm.statistics, q.rows() * groups, 2);
    }
    if (unit_length) make_unit_backward(q, recorded(who, r.lengths, q.rows(), groups), dq, ctx);
    if (ctx.train && dropout_rate > 0) drop<S>(dq, dq, dropout_rate, {r.key}, ctx);
    if (normed()) {
      const matrix_view<const S> before = by_group(matrix_view<const S>(r.before_norm));
      if (layer.weight.size() != 0)
        normalise_rows_backward<S>(before, layer.weight, true, r.norm.statistics, by_group(dq), by_group(dq), g.layer.weight, g.layer.bias, ctx);
      else
        normalise_rows_backward<S>(before, rms.weight, false, r.norm.statistics, by_group(dq), by_group(dq), g.rms.weight, {}, ctx);
    }
    if (networks.empty()) return spread_backward(dq, dx, ctx);
    const index_t part = outputs() / static_cast<index_t>(networks.size());
    const scratch<S> one(ctx, networks.size() > 1 ? x.rows() : 0, x.cols());
    for (std::size_t i = 0; i < networks.size(); ++i) {
      const matrix_view<S> out = i == 0 ? dx : one.view();
      networks[i].backward(x, r.networks[i], dq.slice_cols(static_cast<index_t>(i) * part, part), out, g.networks[i], ctx);
      if (i > 0) add<S>(out, dx, ctx);
    }
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto& n : networks) sum += n.forward_cost(length);
    if (layer.weight.size() != 0) sum += layer.forward_cost(length);
    if (rms.weight.size() != 0) sum += rms.forward_cost(length);
    return sum;
  }
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    visit_parts(f, {"network.", 0, "network"}, s.networks, rest.networks...);
    f("layer_norm", s.layer, rest.layer...);
    f("rms_norm", s.rms, rest.rms...);
  }

 private:
  static constexpr const char* who = "query network";
  [[nodiscard]] bool normed() const { return layer.weight.size() + rms.weight.size() != 0; }
  /// [T x groups width] seen as [T groups x width]: rows of q follow one another.
  template <class E>
  matrix_view<E> by_group(matrix_view<E> q) const {
    return q.cut_rows(width);
  }
  void normalise(matrix_view<const S> from, matrix_view<S> to, matrix_view<S> statistics, const context& ctx) const {
    if (layer.weight.size() != 0)
      normalise_rows<S>(from, layer.weight, layer.bias, layer.epsilon, true, to, statistics, ctx);
    else
      normalise_rows<S>(from, rms.weight, {}, rms.epsilon, false, to, statistics, ctx);
  }
  template <class Net>
  void make(matrix_view<const S> x, matrix_view<S> q, const context& ctx, Net&& net) const {
    const index_t part = networks.empty() ? 0 : outputs() / static_cast<index_t>(networks.size());
    for (std::size_t i = 0; i < networks.size(); ++i) net(networks[i], i, q.slice_cols(static_cast<index_t>(i) * part, part));
    if (!networks.empty()) return;
    ctx.exec->run(x.rows(), detail::grain_rows(q.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t c = 0; c < q.cols(); ++c) q(t, c) = x(t, source_column(c));
    });
  }
  void spread_backward(matrix_view<const S> dq, matrix_view<S> dx, const context& ctx) const {
    ctx.exec->run(dx.rows(), detail::grain_rows(dq.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) {
        dx.row_array(t).setZero();
        for (index_t c = 0; c < dq.cols(); ++c) dx(t, source_column(c)) += dq(t, c);
      }
    });
  }
  /// Which feature of x stands in column c of an identity query. Shuffled, head j >= 1 gets the blocks of inputs / 2^(j+1) features: first
  /// those of even, then those of odd number.
  [[nodiscard]] index_t source_column(index_t c) const {
    const index_t head = c / inputs, at = c % inputs;
    if (source == query_source::identity || head == 0) return at;
    const index_t blocks = index_t{1} << (head + 1), size = inputs / blocks, place = at / size;
    const index_t block = place < blocks / 2 ? 2 * place : 2 * (place - blocks / 2) + 1;
    return block * size + at % size;
  }
  static constexpr double shortest = 1e-12;  // a shorter query is divided by this and gets no gradient
  void make_unit(matrix_view<S> q, matrix_view<S> lengths, const context& ctx) const {
    ctx.exec->run(q.rows(), detail::grain_rows(q.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t g = 0; g < groups; ++g) {
          auto part = q.slice_cols(g * width, width).row_array(t);
          lengths(t, g) = part.matrix().norm();
          part /= std::max(lengths(t, g), static_cast<S>(shortest));
        }
    });
  }
  void make_unit_backward(matrix_view<const S> q, matrix_view<const S> lengths, matrix_view<S> dq, const context& ctx) const {
    ctx.exec->run(q.rows(), detail::grain_rows(q.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t g = 0; g < groups; ++g) {
          const auto unit = q.slice_cols(g * width, width).row_array(t);
          auto d = dq.slice_cols(g * width, width).row_array(t);
          const S along = (unit * d).sum();
          if (lengths(t, g) < static_cast<S>(shortest))
            d.setZero();
          else
            d = (d - along * unit) / lengths(t, g);
        }
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
