#include "golden_runner/golden_case.hpp"
#include "lithe/compose/skip_stack.hpp"
#include "lithe/io/ultra_mem_checkpoints.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

namespace {

/// The layer that a file's configuration describes; the shapes say what it leaves out. `unit` stands before its parameters' names.
template <class S>
ultra_mem_config config_of(const golden_case<S>& g, const std::string& unit) {
  const auto& j = g.config;
  const auto parameter = [&](const std::string& name) { return "param." + unit + name; };
  const auto shape_of = [&](const std::string& name) { return g.file.info(name).shape; };
  const auto keys = shape_of(parameter("keys")), projection = shape_of(parameter("query_proj.weight"));
  ultra_mem_config c;
  c.features = projection.at(1);
  c.heads = keys.at(0);
  c.sub_keys = keys.at(2);
  c.key_width = keys.at(3);
  c.rank = keys.at(4);
  c.cores = 0;
  while (g.has(parameter(concat("tucker_core.", c.cores)))) ++c.cores;
  c.top_k = j.at("knn");
  c.final_k = c.top_k * option<index_t>(j, "mem_final_top_expand_time", 1);
  if (const std::string picks = "mid." + unit + "best_indices"; g.has(picks)) c.final_k = shape_of(picks).at(1) / c.heads;

  const std::string mode = option<std::string>(j, "query_mode", projection.at(0) == 2 * c.key_width ? "shared" : "released");
  if (mode == "shared") c.query = tucker_query::shared;
  else if (mode == "per_rank") c.query = tucker_query::per_rank;
  else if (mode == "released") c.query = tucker_query::released;
  else if (mode == "ascend") c.query = tucker_query::ascend;
  else throw skipped("queries of mode " + mode);
  const std::string norm = option<std::string>(j, "layer_norm_type", "rms");
  c.norm = norm == "none" ? score_norm_kind::none : norm == "rms" ? score_norm_kind::rms : score_norm_kind::layer;
  c.norm_bias = g.has(parameter("query_norm.bias"));
  c.epsilon = option(j, "layer_norm_eps", 1e-5);
  const std::string gate = option<std::string>(j, "score_activation", "none");
  if (gate != "none" && gate != "relu") throw skipped("scores activated by " + gate);
  c.relu_scores = gate == "relu";

  const index_t rows = j.at("value_num");
  c.expansion = shape_of(parameter("shuffle_index")).at(0) / rows;
  c.groups = option<index_t>(j, "value_expand_time", c.expansion);
  c.value_width = j.at("vdim");
  c.table_rows = option<index_t>(j, "all_value_num", rows);
  c.table_offset = option<index_t>(j, "offset", 0);
  c.pre_width = std::max<index_t>(0, option<index_t>(j, "pre_vdim", 0));
  c.pre_gelu = option(j, "mem_use_glu_act", false);
  c.query_conv = option<index_t>(j, "query_conv", 0);
  c.rank_loss = option(j, "aux_weight", 0.0);
  c.rank_margin = option(j, "rank_loss_margin", 0.15);
  c.balance = option(j, "mem_key_balance_reg_coef", 0.0);
  c.output_dropout = option(j, "mem_output_dropout_rate", 0.0);
  return c;
}

template <class S>
ultra_mem<S> load_unit(const golden_case<S>& g, const std::string& unit) {
  ultra_mem<S> l(config_of(g, unit), {});
  const std::string prefix = "param." + unit, shared = prefix + "full_memory_layer.";
  import_ultra_mem(g.file, l, {.prefix = prefix, .table_prefix = g.has(shared + "values_for_look_up") ? shared : prefix});
  return l;
}

/// All gradients of a unit under their public names.
template <class S>
void compare_gradients(golden_case<S>& g, const std::string& unit, const ultra_mem<S>& l, const gradient_of<ultra_mem<S>>& gradient) {
  const std::string shared = "grad." + unit + "full_memory_layer.";
  visit_ultra_mem(
      l,
      [&](const ultra_mem_tensor& p, const auto& t, const auto& d) {
        if constexpr (requires { d(0, 0); }) {
          const std::string name = (p.table && g.has(shared + p.name) ? shared : "grad." + unit) + p.name;
          if (!g.has(name) || t.rows() * t.cols() == 0) return;
          std::vector<double> flat(static_cast<std::size_t>(t.rows() * t.cols()));
          for (index_t i = 0; i < t.rows(); ++i)
            for (index_t k = 0; k < t.cols(); ++k) flat[static_cast<std::size_t>(p.at ? p.at(i, k) : i * t.cols() + k)] = static_cast<double>(d(i, k));
          g.compare(name, flat);
        }
      },
      l, gradient);
}

/// What was picked and with which scores. Picks of a head are compared in the order of the file, because that within a selection is free.
template <class S>
void compare_picks(golden_case<S>& g, const std::string& unit, const ultra_mem<S>& l, const record_of<ultra_mem<S>>& r) {
  const std::string name = "mid." + unit;
  if (!g.has(name + "best_indices")) return;
  const auto theirs = g.file.template read<std::int64_t>(name + "best_indices");
  const auto& ours = r.addresses.value;
  const index_t k = l.search.config.final_k, M = l.config.cores;
  std::vector<double> indices, scores;
  for (index_t i = 0; i < ours.size() && i < static_cast<index_t>(theirs.size()); ++i) {
    index_t at = i / k * k;
    while (at < i / k * k + k - 1 && ours.data()[at] != theirs[static_cast<std::size_t>(i)]) ++at;
    indices.push_back(static_cast<double>(ours.data()[at]));
    for (index_t c = 0; c < M; ++c) scores.push_back(static_cast<double>(r.scores.data()[at * M + c]));
  }
  g.compare(name + "best_indices", indices);
  g.compare(name + "best_scores", scores);
}

/// The loss on singular values by itself, without its weight.
template <class S>
void compare_rank_loss(golden_case<S>& g, const std::string& unit, const ultra_mem<S>& l) {
  matrix<S> cores = matrix<S>::Zero(l.search.cores.rows(), l.search.cores.cols());
  const double loss = detail::rank_loss<S>(l.search.cores, l.config.heads, l.config.rank_margin, 1, matrix_view<S>(cores));
  if (const std::string name = "aux." + unit + "tucker_rank_loss"; g.has(name)) g.compare(name, std::vector<double>{loss});
  const index_t rows = l.config.heads * l.config.rank;
  for (index_t c = 0; c < l.config.cores; ++c)
    if (const std::string name = concat("grad.aux.", unit, "tucker_core.", c); g.has(name))
      g.compare(name, view(std::as_const(cores)).slice_rows(c * rows, rows));
}

template <class S>
void run_unit(golden_case<S>& g) {
  const ultra_mem<S> l = load_unit(g, "");
  const matrix<S> x = g.tensor("input.x"), dy = g.tensor("grad_output.y");
  const index_t length = g.file.info("input.x").shape.at(1);
  std::vector<index_t> offsets;
  for (index_t i = 0; i <= x.rows(); i += length) offsets.push_back(i);
  context ctx;
  ctx.rows = {offsets};

  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  record_of<ultra_mem<S>> r;
  auto gradient = make_gradient(l);
  l.forward(x, y, r, ctx);
  l.backward(x, r, dy, dx, gradient, ctx);
  g.compare("output.y", matrix_view<const S>(y));
  g.compare("grad.input.x", matrix_view<const S>(dx));
  compare_picks(g, "", l, r);
  if (g.has("mid.balance_loss") && l.config.balance > 0)
    g.compare("mid.balance_loss", std::vector<double>{static_cast<double>(r.balance.loss) / l.config.balance});
  compare_gradients(g, "", l, gradient);
  compare_rank_loss(g, "", l);
}

/// y = x: the files' blocks mix no tokens.
template <class S>
struct unmixed {
  using scalar = S;
  struct record {};
  struct gradient {};
  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const { copy<S>(x, y, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record&, const context& ctx) const { copy<S>(x, y, ctx); }
  void backward(matrix_view<const S>, const record&, matrix_view<const S> dy, matrix_view<S> dx, gradient&, const context& ctx) const {
    copy<S>(dy, dx, ctx);
  }
  template <class F, class... T>
  static void visit(F&&, T&...) {}
};

template <class S>
void run_skip(golden_case<S>& g) {
  using block = tapped_block<unmixed<S>, rms_norm<S>, feed_forward<S>>;
  using model = skip_stack<block, ultra_mem<S>>;
  const auto& j = g.config;
  const auto of_block = [](index_t i) { return concat("blocks.", i, "."); };
  model m;
  for (index_t i = 0; i < j.at("blocks").template get<index_t>(); ++i) {
    block b;
    const matrix<S> weight = g.tensor("param." + of_block(i) + "norm.weight");
    b.norm = rms_norm<S>(weight.size(), static_cast<S>(option(j, "layer_norm_eps", 1e-5)));
    b.norm.weight = weight;
    b.feed.kind = activation::gelu;
    g.load(of_block(i) + "fc1", b.feed.up);
    g.load(of_block(i) + "fc2", b.feed.down);
    m.blocks.push_back(std::move(b));
  }
  for (const auto& range : j.at("units")) {
    m.ranges.push_back({range.at(0), range.at(1)});
    m.units.push_back(load_unit(g, concat("mem_blocks.", m.units.size(), ".")));
  }
  const matrix<S> x = g.tensor("input.x"), dy = g.tensor("grad_output.y");
  const index_t length = g.file.info("input.x").shape.at(1);
  std::vector<index_t> offsets;
  for (index_t i = 0; i <= x.rows(); i += length) offsets.push_back(i);
  context ctx;
  ctx.rows = {offsets};
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  record_of<model> r;
  auto gradient = make_gradient(m);
  m.forward(x, y, r, ctx);
  m.backward(x, r, dy, dx, gradient, ctx);
  g.compare("output.y", matrix_view<const S>(y));
  g.compare("grad.input.x", matrix_view<const S>(dx));
  std::vector<double> states;
  const auto append = [&](const matrix<S>& s) {
    for (index_t i = 0; i < s.size(); ++i) states.push_back(static_cast<double>(s.data()[i]));
  };
  for (const auto& s : r.between) append(s);
  append(y);
  if (g.has("mid.states")) g.compare("mid.states", states);
  for (std::size_t i = 0; i < m.blocks.size(); ++i) {
    const std::string name = of_block(static_cast<index_t>(i));
    g.compare("grad." + name + "norm.weight", matrix_view<const S>(gradient.blocks[i].norm.weight));
    g.compare_linear_gradient(name + "fc1", gradient.blocks[i].feed.up);
    g.compare_linear_gradient(name + "fc2", gradient.blocks[i].feed.down);
  }
  for (std::size_t u = 0; u < m.units.size(); ++u) {
    const std::string unit = concat("mem_blocks.", u, ".");
    compare_picks(g, unit, m.units[u], r.units[u]);
    compare_gradients(g, unit, m.units[u], gradient.units[u]);
    compare_rank_loss(g, unit, m.units[u]);
  }
}

}  // namespace

template <class S>
void run_ultra_mem(golden_case<S>& g) {
  g.config.contains("units") ? run_skip(g) : run_unit(g);
}

template void run_ultra_mem(golden_case<float>&);
template void run_ultra_mem(golden_case<double>&);

}  // namespace golden
