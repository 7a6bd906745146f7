#pragma once

#include <numeric>

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/linear.hpp"
#include "lithe/layers/norms.hpp"

// T tokens, D features, N exits, V classes
namespace lithe::inline LITHE_ABI {

/// Whether exits have a part of their own, share one, or have none.
enum class exit_sharing { shared, independent, none };

struct exit_classifiers_config {
  index_t exits = 1, features = 0, classes = 0;
  exit_sharing norm = exit_sharing::shared;        ///< in front of the classifier
  exit_sharing classifier = exit_sharing::shared;  ///< shared or independent
  bool bias = false;
};

/// The answers at every depth: logitsⁿ = Wₙ normₙ(hⁿ) (+ bₙ). x [N T x D] holds the states of blocks 1 .. N one below the other, logits [N T x V];
/// a mask is that of the T tokens.
///
/// Weights start normal with deviation D^-½. Throws config_error, shape_error.
template <std::floating_point S, class Norm = layer_norm<S>>
struct exit_classifiers {
  using scalar = S;
  struct record {
    std::vector<record_of<Norm>> norms;
    matrix<S> sorted, normed;             // in the order of exits
    std::vector<index_t> order, offsets;  // of `sorted`; the order is empty if x is in that order already
  };
  struct gradient {
    std::vector<gradient_of<Norm>> norms;
    std::vector<gradient_of<linear<S>>> classifiers;
  };

  std::vector<Norm> norms;             ///< 0, 1 or N
  std::vector<linear<S>> classifiers;  ///< 1 or N
  index_t exits = 1;
  std::vector<double> gradient_scales;  ///< N numbers gₙ, or none: backward multiplies what exit n sends back to hⁿ by gₙ

  exit_classifiers() = default;
  /// The classifiers' weights start at N(0, 1/√features). Throws config_error without an exit or a classifier.
  exit_classifiers(exit_classifiers_config c, rng_key key) : exits(c.exits) {
    require<config_error>(c.exits >= 1, "exit_classifiers: expected at least 1 exit, got ", c.exits);
    require<config_error>(c.classifier != exit_sharing::none, "exit_classifiers: expected shared or independent classifiers, got none");
    const auto count = [&](exit_sharing s) { return s == exit_sharing::none ? index_t{0} : s == exit_sharing::shared ? index_t{1} : c.exits; };
    for (index_t i = 0; i < count(c.norm); ++i) norms.emplace_back(c.features);
    for (index_t i = 0; i < count(c.classifier); ++i) {
      classifiers.emplace_back(linear_config{c.features, c.classes, c.bias}, key);
      fill_normal<S>(classifiers.back().weight, 1 / std::sqrt(static_cast<double>(c.features)), key.child(static_cast<std::uint64_t>(i)));
    }
  }
  [[nodiscard]] index_t classes() const { return classifiers.front().weight.rows(); }
  /// Whether one classifier, and one norm or none, serves all exits.
  [[nodiscard]] bool alike() const { return norms.size() <= 1 && classifiers.size() == 1; }

  void prepare(gradient& g) const {
    g.norms.resize(norms.size());
    g.classifiers.resize(classifiers.size());
  }
  shape output_shape(matrix_view<const S> x) const {
    require<shape_error>(x.rows() % exits == 0, "exit_classifiers: expected the states of ", exits, " blocks one below the other, got ", x.rows(),
                         " rows");
    require_features("exit_classifiers", classifiers.front().weight.cols(), x);
    return {x.rows(), classes()};
  }

