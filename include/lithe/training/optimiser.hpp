#pragma once

#include "lithe/training/parameter_groups.hpp"
#include "lithe/training/update_rules.hpp"

namespace lithe::inline LITHE_ABI {

struct optimiser_config {
  update_rule dense = update_rule::adam;        ///< for dense gradients
  update_rule sparse = update_rule::lazy_adam;  ///< for row-sparse gradients: value tables, embeddings
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  /// Under sgd and adam, of what moves as a whole; a table's touched rows decay only by a group's own setting.
  double weight_decay = 0;
  std::vector<parameter_group> groups{};
};

/// Moves the parameters of a model along its gradient; state (running statistics) it leaves alone.
///
///     optimiser<float> adam({.weight_decay = 0.1, .groups = {{.pattern = "*bias", .weight_decay = 0},
///                                                            {.pattern = "*.values", .rate = 4}}});
///     for (;;) {
///       set_zero(model, g);
///       ... model.backward(..., g, ctx) once or several times ...
///       clip_by_global_norm(model, g, 1.0, ctx, adam.config.groups);
///       adam.step(model, g, schedule(adam.steps()), ctx);
///     }
///
/// The settings in `config` may be changed between steps, except for the rule of a tensor that has moved. The run's own
/// state is the number of steps, and for each tensor that ever moved the moments and the steps in which it stood still,
/// under its name; what several layers share has one.
template <std::floating_point S>
class optimiser {
 public:
  optimiser_config config;

  /// Throws config_error for betas outside of [0, 1), epsilon <= 0, negative rates or decay.
  explicit optimiser(optimiser_config c = {}) : config(std::move(c)) { check(); }

  /// One step; then folds in what training gathered beside gradients and refreshes packed copies (`after_step` of parameters.hpp).
  /// Allocates moments at the first step only. The same bits with any number of workers.
  ///
  /// Throws config_error for bad settings, and state_error if a group's pattern fits no parameter (a misspelt name would silently
  /// do nothing), if the model is another one than before, or if the gradient is not the model's: all before anything has moved.
  template <class L>
  void step(L& model, const gradient_of<L>& gradient, double learning_rate, const context& ctx = {}) {
    static_assert(std::same_as<typename L::scalar, S>, "lithe: the optimiser's scalar differs from the model's.");
    require<config_error>(learning_rate >= 0 && std::isfinite(static_cast<S>(learning_rate)),
                          "optimiser: expected a finite learning rate of at least 0, got ", learning_rate);
    prepare(model, gradient);
    ++steps_;
    std::size_t at = 0;
    detail::for_each_parameter(
        [&](const std::string& name, auto& p, const auto& q) {
          const settings s = settings_of<decltype(q)>(name);
          moments& state = moments_[at++];
          if (s.moves)
            update(p, q, s, state, s.own_rate.value_or(learning_rate) * s.rate, ctx);
          else
            ++state.skipped;
        },
        model, gradient);
    after_step(model, gradient);
  }

  /// Makes the moments, which the first step does by itself; needed before a saved state is loaded. Throws as `step` does.
  template <class L>
  void prepare(const L& model, const gradient_of<L>& gradient) {
    check();
    matched_.assign(config.groups.size(), 0);
    std::size_t at = 0;
    detail::for_each_parameter(
        [&](const std::string& name, const auto& p, const auto& q) {
          detail::check_gradient("optimiser", name, p, q);
          if (steps_ == 0 && at == moments_.size()) moments_.push_back({name});
          require<state_error>(at < moments_.size() && moments_[at].name == name,
                               "optimiser: expected the model of the steps before, whose tensor ", at, " is ",
                               at < moments_.size() ? moments_[at].name
                               : moments_.empty()   ? "none (was this one moved from?)"
                                                    : "none",
                               ", got ", name);
          moments& state = moments_[at++];
          const settings s = settings_of<decltype(q)>(name);
          if (!state.made) {
            state.rule = s.rule;
            state.rows = p.rows();
            state.cols = p.cols();
            if (s.moves) state.make(steps_);
          }
          require<state_error>(!s.moves || (state.rule == s.rule && state.rows == p.rows() && state.cols == p.cols()),
                               "optimiser: rule or shape of ", name, " changed since its moments were made");
        },
        model, gradient);
    require<state_error>(at == moments_.size(), "optimiser: expected the model of the steps before with ", moments_.size(), " tensors, got ", at);
    for (std::size_t i = 0; i < matched_.size(); ++i)
      require<state_error>(matched_[i] != 0, "optimiser: no parameter has a name like '", config.groups[i].pattern,
                           "', or earlier groups took them all");
  }

