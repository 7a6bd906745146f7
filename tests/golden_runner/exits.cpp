#include "golden_runner/golden_case.hpp"
#include "lithe/layers/halting.hpp"
#include "lithe/layers/halting_sequence.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/exit_calibration.hpp"
#include "lithe/training/exit_losses.hpp"
#include "lithe/training/exit_targets.hpp"

namespace golden {

namespace {

template <class T>
std::vector<double> numbers(const T& values, double shift = 0) {
  std::vector<double> out;
  for (const auto v : values) out.push_back(static_cast<double>(v) + shift);
  return out;
}
template <class S>
std::vector<std::int32_t> integers(golden_case<S>& c, const std::string& name) {
  return c.file.template read<std::int32_t>(name);
}
reduction reduce(const nlohmann::json& j) { return j.at("reduction") == "mean" ? reduction::mean : reduction::sum; }
/// The rows of one part below those of another, and back.
template <class S>
matrix<S> transposed(matrix_view<const S> m) {
  return m.map().transpose();
}

/// "{name}" as the file gives it: a linear layer, or layers map0, map1, ..., map with non-linearities between them.
template <class S>
void load_head(golden_case<S>& c, const std::string& name, halting_head<S>& head) {
  c.load(head.hidden.empty() && !c.has("param." + name + ".map.weight") ? name : name + ".map", head.output);
  for (std::size_t i = 0; i < head.hidden.size(); ++i) c.load(concat(name, ".map", i), head.hidden[i]);
}
template <class S>
void compare_head(golden_case<S>& c, const std::string& name, const gradient_of<halting_head<S>>& g) {
  c.compare_linear_gradient(g.hidden.empty() && !c.has("param." + name + ".map.weight") ? name : name + ".map", g.output);
  for (std::size_t i = 0; i < g.hidden.size(); ++i) c.compare_linear_gradient(concat(name, ".map", i), g.hidden[i]);
}

// Files of the depth-adaptive author's public code: states are [T, B, C], distributions [B, T, N], exits count from 0.
template <class S>
void run_halt(golden_case<S>& c) {
  const auto& j = c.config;
  for (const char* option : {"adapt_block_input", "shift_block_input", "use_saturated_sigmoid"})
    if (j.value(option, false)) throw skipped(concat("halting with ", option));
  if (j.value("halt_dropout", 0.0) != 0) throw skipped("halting with dropout");
  const std::string kind = j.at("reference_class");
  if (kind != "DynamicHalterNclasses" && kind != "DynamicHalterStickBreaking") throw skipped("a halter of class " + kind);
  const bool geometric = kind == "DynamicHalterStickBreaking";
  const index_t N = j.at("num_exits"), D = j.at("embed_dim"), T = j.at("seq_len"), B = j.at("batch"), R = T * B;
  const std::map<std::string, halting_activation> kinds{{"tanh", halting_activation::tanh}, {"relu", halting_activation::relu}, {"sigmoid", halting_activation::sigmoid}};
  halting<S> l({.kind = geometric ? exit_distribution::geometric : exit_distribution::multinomial, .exits = N, .features = D,
                .per_block = geometric && j.at("separate_halting_predictors").template get<bool>(), .hidden_layers = j.at("halt_layers"),
                .activation = kinds.at(j.at("halt_nonlin"))},
               {});
  const auto name = [&](std::size_t i) { return geometric ? concat("halting_predictors.", i) : std::string("halting_predictor"); };
  for (std::size_t i = 0; i < l.heads.size(); ++i) load_head(c, name(i), l.heads[i]);

  matrix<S> x = matrix<S>::Zero(N * R, D), log_q(R, N), dlog_q(R, N), dx(N * R, D);
  for (index_t n = 0; n < N; ++n)
    if (c.has(concat("input.block.", n))) x.middleRows(n * R, R) = c.tensor(concat("input.block.", n));
  const auto batch_first = [&](index_t row) { return row % B * T + row / B; };  // of row (t, b)
  const matrix<S> upstream = c.tensor("grad_output.exit");
  for (index_t i = 0; i < R; ++i) dlog_q.row(i) = upstream.row(batch_first(i));
  record_of<halting<S>> r;
  auto g = make_gradient(l);
  l.forward(x, log_q, r, {});
  l.backward(x, r, dlog_q, dx, g, {});
  if (j.value("detach_before_classifier", false)) dx.setZero();
  matrix<S> y(R, N);
  for (index_t i = 0; i < R; ++i) y.row(batch_first(i)) = log_q.row(i);
  c.compare("output.exit", matrix_view<const S>(y));
  for (index_t n = 0; n < N; ++n)
    if (c.has(concat("grad.input.block.", n))) c.compare(concat("grad.input.block.", n), matrix_view<const S>(dx).slice_rows(n * R, R));
  for (std::size_t i = 0; i < l.heads.size(); ++i) compare_head<S>(c, name(i), g.heads[i]);

  std::vector<std::int32_t> exits(static_cast<std::size_t>(R)), ordered(exits.size());
  const auto compare_exits = [&](const std::string& tensor) {
    for (index_t i = 0; i < R; ++i) ordered[static_cast<std::size_t>(batch_first(i))] = exits[static_cast<std::size_t>(i)];
    c.compare(tensor, numbers(ordered, -1));
  };
  most_probable_exits<S>(log_q, exits);
  compare_exits("output.argmax_exits");
  if (!geometric) return;
  first_exits<S>(r.signals, std::vector<double>{0.5}, true, exits);
  compare_exits("output.threshold_exits");
}

template <class S>
void run_targets(golden_case<S>& c) {
  const auto& j = c.config;
  const matrix<S> logits = c.tensor("input.logits");
  const auto targets = c.file.template read<token_t>("input.targets");
  const auto segment = c.offsets("input.segments");
  const token_t ignored = j.at("ignore_index");
  exit_evidence evidence;
  exit_evidence_from<S>(logits, targets, ignored, evidence);
  const bool by_token = j.at("granularity") == "token";
  const index_t rows = by_token ? static_cast<index_t>(targets.size()) : static_cast<index_t>(segment.size()) - 1;
  std::vector<std::int32_t> exits(static_cast<std::size_t>(rows));
  matrix<double> scores(rows, evidence.correct.cols());
  context ctx;
  ctx.rows = {segment};
  exit_targets(evidence, targets,
               {.oracle = j.at("oracle") == "likelihood" ? exit_oracle::likelihood : exit_oracle::correctness,
                .granularity = by_token ? exit_granularity::token : exit_granularity::sequence,
                .penalty = j.at("lambda"),
                .sigma = j.at("sigma"),
                .normalise = j.at("normalise"),
                .ignore_index = ignored},
               exits, scores, ctx);
  c.compare("output.score", std::vector<double>(scores.data(), scores.data() + scores.size()));
  c.compare("output.exit", numbers(exits));
}

template <class S>
void run_aligned(golden_case<S>& c) {
  const auto& j = c.config;
  const matrix<S> logits = c.tensor("input.logits");
  const auto targets = c.file.template read<token_t>("input.targets");
  const index_t N = j.at("exits");
  const std::map<std::string, exit_weighting> kinds{{"uniform", exit_weighting::uniform},
                                                    {"linear", exit_weighting::linear},
                                                    {"sqrt", exit_weighting::root},
                                                    {"inverse", exit_weighting::inverse},
                                                    {"inverse_sqrt", exit_weighting::inverse_root}};
  const auto weights = j.at("weights").is_string() ? exit_weights(kinds.at(j.at("weights")), N) : j.at("weights").template get<std::vector<double>>();
  matrix<S> d(logits.rows(), logits.cols());
  const auto loss = aligned_exit_loss<S>(logits, targets, weights, reduce(j), j.at("ignore_index"), d);
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare("grad.input.logits", matrix_view<const S>(d));
}

template <class S>
void run_geometric(golden_case<S>& c) {
  const auto& j = c.config;
  const index_t N = j.at("exits"), D = j.at("width");
  const bool per_block = j.at("head") == "per_block";
  halting<S> l({.exits = N, .features = D, .per_block = per_block}, {});
  const matrix<S> w = c.tensor("param.exit.w"), b = c.tensor("param.exit.b"), x = c.tensor("input.states");
  for (std::size_t i = 0; i < l.heads.size(); ++i) {
    l.heads[i].output.weight = w.row(static_cast<index_t>(i));
    l.heads[i].output.bias(0, 0) = b(0, static_cast<index_t>(i));
  }
  const index_t T = x.rows() / N;
  matrix<S> log_q(T, N), dlog_q(T, N), dx(x.rows(), D), dw(w.rows(), D), db(1, w.rows());
  record_of<halting<S>> r;
  auto g = make_gradient(l);
  l.forward(x, log_q, r, {});
  const double alpha = j.at("alpha");
  const auto loss = j.at("target") == "distribution" ? soft_exit_loss<S>(log_q, c.tensor("input.target_distribution"), alpha, reduce(j), dlog_q)
                                                     : exit_loss<S>(log_q, integers(c, "input.exits"), alpha, reduce(j), dlog_q);
  l.backward(x, r, dlog_q, dx, g, {});
  if (j.at("detach")) dx.setZero();
  for (std::size_t i = 0; i < l.heads.size(); ++i) {
    dw.row(static_cast<index_t>(i)) = g.heads[i].output.weight;
    db(0, static_cast<index_t>(i)) = g.heads[i].output.bias(0, 0);
  }
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare("grad.input.states", matrix_view<const S>(dx));
  c.compare("grad.exit.w", matrix_view<const S>(dw));
  c.compare("grad.exit.b", matrix_view<const S>(db));
}

template <class S>
void run_multinomial(golden_case<S>& c) {
  const auto& j = c.config;
  halting<S> l({.kind = exit_distribution::multinomial, .exits = j.at("exits"), .features = j.at("width")}, {});
  c.load("exit", l.heads[0].output);
  const matrix<S> h = c.tensor("input.states");
  const index_t T = h.rows(), N = l.exits;
  matrix<S> x = matrix<S>::Zero(N * T, h.cols()), log_q(T, N), dlog_q(T, N), dx(N * T, h.cols());
  x.topRows(T) = h;
  record_of<halting<S>> r;
  auto g = make_gradient(l);
  l.forward(x, log_q, r, {});
  const auto loss = exit_loss<S>(log_q, integers(c, "input.exits"), j.at("alpha"), reduce(j), dlog_q);
  l.backward(x, r, dlog_q, dx, g, {});
  if (j.at("detach")) dx.setZero();
  std::vector<std::int32_t> exits(static_cast<std::size_t>(T));
  most_probable_exits<S>(log_q, exits);
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare("output.argmax_exits", numbers(exits));
  c.compare("grad.input.states", matrix_view<const S>(dx).slice_rows(0, T));
  c.compare_linear_gradient("exit", g.heads[0].output);
}

template <class S>
void run_sequence(golden_case<S>& c) {
  const auto& j = c.config;
  const index_t B = j.at("batch"), X = j.at("encoder_length"), N = j.at("exits");
  sequence_halting<S> l({.features = j.at("encoder_width"), .outputs = N}, {});
  c.load("exit", l.head.output);
  const matrix<S> x = c.tensor("input.encoder");
  std::vector<std::uint8_t> mask;
  for (const auto m : integers(c, "input.encoder_mask")) mask.push_back(m != 0);
  std::vector<index_t> offsets;
  for (index_t b = 0; b <= B; ++b) offsets.push_back(b * X);
  context ctx;
  ctx.rows = {offsets};
  ctx.mask = mask;
  matrix<S> log_q(B, N), dlog_q(B, N), dx(x.rows(), x.cols());
  record_of<sequence_halting<S>> r;
  auto g = make_gradient(l);
  l.forward(x, log_q, r, ctx);
  const auto loss = exit_loss<S>(log_q, integers(c, "input.exits"), j.at("alpha"), reduce(j), dlog_q);
  l.backward(x, r, dlog_q, dx, g, ctx);
  if (j.at("detach")) dx.setZero();
  std::vector<std::int32_t> exits(static_cast<std::size_t>(B));
  most_probable_exits<S>(log_q, exits);
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare("output.argmax_exits", numbers(exits));
  c.compare("grad.input.encoder", matrix_view<const S>(dx));
  c.compare_linear_gradient("exit", g.head.output);
}

template <class S>
void run_meta(golden_case<S>& c) {
  const auto& j = c.config;
  const index_t N = j.at("exits"), D = j.at("width");
  halting_head<S> l({.features = D}, {});
  c.load("meta", l.output);
  const matrix<S> x = c.tensor("input.states"), logits = c.tensor("input.logits");
  const index_t T = x.rows() / N, rows = (N - 1) * T;
  matrix<S> z(N - 1, T), consistent(N - 1, T), dz(N - 1, T), dx(rows, D);
  record_of<halting_head<S>> r;
  auto g = make_gradient(l);
  l.forward(matrix_view<const S>(x).slice_rows(0, rows), matrix_view<S>(z.data(), rows, 1), r, {});
  meta_targets<S>(logits, N, consistent);
  const auto loss = meta_exit_loss<S>(z, consistent, reduce(j), dz);
  l.backward(matrix_view<const S>(x).slice_rows(0, rows), r, matrix_view<const S>(dz.data(), rows, 1), dx, g, {});
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare_linear_gradient("meta", g.output);
  if (c.has("mid.targets")) c.compare("mid.targets", matrix_view<const S>(transposed<S>(consistent)));
}

template <class S>
void run_calibration(golden_case<S>& c) {
  const auto& j = c.config;
  const auto thresholds = c.file.template read<double>("input.thresholds");
  matrix<double> losses;
  if (j.at("loss") == "risk") {
    const auto early = c.file.template read_matrix<double>("input.risk_early");
    const auto full = c.file.template read<double>("input.risk_full");
    losses.resize(early.rows(), early.cols());
    for (index_t g = 0; g < losses.rows(); ++g)
      excess_risk({early.data() + g * early.cols(), full.size()}, full, {losses.data() + g * losses.cols(), full.size()});
  } else {
    losses = c.file.template read_matrix<double>("input.losses");
  }
  const auto result = calibrate(thresholds, losses,
                                {.delta = j.at("delta"),
                                 .epsilon = j.at("epsilon"),
                                 .bound = j.at("p_value") == "hoeffding" ? risk_bound::hoeffding : risk_bound::hoeffding_bentkus});
  c.compare("output.mean_loss", result.mean_loss);
  c.compare("output.p_value", result.p_values);
  const auto theirs = c.file.template read<double>("output.p_value");
  for (std::size_t i = 0; i < theirs.size(); ++i)  // one by one: some are far below the largest
    if (std::abs(result.p_values[i] - theirs[i]) > 1e-9 * theirs[i]) throw std::runtime_error(concat("output.p_value ", i, " is ", result.p_values[i], ", expected ", theirs[i]));
  c.compare("output.threshold", std::vector<double>{result.threshold});
  c.compare("output.accepted", std::vector<double>{static_cast<double>(result.accepted)});
}

}  // namespace

template <class S>
void run_exits(golden_case<S>& c) {
  const std::string name = c.file.metadata().at("case");
  const std::pair<const char*, void (*)(golden_case<S>&)> kinds[] = {
      {"halt_", run_halt<S>},
      {"exit_targets_", run_targets<S>},
      {"exit_loss_aligned", run_aligned<S>},
      {"exit_loss_geometric", run_geometric<S>},
      {"exit_loss_multinomial", run_multinomial<S>},
      {"exit_loss_sequence", run_sequence<S>},
      {"exit_loss_meta", run_meta<S>},
      {"exit_calibration_", run_calibration<S>},
  };
  for (const auto& [prefix, run] : kinds)
    if (name.starts_with(prefix)) return run(c);
  throw skipped("exits of this kind");
}

template void run_exits(golden_case<float>&);
template void run_exits(golden_case<double>&);

}  // namespace golden
