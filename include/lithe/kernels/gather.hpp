#pragma once

#include <cstring>

#include "lithe/kernels/gather_kernel.hpp"
#include "lithe/kernels/gemm.hpp"
#include "lithe/kernels/sort_rows.hpp"

namespace lithe::inline LITHE_ABI {

/// What T tokens read of a table: token t takes row slots[t P + j] with weight weights[t P + j], for j < P = per_token.
/// Slot -1 means no pick (a masked token): it reads nothing, its weight is ignored and it gets no gradient.
template <class S>
struct picks {
  std::span<const slot_t> slots;
  std::span<const S> weights;
  index_t per_token = 0;
};

namespace detail {

/// Pieces of about 64 KiB of reads; whole tokens when there are enough of them, so that one worker reads a row from end to end.
inline index_t gather_grain(index_t tokens, index_t parts, index_t bytes_per_part) {
  const index_t grain = std::max<index_t>(1, (index_t{1} << 16) / std::max<index_t>(1, bytes_per_part));
  parts = std::max<index_t>(1, parts);  // none: nobody picks anything
  return tokens < 8 ? grain : (grain + parts - 1) / parts * parts;
}

/// Picks sorted by row. The tokens and weights of one row's picks stand next to each other: what they add up to is a gather_sum over the
/// tokens' rows, so a scatter-add runs without atomics and in the order of the picks.
template <class S>
struct sorted_picks {
  scratch<row_pick> by_row, spare;
  index_t count;              // picks that name a row
  scratch<slot_t> token;
  scratch<S> weight;
  scratch<index_t> start;     // of each row's picks, and the end of the last
  index_t segments = 0;       // rows that were picked

