#pragma once

#include "lithe/compose/reversible_part.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

/// A block that is one of several kinds, chosen when the model is made: a std::variant of layers with the layer concept of its own. A
/// stack<one_of<...>> mixes kinds of blocks.
template <class... B>
struct one_of {
  static_assert((explain_layer<B>() && ...));
  using scalar = typename std::tuple_element_t<0, std::tuple<B...>>::scalar;
  using S = scalar;
  struct record {
    std::variant<record_of<B>...> value;
  };
  struct gradient {
    std::variant<gradient_of<B>...> value;
  };
  using cache = std::variant<cache_of<B>...>;
  static constexpr bool looks_across = (looks_across_tokens<B> || ...);

  std::variant<B...> value;

  one_of() = default;
  /// A block of that kind.
  template <class T>
    requires(std::same_as<T, B> || ...)
  one_of(T kind) : value(std::move(kind)) {}  // implicit: a block stands where any of the kinds may

  void prepare(gradient& g) const {
    active([&]<std::size_t I>(const auto&) { g.value.template emplace<I>(); });
  }
  shape output_shape(matrix_view<const S> x) const {
    return std::visit([&](const auto& b) { return b.output_shape(x); }, value);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    std::visit([&](const auto& b) { b.forward(x, y, ctx); }, value);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    active([&]<std::size_t I>(const auto& b) {
      if (r.value.index() != I) r.value.template emplace<I>();
      b.forward(x, y, std::get<I>(r.value), ctx);
    });
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("one_of", *this, x, dy, dx, g, ctx);
    check_kind(r);
    active([&]<std::size_t I>(const auto& b) { b.backward(x, std::get<I>(r.value), dy, dx, std::get<I>(g.value), ctx); });
  }
  void forward_in_place(matrix_view<S> xy, record* r, const context& ctx) const requires(reversible_block<B> && ...) {
    active([&]<std::size_t I>(const auto& b) {
      if (r != nullptr && r->value.index() != I) r->value.template emplace<I>();
      b.forward_in_place(xy, r == nullptr ? nullptr : &std::get<I>(r->value), ctx);
    });
  }
  void reverse(matrix_view<S> xy, matrix_view<S> dxy, const record& r, gradient& g, const context& ctx) const requires(reversible_block<B> && ...) {
    check_gradient("one_of", *this, g);
    check_kind(r);
    active([&]<std::size_t I>(const auto& b) { b.reverse(xy, dxy, std::get<I>(r.value), std::get<I>(g.value), ctx); });
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    cache c;
    active([&]<std::size_t I>(const auto& b) { c.template emplace<I>(lithe::make_cache(b, slots, capacity)); });
    return c;
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode("one_of", *this, x, y);
    check(c);
    active([&]<std::size_t I>(const auto& b) { lithe::decode(b, x, y, std::get<I>(c), ctx); });
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    check(c);
    active([&]<std::size_t I>(const auto& b) { lithe::fill(b, x, std::get<I>(c), ctx); });
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    check(c);
    index_t least = 0;
    active([&]<std::size_t I>(const auto& b) { least = lithe::least_length(b, std::get<I>(c), slot); });
    return least;
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    check(c);
    active([&]<std::size_t I>(const auto& b) { lithe::truncate(b, std::get<I>(c), slot, length); });
  }
  void permute(cache& c, std::span<const index_t> order) const {
    check(c);
    active([&]<std::size_t I>(const auto& b) { lithe::permute(b, std::get<I>(c), order); });
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return std::visit([&](const auto& b) { return cost_of(b, length); }, value);
  }
  template <class V, class First, class... T>
  static void visit(V&& f, First& s, T&... rest) {
    [[maybe_unused]] const auto alike = [&](const auto& other) {
      require<unmatched_parts>(other.value.index() == s.value.index(), "expected a gradient or copy of kind ", s.value.index(),
                               ", as make_gradient makes it, got one of kind ", other.value.index());
    };
    (alike(rest), ...);
    at(s.value.index(), [&]<std::size_t I>() { f("", std::get<I>(s.value), std::get<I>(rest.value)...); });
  }

 private:
  void check_kind(const record& r) const {
    require<state_error>(r.value.index() == value.index(), "one_of: the record is of another call, or was never filled: expected one of kind ", value.index(),
                         ", got ", r.value.index());
  }
  void check(const cache& c) const {
    require<state_error>(c.index() == value.index(), "one_of: the cache is of another model: expected that of kind ",
                         value.index(), ", got that of kind ", c.index());
  }
  template <class F>
  static void at(std::size_t index, F&& f) {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      ((I == index ? f.template operator()<I>() : void()), ...);
    }(std::index_sequence_for<B...>{});
  }
  template <class F>
  void active(F&& f) const {
    at(value.index(), [&]<std::size_t I>() { f.template operator()<I>(std::get<I>(value)); });
  }
};

}  // namespace lithe::inline LITHE_ABI
