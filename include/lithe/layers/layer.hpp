#pragma once

#include <concepts>
#include <string_view>

#include "lithe/core/context.hpp"
#include "lithe/layers/record.hpp"
#include "lithe/tensor/row_gradient.hpp"
#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// Rows and columns of an output.
struct shape {
  index_t rows = 0, cols = 0;
  /// Whether rows and columns agree.
  friend bool operator==(const shape&, const shape&) = default;
};

/// Stands where a layer has nothing to say: the input gradient of tokens, the cache of a position-wise layer.
struct nothing {};

/// What a walked tensor is: optimisers skip state, savers do not. Of a permutation, which is state too, every row has
/// the numbers from 0 to its length - 1 once each, and readers refuse one that has not: it says where memory is read. A
/// key is an rng_key as four whole numbers of 16 bits, lowest first, which float and double hold exactly; added state
/// follows a key in `visit`. Files of version 0.1 lack both: then a layer keeps its own.
enum class role { parameter, state, permutation, added_state, key };

/// The name of a field in `visit`, and its role.
struct field {
  std::string_view name;  // lives as long as the call that it is an argument of
  role kind = role::parameter;
  /// From a literal.
  field(const char* n, role k = role::parameter) : name(n), kind(k) {}
  /// From a name that is put together for the call.
  field(const std::string& n, role k = role::parameter) : name(n), kind(k) {}
};

/// Rows of another sequence (an encoder's output) and where its sequences begin: sequence i of x sees sequence i of the memory.
template <class S>
struct memory_view {
  matrix_view<const S> x;
  segments rows{};
};

namespace detail {

template <class L>
struct input {
  using type = matrix_view<const typename L::scalar>;
};
template <class L>
  requires requires { typename L::input_type; }
struct input<L> {
  using type = typename L::input_type;
};
template <class L>
struct input_gradient {
  using type = matrix_view<typename L::scalar>;
};
template <class L>
  requires requires { typename L::input_gradient_type; }
struct input_gradient<L> {
  using type = typename L::input_gradient_type;
};
template <class L>
struct cache {
  using type = nothing;
};
template <class L>
  requires requires { typename L::cache; }
struct cache<L> {
  using type = typename L::cache;
};

}  // namespace detail

/// Structs that are walked in lockstep hold different parts: most often a gradient that `make_gradient` did not make.
struct unmatched_parts : state_error {
  using state_error::state_error;
};

/// The names of the parts that stand in a vector: `many` and a number from `from` on; or, given a name for a part that is alone, that.
struct part_names {
  const char* many;
  std::size_t from = 0;
  const char* alone = nullptr;
  /// Of part i of n.
  [[nodiscard]] std::string operator()(std::size_t i, std::size_t n) const {
    if (n == 1 && alone != nullptr) return alone;
    std::string name(many);
    name += std::to_string(i + from);
    return name;
  }
};

/// f(name, first[i], rest[i]...) for the parts that a layer and its gradients or copies hold in vectors: what `visit` is written with. Throws
/// unmatched_parts unless all of them hold equally many.
template <class F, class First, class... Rest>
void visit_parts(F&& f, part_names names, First& first, Rest&... rest) {
  [[maybe_unused]] const auto alike = [&](const auto& other) {
    require<unmatched_parts>(other.size() == first.size(), "expected a gradient or copy of ", first.size(), " parts, as make_gradient makes it, got one of ",
                             other.size());
  };
  (alike(rest), ...);
  for (std::size_t i = 0; i < first.size(); ++i) f(names(i, first.size()), first[i], rest[i]...);
}

template <class L>
using record_of = typename L::record;
template <class L>
using gradient_of = typename L::gradient;
/// What forward reads: a matrix view, or `L::input_type` (a span of tokens for an embedding).
template <class L>
using input_of = typename detail::input<L>::type;
/// What backward writes for its input: a matrix view, or `L::input_gradient_type`.
template <class L>
using input_gradient_of = typename detail::input_gradient<L>::type;
template <class L>
using cache_of = typename detail::cache<L>::type;

/// The parts that `walk` recurses into.
template <class L>
concept has_parameters = requires {
  typename L::scalar;
  typename L::record;
  typename L::gradient;
};

