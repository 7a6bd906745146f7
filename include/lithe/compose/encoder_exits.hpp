#pragma once

#include <numeric>

#include "lithe/compose/adaptive_depth_rules.hpp"
#include "lithe/compose/adaptive_depth_stack.hpp"
#include "lithe/layers/linear.hpp"

// R rows of all sequences, B sequences, D features, N exits, V classes (1: regression)
namespace lithe::inline LITHE_ABI {

struct encoder_exits_config {
  index_t exits = 1, features = 0, classes = 2;
  bool shared_pooler = false;  ///< one pooler for all exits (PABEE); else each has its own (DeeBERT)
};

/// What makes a sequence leave an encoder early. With H the entropy of the exit's answer in nats:
enum class encoder_confidence {
  never,
  entropy,           ///< H < thresholds (arXiv 2004.12993, section 3.2)
  relative_entropy,  ///< H / ln V < thresholds (arXiv 2004.02178, section 3.2: the speed)
  patience           ///< the answer stayed the same `patience` times in a row (arXiv 2006.04152, section 3.2); 0: all blocks
};
/// When a sequence has seen enough blocks of an encoder.
struct encoder_exit_rule {
  encoder_confidence kind = encoder_confidence::never;
  std::vector<double> thresholds{0.0};  ///< one for all exits, or N - 1
  index_t patience = 0;
  double difference = 0;  ///< patience in regression: answers closer than this are the same

  /// Throws config_error unless the rule fits an encoder of N exits.
  void check(index_t N) const {
    require<config_error>(thresholds.size() == 1 || static_cast<index_t>(thresholds.size()) == N - 1, "encoder_exit_rule: expected 1 threshold or ",
                          N - 1, ", got ", thresholds.size());
    for (const double t : thresholds) require<config_error>(!std::isnan(t), "encoder_exit_rule: a threshold is not a number");
    require<config_error>(patience >= 0 && difference >= 0, "encoder_exit_rule: expected a patience and a difference of at least 0, got ", patience,
                          " and ", difference);
  }
};

/// An encoder that may classify each sequence after any block, from its first row: pooledⁿ = tanh(W_p h₀ⁿ + b_p), logitsⁿ = W_c pooledⁿ + b_c.
/// Training is on the answers of all exits (`forward`, `backward` and `aligned_exit_loss` with exit-major rows; PABEE: weights n), inference leaves
/// early (`classify`).
///
/// x [R x D] with its sequences in ctx.rows, logits [N B x V]. Throws config_error, shape_error (an empty sequence has no first row).
template <class Block>
struct encoder_exits {
  using scalar = typename Block::scalar;
  using S = scalar;
  struct record {
    record_of<adaptive_stack<Block>> stack;
    matrix<S> first, pooled;  // [N B x D]
  };
  struct gradient {
    gradient_of<adaptive_stack<Block>> stack;
    std::vector<gradient_of<linear<S>>> poolers, classifiers;
  };

  adaptive_stack<Block> stack;
  std::vector<linear<S>> poolers;      ///< 1 or N
  std::vector<linear<S>> classifiers;  ///< N

  encoder_exits() = default;
  /// Poolers and classifiers start as `linear`. Throws config_error unless there are as many exits as blocks.
  encoder_exits(adaptive_stack<Block> blocks, encoder_exits_config c, rng_key key) : stack(std::move(blocks)) {
    require<config_error>(c.exits == stack.exits(), "encoder_exits: expected as many exits as blocks, ", stack.exits(), ", got ", c.exits);
    for (index_t n = 0; n < (c.shared_pooler ? 1 : c.exits); ++n)
      poolers.emplace_back(linear_config{c.features, c.features}, key.child(static_cast<std::uint64_t>(2 * n)));
    for (index_t n = 0; n < c.exits; ++n)
      classifiers.emplace_back(linear_config{c.features, c.classes}, key.child(static_cast<std::uint64_t>(2 * n + 1)));
  }
  [[nodiscard]] index_t exits() const { return stack.exits(); }
  [[nodiscard]] index_t classes() const { return classifiers.front().weight.rows(); }

  void prepare(gradient& g) const {
    g.poolers.resize(poolers.size());
    g.classifiers.resize(classifiers.size());
  }

