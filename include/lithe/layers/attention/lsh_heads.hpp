#pragma once

#include "lithe/kernels/chunk_attention.hpp"
#include "lithe/kernels/chunk_attention_gradient.hpp"
#include "lithe/layers/attention/lsh_config.hpp"

namespace lithe::inline LITHE_ABI::detail {

/// Some heads of LSH attention over all sequences of a call, between the projections: T tokens, G heads of D features worked on together, R rounds.
/// Each head's queries are [T x D] apart from the others', because sorted tokens are gathered one by one.
template <class S>
struct lsh_heads {
  const lsh_attention_config& config;
  const token_hash<S>& hash;
  const context& ctx;
  index_t T, first, count;       // of the heads
  matrix_view<const S> q, v;     // [G T x D]
  const S* scales;               // [G T], of the keys
  matrix_view<const bucket_t> ids;    // [H R x T]
  matrix_view<position_t> order{};    // [G R x T]
  matrix_view<position_t> places{};   // [G R x T], where keys count once

  /// One sequence as the kernels cut it. An exact one is a single chunk of all its tokens, in their own order.
  struct sequence {
    index_t begin, length, chunk, chunks, before, after, rounds;
    bool exact;
  };
  [[nodiscard]] sequence find(index_t s) const {
    const index_t begin = ctx.rows.begin(s), n = ctx.rows.end(s, T) - begin;
    if (n <= config.exact_up_to) return {begin, n, std::max<index_t>(n, 1), n == 0 ? 0 : 1, 0, 0, 1, true};
    const index_t padded = (n + config.pad_to - 1) / config.pad_to * config.pad_to;
    return {begin, n, config.chunk, padded / config.chunk, config.before, config.after, config.hash.rounds, false};
  }
  /// Its buckets; tokens that are padding are in one more.
  [[nodiscard]] bucket_factors buckets(const sequence& s) const { return hash.buckets("lsh_attention", s.chunks * s.chunk, s.chunk); }
  /// How many heads to work on together: while they are small, so that short calls have work for all workers. Depends on shapes alone.
  static index_t together(index_t tokens, index_t width, index_t heads) {
    return std::clamp<index_t>((index_t{1} << 22) / std::max<index_t>(1, tokens * width), 1, heads);
  }

  /// Fills `order` (and `places`).
  void sort() const {
    const index_t R = config.hash.rounds, n = ctx.rows.count();
    ctx.exec->run(count * n * R, 1, [&](index_t from, index_t to) {
      for (index_t i = from; i < to; ++i) {
        const index_t g = i / (n * R), r = i % R;
        const sequence s = find(i / R % n);
        const auto part = [&](position_t* row) { return std::span<position_t>(row + s.begin, static_cast<std::size_t>(s.length)); };
        if (r >= s.rounds) continue;
        const auto sorted = part(order.row(g * R + r));
        if (s.exact) {
          std::iota(sorted.begin(), sorted.end(), 0);
          continue;
        }
        const scratch<index_t> starts(ctx, buckets(s).total() + 2);
        bucket_sort({ids.row((first + g) * R + r) + s.begin, sorted.size()}, starts.span(), sorted);
        if (!config.count_once) continue;
        const auto place = part(places.row(g * R + r));
        for (std::size_t p = 0; p < sorted.size(); ++p) place[static_cast<std::size_t>(sorted[p])] = static_cast<position_t>(p);
      }
    });
  }

  /// o(g) [T x V] of the g-th of these heads; maximum and sum [G x T].
  template <class Output>
  void forward(Output&& o, matrix_view<S> maximum, matrix_view<S> sum) const {
    const scratch<piece> pieces(ctx, room());
    index_t n = 0;
    each_sequence([&](const sequence& s) { n = cut(s, 0, s.chunks, pieces.data(), n, [](index_t) { return true; }); });
    for (index_t round = 0; round < config.hash.rounds; ++round)
      ctx.exec->run(n * count, 1, [&](index_t from, index_t to) {
        for (index_t i = from; i < to; ++i) {
          const piece& p = pieces[i % n];  // head by head, so that in every round a worker finds its heads in its cache
          const index_t g = i / n, begin = p.of.begin;
          if (round >= p.of.rounds) continue;
          chunk_attention<S> tile(ctx, head(p.of, g));
          tile.run(round, p.first, p.last, maximum.row(g) + begin, sum.row(g) + begin, o(g).slice_rows(begin, p.of.length));
        }
      });
  }