/// A layer is its parameters and its configuration; `forward` and `backward` are const, what changes goes out through arguments.
///
///     shape output_shape(x) const;                      // infers and validates; throws shape_error
///     void  forward(x, y, ctx) const;                   // inference
///     void  forward(x, y, record, ctx) const;           // keeps what backward needs
///     void  backward(x, record, dy, dx, gradient, ctx) const;   // dx overwritten, gradient accumulated
///     static void visit(f, structs...);                 // f("name", s.name...) for every parameter and child
///
/// backward and a replayed forward get the context of their forward (its key above all); whoever replays later stores that key. A forward
/// without a record keeps no choices and so ignores `replay`. A field of `gradient` for a tensor that needs none (state without
/// statistics) is `nothing`.
template <class L>
concept layer = std::copyable<L> && has_parameters<L> && std::default_initializable<record_of<L>> &&
                requires(const L l, input_of<L> x, input_gradient_of<L> dx, matrix_view<typename L::scalar> y,
                         matrix_view<const typename L::scalar> dy, record_of<L> r, const record_of<L> cr, gradient_of<L> g, const context& ctx) {
                  { l.output_shape(x) } -> std::same_as<shape>;
                  l.forward(x, y, ctx);
                  l.forward(x, y, r, ctx);
                  l.backward(x, cr, dy, dx, g, ctx);
                };

/// A layer with a second input, whose gradient dm it adds to.
template <class L>
concept conditioned_layer =
    std::copyable<L> && has_parameters<L> && std::default_initializable<record_of<L>> &&
    requires(const L l, input_of<L> x, memory_view<typename L::scalar> m, input_gradient_of<L> dx, matrix_view<typename L::scalar> y,
             matrix_view<const typename L::scalar> dy, record_of<L> r, const record_of<L> cr, gradient_of<L> g, const context& ctx) {
      { l.output_shape(x) } -> std::same_as<shape>;
      l.forward(x, m, y, ctx);
      l.forward(x, m, y, r, ctx);
      l.backward(x, m, cr, dy, dx, y, g, ctx);
    };

/// A layer that looks across tokens and can decode step by step. x holds the new rows of each sequence (ctx.rows) and ctx.slots
/// says which cache slot each sequence has: prefill, one step, checking of drafts and compacted rows are one call.
template <class L>
concept cached_layer = has_parameters<L> && requires(const L l, input_of<L> x, matrix_view<typename L::scalar> y, cache_of<L> c,
                                                     const context& ctx, index_t n, std::span<const index_t> order) {
  typename L::cache;
  { l.make_cache(n, n) } -> std::same_as<cache_of<L>>;  // slots, capacity in tokens
  l.decode(x, y, c, ctx);                               // appends x to the cache, writes y
  l.fill(x, c, ctx);                                    // appends x to the cache only
  l.truncate(c, n, n);                                  // slot, new length
  l.permute(c, order);                                  // slot i becomes what slot order[i] was
};

/// Explains, where a container is made, which member of the layer concept a type lacks.
template <class L>
consteval bool explain_layer() {
  static_assert(has_parameters<L>, "lithe: a layer needs the member types scalar, record and gradient.");
  if constexpr (has_parameters<L>) {
    using S = typename L::scalar;
    static_assert(!(conditioned_layer<L> && !layer<L>), "lithe: this layer needs a second input (a memory); use it inside a decoder block.");
    if constexpr (!conditioned_layer<L>) {
      static_assert(std::copyable<L>, "lithe: a layer must be copyable.");
      static_assert(requires(const L l, input_of<L> x) { { l.output_shape(x) } -> std::same_as<shape>; },
                    "lithe: a layer needs `shape output_shape(x) const`.");
      static_assert(requires(const L l, input_of<L> x, matrix_view<S> y, const context& c) { l.forward(x, y, c); },
                    "lithe: a layer needs `forward(x, y, ctx) const`.");
      static_assert(requires(const L l, input_of<L> x, matrix_view<S> y, record_of<L> r, const context& c) { l.forward(x, y, r, c); },
                    "lithe: a layer needs `forward(x, y, record&, ctx) const`.");
      static_assert(requires(const L l, input_of<L> x, const record_of<L> r, matrix_view<const S> dy, input_gradient_of<L> dx, gradient_of<L> g,
                             const context& c) { l.backward(x, r, dy, dx, g, c); },
                    "lithe: a layer needs `backward(x, const record&, dy, dx, gradient&, ctx) const`.");
    }
  }
  return layer<L>;
}

/// Throws shape_error unless x has `expected` features.
template <class S>
void require_features(const char* who, index_t expected, matrix_view<S> x) {
  require<shape_error>(x.cols() == expected, who, ": expected ", expected, " features, got ", x.cols());
}

}  // namespace lithe::inline LITHE_ABI