  /// The number of steps taken.
  [[nodiscard]] std::int64_t steps() const { return steps_; }

  /// f(name, x) for all that resuming needs: "steps", a number, and of each tensor that has moved the moments, each a
  /// `matrix_view<S>` to read or to write, and "skipped_steps.", a number, if it stood still in some. A run that is
  /// resumed from them goes on with the same bits.
  ///
  /// A visitor that loads has two members more: f.contains(name) says what there is, because tensors may be frozen now
  /// that moved then, or the other way round; f.then(action) puts off what must wait until all is known to fit.
  template <class F>
  void visit_state(F&& f) {
    f(std::string("steps"), steps_);
    for (moments& state : moments_) {
      const std::string first_name = "first_moment." + state.name, second_name = "second_moment." + state.name;
      const std::string skipped_name = "skipped_steps." + state.name;
      bool skipped = state.skipped != 0;
      if constexpr (requires { f.contains(state.name); }) {
        skipped = f.contains(skipped_name);
        if (f.contains(first_name) || f.contains(second_name)) {
          if (!state.made) state.make(0);
          if (!skipped) f.then([&state] { state.skipped = 0; });
        } else {
          f.then([&state] { state.forget(); });
          continue;
        }
      }
      auto first = state.first.view(), second = state.second.view();
      if (first.size() != 0) f(first_name, first);
      if (second.size() != 0) f(second_name, second);
      if (first.size() != 0 && skipped) f(skipped_name, state.skipped);
    }
  }

 private:
  /// What is kept of a tensor: nothing before it moves.
  struct moments {
    std::string name;
    bool made = false;
    update_rule rule{};  // this and the shape: of the moments, or that they would have
    index_t rows = 0, cols = 0;
    std::int64_t skipped = 0;  // steps of the run in which it stood still: 0 as a rule, and for files that lack it
    detail::zeroed_matrix<S> first{}, second{};

    void make(std::int64_t steps_before) {
      made = true;
      skipped = steps_before;
      if (rule == update_rule::sgd) return;
      const bool by_row = rule == update_rule::rowwise_adagrad;
      if (!by_row) first = {rows, cols};
      second = {rows, by_row ? 1 : cols};
    }
    void forget() {
      made = false;
      first = {};
      second = {};
    }
  };
  struct settings {
    double rate;
    std::optional<double> own_rate;
    double weight_decay;
    update_rule rule;
    bool moves;
  };

  void check() const {
    const auto fraction = [](double b) { return b >= 0 && b < 1; };
    const auto usable = [](double r) { return r >= 0 && std::isfinite(r); };
    require<config_error>(fraction(config.beta1) && fraction(config.beta2), "optimiser: expected betas in [0, 1), got ", config.beta1, " and ",
                          config.beta2);
    require<config_error>(static_cast<S>(config.epsilon) > 0 && std::isfinite(static_cast<S>(config.epsilon)),
                          "optimiser: expected an epsilon above 0, got ", config.epsilon);
    require<config_error>(usable(config.weight_decay), "optimiser: expected a weight decay of at least 0, got ", config.weight_decay);
    for (const parameter_group& g : config.groups)
      require<config_error>(usable(g.rate) && usable(g.own_rate.value_or(0)) && usable(g.weight_decay.value_or(0)), "optimiser: group '", g.pattern,
                            "' has a negative rate or weight decay");
  }
  template <class Q>
  settings settings_of(const std::string& name) {
    const parameter_group* const g = group_of(config.groups, name);
    if (g != nullptr) matched_[static_cast<std::size_t>(g - config.groups.data())] = 1;
    constexpr bool sparse = sparse_gradient<Q>;
    const update_rule usual = sparse ? config.sparse : config.dense;
    const update_rule rule = g != nullptr ? g->rule.value_or(usual) : usual;
    const bool by_row = rule == update_rule::rowwise_adagrad || (sparse && rule != update_rule::adam);
    const double decay = by_row ? 0 : config.weight_decay;
    if (g == nullptr) return {1, {}, decay, rule, true};
    return {g->rate, g->own_rate, g->weight_decay.value_or(decay), rule, g->moves()};
  }

