#pragma once

#include "lithe/compose/reversible_part.hpp"
#include "lithe/layers/cost.hpp"

// T tokens, D features of one stream
namespace lithe::inline LITHE_ABI {

/// Reversible residual block (arXiv 1707.04585, equations 6 and 7) over two layers that keep the shape of a stream. x =
/// [x₁ | x₂] and y are [T x 2D], the streams side by side:
///
///     y₁ = x₁ + F(x₂),   y₂ = x₂ + G(y₁);      x₂ = y₂ - G(y₁),   x₁ = y₁ - F(x₂)
///
/// so backward needs neither x nor anything computed from it: the record holds the choices of F and G and one key, and
/// `reverse` computes F and G again with them. More parts go on alternating, and an odd number of them ends with the
/// streams swapped, so that the next block begins with the other one: reversible<self, cross, feed> is the decoder
/// block of arXiv 2001.04451, z = [y₂ | y₁ + feed(y₂)]. With a part that needs a memory (cross-attention) the block is
/// a `conditioned_layer`.
///
/// Position-wise parts are computed `chunk` rows at a time (0: all at once), so that no [T x hidden] matrix exists; the
/// values do not depend on it. A loss that a part adds of its own accord is the mean of its chunks' losses, each
/// weighted by its rows; that is the loss of all rows at once but for products of means (balance of experts), which are
/// of each chunk. Throws shape_error, config_error for batch norm in training, state_error for the record of another
/// call.
template <class... F>
struct reversible {
  static_assert(sizeof...(F) > 0, "lithe: a reversible block needs at least one part.");
  static_assert((detail::explain_part<F>() && ...));
  using scalar = typename std::tuple_element_t<0, std::tuple<F...>>::scalar;
  using S = scalar;
  static constexpr std::size_t count = sizeof...(F);
  static constexpr bool conditioned = (conditioned_layer<F> || ...);
  static constexpr bool looks_across = (looks_across_tokens<F> || ...);
  struct record {
    std::tuple<std::vector<record_of<F>>...> parts;  // of each chunk
    std::uint64_t key = 0;
    index_t rows = -1;  // of the call
  };
  struct gradient {
    std::tuple<gradient_of<F>...> parts;
  };
  using cache = std::tuple<cache_of<F>...>;

  std::tuple<F...> parts;
  index_t chunk = 0;

  reversible() = default;
  /// The parts in their order; throws config_error for a chunk below 0.
  explicit reversible(F... f, index_t chunk_ = 0) : parts(std::move(f)...), chunk(chunk_) {
    require<config_error>(chunk >= 0, "reversible: expected a chunk of 0 (all) or more rows, got ", chunk);
  }

