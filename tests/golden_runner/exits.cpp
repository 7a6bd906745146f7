#include "golden_runner/golden_case.hpp"
#include "lithe/compose/exit_decoder.hpp"
#include "lithe/compose/generator.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/halting.hpp"
#include "lithe/layers/halting_sequence.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/exit_calibration.hpp"
#include "lithe/training/exit_losses.hpp"
#include "lithe/training/exit_targets.hpp"
#include "lithe/training/exit_training.hpp"

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

/// A head's gradient into the states below it. A head stops none; `aligned_exit_step` does, which the files of whole models judge.
template <class S>
void compare_or_stop(golden_case<S>& c, const std::string& name, bool stopped, matrix_view<const S> ours) {
  stopped ? c.pass_over(name) : c.compare(name, ours);
}

// Files of the depth-adaptive author's public code: states are [T, B, C], distributions [B, T, N], exits count from 0.
template <class S>
void run_halt(golden_case<S>& c) {
  const auto& j = c.config;
  for (const char* option : {"shift_block_input", "use_saturated_sigmoid"})
    if (j.value(option, false)) throw skipped(concat("halting with ", option));
  if (j.value("halt_dropout", 0.0) != 0) throw skipped("halting with dropout");
  const std::string kind = j.at("reference_class");
  if (kind != "DynamicHalterNclasses" && kind != "DynamicHalterStickBreaking") throw skipped("a halter of class " + kind);
  const bool geometric = kind == "DynamicHalterStickBreaking";
  const index_t N = j.at("num_exits"), D = j.at("embed_dim"), T = j.at("seq_len"), B = j.at("batch"), R = T * B;
  const std::map<std::string, halting_activation> kinds{
      {"tanh", halting_activation::tanh}, {"relu", halting_activation::relu}, {"sigmoid", halting_activation::sigmoid}};
  halting<S> l({.kind = geometric ? exit_distribution::geometric : exit_distribution::multinomial,
                .exits = N,
                .features = D,
                .per_block = geometric && j.at("separate_halting_predictors").template get<bool>(),
                .hidden_layers = j.at("halt_layers"),
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
  matrix<S> y(R, N);
  for (index_t i = 0; i < R; ++i) y.row(batch_first(i)) = log_q.row(i);
  c.compare("output.exit", matrix_view<const S>(y));
  for (index_t n = 0; n < N; ++n) {
    const std::string gradient = concat("grad.input.block.", n);
    if (c.has(gradient)) compare_or_stop<S>(c, gradient, j.value("detach_before_classifier", false), matrix_view<const S>(dx).slice_rows(n * R, R));
  }
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
  for (std::size_t i = 0; i < l.heads.size(); ++i) {
    dw.row(static_cast<index_t>(i)) = g.heads[i].output.weight;
    db(0, static_cast<index_t>(i)) = g.heads[i].output.bias(0, 0);
  }
  c.compare("output.loss", std::vector<double>{loss.loss});
  compare_or_stop<S>(c, "grad.input.states", j.at("detach"), matrix_view<const S>(dx));
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
  std::vector<std::int32_t> exits(static_cast<std::size_t>(T));
  most_probable_exits<S>(log_q, exits);
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare("output.argmax_exits", numbers(exits));
  compare_or_stop<S>(c, "grad.input.states", j.at("detach"), matrix_view<const S>(dx).slice_rows(0, T));
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
  std::vector<std::int32_t> exits(static_cast<std::size_t>(B));
  most_probable_exits<S>(log_q, exits);
  c.compare("output.loss", std::vector<double>{loss.loss});
  c.compare("output.argmax_exits", numbers(exits));
  compare_or_stop<S>(c, "grad.input.encoder", j.at("detach"), matrix_view<const S>(dx));
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
    if (std::abs(result.p_values[i] - theirs[i]) > 1e-9 * theirs[i])
      throw std::runtime_error(concat("output.p_value ", i, " is ", result.p_values[i], ", expected ", theirs[i]));
  c.compare("output.threshold", std::vector<double>{result.threshold});
  c.compare("output.accepted", std::vector<double>{static_cast<double>(result.accepted)});
}

// The small model of the files: pre-norm, decoder only.
template <class S>
using small_block = sequential<residual<sequential<layer_norm<S>, attention<S>>>, residual<sequential<layer_norm<S>, feed_forward<S>>>>;

template <class S>
struct small_model {
  embedding<S> tokens;
  adaptive_depth<small_block<S>> stack;
  bool tied = false;
};

/// f(file's name, tensor, others...) for every tensor of the stack.
template <class F, class M, class... T>
void each_named(F&& f, M& model, T&... rest) {
  for (std::size_t i = 0; i < model.stack.blocks.size(); ++i) {
    const std::string at = concat("blocks.", i + 1, ".");
    const auto both = [&](const std::string& name, auto&& part) {
      f(name + ".weight", part(model.stack.blocks[i]).weight, part(rest.stack.blocks[i]).weight...);
      f(name + ".bias", part(model.stack.blocks[i]).bias, part(rest.stack.blocks[i]).bias...);
    };
    // A gradient's residual calls its inner layers `inner.layers`, as the model does; a child is found by its place.
    const auto inner = [](auto& block, auto which, auto child) -> auto& { return std::get<child>(std::get<which>(block.layers).inner.layers); };
    constexpr std::integral_constant<std::size_t, 0> first;
    constexpr std::integral_constant<std::size_t, 1> second;
    both(
        at + "attention_norm", [&](auto& b) -> auto& { return inner(b, first, first); });
    both(
        at + "attention.query", [&](auto& b) -> auto& { return inner(b, first, second).query; });
    both(
        at + "attention.key", [&](auto& b) -> auto& { return inner(b, first, second).key; });
    both(
        at + "attention.value", [&](auto& b) -> auto& { return inner(b, first, second).value; });
    both(
        at + "attention.output", [&](auto& b) -> auto& { return inner(b, first, second).output; });
    both(
        at + "feed_forward_norm", [&](auto& b) -> auto& { return inner(b, second, first); });
    both(
        at + "feed_forward.fc1", [&](auto& b) -> auto& { return inner(b, second, second).up; });
    both(
        at + "feed_forward.fc2", [&](auto& b) -> auto& { return inner(b, second, second).down; });
  }
  const auto numbered = [](const char* one, const char* many, std::size_t count, std::size_t i) {
    return count == 1 ? std::string(one) : concat(many, ".", i + 1);
  };
  for (std::size_t i = 0; i < model.answers.norms.size(); ++i) {
    const auto name = numbered("final_norm", "exit_norms", model.answers.norms.size(), i);
    f(name + ".weight", model.answers.norms[i].weight, rest.answers.norms[i].weight...);
    f(name + ".bias", model.answers.norms[i].bias, rest.answers.norms[i].bias...);
  }
  for (std::size_t i = 0; i < model.answers.classifiers.size(); ++i)
    f(numbered("classifier", "classifiers", model.answers.classifiers.size(), i) + ".weight", model.answers.classifiers[i].weight,
      rest.answers.classifiers[i].weight...);
}

template <class S>
small_model<S> load_small_model(golden_case<S>& c) {
  const auto& j = c.config;
  const index_t N = j.at("blocks"), D = j.at("width"), V = j.at("vocab"), heads = j.at("heads");
  const std::string positions = j.at("positions"), kind = j.at("activation"), norm = j.at("exit_norm"), classifier = j.at("classifiers");
  const std::map<std::string, activation> activations{{"relu", activation::relu}, {"gelu", activation::gelu}};
  if (!activations.contains(kind)) throw skipped("an activation " + kind);
  if (positions != "learned" && positions != "rotary" && positions != "none") throw skipped("positions of kind " + positions);
  const bool rotary = positions == "rotary", learned = positions == "learned";
  small_model<S> model;
  model.tokens = embedding<S>({.tokens = V, .features = D, .positions = learned ? j.at("max_positions").template get<index_t>() : 0}, {});
  model.tokens.weight = c.tensor("param.embedding.weight");
  if (learned) model.tokens.position = c.tensor("param.positions.weight");
  for (index_t n = 0; n < N; ++n)
    model.stack.stack.blocks.push_back(small_block<S>(
        {sequential(
            layer_norm<S>(D),
            attention<S>(
                {.inputs = D, .heads = heads, .causal = true, .rotary_width = rotary ? D / heads : 0, .rotary_base = option(j, "rotary_base", 10000.0)},
                {}))},
        {sequential(layer_norm<S>(D), feed_forward<S>({D, j.at("inner"), activations.at(kind)}, {}))}));
  model.tied = classifier == "tied";
  model.stack.answers = exit_classifiers<S>({.exits = N,
                                             .features = D,
                                             .classes = V,
                                             .norm = norm == "none"     ? exit_sharing::none
                                                     : norm == "shared" ? exit_sharing::shared
                                                                        : exit_sharing::independent,
                                             .classifier = classifier == "independent" ? exit_sharing::independent : exit_sharing::shared},
                                            {});
  each_named(
      [&](const std::string& name, auto& p) {
        const bool is_tied = model.tied && std::string_view(name) == "classifier.weight";
        p = is_tied ? model.tokens.weight : c.tensor("param." + name);
      },
      model.stack);
  if (j.contains("exit_head") && !j.at("exit_head").is_null()) {
    const bool per_block = j.at("exit_head") == "geometric_per_block";
    if (!per_block && j.at("exit_head") != "geometric") throw skipped("an exit head of this kind");
    model.stack.halt = halting<S>({.exits = N, .features = D, .per_block = per_block}, {});
    const matrix<S> w = c.tensor("param.exit.w"), b = c.tensor("param.exit.b");
    for (std::size_t i = 0; i < model.stack.halt.heads.size(); ++i) {
      model.stack.halt.heads[i].output.weight = w.row(static_cast<index_t>(i));
      model.stack.halt.heads[i].output.bias(0, 0) = b(0, static_cast<index_t>(i));
    }
  }
  return model;
}

template <class S>
void compare_small_gradient(golden_case<S>& c, small_model<S>& model, gradient_of<adaptive_depth<small_block<S>>>& g,
                            const gradient_of<embedding<S>>& ge) {
  matrix<S> de = matrix<S>::Zero(model.tokens.weight.rows(), model.tokens.weight.cols()),
            dp = matrix<S>::Zero(model.tokens.position.rows(), de.cols());
  for (index_t i = 0; i < de.rows(); ++i)
    for (index_t k = 0; k < de.cols(); ++k) de(i, k) = ge.weight(i, k);
  for (index_t i = 0; i < dp.rows(); ++i)
    for (index_t k = 0; k < dp.cols(); ++k) dp(i, k) = ge.position(i, k);
  each_named(
      [&](const std::string& name, auto&, auto& d) {
        if (name == "classifier.weight" && model.tied)
          de += d;
        else
          c.compare("grad." + name, matrix_view<const S>(d));
      },
      model.stack, g);
  c.compare("grad.embedding.weight", matrix_view<const S>(de));
  if (dp.size() != 0) c.compare("grad.positions.weight", matrix_view<const S>(dp));
  if (model.stack.halt.heads.empty()) return;
  const auto heads = static_cast<index_t>(g.halt.heads.size());
  matrix<S> dw(heads, de.cols()), db(1, heads);
  for (index_t i = 0; i < heads; ++i) {
    dw.row(i) = g.halt.heads[static_cast<std::size_t>(i)].output.weight;
    db(0, i) = g.halt.heads[static_cast<std::size_t>(i)].output.bias(0, 0);
  }
  c.compare("grad.exit.w", matrix_view<const S>(dw));
  c.compare("grad.exit.b", matrix_view<const S>(db));
}

template <class S>
void run_training(golden_case<S>& c) {
  const auto& j = c.config;
  auto model = load_small_model(c);
  const auto tokens = c.file.template read<token_t>("input.tokens"), targets = c.file.template read<token_t>("input.targets");
  const auto segment = c.offsets("input.segments");
  const auto exits = integers(c, "input.exits");
  const auto T = static_cast<index_t>(tokens.size()), D = model.tokens.weight.cols(), V = model.tokens.weight.rows();
  context ctx;
  ctx.rows = {segment};
  ctx.train = true;
  matrix<S> x(T, D), dx(T, D);
  model.tokens.forward(tokens, x, ctx);
  auto g = make_gradient(model.stack);
  auto ge = make_gradient(model.tokens);
  exit_training_record<adaptive_depth<small_block<S>>> r;
  exit_training_losses losses;
  if (j.contains("sequences_of_exits")) {
    const index_t M = j.at("sequences_of_exits");
    matrix<S> states(M * T, D), logits(M * T, V);
    losses = mixed_exit_step(model.stack, matrix_view<const S>(x), nothing{}, targets, M, reduce(j), j.at("ignore_index"), r, matrix_view<S>(dx),
                             nothing{}, g, ctx, exits, [&](index_t pass, matrix_view<const S> h, matrix_view<const S> l) {
                               states.middleRows(pass * T, T) = h.map();
                               logits.middleRows(pass * T, T) = l.map();
                             });
    c.compare("output.logits", matrix_view<const S>(logits));
    if (c.has("mid.exit_states")) c.compare("mid.exit_states", matrix_view<const S>(states));
  } else {
    matrix<S> logits(model.stack.exits() * T, V);
    model.stack.forward(x, logits, ctx);
    c.compare("output.logits", matrix_view<const S>(logits));
    losses = aligned_exit_step(model.stack, matrix_view<const S>(x), nothing{}, targets,
                               {.weights = c.file.template read<double>("input.weights"),
                                .alpha = j.at("alpha"),
                                .detach = j.at("detach"),
                                .targets = {.ignore_index = j.at("ignore_index")},
                                .reduce = reduce(j)},
                               0, r, matrix_view<S>(dx), nothing{}, g, ctx, exits);
    if (c.has("mid.exit_loss") && j.at("alpha") != 0) c.compare("mid.exit_loss", std::vector<double>{losses.exit});  // without a weight it is not computed
  }
  model.tokens.backward(tokens, {}, dx, {}, ge, ctx);
  c.compare("output.loss", std::vector<double>{losses.total});
  compare_small_gradient(c, model, g, ge);
}

threshold_decay decay_form(const nlohmann::json& j) {
  if (!j.contains("decay_form") || j.at("decay_form").is_null()) return threshold_decay::none;
  return j.at("decay_form") == "paper" ? threshold_decay::paper : threshold_decay::t5x;
}

template <class S>
void run_decode(golden_case<S>& c) {
  const auto& j = c.config;
  const auto model = load_small_model(c);
  const std::map<std::string, exit_confidence> kinds{{"geometric", exit_confidence::geometric},
                                                     {"max_prob", exit_confidence::max_prob},
                                                     {"softmax_diff", exit_confidence::softmax_diff},
                                                     {"state", exit_confidence::state}};
  if (!kinds.contains(j.at("confidence"))) throw skipped("a confidence of this kind");
  const index_t steps = j.at("max_steps");
  std::vector<std::vector<token_t>> prompts;
  for (const auto t : c.file.template read<token_t>("input.start")) prompts.push_back({t});
  generator_config config{.how = {.temperature = 0}, .most = steps};
  if (!j.at("eos").is_null()) config.stop = {j.at("eos").template get<token_t>()};
  exit_rule rule;
  rule.kind = kinds.at(j.at("confidence"));
  rule.thresholds = j.at("thresholds").is_number() ? std::vector<double>{j.at("thresholds").template get<double>()}
                                                          : j.at("thresholds").template get<std::vector<double>>();
  rule.strict = j.at("compare") == ">";
  rule.decay = decay_form(j);
  rule.temperature = j.value("decay_temperature", 0.0);
  rule.longest = steps;
  matrix<S> logits = matrix<S>::Zero(static_cast<index_t>(prompts.size()) * steps, model.tokens.weight.rows());
  std::vector<index_t> done(prompts.size(), 0);
  const auto out = generate(exit_decoder(model.tokens, model.stack, {}, rule), prompts, config, {}, {}, [&](index_t i, std::span<const S> row) {
    std::copy(row.begin(), row.end(), logits.row(i * steps + done[static_cast<std::size_t>(i)]++).data());
  });
  std::vector<double> tokens, exits;
  for (std::size_t b = 0; b < prompts.size(); ++b)
    for (std::size_t t = 0; t < static_cast<std::size_t>(steps); ++t) {
      const bool there = t < out.tokens[b].size();
      tokens.push_back(there ? out.tokens[b][t] : -1);
      exits.push_back(there ? out.exits[b][t] : 0);
    }
  c.compare("output.tokens", tokens);
  c.compare("output.exits", exits);
  c.compare("output.logits", matrix_view<const S>(logits));
  if (c.has("mid.projected_rows")) c.compare("mid.projected_rows", std::vector<double>{static_cast<double>(out.projected)});
  rule.eager = true;
  const auto eager = generate(exit_decoder(model.tokens, model.stack, {}, rule), prompts, config);
  if (eager.tokens != out.tokens || eager.exits != out.exits)
    throw std::runtime_error("keys and values filled at once give other tokens or exits than filled late");
}

template <class S>
void run_decay(golden_case<S>& c) {
  const auto thresholds = c.file.template read<double>("input.thresholds");
  const auto steps = c.file.template read<std::int64_t>("input.steps");
  for (const auto& [name, form] : {std::pair{"output.paper", threshold_decay::paper}, std::pair{"output.t5x", threshold_decay::t5x}}) {
    std::vector<double> out;
    for (const double l : thresholds)
      for (const auto t : steps) out.push_back(decayed_threshold(form, l, c.config.at("temperature"), t, c.config.at("t_max")));
    c.compare(name, out);
  }
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
      {"exit_calibration_decay", run_decay<S>},
      {"exit_calibration_", run_calibration<S>},
      {"exit_mixed_", run_training<S>},
      {"exit_total_", run_training<S>},
      {"exit_decode_", run_decode<S>},
  };
  for (const auto& [prefix, run] : kinds)
    if (name.starts_with(prefix)) return run(c);
  throw skipped("exits of this kind");
}

template void run_exits(golden_case<float>&);
template void run_exits(golden_case<double>&);

}  // namespace golden