  /// Calls `move` with the arithmetic of a rule.
  template <class F>
  void with_rule(const settings& s, const moments& state, double rate, F&& move) const {
    if (s.rule == update_rule::sgd)
      move(detail::sgd_update<S>(rate, s.weight_decay));
    else if (s.rule == update_rule::rowwise_adagrad)
      move(detail::rowwise_adagrad_update<S>(rate, s.weight_decay, config.epsilon));
    else
      move(detail::adam_update<S>(config.beta1, config.beta2, config.epsilon, rate, s.weight_decay,
                                  static_cast<double>(steps_ - state.skipped)));
  }

  template <class P, class Q>
  void update(P& p, const Q& q, const settings& s, const moments& state, double rate, const context& ctx) const {
    if constexpr (sparse_gradient<const Q>) {
      const auto& g = rows_of(q);
      with_rule(s, state, rate, [&](const auto& rule) {
        if (s.rule == update_rule::adam)
          update_all_rows(p, g, rule, state, ctx);
        else
          update_touched_rows(p, g, rule, state, ctx);
      });
    } else {
      with_rule(s, state, rate, [&](const auto& rule) {
        if (s.rule == update_rule::rowwise_adagrad) {
          ctx.exec->run(p.rows(), rows_in_piece(p.cols()), [&](index_t first, index_t last) {
            for (index_t i = first; i < last; ++i) rule(p.data() + i * p.cols(), q.data() + i * p.cols(), nullptr, state.second.row(i), p.cols());
          });
        } else {
          S* const m = state.first.view().data();
          S* const v = state.second.view().data();
          ctx.exec->run(p.size(), 16 * detail::update_block, [&](index_t first, index_t last) {
            rule(p.data() + first, q.data() + first, m == nullptr ? m : m + first, v == nullptr ? v : v + first, last - first);
          });
        }
      });
    }
  }

  static index_t rows_in_piece(index_t cols) { return std::max<index_t>(1, 16 * detail::update_block / cols); }

  template <class P, class Rule>
  static void update_touched_rows(P& p, const row_gradient<S>& g, const Rule& rule, const moments& state, const context& ctx) {
    const auto in_place = detail::rows_in_place<S>(p);
    ctx.exec->run(g.count(), rows_in_piece(p.cols()), [&](index_t first, index_t last) {
      const scratch<S> buffer(ctx, p.cols());
      for (index_t i = first; i < last; ++i) {
        const index_t row = g.rows[static_cast<std::size_t>(i)];
        detail::change_row<S>(p, in_place, row, buffer.span(),
                              [&](S* to) { rule(to, g.values().row(i), state.first.row(row), state.second.row(row), p.cols()); });
      }
    });
  }
  template <class P, class Rule>
  static void update_all_rows(P& p, const row_gradient<S>& g, const Rule& rule, const moments& state, const context& ctx) {
    if constexpr (std::is_same_v<Rule, detail::adam_update<S>>) {  // the one rule that moves rows without a gradient
      const auto in_place = detail::rows_in_place<S>(p);
      ctx.exec->run(p.rows(), rows_in_piece(p.cols()), [&](index_t first, index_t last) {
        const scratch<S> buffer(ctx, p.cols());
        for (index_t row = first; row < last; ++row) {
          const index_t at = g.find(static_cast<slot_t>(row));
          detail::change_row<S>(p, in_place, row, buffer.span(), [&](S* to) {
            rule(to, at < 0 ? nullptr : g.values().row(at), state.first.row(row), state.second.row(row), p.cols());
          });
        }
      });
    }
  }

  std::int64_t steps_ = 0;
  std::vector<moments> moments_;  // in the order of the walk
  std::vector<char> matched_;     // which groups fit a name, in the walk of `prepare`
};

}  // namespace lithe::inline LITHE_ABI