  void forward(matrix_view<const S> x, matrix_view<S> logits, record& r, const context& ctx) const {
    const index_t B = check(x, ctx), N = exits();
    require_shape("encoder_exits", "logits", logits, N * B, classes());
    const scratch<S> states(ctx, N * x.rows(), x.cols());
    stack.forward(x, nothing{}, states.view(), r.stack, ctx);
    r.first.resize(N * B, x.cols());
    r.pooled.resize(N * B, x.cols());
    for (index_t n = 1; n <= N; ++n) {
      const index_t at = (n - 1) * B;
      gather_first(matrix_view<const S>(states).slice_rows((n - 1) * x.rows(), x.rows()), ctx.rows, matrix_view<S>(r.first).slice_rows(at, B));
      answer(n, matrix_view<const S>(r.first).slice_rows(at, B), matrix_view<S>(r.pooled).slice_rows(at, B), logits.slice_rows(at, B), ctx);
    }
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dlogits, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t B = check(x, ctx), N = exits();
    require_shape("encoder_exits", "dlogits", dlogits, N * B, classes());
    detail::check_like("encoder_exits", "dx", dx, x);
    check_gradient("encoder_exits", *this, g);
    recorded("encoder_exits", r.first, N * B, x.cols());
    recorded("encoder_exits", r.pooled, N * B, x.cols());
    const scratch<S> dstates(ctx, N * x.rows(), x.cols()), dpooled(ctx, B, x.cols()), dfirst(ctx, B, x.cols());
    dstates.map().setZero();
    for (index_t n = 1; n <= N; ++n) {
      const index_t at = (n - 1) * B;
      const auto pooled = matrix_view<const S>(r.pooled).slice_rows(at, B);
      const auto i = static_cast<std::size_t>(n - 1), p = poolers.size() == 1 ? 0 : i;
      classifiers[i].backward(pooled, {}, dlogits.slice_rows(at, B), dpooled, g.classifiers[i], ctx.position_wise());
      for (index_t b = 0; b < B; ++b) dpooled.view().row_array(b) *= S(1) - pooled.row_array(b).square();
      poolers[p].backward(matrix_view<const S>(r.first).slice_rows(at, B), {}, dpooled, dfirst, g.poolers[p], ctx.position_wise());
      for (index_t b = 0; b < B; ++b) dstates.view().row_array((n - 1) * x.rows() + ctx.rows.begin(b)) = dfirst.view().row_array(b);
    }
    stack.backward(x, nothing{}, r.stack, dstates, dx, nothing{}, g.stack, ctx);
  }

  /// Inference: each sequence leaves when the rule says so, and those that stay go on as a smaller batch. logits [B x V], exits [B] from 1.
  /// The same for a sequence whatever else is in the batch, up to rounding.
  void classify(matrix_view<const S> x, matrix_view<S> logits, std::span<std::int32_t> exit_of, const encoder_exit_rule& rule,
                const context& ctx) const {
    const index_t B = check(x, ctx), N = exits(), V = classes();
    rule.check(N);
    require_shape("encoder_exits", "logits", logits, B, V);
    require<shape_error>(static_cast<index_t>(exit_of.size()) == B, "encoder_exits: expected an exit for each of ", B, " sequences, got ",
                         exit_of.size());
    const scratch<S> a(ctx, x.rows(), x.cols()), b(ctx, x.rows(), x.cols()), first(ctx, B, x.cols()), pooled(ctx, B, x.cols()), answers(ctx, B, V),
        before(ctx, B, V);
    const scratch<index_t> offsets(ctx, B + 1), sequence(ctx, B), agreed(ctx, B);
    const scratch<std::uint8_t> mask(ctx, static_cast<index_t>(ctx.mask.size()));
    std::copy(ctx.mask.begin(), ctx.mask.end(), mask.data());
    for (index_t s = 0; s < B; ++s) {
      offsets[s] = ctx.rows.begin(s);
      sequence[s] = s;
      agreed[s] = 0;
    }
    offsets[B] = x.rows();
    matrix_view<const S> in = x;
    for (index_t n = 1, active = B; active > 0; ++n) {
      const index_t rows = offsets[active];
      const matrix_view<S> out = (in.data() == a.data() ? b : a).view().slice_rows(0, rows);
      context inner = ctx.child(static_cast<std::uint64_t>(n - 1));
      inner.rows = {offsets.span().first(static_cast<std::size_t>(active) + 1)};
      if (!ctx.mask.empty()) inner.mask = mask.span().first(static_cast<std::size_t>(rows));
      stack.block(n).forward(in, out, inner);
      gather_first(matrix_view<const S>(out), inner.rows, first.view().slice_rows(0, active));
      answer(n, matrix_view<const S>(first).slice_rows(0, active), pooled.view().slice_rows(0, active), answers.view().slice_rows(0, active), ctx);
      index_t left = 0, rows_left = 0;
      for (index_t s = 0; s < active; ++s) {
        const index_t begin = offsets[s], length = offsets[s + 1] - begin;
        if (n == N || leaves(n, answers.row(s), before.row(s), agreed[s], rule)) {
          std::copy_n(answers.row(s), V, logits.row(sequence[s]));
          exit_of[static_cast<std::size_t>(sequence[s])] = static_cast<std::int32_t>(n);
          continue;
        }
        std::copy_n(answers.row(s), V, before.row(left));
        if (rows_left != begin) std::copy(out.row(begin), out.row(begin) + length * out.cols(), out.row(rows_left));
        if (!ctx.mask.empty()) std::copy_n(mask.data() + begin, length, mask.data() + rows_left);
        sequence[left] = sequence[s];
        agreed[left] = agreed[s];
        offsets[left++] = rows_left;  // the start of s has been read, and left <= s
        rows_left += length;
      }
      active = left;
      offsets[left] = rows_left;
      in = out.slice_rows(0, rows_left);
    }
  }

