#pragma once

#include "lithe/compose/adaptive_depth_cache.hpp"
#include "lithe/compose/adaptive_depth_rules.hpp"

// R rows (one for each slot of a step), D features, N exits, V classes
namespace lithe::inline LITHE_ABI {

namespace detail {

/// Throws config_error unless the model is whole and has what the rule asks.
template <class Block, class Norm>
void check_rule(const adaptive_depth<Block, Norm>& model, const exit_rule& rule) {
  const index_t N = model.exits();
  model.check();
  rule.check(N);
  require<config_error>((rule.kind != exit_confidence::geometric && rule.kind != exit_confidence::multinomial) || N == 1 ||
                            (!model.halt.heads.empty() && model.halt.geometric() == (rule.kind == exit_confidence::geometric)),
                        "exit_rule: the model has no halting head of the kind that the rule asks for");
  require<config_error>(rule.kind != exit_confidence::meta || N == 1 || model.meta.output.weight.size() != 0,
                        "exit_rule: the model has no meta head");
}

/// One step of decoding with exits. The rows that are still in the stack stand packed, in the order of the call.
template <class Block, class Norm>
class exit_step {
 public:
  using S = typename Block::scalar;
  using model_type = adaptive_depth<Block, Norm>;

  exit_step(const model_type& model, const exit_rule& rule, adaptive_cache<Block>& c, index_t rows, matrix_view<S> logits,
            std::span<std::int32_t> exits, matrix_view<double> confidences, const context& ctx)
      : model_(model),
        rule_(rule),
        c_(c),
        ctx_(ctx),
        logits_(logits),
        exits_(exits),
        confidences_(confidences),
        active_(rows),
        row_(ctx, rows),
        slot_(ctx, rows),
        offsets_(ctx, rows + 1),
        leaving_(ctx, rows),
        planned_(ctx, rows),
        answers_(ctx, rule.reads_logits() ? rows : 0, logits.cols()),
        a_(ctx, rows, model.features()),
        b_(ctx, rows, model.features()) {
    for (index_t i = 0; i < rows; ++i) {
      row_[i] = i;
      slot_[i] = ctx.slot(i);
      planned_[i] = static_cast<std::int32_t>(model.exits());
      if (rule.kind == exit_confidence::fixed && !rule.exits.empty())
        planned_[i] = rule.exits[rule.exits.size() == 1 ? 0 : static_cast<std::size_t>(slot_[i])];
    }
    std::iota(offsets_.data(), offsets_.data() + rows + 1, index_t{0});
  }

  void run(matrix_view<const S> x, const memory_of<Block>& m) {
    const index_t N = model_.exits();
    matrix_view<const S> in = x;
    for (index_t n = 1; active_ > 0; ++n) {
      const matrix_view<S> out = (in.data() == a_.data() ? b_ : a_).view().slice_rows(0, active_);
      fill_pending(model_, n, slots(), c_, ctx_);
      context inner = ctx_.child(static_cast<std::uint64_t>(n - 1));
      inner.rows = {offsets_.span().first(static_cast<std::size_t>(active_) + 1)};
      inner.slots = slots();
      decode_block<Block>(model_.stack.block(n), in, m, out, c_.blocks[static_cast<std::size_t>(n - 1)], inner);
      for (index_t i = 0; i < active_; ++i) ++c_.filled_to(n, slot_[i]);
      c_.visited += active_;
      c_.projected += active_;
      answered_ = false;
      decide(n, N, in, out);
      leave(n, out);
      in = out.slice_rows(0, active_);
    }
  }

 private:
  [[nodiscard]] std::span<const index_t> slots() const { return slot_.span().first(static_cast<std::size_t>(active_)); }

