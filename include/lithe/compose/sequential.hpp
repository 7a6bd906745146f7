#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {
template <class First, class... Rest>
inline constexpr bool only_first_takes_tokens = (std::same_as<input_of<Rest>, matrix_view<const typename Rest::scalar>> && ...);
}  // namespace detail

/// Layers one after the other: y = l_n(... l_2(l_1(x))). Only the first may take tokens. Its children are named "0", "1", ...
template <class... L>
struct sequential {
  static_assert(sizeof...(L) > 0, "lithe: a sequential needs at least one layer.");
  static_assert((explain_layer<L>() && ...));
  static_assert(detail::only_first_takes_tokens<L...>, "lithe: only the first layer of a sequential may take tokens.");
  /// The layer that reads x.
  using first = std::tuple_element_t<0, std::tuple<L...>>;
  using scalar = typename first::scalar;
  using S = scalar;
  using input_type = input_of<first>;
  using input_gradient_type = input_gradient_of<first>;
  static constexpr std::size_t count = sizeof...(L);
  struct record {
    std::tuple<record_of<L>...> layers;
    std::vector<matrix<S>> between;  // the inputs of all layers but the first
  };
  struct gradient {
    std::tuple<gradient_of<L>...> layers;
  };
  using cache = std::tuple<cache_of<L>...>;
  static constexpr bool looks_across = (looks_across_tokens<L> || ...);

  std::tuple<L...> layers;

  sequential() = default;
  /// The layers in the order in which they run.
  explicit sequential(L... l) : layers(std::move(l)...) {}

  shape output_shape(input_type x) const { return shape_from<1>(std::get<0>(layers).output_shape(x)); }
  void forward(input_type x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    infer<0>(x, y, ctx);
  }
  void forward(input_type x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    r.between.resize(count - 1);
    keep<0>(x, y, r, ctx);
  }
  void backward(input_type x, const record& r, matrix_view<const S> dy, input_gradient_type dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    check_between<1>(std::get<0>(layers).output_shape(x), r);
    back<count - 1>(x, r, dy, dx, g, ctx);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return std::apply([&](const auto&... l) { return cache{lithe::make_cache(l, slots, capacity)...}; }, layers);
  }
  void decode(input_type x, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode(who, *this, x, y);
    step<0>(x, y, c, ctx);
  }
  void fill(input_type x, cache& c, const context& ctx) const {
    if constexpr (looks_across) fill_from<0>(x, c, ctx);
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    index_t least = 0;
    each([&]<std::size_t I>() {
      least = std::max(least, lithe::least_length(std::get<I>(layers), std::get<I>(c), slot));
    });
    return least;
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("sequential", least_length(c, slot), slot, length);
    each([&]<std::size_t I>() { lithe::truncate(std::get<I>(layers), std::get<I>(c), slot, length); });
  }
  void permute(cache& c, std::span<const index_t> order) const {
    each([&]<std::size_t I>() { lithe::permute(std::get<I>(layers), std::get<I>(c), order); });
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return std::apply([&](const auto&... l) { return (cost_of(l, length) + ...); }, layers);
  }
  template <class V, class... T>
  static void visit(V&& f, T&... s) {
    each([&]<std::size_t I>() { f(std::to_string(I), std::get<I>(s.layers)...); });
  }

 private:
  static constexpr const char* who = "sequential";

  template <std::size_t I>
  void check_between(shape s, const record& r) const {
    if constexpr (I < count) {
      const auto in = recorded(who, recorded(who, r.between, count - 1)[I - 1], s.rows, s.cols);
      check_between<I + 1>(std::get<I>(layers).output_shape(in), r);
    }
  }
  template <class F>
  static void each(F&& f) {
    [&]<std::size_t... I>(std::index_sequence<I...>) { (f.template operator()<I>(), ...); }(std::index_sequence_for<L...>{});
  }
  static constexpr std::size_t last_across() {
    std::size_t i = 0, last = 0;
    ((last = looks_across_tokens<L> ? i : last, ++i), ...);
    return last;
  }
  template <std::size_t I>
  shape shape_from(shape s) const {
    if constexpr (I == count)
      return s;
    else
      return shape_from<I + 1>(std::get<I>(layers).output_shape(matrix_view<const S>(nullptr, s.rows, s.cols)));
  }
  template <std::size_t I, class X>
  void infer(X x, matrix_view<S> y, const context& ctx) const {
    const auto& l = std::get<I>(layers);
    if constexpr (I + 1 == count) {
      l.forward(x, y, ctx.child(I));
    } else {
      const shape s = l.output_shape(x);
      const scratch<S> h(ctx, s.rows, s.cols);
      l.forward(x, h, ctx.child(I));
      infer<I + 1>(matrix_view<const S>(h), y, ctx);
    }
  }
  template <std::size_t I, class X>
  void keep(X x, matrix_view<S> y, record& r, const context& ctx) const {
    const auto& l = std::get<I>(layers);
    if constexpr (I + 1 == count) {
      l.forward(x, y, std::get<I>(r.layers), ctx.child(I));
    } else {
      const shape s = l.output_shape(x);
      r.between[I].resize(s.rows, s.cols);
      l.forward(x, r.between[I], std::get<I>(r.layers), ctx.child(I));
      keep<I + 1>(matrix_view<const S>(r.between[I]), y, r, ctx);
    }
  }
  template <std::size_t I>
  void back(input_type x, const record& r, matrix_view<const S> dy, input_gradient_type dx, gradient& g, const context& ctx) const {
    const auto& l = std::get<I>(layers);
    if constexpr (I == 0) {
      l.backward(x, std::get<0>(r.layers), dy, dx, std::get<0>(g.layers), ctx.child(0));
    } else {
      const matrix<S>& in = r.between[I - 1];
      const scratch<S> d(ctx, in.rows(), in.cols());
      l.backward(in, std::get<I>(r.layers), dy, d, std::get<I>(g.layers), ctx.child(I));
      back<I - 1>(x, r, matrix_view<const S>(d), dx, g, ctx);
    }
  }
  template <std::size_t I, class X>
  void step(X x, matrix_view<S> y, cache& c, const context& ctx) const {
    const auto& l = std::get<I>(layers);
    if constexpr (I + 1 == count) {
      lithe::decode(l, x, y, std::get<I>(c), ctx.child(I));
    } else {
      const shape s = l.output_shape(x);
      const scratch<S> h(ctx, s.rows, s.cols);
      lithe::decode(l, x, h, std::get<I>(c), ctx.child(I));
      step<I + 1>(matrix_view<const S>(h), y, c, ctx);
    }
  }
  /// What follows the last layer that looks across tokens changes no cache.
  template <std::size_t I, class X>
  void fill_from(X x, cache& c, const context& ctx) const {
    const auto& l = std::get<I>(layers);
    if constexpr (I == last_across()) {
      lithe::fill(l, x, std::get<I>(c), ctx.child(I));
    } else {
      const shape s = l.output_shape(x);
      const scratch<S> h(ctx, s.rows, s.cols);
      lithe::decode(l, x, h, std::get<I>(c), ctx.child(I));
      fill_from<I + 1>(matrix_view<const S>(h), c, ctx);
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