  /// Blocks and exits count from 1.
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    f("blocks", s.stack, rest.stack...);
    visit_parts(f, {"poolers.", 1, "pooler"}, s.poolers, rest.poolers...);
    visit_parts(f, {"classifiers.", 1}, s.classifiers, rest.classifiers...);
  }

 private:
  index_t check(matrix_view<const S> x, const context& ctx) const {
    stack.output_shape(x);
    ctx.check("encoder_exits", x.rows());
    for (index_t s = 0; s < ctx.rows.count(); ++s)
      require<shape_error>(ctx.rows.end(s, x.rows()) > ctx.rows.begin(s) || (x.rows() == 0 && ctx.rows.offsets.empty()),
                           "encoder_exits: expected at least 1 row in sequence ", s, ", got none");
    return x.rows() == 0 ? 0 : ctx.rows.count();
  }
  static void gather_first(matrix_view<const S> states, segments rows, matrix_view<S> first) {
    for (index_t s = 0; s < first.rows(); ++s) first.row_array(s) = states.row_array(rows.begin(s));
  }
  void answer(index_t n, matrix_view<const S> first, matrix_view<S> pooled, matrix_view<S> logits, const context& ctx) const {
    const auto i = static_cast<std::size_t>(n - 1);
    poolers[poolers.size() == 1 ? 0 : i].forward(first, pooled, ctx.position_wise());
    for (index_t s = 0; s < pooled.rows(); ++s) pooled.row_array(s) = pooled.row_array(s).tanh();
    classifiers[i].forward(pooled, logits, ctx.position_wise());
  }
  [[nodiscard]] bool leaves(index_t n, const S* now, const S* before, index_t& agreed, const encoder_exit_rule& rule) const {
    const index_t V = classes();
    if (rule.kind == encoder_confidence::never) return false;
    if (rule.kind == encoder_confidence::patience) {
      const bool same = n > 1 && (V == 1 ? std::abs(static_cast<double>(now[0] - before[0])) < rule.difference
                                         : std::max_element(now, now + V) - now == std::max_element(before, before + V) - before);
      agreed = same ? agreed + 1 : 0;
      return rule.patience > 0 && agreed == rule.patience;
    }
    const double threshold = rule.thresholds.size() == 1 ? rule.thresholds[0] : rule.thresholds[static_cast<std::size_t>(n - 1)];
    const double entropy = answer_entropy(now, V);
    return (rule.kind == encoder_confidence::entropy ? entropy : entropy / std::log(static_cast<double>(V))) < threshold;
  }
};

}  // namespace lithe::inline LITHE_ABI