  /// Marks who leaves after block n.
  void decide(index_t n, index_t N, matrix_view<const S> in, matrix_view<const S> out) {
    if (n == 1 && rule_.kind == exit_confidence::multinomial) plan(out);
    if (n == N || !rule_.allowed(n)) {
      std::fill_n(leaving_.data(), active_, std::uint8_t{n == N});
      return;
    }
    if (rule_.planned()) {
      for (index_t i = 0; i < active_; ++i) leaving_[i] = planned_[i] <= n;
    } else {
      const scratch<S> signals(ctx_, active_);
      prepare(n, out, signals.span());
      for (index_t i = 0; i < active_; ++i) {
        const double confidence = confidence_of(i, in, out, signals[i]);
        if (confidences_.data() != nullptr) confidences_(row_[i], n - 1) = confidence;
        const auto s = static_cast<std::size_t>(slot_[i]);
        leaving_[i] = reaches(confidence, rule_.threshold(n, c_.length[s] - c_.start[s]), rule_.strict);
      }
    }
    if (rule_.whole_batch && std::find(leaving_.data(), leaving_.data() + active_, std::uint8_t{0}) != leaving_.data() + active_)
      std::fill_n(leaving_.data(), active_, std::uint8_t{0});
  }
  void plan(matrix_view<const S> out) {
    const scratch<S> scores(ctx_, active_, model_.exits());
    model_.halt.head(1).forward(out, scores, ctx_.position_wise());
    most_probable_exits<S>(scores, planned_.span().first(static_cast<std::size_t>(active_)));
  }
  /// What all confidences of an exit are computed from together: halting signals, or logits.
  void prepare(index_t n, matrix_view<const S> out, std::span<S> signals) {
    const matrix_view<S> column(signals.data(), active_, 1);
    if (rule_.kind == exit_confidence::geometric) model_.halt.head(n).forward(out, column, ctx_.position_wise());
    if (rule_.kind == exit_confidence::meta) model_.meta.forward(out, column, ctx_.position_wise());
    if (rule_.reads_logits()) {
      model_.answers.answer(n, out, answers_.view().slice_rows(0, active_), ctx_);
      answered_ = true;
    }
  }
  [[nodiscard]] double confidence_of(index_t i, matrix_view<const S> in, matrix_view<const S> out, S signal) const {
    if (rule_.reads_logits()) return answer_confidence<S>(rule_.kind, answers_.row(i), answers_.cols());
    if (rule_.kind != exit_confidence::state) return static_cast<double>(sigmoid(signal));
    double dot = 0, here = 0, before = 0;
    for (index_t d = 0; d < out.cols(); ++d) {
      const auto h = static_cast<double>(out(i, d)), g = static_cast<double>(in(i, d));
      dot += h * g;
      here += h * h;
      before += g * g;
    }
    return dot / std::sqrt(here * before);
  }

  /// Answers for those who leave, and packs the others.
  void leave(index_t n, matrix_view<S> out) {
    const auto gone = static_cast<index_t>(std::count(leaving_.data(), leaving_.data() + active_, std::uint8_t{1}));
    if (gone == 0) return;
    const scratch<index_t> gone_slots(ctx_, gone);
    if (answered_) {
      for (index_t i = 0; i < active_; ++i)
        if (leaving_[i] != 0) std::copy_n(answers_.row(i), logits_.cols(), logits_.row(row_[i]));
    } else if (gone == logits_.rows()) {  // everybody, in order
      model_.answers.answer(n, out, logits_, ctx_);
    } else {
      const scratch<S> h(ctx_, gone, out.cols()), answer(ctx_, gone, logits_.cols());
      each_leaving([&](index_t i, index_t at) { std::copy_n(out.row(i), out.cols(), h.row(at)); });
      model_.answers.answer(n, h, answer, ctx_);
      each_leaving([&](index_t i, index_t at) { std::copy_n(answer.row(at), logits_.cols(), logits_.row(row_[i])); });
    }
    each_leaving([&](index_t i, index_t) {
      if (!(logits_.row_array(row_[i]) > -std::numeric_limits<S>::infinity()).any())
        throw std::runtime_error(
            concat("adaptive_depth: no logit of exit ", n, " of slot ", slot_[i], " is a number above -infinity"));
    });
    each_leaving([&](index_t i, index_t at) {
      const index_t s = slot_[i];
      exits_[static_cast<std::size_t>(row_[i])] = static_cast<std::int32_t>(n);
      c_.state(s, c_.length[static_cast<std::size_t>(s)], 1).row_array(0) = out.row_array(i);
      gone_slots[at] = s;
    });
    // From here on nothing throws but the eager products, which find the slots already advanced.
    for (index_t i = 0; i < gone; ++i) ++c_.length[static_cast<std::size_t>(gone_slots[i])];
    index_t left = 0;
    for (index_t i = 0; i < active_; ++i)
      if (leaving_[i] == 0) {
        if (left != i) std::copy_n(out.row(i), out.cols(), out.row(left));
        row_[left] = row_[i];
        slot_[left] = slot_[i];
        planned_[left++] = planned_[i];
      }
    active_ = left;
    for (index_t k = n + 1; rule_.eager && k <= model_.exits(); ++k) fill_pending(model_, k, gone_slots.span(), c_, ctx_);
  }
  /// f(i, k) for the k-th of those who leave.
  template <class F>
  void each_leaving(F&& f) const {
    index_t at = 0;
    for (index_t i = 0; i < active_; ++i)
      if (leaving_[i] != 0) f(i, at++);
  }

