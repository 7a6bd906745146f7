#include "golden_runner/golden_case.hpp"
#include "lithe/layers/memory/value_table.hpp"
#include "lithe/training/clip.hpp"
#include "lithe/training/losses.hpp"
#include "lithe/training/optimiser.hpp"
#include "lithe/training/schedules.hpp"

namespace golden {

namespace {

/// Tensors under the names that a file gives, and a table with a row-sparse gradient.
template <class S>
struct named_tensors {
  using scalar = S;
  struct record {};
  struct gradient {
    std::map<std::string, matrix<S>> tensors;
    row_gradient<S> table;
  };
  std::map<std::string, matrix<S>> tensors;
  matrix<S> table;

  void prepare(gradient& g) const {
    for (const auto& [name, t] : tensors) g.tensors[name];
  }
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    for (auto& [name, t] : s.tensors) f(name, t, rest.tensors.at(name)...);
    f("table", s.table, rest.table...);
  }
};

template <class S>
void set_rows(row_gradient<S>& g, const std::vector<std::int64_t>& rows, const matrix<S>& values, index_t first, index_t last) {
  g.rows.clear();
  for (index_t i = first; i < last; ++i) g.rows.push_back(static_cast<slot_t>(rows[static_cast<std::size_t>(i)]));
  g.storage.assign(values.data() + first * values.cols(), values.data() + last * values.cols());
}

template <class S>
void append(std::vector<double>& to, const matrix<S>& m) {
  for (index_t i = 0; i < m.size(); ++i) to.push_back(static_cast<double>(m.data()[i]));
}

/// The moments of an optimiser under the names of its tensors.
template <class S>
void compare_moments(golden_case<S>& c, optimiser<S>& o, const std::string& tensor, const std::string& suffix) {
  for (const char* which : {"first_moment", "second_moment"})
    o.visit_state([&](const std::string& name, auto& value) {
      if constexpr (requires { value.cols(); }) {
        if (name != concat(which, ".", tensor)) return;
        std::vector<double> numbers;
        for (index_t i = 0; i < value.rows(); ++i)
          for (index_t j = 0; j < value.cols(); ++j) numbers.push_back(static_cast<double>(view(value)(i, j)));
        c.compare(concat("after.", which, suffix), numbers);
      }
    });
}

template <class S>
named_tensors<S> tensors_of(golden_case<S>& c) {
  named_tensors<S> model;
  if (c.config.contains("shapes"))
    for (const auto& [name, shape] : c.config.at("shapes").items()) {
      const auto s = shape.template get<std::vector<index_t>>();
      model.tensors[name] = c.has("param." + name) ? c.tensor("param." + name) : matrix<S>::Zero(s.size() > 1 ? s[0] : 1, s.back());
    }
  return model;
}

template <class S>
void run_adamw(golden_case<S>& c) {
  auto model = tensors_of(c);
  const auto& j = c.config;
  optimiser_config o{.beta1 = j.at("beta1"), .beta2 = j.at("beta2"), .epsilon = j.at("epsilon"), .weight_decay = 0};
  for (const auto& name : j.at("decayed")) o.groups.push_back({.pattern = name, .weight_decay = j.at("weight_decay").template get<double>()});
  optimiser<S> adam(o);
  auto g = make_gradient(model);
  const auto rates = c.file.template read<double>("input.learning_rate");
  std::map<std::string, std::vector<double>> path;
  for (std::size_t step = 0; step < rates.size(); ++step) {
    for (auto& [name, t] : g.tensors) {
      const auto all = c.tensor("input.gradient." + name);
      t = all.middleRows(static_cast<index_t>(step) * t.rows(), t.rows());
    }
    adam.step(model, g, rates[step]);
    for (const auto& [name, t] : model.tensors) append(path[name], t);
  }
  for (const auto& [name, numbers] : path) {
    c.compare("output." + name, numbers);
    compare_moments(c, adam, name, "." + name);
  }
}

template <class S>
void run_lazy_adam(golden_case<S>& c) {
  named_tensors<S> model;
  model.table = c.tensor("param.table");
  const auto& j = c.config;
  optimiser<S> adam({.beta1 = j.at("beta1"), .beta2 = j.at("beta2"), .epsilon = j.at("epsilon")});
  auto g = make_gradient(model);
  const auto rows = c.file.template read<std::int64_t>("input.rows"), offsets = c.file.template read<std::int64_t>("input.row_offsets");
  const auto values = c.tensor("input.row_gradients");
  std::vector<double> path;
  for (std::size_t step = 0; step + 1 < offsets.size(); ++step) {
    set_rows(g.table, rows, values, offsets[step], offsets[step + 1]);
    adam.step(model, g, j.at("learning_rate"));
    append(path, model.table);
  }
  c.compare("output.table", path);
  compare_moments(c, adam, "table", "");
}

template <class S>
void run_clip(golden_case<S>& c) {
  auto model = tensors_of(c);
  const bool table = c.has("input.rows");
  if (table) model.table.setZero(c.config.at("table_rows").template get<index_t>(), c.config.at("table_width").template get<index_t>());
  auto g = make_gradient(model);
  for (auto& [name, t] : g.tensors) t = c.tensor("input.gradient." + name);
  if (table) {
    const auto rows = c.file.template read<std::int64_t>("input.rows");
    set_rows(g.table, rows, c.tensor("input.row_gradients"), 0, static_cast<index_t>(rows.size()));
  }
  const double norm = clip_by_global_norm(model, g, c.config.at("max_norm"));
  c.compare("output.norm", std::vector<double>{norm});
  for (const auto& [name, t] : g.tensors) c.compare("output.gradient." + name, matrix_view<const S>(t));
  if (table) c.compare("output.row_gradients", std::as_const(g.table).values());
}

template <class S>
void run_schedule(golden_case<S>& c) {
  const auto& j = c.config;
  const std::string kind = j.at("kind");
  learning_rate_schedule schedule{.learning_rate = j.at("learning_rate"), .warmup_steps = j.at("warmup_steps"), .total_steps = j.at("total_steps"),
                                  .start_ratio = j.at("start_ratio"), .final_ratio = j.at("final_ratio")};
  if (kind == "linear") schedule.shape = decay::linear;
  if (kind == "constant") schedule.shape = decay::constant;
  if (kind != "linear" && kind != "constant" && kind != "cosine" && kind != "value_rate") throw skipped("a schedule of kind " + kind);
  std::vector<double> rates;
  for (const auto t : c.file.template read<std::int64_t>("input.steps")) {
    rates.push_back(schedule(t));
    if (kind == "value_rate") rates.back() *= value_rate_schedule{.times = j.at("times"), .rate = j.at("rate"), .total_steps = j.at("total_steps")}(t);
  }
  c.compare("output.learning_rate", rates);
}

}  // namespace