  sorted_picks(const picks<S>& p, index_t rows, const context& ctx)
      : by_row(ctx, static_cast<index_t>(p.slots.size())), spare(ctx, static_cast<index_t>(p.slots.size())),
        count(sort_rows(p.slots, rows, by_row.span(), spare.span())), token(ctx, count), weight(ctx, count), start(ctx, count + 1) {
    ctx.exec->run(count, 8192, [&](index_t first, index_t last) {
      const double inverse = 1.0 / static_cast<double>(p.per_token);  // (pick + 1/2) / P never rounds across an integer below 2^32
      for (index_t i = first; i < last; ++i) {
        token[i] = static_cast<slot_t>((by_row[i].pick + 0.5) * inverse);
        weight[i] = p.weights[by_row[i].pick];
      }
    });
    for (index_t i = 0; i < count; ++i)
      if (i == 0 || by_row[i].row != by_row[i - 1].row) start[segments++] = i;
    start[segments] = count;
  }
  [[nodiscard]] slot_t row(index_t segment) const { return by_row[start[segment]].row; }
  /// out = init + Σ w dy_t over the picks of a segment (none if negative), for a piece of at most sum_columns columns.
  void sum(index_t segment, matrix_view<const S> dy, const S* init, S* out, bool stream) const {
    const index_t begin = segment < 0 ? 0 : start[segment], end = segment < 0 ? 0 : start[segment + 1];
    sum_rows(dy.data(), dy.stride(), dy.cols(), token.data() + begin, weight.data() + begin, end - begin, count - begin, init, out, stream);
  }
};

}  // namespace detail

/// y_t = Σ_j w_tj table[slot_tj], or y_t += that sum.
///
/// table [N x D], y [T x D], p of T tokens; slots in [-1, N). The table may be far larger than any cache: 1 KiB pieces of rows are
/// read in turn with several on their way, which keeps memory as busy as a sequential read.
template <class S>
void gather_sum(matrix_view<const S> table, picks<S> p, matrix_view<S> y, const context& ctx, update mode = update::assign) {
  const index_t D = table.cols(), P = p.per_token, blocks = (D + detail::sum_columns<S> - 1) / detail::sum_columns<S>;
  const auto total = static_cast<index_t>(p.slots.size());
  LITHE_ASSERT(y.cols() == D && total == y.rows() * P && p.weights.size() == p.slots.size());
  LITHE_ASSERT(detail::slots_in_range(p.slots, table.rows()));
  const index_t part = std::min(D, detail::sum_columns<S>) * P * static_cast<index_t>(sizeof(S));
  ctx.exec->run(y.rows() * blocks, detail::gather_grain(y.rows(), blocks, part), [&](index_t first, index_t last) {
    for (index_t item = first; item < last; ++item) {
      const index_t t = item / blocks, c = item % blocks * detail::sum_columns<S>;
      S* out = y.row(t) + c;
      detail::sum_rows(table.data() + c, table.stride(), std::min(detail::sum_columns<S>, D - c), p.slots.data() + t * P, p.weights.data() + t * P, P,
                       total - t * P, mode == update::add ? out : nullptr, out, false);
    }
  });
}

/// dw_tj = <dy_t, table[slot_tj]>, 0 where there is no pick. table [N x D], dy [T x D], slots and dw of T per_token elements.
template <class S>
void row_dots(matrix_view<const S> table, std::span<const slot_t> slots, index_t per_token, matrix_view<const S> dy, std::span<S> dw,
              const context& ctx) {
  constexpr index_t part = 32;  // picks
  const index_t D = table.cols(), P = per_token, parts = (P + part - 1) / part;
  const auto total = static_cast<index_t>(slots.size());
  LITHE_ASSERT(dy.cols() == D && total == dy.rows() * P && dw.size() == slots.size());
  LITHE_ASSERT(detail::slots_in_range(slots, table.rows()));
  const index_t bytes = D * std::min(P, part) * static_cast<index_t>(sizeof(S));
  ctx.exec->run(dy.rows() * parts, detail::gather_grain(dy.rows(), parts, bytes), [&](index_t first, index_t last) {
    for (index_t item = first; item < last; ++item) {
      const index_t t = item / parts, j = item % parts * part, at = t * P + j;
      detail::dot_rows(table, slots.data() + at, std::min(part, P - j), total - at, dy.row(t), dw.data() + at);
    }
  });
}

/// g[slot_tj] += w_tj dy_t for every pick: the gradient of `gather_sum` for the table.
///
/// dy [T x D], g of the table's rows and D columns. The picks are sorted by row, and one worker sums a row (or 1 KiB of it) in the
/// order of the picks onto what g holds: no atomics, the same bits with any number of workers. Allocates only while g grows.
template <class S>
void scatter_add(picks<S> p, matrix_view<const S> dy, row_gradient<S>& g, const context& ctx) {
  const index_t D = g.cols;
  LITHE_ASSERT(dy.cols() == D && static_cast<index_t>(p.slots.size()) == dy.rows() * p.per_token && p.weights.size() == p.slots.size());
  const detail::sorted_picks<S> sorted(p, g.total_rows, ctx);
  if (sorted.segments == 0) return;

  // Merge with the rows that g has. An output row is an old one (or none) plus the picks of one segment (or none).
  const index_t old = g.count(), touched = sorted.segments, most = old == 0 ? 0 : old + touched;
  // An empty g needs no such plan: the other workers would have to fetch it.
  const scratch<std::int32_t> from(ctx, most), segment(ctx, most);
  g.spare_rows.resize(static_cast<std::size_t>(old + touched));
  index_t count = 0;
  if (old == 0)
    for (; count < touched; ++count) g.spare_rows[static_cast<std::size_t>(count)] = sorted.row(count);
  else
    for (index_t i = 0, s = 0; i < old || s < touched; ++count) {
      const slot_t a = i < old ? g.rows[static_cast<std::size_t>(i)] : std::numeric_limits<slot_t>::max();
      const slot_t b = s < touched ? sorted.row(s) : std::numeric_limits<slot_t>::max();
      g.spare_rows[static_cast<std::size_t>(count)] = std::min(a, b);
      from[count] = a <= b ? static_cast<std::int32_t>(i++) : -1;
      segment[count] = b <= a ? static_cast<std::int32_t>(s++) : -1;
    }
  g.spare_rows.resize(static_cast<std::size_t>(count));
  const bool in_place = count == old;
  auto& target = in_place || old == 0 ? g.storage : g.spare_storage;
  g.reserve(target, static_cast<std::size_t>(count));

  const index_t blocks = (D + detail::sum_columns<S> - 1) / detail::sum_columns<S>;
  const bool stream = !in_place && count * D * static_cast<index_t>(sizeof(S)) >= detail::stream_bytes;
  ctx.exec->run(count * blocks, 16 * blocks, [&](index_t first, index_t last) {
    for (index_t item = first; item < last; ++item) {
      const index_t r = item / blocks, c = item % blocks * detail::sum_columns<S>;
      const index_t added = old == 0 ? r : segment[r], before = old == 0 ? -1 : from[r];
      if (in_place && added < 0) continue;
      sorted.sum(added, dy.slice_cols(c, std::min(detail::sum_columns<S>, D - c)), before < 0 ? nullptr : g.storage.data() + before * D + c,
                 target.data() + r * D + c, stream);
    }
    detail::stream_fence();
  });
  if (&target != &g.storage) g.storage.swap(g.spare_storage);
  g.rows.swap(g.spare_rows);
}

/// target[slot_tj] += w_tj dy_t for every pick: the same for a target small enough to be held dense (sub-keys). dy [T x D], target [N x D].
template <class S>
void scatter_add(picks<S> p, matrix_view<const S> dy, matrix_view<S> target, const context& ctx) {
  const index_t D = target.cols(), blocks = (D + detail::sum_columns<S> - 1) / detail::sum_columns<S>;
  LITHE_ASSERT(dy.cols() == D && static_cast<index_t>(p.slots.size()) == dy.rows() * p.per_token && p.weights.size() == p.slots.size());
  const detail::sorted_picks<S> sorted(p, target.rows(), ctx);
  ctx.exec->run(sorted.segments * blocks, 16 * blocks, [&](index_t first, index_t last) {
    for (index_t item = first; item < last; ++item) {
      const index_t s = item / blocks, c = item % blocks * detail::sum_columns<S>;
      S* out = target.row(sorted.row(s)) + c;
      sorted.sum(s, dy.slice_cols(c, std::min(detail::sum_columns<S>, D - c)), out, out, false);
    }
  });
}

}  // namespace lithe::inline LITHE_ABI