  shape output_shape(matrix_view<const S> x) const {
    require<shape_error>(x.cols() % 2 == 0, "reversible: expected two streams side by side, got ", x.cols(), " columns");
    const matrix_view<const S> stream = x.slice_cols(0, x.cols() / 2);
    each([&]<std::size_t I>() {
      const shape s = std::get<I>(parts).output_shape(stream);
      require<shape_error>(s == shape{stream.rows(), stream.cols()}, "reversible: part ", I, " turns ", to_text(stream.rows(), stream.cols()), " into ",
                           to_text(s.rows, s.cols), "; x + f(x) needs the same shape");
    });
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const requires(!conditioned) { copy_forward(x, {}, y, nullptr, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const requires(!conditioned) {
    copy_forward(x, {}, y, &r, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const
      requires(!conditioned) {
    copy_backward(x, {}, r, dy, dx, g, ctx);
  }
  void forward_in_place(matrix_view<S> xy, record* r, const context& ctx) const requires(!conditioned) { run(xy, {}, r, ctx); }
  void reverse(matrix_view<S> xy, matrix_view<S> dxy, const record& r, gradient& g, const context& ctx) const requires(!conditioned) {
    run_back(xy, {}, dxy, r, g, ctx);
  }

  // The same for blocks with a memory, whose gradient dm is added to.
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const requires conditioned {
    copy_forward(x, {m}, y, nullptr, ctx);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const requires conditioned {
    copy_forward(x, {m}, y, &r, ctx);
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const requires conditioned {
    copy_backward(x, {m, dm}, r, dy, dx, g, ctx);
  }
  void forward_in_place(matrix_view<S> xy, memory_view<S> m, record* r, const context& ctx) const requires conditioned { run(xy, {m}, r, ctx); }
  void reverse(matrix_view<S> xy, memory_view<S> m, matrix_view<S> dxy, matrix_view<S> dm, const record& r, gradient& g, const context& ctx) const
      requires conditioned {
    run_back(xy, {m, dm}, dxy, r, g, ctx);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return std::apply([&](const auto&... f) { return cache{lithe::make_cache(f, slots, capacity)...}; }, parts);
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const requires(!conditioned) { step<count>(x, {}, y, c, ctx); }
  void decode(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, cache& c, const context& ctx) const requires conditioned {
    step<count>(x, {m}, y, c, ctx);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const requires(!conditioned) {
    const scratch<S> y(ctx, looks_across ? x.rows() : 0, x.cols());
    if constexpr (looks_across) step<last_across()>(x, {}, y, c, ctx);
  }
  void fill(matrix_view<const S> x, memory_view<S> m, cache& c, const context& ctx) const requires conditioned {
    const scratch<S> y(ctx, looks_across ? x.rows() : 0, x.cols());
    if constexpr (looks_across) step<last_across()>(x, {m}, y, c, ctx);
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    index_t least = 0;
    each([&]<std::size_t I>() {
      least = std::max(least, lithe::least_length(std::get<I>(parts), std::get<I>(c), slot));
    });
    return least;
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("reversible", least_length(c, slot), slot, length);
    each([&]<std::size_t I>() { lithe::truncate(std::get<I>(parts), std::get<I>(c), slot, length); });
  }
  void permute(cache& c, std::span<const index_t> order) const {
    each([&]<std::size_t I>() { lithe::permute(std::get<I>(parts), std::get<I>(c), order); });
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return std::apply([&](const auto&... f) { return (cost_of(f, length) + ...); }, parts);
  }
  template <class V, class... T>
  static void visit(V&& f, T&... s) {
    each([&]<std::size_t I>() { f(std::to_string(I), std::get<I>(s.parts)...); });
  }

 private:
  static constexpr const char* who = "reversible";
  void check_record(index_t rows, const record& r) const {
    require<state_error>(r.rows == rows, who, ": the record is of another call, or was never filled: expected ", rows, " rows, got ", r.rows);
    each([&]<std::size_t I>() {
      recorded(who, std::get<I>(r.parts), detail::count_chunks<std::tuple_element_t<I, std::tuple<F...>>>(rows, chunk));
    });
  }
  using conditioning = detail::conditioning<S>;

  template <class V>
  static void each(V&& f) {
    [&]<std::size_t... I>(std::index_sequence<I...>) { (f.template operator()<I>(), ...); }(std::index_sequence_for<F...>{});
  }
  /// The stream that part I writes; part I + 1 reads it.
  template <std::size_t I, class T>
  static matrix_view<T> stream(matrix_view<T> xy) {
    return xy.slice_cols(I % 2 == 0 ? 0 : xy.cols() / 2, xy.cols() / 2);
  }
  static void swap_streams(matrix_view<S> xy, const context& ctx) {
    if (count % 2 == 0) return;
    const index_t half = xy.cols() / 2;
    ctx.exec->run(xy.rows(), detail::grain_rows(xy.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t) std::swap_ranges(xy.row(t), xy.row(t) + half, xy.row(t) + half);
    });
  }
  static context replaying(const record& r, context ctx) {
    ctx.key = {r.key};
    ctx.replay = true;
    return ctx;
  }

  void run(matrix_view<S> xy, const conditioning& m, record* r, const context& ctx) const {
    output_shape(xy);
    ctx.check(who, xy.rows());
    require<config_error>(!ctx.train || !has_batch_norm(), "reversible: batch norm cannot train inside a reversible block, whose rows are computed again "
                          "from rounded inputs and in chunks; use layer norm");
    if (r != nullptr) {
      r->key = ctx.key.value;
      r->rows = xy.rows();
    }
    each([&]<std::size_t I>() {
      detail::add_part<std::tuple_element_t<I, std::tuple<F...>>, S>(std::get<I>(parts), stream<I + 1>(xy), m, stream<I>(xy),
                                                                     r == nullptr ? nullptr : &std::get<I>(r->parts), chunk, ctx.child(I));
    });
    swap_streams(xy, ctx);
  }
  void run_back(matrix_view<S> xy, const conditioning& m, matrix_view<S> dxy, const record& r, gradient& g, const context& ctx) const {
    output_shape(xy);
    require_shape(who, "dxy", dxy, xy.rows(), xy.cols());
    ctx.check(who, xy.rows());
    check_gradient(who, *this, g);
    check_record(xy.rows(), r);
    const context c = replaying(r, ctx);
    swap_streams(xy, ctx);
    swap_streams(dxy, ctx);
    each([&]<std::size_t Done>() {
      constexpr std::size_t I = count - 1 - Done;
      detail::reverse_part<std::tuple_element_t<I, std::tuple<F...>>, S>(std::get<I>(parts), stream<I + 1>(xy), m, stream<I>(xy), std::get<I>(r.parts),
                                                                         stream<I>(dxy), stream<I + 1>(dxy), std::get<I>(g.parts), chunk, c.child(I));
    });
  }
  void copy_forward(matrix_view<const S> x, const conditioning& m, matrix_view<S> y, record* r, const context& ctx) const {
    detail::check_rows(who, "y", *this, x, y, ctx);
    copy<S>(x, y, ctx);
    run(y, m, r, ctx);
  }
  void copy_backward(matrix_view<const S> x, const conditioning& m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
                     const context& ctx) const {
    detail::check_rows(who, "dy", *this, x, dy, ctx);
    detail::check_like(who, "dx", dx, x);
    check_gradient(who, *this, g);
    check_record(x.rows(), r);
    const scratch<S> xy(ctx, x.rows(), x.cols());
    record again = r;
    copy<S>(x, xy, ctx);
    run(xy, m, &again, replaying(r, ctx));
    copy<S>(dy, dx, ctx);
    run_back(xy, m, dx, r, g, ctx);
  }
  static constexpr std::size_t last_across() {
    std::size_t i = 0, last = 0;
    ((last = looks_across_tokens<F> ? i : last, ++i), ...);
    return last;
  }
  /// Decodes the parts before `End`, and fills the cache of that one if there is one.
  template <std::size_t End>
  void step(matrix_view<const S> x, const conditioning& m, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode(who, *this, x, y);
    copy<S>(x, y, ctx);
    const scratch<S> out(ctx, x.rows(), x.cols() / 2);
    each([&]<std::size_t I>() {
      const auto& f = std::get<I>(parts);
      const matrix_view<const S> in = stream<I + 1>(y);
      if constexpr (I == End) {
        lithe::fill(f, in, std::get<I>(c), ctx.child(I));
      } else if constexpr (I < End) {
        if constexpr (conditioned_layer<std::tuple_element_t<I, std::tuple<F...>>>)
          f.forward(in, m.memory, out, ctx.child(I));
        else
          lithe::decode(f, in, out, std::get<I>(c), ctx.child(I));
        add<S>(out, stream<I>(y), ctx);
      }
    });
    if constexpr (End == count) swap_streams(y, ctx);
  }
  [[nodiscard]] bool has_batch_norm() const {
    return std::apply([](const auto&... f) { return (detail::has_batch_norm(f) || ...); }, parts);
  }
};

}  // namespace lithe::inline LITHE_ABI