  /// dq and dv [G T x D], which are added to, from g = dL/do [G T x D] and the dot products of its rows with those of o [G x T].
  ///
  /// Runs of chunks are worked on at the same time if no window reaches both: first the even runs of a round, then the odd ones, then the chunks
  /// at its ends, whose windows may reach anything. The bits do not depend on the workers.
  void backward(matrix_view<const S> g, matrix_view<const S> maximum, matrix_view<const S> sum, matrix_view<const S> dots, matrix_view<S> dq,
                matrix_view<S> dv) const {
    const index_t most = room();
    const scratch<piece> pieces(ctx, 4 * most);
    index_t n[3];
    const auto ends = [&](const sequence& s) {  // the first and the last chunk whose windows stay inside the round
      if (config.wrap == chunk_wrap::none || s.exact) return std::pair<index_t, index_t>{0, s.chunks};
      return s.before + s.after >= s.chunks ? std::pair<index_t, index_t>{0, 0} : std::pair<index_t, index_t>{s.before, s.chunks - s.after};
    };
    for (index_t colour = 0; colour < 2; ++colour) {
      n[colour] = 0;
      each_sequence([&](const sequence& s) {
        n[colour] = cut(s, ends(s).first, ends(s).second, pieces.data() + colour * most, n[colour], [&](index_t i) { return i % 2 == colour; });
      });
    }
    n[2] = 0;
    each_sequence([&](const sequence& s) {
      if (s.chunks > 0) pieces[2 * most + n[2]++] = {s, ends(s).first, ends(s).second};
    });
    for (index_t round = 0; round < config.hash.rounds; ++round)
      for (index_t colour = 0; colour < 3; ++colour)
        ctx.exec->run(n[colour] * count, 1, [&](index_t from, index_t to) {
          for (index_t i = from; i < to; ++i) {
            const piece& p = pieces[colour * most + i % n[colour]];
            const index_t h = i / n[colour], begin = p.of.begin, row = h * T + begin, length = p.of.length;
            if (round >= p.of.rounds || (colour == 2 && p.first == 0 && p.last == p.of.chunks)) continue;
            chunk_attention_gradient<S> tile(ctx, head(p.of, h), config.norm);
            const chunk_softmax<S> softmax{g.slice_rows(row, length), maximum.row(h) + begin, sum.row(h) + begin, dots.row(h) + begin};
            const auto run = [&](index_t a, index_t b) {
              if (a < b) tile.run(round, a, b, softmax, dq.slice_rows(row, length), dv.slice_rows(row, length));
            };
            if (colour < 2) {
              run(p.first, p.last);
            } else {
              run(0, p.first);
              run(p.last, p.of.chunks);
            }
          }
        });
  }

  /// The g-th of these heads in one sequence, for the kernels.
  [[nodiscard]] chunked_head<S> head(const sequence& s, index_t g) const {
    const index_t R = config.hash.rounds, row = g * T + s.begin;
    chunked_head<S> h;
    h.q = q.slice_rows(row, s.length);
    h.v = v.slice_rows(row, s.length);
    h.scales = scales + row;
    if (!ctx.mask.empty()) h.valid = ctx.mask.data() + s.begin;
    h.order = matrix_view<const position_t>(order).slice_rows(g * R, s.rounds).slice_cols(s.begin, s.length);
    h.chunk = s.chunk;
    h.chunks = s.chunks;
    h.before = s.before;
    h.after = s.after;
    h.causal = config.causal;
    h.self = config.self;
    h.hidden = config.hidden;
    if (!s.exact) {
      h.wrap = config.wrap;
      h.merge = config.merge;
      h.other_bucket = config.other_bucket;
      h.ids = ids.slice_rows((first + g) * R, R).slice_cols(s.begin, s.length);
      if (config.count_once)
        h.places = matrix_view<const position_t>(places).slice_rows(g * R, R).slice_cols(s.begin, s.length);
    }
    if (ctx.train) h.dropout = config.dropout;
    h.key = ctx.key.child(weights_child);
    h.row = (first + g) * R * T + s.begin;
    h.round_rows = T;
    return h;
  }

 private:
  static constexpr std::uint64_t weights_child = 1;

  struct piece {
    sequence of;
    index_t first, last;  // chunks
  };
  template <class F>
  void each_sequence(F&& f) const {
    for (index_t s = 0; s < ctx.rows.count(); ++s) f(find(s));
  }
  // Chunks of one piece: as many as a window has at least, so that only neighbours meet.
  static index_t run_length(const sequence& s) { return std::max(s.before + 1 + s.after, (512 + s.chunk - 1) / s.chunk); }
  // At most so many pieces are cut.
  [[nodiscard]] index_t room() const {
    index_t n = 1;
    each_sequence([&](const sequence& s) { n += 1 + s.chunks / run_length(s); });
    return n;
  }
  template <class Wanted>
  static index_t cut(const sequence& s, index_t from, index_t to, piece* pieces, index_t n, Wanted&& wanted) {
    const index_t runs = to <= from ? 0 : std::max<index_t>(1, (to - from) / run_length(s));
    for (index_t i = 0; i < runs; ++i)
      if (wanted(i)) pieces[n++] = {s, from + (to - from) * i / runs, from + (to - from) * (i + 1) / runs};
    return n;
  }
};

}  // namespace lithe::inline LITHE_ABI::detail