  /// The answer of exit n alone, from 1: h [R x D], logits [R x V].
  void answer(index_t n, matrix_view<const S> h, matrix_view<S> logits, const context& ctx) const {
    require<config_error>(n >= 1 && n <= exits, "exit_classifiers: expected an exit from 1 to ", exits, ", got ", n);
    const context alone = ctx.position_wise();
    if (norms.empty()) return classifier(n).forward(h, logits, alone);
    const scratch<S> normed(ctx, h.rows(), h.cols());
    norms[norms.size() == 1 ? 0 : static_cast<std::size_t>(n - 1)].forward(h, normed, alone);
    classifier(n).forward(normed, logits, alone);
  }
  void forward(matrix_view<const S> x, matrix_view<S> logits, const context& ctx) const {
    detail::check_matrices("exit_classifiers", "logits", *this, x, logits);
    const index_t T = x.rows() / exits;
    ctx.check("exit_classifiers", T);
    if (alike()) return answer(1, x, logits, ctx);
    for (index_t n = 1; n <= exits; ++n) answer(n, x.slice_rows((n - 1) * T, T), logits.slice_rows((n - 1) * T, T), ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> logits, record& r, const context& ctx) const {
    detail::check_matrices("exit_classifiers", "logits", *this, x, logits);
    const index_t T = x.rows() / exits;
    ctx.check("exit_classifiers", T);
    r.order.clear();
    r.offsets.resize(static_cast<std::size_t>(exits) + 1);
    for (index_t n = 0; n <= exits; ++n) r.offsets[static_cast<std::size_t>(n)] = n * T;
    run(x, logits, r, ctx);
  }
  /// One exit for each row, as mixed training has it: x [T x D], logits [T x V]. Its backward is the same.
  void forward_mixed(matrix_view<const S> x, std::span<const std::int32_t> row_exits, matrix_view<S> logits, record& r, const context& ctx) const {
    const index_t T = x.rows();
    require<shape_error>(static_cast<index_t>(row_exits.size()) == T, "exit_classifiers: expected an exit for each of ", T, " rows, got ",
                         row_exits.size());
    require_features("exit_classifiers", classifiers.front().weight.cols(), x);
    require_shape("exit_classifiers", "logits", logits, T, classes());
    ctx.check("exit_classifiers", T);
    r.order.resize(row_exits.size());
    r.offsets.assign(static_cast<std::size_t>(exits) + 1, 0);
    for (const auto n : row_exits) {
      require<config_error>(n >= 1 && n <= exits, "exit_classifiers: expected exits from 1 to ", exits, ", got ", n);
      ++r.offsets[static_cast<std::size_t>(n)];
    }
    std::partial_sum(r.offsets.begin(), r.offsets.end(), r.offsets.begin());
    std::vector<index_t> next(r.offsets.begin(), r.offsets.end() - 1);
    for (index_t t = 0; t < T; ++t)
      r.order[static_cast<std::size_t>(next[static_cast<std::size_t>(row_exits[static_cast<std::size_t>(t)] - 1)]++)] = t;
    r.sorted.resize(T, x.cols());
    for (index_t i = 0; i < T; ++i) r.sorted.row(i) = x.map().row(r.order[static_cast<std::size_t>(i)]);
    const scratch<S> out(ctx, T, classes());
    run(r.sorted, out, r, ctx);
    for (index_t i = 0; i < T; ++i) logits.map().row(r.order[static_cast<std::size_t>(i)]) = out.map().row(i);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dlogits, matrix_view<S> dx, gradient& g, const context& ctx) const {
    recorded("exit_classifiers", r.offsets, static_cast<std::size_t>(exits) + 1);
    require<state_error>(r.offsets.back() == x.rows(), "exit_classifiers: the record is of another call: expected ", x.rows(), " rows, got ",
                         r.offsets.back());
    require_features("exit_classifiers", classifiers.front().weight.cols(), x);
    require_shape("exit_classifiers", "dlogits", dlogits, x.rows(), classes());
    detail::require_data("exit_classifiers", "dlogits", dlogits);
    detail::check_like("exit_classifiers", "dx", dx, x);
    ctx.check("exit_classifiers", r.order.empty() ? x.rows() / exits : x.rows());
    check_gradient("exit_classifiers", *this, g);
    recorded("exit_classifiers", r.norms, norms.size());
    recorded("exit_classifiers", r.normed, norms.empty() ? 0 : x.rows(), x.cols());
    if (r.order.empty()) return back(x, r, dlogits, dx, g, ctx);
    const scratch<S> d(ctx, x.rows(), classes()), dsorted(ctx, x.rows(), x.cols());
    for (index_t i = 0; i < x.rows(); ++i) d.map().row(i) = dlogits.map().row(r.order[static_cast<std::size_t>(i)]);
    back(r.sorted, r, d, dsorted, g, ctx);
    for (index_t i = 0; i < x.rows(); ++i) dx.map().row(r.order[static_cast<std::size_t>(i)]) = dsorted.map().row(i);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto& n : norms) sum += n.forward_cost(length);
    for (const auto& c : classifiers) sum += c.forward_cost(length);
    return sum;
  }
  /// Exits count from 1; a shared part has no number.
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    visit_parts(f, {"norms.", 1, "norm"}, s.norms, rest.norms...);
    visit_parts(f, {"classifiers.", 1, "classifier"}, s.classifiers, rest.classifiers...);
  }

