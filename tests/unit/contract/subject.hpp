#pragma once

// Any layer behind one interface, so that what all layers owe their callers is written once and compiled once for each scalar.
#include <memory>

#include "lithe/lithe.hpp"
#include "support/matrices.hpp"

namespace every_layer_tests {

using namespace lithe;

/// What a layer owes beside what all owe.
struct traits {
  bool causal = false;         ///< a later row changes no earlier one
  bool decodes_exactly = false;  ///< decoding gives the rows of the full pass
  bool moves = false;          ///< later rows move the choices of earlier ones (chunks of LSH attention)
  bool selects = false;        ///< rounding may change a selection
  bool tokens = false;         ///< reads ids, has no dx
  index_t in = 1, out = 1;     ///< rows of x and of y for each token; row i belongs to token i modulo their number
  index_t most = 1 << 20;      ///< tokens of a sequence
};

/// Something of the layer's own type: a record, a gradient, a cache.
struct box {
  virtual ~box() = default;
};
template <class T>
struct box_of final : box {
  T value{};
  box_of() = default;
  explicit box_of(T v) : value(std::move(v)) {}
};
using boxed = std::unique_ptr<box>;

template <class S>
struct subject {
  std::string name;
  traits is;
  index_t features = 8;

  virtual ~subject() = default;
  virtual shape output_shape(matrix_view<const S> x) const = 0;
  virtual void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const = 0;
  virtual void forward(matrix_view<const S> x, matrix_view<S> y, box& record, const context& ctx) const = 0;
  virtual void backward(matrix_view<const S> x, const box& record, matrix_view<const S> dy, matrix_view<S> dx, box& g, const context& ctx) const = 0;
  virtual boxed make_record() const = 0;
  virtual bool records(const box& record) const = 0;  ///< whether there is anything in it
  virtual boxed make_gradient() const = 0;
  virtual boxed unmade_gradient() const = 0;
  virtual bool trains() const = 0;  ///< whether a gradient has tensors
  virtual index_t parameters() const = 0;
  virtual cost forward_cost(index_t length) const = 0;
  virtual std::vector<matrix<S>> tensors(const box& g) const = 0;
  virtual bool has_cache() const = 0;
  virtual boxed make_cache(index_t slots, index_t capacity) const = 0;
  virtual void decode(matrix_view<const S> x, matrix_view<S> y, box& cache, const context& ctx) const = 0;
  virtual void fill(matrix_view<const S> x, box& cache, const context& ctx) const = 0;
};

/// Ids for layers that read tokens: a function of the first number of a row, whatever it is.
template <class S>
std::vector<token_t> to_ids(matrix_view<const S> x) {
  std::vector<token_t> ids;
  for (index_t t = 0; t < x.rows(); ++t) ids.push_back(std::isfinite(x(t, 0)) ? static_cast<token_t>(std::abs(static_cast<double>(x(t, 0))) * 1e6) % 16 : 0);
  return ids;
}

template <class L>
class subject_of final : public subject<typename L::scalar> {
  using S = typename L::scalar;
  L l_;

  static const auto& of(const box& b, const auto* type) { return static_cast<const box_of<std::remove_cvref_t<decltype(*type)>>&>(b).value; }
  static auto& of(box& b, const auto* type) { return static_cast<box_of<std::remove_cvref_t<decltype(*type)>>&>(b).value; }
  static constexpr const record_of<L>* a_record = nullptr;
  static constexpr const gradient_of<L>* a_gradient = nullptr;
  static constexpr const cache_of<L>* a_cache = nullptr;
  static constexpr bool tokens = std::same_as<input_of<L>, std::span<const token_t>>;

  template <class F>
  static auto with_input(matrix_view<const S> x, F&& f) {
    if constexpr (tokens) {
      const auto ids = to_ids(x);
      return f(input_of<L>(ids));
    } else {
      return f(x);
    }
  }