  const model_type& model_;
  const exit_rule& rule_;
  adaptive_cache<Block>& c_;
  const context& ctx_;
  matrix_view<S> logits_;
  std::span<std::int32_t> exits_;
  matrix_view<double> confidences_;
  index_t active_;
  scratch<index_t> row_, slot_, offsets_;
  scratch<std::uint8_t> leaving_;
  scratch<std::int32_t> planned_;
  scratch<S> answers_, a_, b_;
  bool answered_ = false;
};

}  // namespace detail

/// One step of decoding with an exit of its own for each row (arXiv 1910.10073, section 4; arXiv 2207.07061): the new
/// rows x [R x D], one for each slot of ctx.slots, go up the blocks; who leaves after block n gets logits [R x V] from
/// its classifier, and the others go on as a smaller batch. Block n makes the keys and values of positions that left
/// below it from their copied states when the first row of their slot comes by (or at once, `exit_rule::eager`: the
/// same values).
///
/// `exits` [R] from 1; `confidences` [R x N-1], unless empty, has 0 where nothing was tested. The values do not depend
/// on who else is in the batch beyond rounding. Throws config_error for a model or a rule that does not fit,
/// std::length_error when a slot is full, std::runtime_error when no logit of a row that leaves is a number above
/// -infinity; the slots then have no row more than before (those that had already left keep theirs). A row with a logit
/// that is no number never leaves by its confidence.
template <class Block, class Norm>
void adaptive_step(const adaptive_depth<Block, Norm>& model, matrix_view<const typename Block::scalar> x, const detail::memory_of<Block>& m,
                   matrix_view<typename Block::scalar> logits, std::span<std::int32_t> exits, adaptive_cache<Block>& c, const exit_rule& rule,
                   const context& ctx, matrix_view<double> confidences = {}) {
  const index_t R = x.rows(), N = model.exits();
  detail::check_rule(model, rule);
  detail::check_exits(model, c);
  require<config_error>(rule.kind != exit_confidence::fixed || rule.exits.size() <= 1 || static_cast<index_t>(rule.exits.size()) == c.slots(),
                        "exit_rule: expected an exit for each of ", c.slots(), " slots, or one for all, got ", rule.exits.size());
  require_features("adaptive_depth", model.features(), x);
  require_shape("adaptive_depth", "logits", logits, R, model.answers.classes());
  require<shape_error>(static_cast<index_t>(exits.size()) == R && (ctx.slots.empty() || static_cast<index_t>(ctx.slots.size()) == R),
                       "adaptive_depth: expected an exit and a slot for each of ", R, " rows, got ", exits.size(), " and ", ctx.slots.size());
  if (confidences.data() != nullptr) {
    require_shape("adaptive_depth", "confidences", confidences, R, N - 1);
    confidences.map().setZero();
  }
  if (R == 0) return;
  const scratch<index_t> offsets(ctx, R + 1), slots(ctx, R);
  std::iota(offsets.data(), offsets.data() + R + 1, index_t{0});
  context one = ctx;
  one.rows = {offsets.span()};
  detail::check_room("adaptive_depth", c, R, one);
  for (index_t i = 0; i < R; ++i) slots[i] = ctx.slot(i);
  try {
    detail::exit_step<Block, Norm>(model, rule, c, R, logits, exits, confidences, one).run(x, m);
  } catch (...) {
    detail::roll_back(model, slots.span(), c);
    throw;
  }
}

}  // namespace lithe::inline LITHE_ABI