 private:
  [[nodiscard]] const linear<S>& classifier(index_t n) const { return classifiers[classifiers.size() == 1 ? 0 : static_cast<std::size_t>(n - 1)]; }
  /// f(part, first row, rows) for the rows that each of `parts` parts has.
  template <class F>
  static void each_part(std::size_t parts, const record& r, F&& f) {
    if (parts == 1) return f(std::size_t{0}, index_t{0}, r.offsets.back());
    for (std::size_t i = 0; i < parts; ++i) f(i, r.offsets[i], r.offsets[i + 1] - r.offsets[i]);
  }
  /// The context of the rows as they are worked on.
  static regrouped by_row(const record& r, const context& ctx) {
    return {ctx, r.offsets.back(), [&, T = static_cast<index_t>(ctx.mask.size())](index_t i) {
              return r.order.empty() ? i % T : r.order[static_cast<std::size_t>(i)];
            }};
  }
  void run(matrix_view<const S> x, matrix_view<S> logits, record& r, const context& ctx) const {
    const regrouped rows = by_row(r, ctx);
    r.norms.resize(norms.size());
    r.normed.resize(norms.empty() ? 0 : x.rows(), x.cols());
    each_part(norms.size(), r, [&](std::size_t i, index_t first, index_t n) {
      norms[i].forward(x.slice_rows(first, n), matrix_view<S>(r.normed).slice_rows(first, n), r.norms[i], rows.ctx(first, n));
    });
    const matrix_view<const S> in = norms.empty() ? x : matrix_view<const S>(r.normed);
    each_part(classifiers.size(), r, [&](std::size_t i, index_t first, index_t n) {
      classifiers[i].forward(in.slice_rows(first, n), logits.slice_rows(first, n), rows.ctx(first, n));
    });
  }
  void back(matrix_view<const S> x, const record& r, matrix_view<const S> dlogits, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const regrouped rows = by_row(r, ctx);
    const matrix_view<const S> in = norms.empty() ? x : matrix_view<const S>(r.normed);
    const scratch<S> room(ctx, norms.empty() ? 0 : x.rows(), x.cols());
    const matrix_view<S> dn = norms.empty() ? dx : room.view();
    each_part(classifiers.size(), r, [&](std::size_t i, index_t first, index_t n) {
      classifiers[i].backward(in.slice_rows(first, n), {}, dlogits.slice_rows(first, n), dn.slice_rows(first, n), g.classifiers[i],
                              rows.ctx(first, n));
    });
    each_part(norms.size(), r, [&](std::size_t i, index_t first, index_t n) {
      norms[i].backward(x.slice_rows(first, n), r.norms[i], dn.slice_rows(first, n), dx.slice_rows(first, n), g.norms[i],
                        rows.ctx(first, n));
    });
    if (gradient_scales.empty()) return;
    for (std::size_t n = 0; n + 1 < r.offsets.size(); ++n)
      dx.slice_rows(r.offsets[n], r.offsets[n + 1] - r.offsets[n]).map() *= static_cast<S>(gradient_scales[n]);
  }
};

}  // namespace lithe::inline LITHE_ABI
