#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/norms.hpp"

// T tokens, D features of one stream
namespace lithe::inline LITHE_ABI {

/// What `reversible_stack` is made of: y = b(x) and back, in place.
///
///     forward_in_place(xy, record*, ctx)              // xy = [x₁ | x₂] becomes [y₁ | y₂]; no record: nothing is kept
///     reverse(xy, dxy, record, gradient, ctx)         // and back, while dxy turns from dL/dy into dL/dx
template <class B>
concept reversible_block = has_parameters<B> && requires(const B b, matrix_view<typename B::scalar> xy, record_of<B> r, const record_of<B> cr,
                                                         gradient_of<B> g, const context& ctx) {
                             b.forward_in_place(xy, &r, ctx);
                             b.reverse(xy, xy, cr, g, ctx);
                           };
/// The same with a memory, whose gradient dm is added to.
template <class B>
concept conditioned_reversible_block = has_parameters<B> && requires(const B b, matrix_view<typename B::scalar> xy, memory_view<typename B::scalar> m,
                                                                     record_of<B> r, const record_of<B> cr, gradient_of<B> g, const context& ctx) {
                                         b.forward_in_place(xy, m, &r, ctx);
                                         b.reverse(xy, m, xy, xy, cr, g, ctx);
                                       };

/// A part that adds itself to a stream, and takes itself away again while it passes gradients back, in less memory than its record
/// and a copy of the stream need (attention that works head by head). x, y, dy and dx are [T x D] and do not overlap.
///
///     add_to(x, y, r, ctx)                  // y += f(x); r keeps the choices alone
///     reverse(x, y, r, dy, dx, g, ctx)      // y -= f(x), dx += f'(x)ᵀ dy, g added to
template <class L>
concept fused_part = has_parameters<L> && requires(const L l, matrix_view<const typename L::scalar> x, matrix_view<typename L::scalar> y, record_of<L> r,
                                                   const record_of<L> cr, gradient_of<L> g, const context& ctx) {
                       l.add_to(x, y, r, ctx);
                       l.reverse(x, y, cr, x, y, g, ctx);
                     };

namespace detail {

/// As explain_layer, for parts that may need a memory.
template <class L>
consteval bool explain_part() {
  if constexpr (conditioned_layer<L>)
    return true;
  else
    return explain_layer<L>();
}

/// The second input of conditioned parts and where its gradient is added. Other parts do not look.
template <class S>
struct conditioning {
  memory_view<S> memory{};
  matrix_view<S> gradient{};
};

template <class L, class S>
void forward_part(const L& l, matrix_view<const S> x, const conditioning<S>& m, matrix_view<S> y, const context& ctx) {
  if constexpr (conditioned_layer<L>)
    l.forward(x, m.memory, y, ctx);
  else
    l.forward(x, y, ctx);
}
template <class L, class S>
void forward_part(const L& l, matrix_view<const S> x, const conditioning<S>& m, matrix_view<S> y, record_of<L>& r, const context& ctx) {
  if constexpr (conditioned_layer<L>)
    l.forward(x, m.memory, y, r, ctx);
  else
    l.forward(x, y, r, ctx);
}
template <class L, class S>
void backward_part(const L& l, matrix_view<const S> x, const conditioning<S>& m, const record_of<L>& r, matrix_view<const S> dy, matrix_view<S> dx,
                   gradient_of<L>& g, const context& ctx) {
  if constexpr (conditioned_layer<L>)
    l.backward(x, m.memory, r, dy, dx, m.gradient, g, ctx);
  else
    l.backward(x, r, dy, dx, g, ctx);
}

/// Position-wise parts go in chunks (0: whole), others whole.
template <class L>
[[nodiscard]] bool goes_whole(index_t rows, index_t chunk) {
  return looks_across_tokens<L> || conditioned_layer<L> || fused_part<L> || chunk == 0 || chunk >= rows;
}
template <class L>
[[nodiscard]] std::size_t count_chunks(index_t rows, index_t chunk) {
  return goes_whole<L>(rows, chunk) ? 1 : static_cast<std::size_t>((rows + chunk - 1) / chunk);
}
/// f(first row, rows, number of the chunk, its context, its share of the call). A layer's own loss is a mean over the
/// rows it is given, so each chunk's is weighted by the share: the mean of all chunks' losses, whatever their size.
/// Losses that are not linear in the rows (the balance of experts: a product of two means) are balances within chunks
/// then, as those of micro-batches are.
template <class L, class F>
void each_chunk(index_t rows, index_t chunk, const context& ctx, F&& f) {
  if (goes_whole<L>(rows, chunk)) return f(index_t{0}, rows, std::size_t{0}, ctx, 1.0);
  const auto all = static_cast<double>(std::max<index_t>(1, ctx.count_valid(0, rows)));
  for (index_t first = 0; first < rows; first += chunk) {
    const index_t n = std::min(chunk, rows - first);
    const double share = static_cast<double>(ctx.count_valid(first, n)) / all;
    f(first, n, static_cast<std::size_t>(first / chunk), ctx.chunk(first, n, share), share);
  }
}
/// y += f(x). The records, one for each chunk, are left with their choices; none: nothing is kept.
template <class L, class S>
void add_part(const L& l, matrix_view<const S> x, const conditioning<S>& m, matrix_view<S> y, std::vector<record_of<L>>* records, index_t chunk,
              const context& ctx) {
  const std::size_t chunks = count_chunks<L>(x.rows(), chunk);
  if (records != nullptr) records->resize(chunks);
  if constexpr (fused_part<L>) {
    if (records != nullptr) return l.add_to(x, y, records->front(), ctx);
  }
  const scratch<S> room(ctx, chunks == 1 ? x.rows() : chunk, x.cols());
  each_chunk<L>(x.rows(), chunk, ctx, [&](index_t first, index_t n, std::size_t i, const context& c, double share) {
    const matrix_view<S> out = room.view().slice_rows(0, n);
    if (records != nullptr) {
      forward_part(l, x.slice_rows(first, n), m, out, (*records)[i], c);
      scale_auxiliary((*records)[i], share);
      forget((*records)[i]);
    } else {
      forward_part(l, x.slice_rows(first, n), m, out, c);
    }
    add<S>(out, y.slice_rows(first, n), c);
  });
}

/// y -= f(x), dx += f'(x)ᵀ dy: the part runs again with the choices it made.
template <class L, class S>
void reverse_part(const L& l, matrix_view<const S> x, const conditioning<S>& m, matrix_view<S> y, const std::vector<record_of<L>>& records,
                  matrix_view<const S> dy, matrix_view<S> dx, gradient_of<L>& g, index_t chunk, const context& ctx) {
  const std::size_t chunks = count_chunks<L>(x.rows(), chunk);
  require<state_error>(records.size() == chunks, "reversible: expected the record of a forward of these ", x.rows(), " rows in ", chunks,
                       " chunks, got one of ", records.size());
  if constexpr (fused_part<L>) {
    l.reverse(x, y, records.front(), dy, dx, g, ctx);
  } else {
    const scratch<S> room(ctx, chunks == 1 ? x.rows() : chunk, x.cols());
    each_chunk<L>(x.rows(), chunk, ctx, [&](index_t first, index_t n, std::size_t i, const context& c, double) {
      const matrix_view<S> out = room.view().slice_rows(0, n);
      record_of<L> again = records[i];
      forward_part(l, x.slice_rows(first, n), m, out, again, c);
      subtract<S>(out, y.slice_rows(first, n), c);
      backward_part(l, x.slice_rows(first, n), m, again, dy.slice_rows(first, n), out, g, c);
      add<S>(out, dx.slice_rows(first, n), c);
    });
  }
}

/// Whether a batch norm is anywhere inside.
template <class L>
[[nodiscard]] bool has_batch_norm(const L& l) {
  if constexpr (std::same_as<L, batch_norm<typename L::scalar>>) {
    return l.weight.size() != 0;
  } else {
    bool found = false;
    L::visit(
        [&](const field&, const auto& part) {
          if constexpr (has_parameters<std::remove_cvref_t<decltype(part)>>) found = found || has_batch_norm(part);
        },
        l);
    return found;
  }
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
