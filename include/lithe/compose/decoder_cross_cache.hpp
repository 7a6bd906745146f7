#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/kernels/gather.hpp"
#include "lithe/layers/attention/cross_attention.hpp"

// R new rows, X rows of memory, D features, W features of a head filled up to whole packets
namespace lithe::inline LITHE_ABI {

/// The keys and values that a cross-attention makes of a memory, each source sequence the first time that somebody looks at it. Beams of one
/// source share them: `source[slot]` says which sequence of the memory a slot reads.
template <class S>
struct cross_cache {
  std::vector<index_t> source;      ///< of each slot
  std::vector<index_t> old_source;  // `permute` needs it
  std::vector<std::uint8_t> known;  ///< sources whose keys and values are there
  matrix<S> keys, values;           ///< (source, head, row) by row
  index_t projected = 0;            ///< rows of memory that were projected so far
};

/// A cache for slots that read the sources 0, 1, 2, ... of a memory.
template <class S>
[[nodiscard]] cross_cache<S> make_cross_cache(index_t slots) {
  cross_cache<S> c;
  c.source.resize(static_cast<std::size_t>(slots));
  for (index_t s = 0; s < slots; ++s) c.source[static_cast<std::size_t>(s)] = s;
  c.old_source = c.source;
  return c;
}

/// Forgets everything; from now on slot s reads sequence source[s] of a memory. Throws index_error for a sequence that is not there.
template <class S>
void start_cross_cache(const cross_attention<S>& l, memory_view<S> m, std::span<const index_t> source, cross_cache<S>& c) {
  require<shape_error>(source.size() == c.source.size(), "cross_cache: expected the source of each of ", c.source.size(), " slots, got ",
                       source.size());
  m.rows.check("cross_cache", m.x.rows());
  for (const index_t s : source)
    require<index_error>(s >= 0 && s < m.rows.count(), "cross_cache: expected a source below ", m.rows.count(), ", got ", s);
  std::copy(source.begin(), source.end(), c.source.begin());
  c.known.assign(static_cast<std::size_t>(m.rows.count()), 0);
  c.keys.resize(m.x.rows() * l.config.key_value_heads, detail::tile::round_up<S>(l.config.head_width));
  c.values.resize(c.keys.rows(), c.keys.cols());
  c.projected = 0;
}

namespace detail {

/// Keys and values of the sources that these sequences see for the first time, in one product each.
template <class S>
void project_new_sources(const cross_attention<S>& l, memory_view<S> m, cross_cache<S>& c, const context& ctx) {
  const index_t sequences = ctx.rows.count(), G = l.key.weight.rows(), d = l.config.head_width, W = c.keys.cols();
  scratch<index_t> fresh(ctx, sequences);
  index_t count = 0, rows = 0;
  for (index_t s = 0; s < sequences; ++s) {
    const index_t from = c.source[static_cast<std::size_t>(ctx.slot(s))];
    auto& known = c.known[static_cast<std::size_t>(from)];
    if (known != 0) continue;
    known = 1;
    fresh[count++] = from;
    rows += m.rows.end(from, m.x.rows()) - m.rows.begin(from);
  }
  if (count == 0) return;
  const scratch<S> x(ctx, rows, m.x.cols()), k(ctx, rows, G), v(ctx, rows, G);
  const auto each = [&](auto&& f) {
    index_t at = 0;
    for (index_t i = 0; i < count; ++i) {
      const index_t begin = m.rows.begin(fresh[i]), n = m.rows.end(fresh[i], m.x.rows()) - begin;
      f(begin, n, at);
      at += n;
    }
  };
  each([&](index_t begin, index_t n, index_t at) { x.view().slice_rows(at, n).map() = m.x.slice_rows(begin, n).map(); });
  l.key.forward(x, k, ctx.position_wise());
  l.value.forward(x, v, ctx.position_wise());
  each([&](index_t begin, index_t n, index_t at) {
    for (index_t h = 0; h < l.config.key_value_heads; ++h) {
      const index_t to = (begin * l.config.key_value_heads + h * n) * W;
      tile::pad_rows<S>(k.view().slice_cols(h * d, d).slice_rows(at, n), c.keys.data() + to);
      tile::pad_rows<S>(v.view().slice_cols(h * d, d).slice_rows(at, n), c.values.data() + to);
    }
  });
  c.projected += rows;
}

}  // namespace detail

/// y = l(x, m) for new rows x [R x D] of the slots that ctx.slots names, with the keys and values of the cache: the values of `l.forward`.
template <class S>
void cross_decode(const cross_attention<S>& l, matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, cross_cache<S>& c, const context& ctx) {
  constexpr index_t few = 12;
  require<state_error>(c.known.size() == static_cast<std::size_t>(m.rows.count()) && c.keys.rows() == m.x.rows() * l.config.key_value_heads,
                       "cross_cache: expected the memory that the cache was started with");
  require<state_error>(c.keys.cols() == detail::tile::round_up<S>(l.config.head_width),
                       "cross_cache: the cache is of another layer: expected heads of ", l.config.head_width,
                       " numbers filled up to whole packets, got rows of ", c.keys.cols());
  ctx.rows.check("cross_cache", x.rows());
  require<shape_error>(ctx.slots.empty() || static_cast<index_t>(ctx.slots.size()) == ctx.rows.count(),
                       "cross_cache: expected a slot for each of ", ctx.rows.count(), " sequences, got ",
                       ctx.slots.size());
  for (index_t s = 0; s < ctx.rows.count(); ++s)
    require<index_error>(ctx.slot(s) >= 0 && ctx.slot(s) < static_cast<index_t>(c.source.size()),
                         "cross_cache: expected a slot below ", c.source.size(), ", got ", ctx.slot(s));
  detail::project_new_sources(l, m, c, ctx);
  const index_t R = x.rows(), d = l.config.head_width, W = c.keys.cols(), kv = l.config.key_value_heads, shared = l.config.heads / kv;
  const scratch<S> q(ctx, R, l.query.weight.rows()), o(ctx, R, l.query.weight.rows());
  l.query.forward(x, q, ctx);
  ctx.exec->run(ctx.rows.count() * kv, 4, [&](index_t first, index_t last) {
    const scratch<S> rows(ctx, few, W), out(ctx, few, W);
    for (index_t piece = first; piece < last; ++piece) {
      const index_t s = piece / kv, h = piece % kv, i = ctx.rows.begin(s), M = (ctx.rows.end(s, R) - i) * shared;
      const index_t from = c.source[static_cast<std::size_t>(ctx.slot(s))], begin = m.rows.begin(from), N = m.rows.end(from, m.x.rows()) - begin;
      const S* k = c.keys.data() + (begin * kv + h * N) * W;
      const S* v = c.values.data() + (begin * kv + h * N) * W;
      index_t visible[few];
      std::fill_n(visible, few, N);
      for (index_t r0 = 0; r0 < M; r0 += few) {
        const index_t n = std::min(few, M - r0);
        const auto at = [&](auto& matrix, index_t r) { return matrix.row(i + (r0 + r) / shared) + (h * shared + (r0 + r) % shared) * d; };
        for (index_t r = 0; r < n; ++r) detail::tile::pad_rows<S>({at(q, r), 1, d, d}, rows.row(r), static_cast<S>(l.config.scale));
        if (N > 0)
          attend_few<S>(rows.view().slice_rows(0, n), k, v, visible, out.view().slice_rows(0, n), ctx);
        else
          out.map().setZero();
        for (index_t r = 0; r < n; ++r) std::copy_n(out.row(r), d, at(o, r));
      }
    }
  });
  l.output.forward(o, y, ctx);
}

/// Slot i becomes what slot order[i] was. Throws shape_error or index_error for an order that is not one; then nothing
/// has changed.
template <class S>
void permute_cross_cache(cross_cache<S>& c, std::span<const index_t> order) {
  require<shape_error>(order.size() == c.source.size(), "cross_cache: expected an order of ", c.source.size(),
                       " slots, got ", order.size());
  for (const index_t from : order)
    require<index_error>(from >= 0 && from < static_cast<index_t>(c.source.size()),
                         "cross_cache: expected a slot below ", c.source.size(), ", got ", from);
  c.old_source.swap(c.source);
  for (std::size_t i = 0; i < order.size(); ++i) c.source[i] = c.old_source[static_cast<std::size_t>(order[i])];
}

}  // namespace lithe::inline LITHE_ABI