 public:
  subject_of(std::string called, L l, traits owes) : l_(std::move(l)) {
    this->name = std::move(called);
    this->is = owes;
    this->is.tokens = tokens;
  }
  shape output_shape(matrix_view<const S> x) const override {
    return with_input(x, [&](auto in) { return l_.output_shape(in); });
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const override {
    with_input(x, [&](auto in) { l_.forward(in, y, ctx); });
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, box& record, const context& ctx) const override {
    with_input(x, [&](auto in) { l_.forward(in, y, of(record, a_record), ctx); });
  }
  void backward(matrix_view<const S> x, const box& record, matrix_view<const S> dy, matrix_view<S> dx, box& g, const context& ctx) const override {
    with_input(x, [&](auto in) {
      if constexpr (tokens)
        l_.backward(in, of(record, a_record), dy, nothing{}, of(g, a_gradient), ctx);
      else
        l_.backward(in, of(record, a_record), dy, dx, of(g, a_gradient), ctx);
    });
  }
  boxed make_record() const override { return std::make_unique<box_of<record_of<L>>>(); }
  bool records(const box& record) const override { return bytes(of(record, a_record)) != 0; }
  boxed make_gradient() const override { return std::make_unique<box_of<gradient_of<L>>>(lithe::make_gradient(l_)); }
  boxed unmade_gradient() const override { return std::make_unique<box_of<gradient_of<L>>>(); }
  bool trains() const override { return parameters() != 0; }
  index_t parameters() const override { return count_parameters(l_); }
  cost forward_cost(index_t length) const override { return l_.forward_cost(length); }
  std::vector<matrix<S>> tensors(const box& g) const override {
    std::vector<matrix<S>> all;
    for_each_tensor(
        [&](const std::string&, role, const auto& p, const auto& q) {
          if constexpr (sparse_gradient<const std::remove_cvref_t<decltype(q)>>) {
            matrix<S> dense = matrix<S>::Zero(p.rows(), p.cols());
            const auto& rows = rows_of(q);
            for (index_t i = 0; i < rows.count(); ++i) dense.row(rows.rows[static_cast<std::size_t>(i)]) = rows.values().map().row(i);
            all.push_back(dense);
          } else if constexpr (!std::same_as<std::remove_cvref_t<decltype(q)>, nothing>) {
            all.push_back(q);
          }
        },
        l_, of(g, a_gradient));
    return all;
  }
  bool has_cache() const override { return cached_layer<L> && this->is.causal; }
  boxed make_cache(index_t slots, index_t capacity) const override {
    if constexpr (cached_layer<L>)
      return std::make_unique<box_of<cache_of<L>>>(l_.make_cache(slots, capacity));
    else
      return nullptr;
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, box& cache, const context& ctx) const override {
    if constexpr (cached_layer<L>) with_input(x, [&](auto in) { l_.decode(in, y, of(cache, a_cache), ctx); });
  }
  void fill(matrix_view<const S> x, box& cache, const context& ctx) const override {
    if constexpr (cached_layer<L>) with_input(x, [&](auto in) { l_.fill(in, of(cache, a_cache), ctx); });
  }
};

/// A layer that reads a second sequence, with one of three rows for each sequence of x.
template <class L>
struct beside {
  using scalar = typename L::scalar;
  using S = scalar;
  using record = record_of<L>;
  struct gradient {
    gradient_of<L> inner;
  };
  L inner;

  shape output_shape(matrix_view<const S> x) const { return inner.output_shape(x); }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    const source s(x.cols(), ctx);
    inner.forward(x, s.view(), y, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const source s(x.cols(), ctx);
    inner.forward(x, s.view(), y, r, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const source s(x.cols(), ctx);
    matrix<S> ds = matrix<S>::Zero(s.rows.rows(), s.rows.cols());
    inner.backward(x, s.view(), r, dy, dx, ds, g.inner, ctx);
  }
  [[nodiscard]] cost forward_cost(index_t length) const { return cost_of(inner, length); }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("", s.inner...);
  }

 private:
  struct source {
    matrix<S> rows;
    std::vector<index_t> offsets{0};
    source(index_t width, const context& ctx) {
      // Every sequence has the same rows, so that it does not matter which others are in the call.
      const matrix<S> three = random<S>(3, width, 77);
      rows.resize(3 * ctx.rows.count(), width);
      for (index_t s = 0; s < ctx.rows.count(); ++s) {
        rows.middleRows(3 * s, 3) = three;
        offsets.push_back(3 * (s + 1));
      }
    }
    memory_view<S> view() const { return {rows, {offsets}}; }
  };
};

}  // namespace every_layer_tests