template <class S>
void run_optimiser(golden_case<S>& c) {
  const std::string name = c.file.metadata().at("case");
  if (name.starts_with("optimizer_adamw")) return run_adamw(c);
  if (name.starts_with("optimizer_lazy_adam")) return run_lazy_adam(c);
  if (name.starts_with("optimizer_clip")) return run_clip(c);
  if (name.starts_with("optimizer_schedule")) return run_schedule(c);
  throw skipped("an optimiser of this kind");
}

template <class S>
void run_loss(golden_case<S>& c) {
  const auto& j = c.config;
  const auto reduce = j.at("reduction") == "mean" ? reduction::mean : reduction::sum;
  matrix<S> d;
  loss_result result;
  if (c.has("input.prediction")) {
    const matrix<S> prediction = c.tensor("input.prediction"), target = c.tensor("input.target");
    d.resize(prediction.rows(), prediction.cols());
    result = mean_square<S>(prediction, target, reduce, d);
    c.compare("grad.input.prediction", matrix_view<const S>(d));
  } else {
    const matrix<S> logits = c.tensor("input.logits");
    const auto targets = c.file.template read<std::int32_t>("input.targets");
    d.resize(logits.rows(), logits.cols());
    result = cross_entropy<S>(logits, targets, {.label_smoothing = j.at("label_smoothing"), .ignore_index = j.at("ignore_index"), .reduce = reduce}, d);
    c.compare("grad.input.logits", matrix_view<const S>(d));
  }
  c.compare("output.loss", std::vector<double>{result.loss});
}

template void run_optimiser(golden_case<float>&);
template void run_optimiser(golden_case<double>&);
template void run_loss(golden_case<float>&);
template void run_loss(golden_case<double>&);

}  // namespace golden
