#pragma once

#include <bit>

#include "lithe/kernels/attention_tile.hpp"
#include "lithe/kernels/bucket_sort.hpp"
#include "lithe/kernels/dropout_factors.hpp"

namespace lithe::inline LITHE_ABI {

// Attention among tokens sorted by bucket: L tokens of one head of one sequence, R rounds, chunks of m sorted tokens, D features of a query,
// V of a value. The queries of a chunk see the keys of a window of w = before + 1 + after chunks around it.

/// What happens to the score of a pair that should not count: `value` takes its place, or is added to it (its gradient then flows on).
struct mask_rule {
  double value = 0;
  bool replace = true;
  /// Whether it leaves every score as it is.
  [[nodiscard]] bool idle() const { return value == 0 && !replace; }
};

/// What stands before the first and behind the last chunk of a round: the last of the round before and the first of the next (circular over all
/// rounds), the last and first of the same round, or nothing.
enum class chunk_wrap { circular, round, none };

/// How rounds are merged: one softmax over all pairs of all rounds, or the mean of the rounds' own softmaxes.
enum class round_merge { softmax, mean };

/// One head of one sequence, and how it is cut and masked. For token t: query q_t, key scales[t] q_t, value v_t.
template <class S>
struct chunked_head {
  matrix_view<const S> q, v;               ///< [L x D], [L x V]
  const S* scales = nullptr;               ///< [L]
  const std::uint8_t* valid = nullptr;     ///< [L], 0 = padding, which is no key; or none
  matrix_view<const position_t> order{};   ///< [R x L]: the sorted tokens of each round
  matrix_view<const bucket_t> ids{};       ///< [R x L], for `other_bucket` alone
  matrix_view<const position_t> places{};  ///< [R x L]: the place of each token in the order; with it, keys met several times count once
  index_t chunk = 1, chunks = 0, before = 0, after = 0;
  chunk_wrap wrap = chunk_wrap::circular;
  round_merge merge = round_merge::softmax;
  bool causal = false;
  mask_rule self{-1e5}, hidden{-1e9}, other_bucket{0, false};
  double dropout = 0;  ///< of the weights
  rng_key key{};       ///< of the draws
  index_t row = 0, round_rows = 0;  ///< the draws of query t in round r are those of row `row + r round_rows + t`

  [[nodiscard]] index_t length() const { return q.rows(); }            ///< L
  [[nodiscard]] index_t rounds() const { return order.rows(); }        ///< R
  [[nodiscard]] index_t window() const { return before + 1 + after; }  ///< chunks that a query sees

  /// A chunk among all rounds.
  struct place {
    index_t round, chunk;  // chunk -1: nothing there
  };
  /// Which chunk stands where chunk c of a round would be, c from -before to chunks + after - 1.
  [[nodiscard]] place find(index_t round, index_t c) const {
    const auto modulo = [](index_t a, index_t n) { return (a % n + n) % n; };
    if (c >= 0 && c < chunks) return {round, c};
    if (wrap == chunk_wrap::none) return {round, -1};
    if (wrap == chunk_wrap::round) return {round, modulo(c, chunks)};
    const index_t g = modulo(round * chunks + c, rounds() * chunks);
    return {g / chunks, g % chunks};
  }
};

// As in attention_tile.hpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace detail {

/// A number of S for each position that compares as the positions do: their bits behind those of the denormal numbers.
template <class S>
S position_code(position_t t) {
  if constexpr (sizeof(S) == 4)
    return std::bit_cast<S>(static_cast<std::uint32_t>(t) + (std::uint32_t{1} << 23));
  else
    return static_cast<S>(t);
}

inline constexpr index_t chunk_queries = 64;  // queries whose scores are held at once

/// The window around a chunk as a ring of gathered chunks: when the window moves on by one, one chunk is gathered and the others stay. A slot
/// holds queries [m x D], keys transposed [D x m] and values [m x V], all filled up with zeros to whole packets.
template <class S>
struct chunk_window {
  static constexpr S infinity = std::numeric_limits<S>::infinity();

  chunked_head<S> head;
  index_t slots, chunk, width, D, query_stride, value_stride;  // chunk: m up to whole packets; width: of all slots
  scratch<S> queries, keys, values, scales;
  scratch<S> codes, seen_from, hidden;  // of each key: its position, the first position that sees it, what it scores for the others
  scratch<S> factors;
  scratch<position_t> tokens;
  scratch<index_t> counts, rounds;  // of each slot: keys, and the round that they are from
  scratch<std::uint8_t> finite_slots;    // of each slot: whether its values are

  chunk_window(const context& ctx, const chunked_head<S>& h)
      : head(h), slots(h.window()), chunk(tile::round_up<S>(h.chunk)), width(slots * chunk), D(h.q.cols()), query_stride(tile::round_up<S>(D)),
        value_stride(tile::round_up<S>(h.v.cols())), queries(ctx, width, query_stride), keys(ctx, slots * D, chunk), values(ctx, width, value_stride),
        scales(ctx, width), codes(ctx, width), seen_from(ctx, width), hidden(ctx, width), factors(ctx, h.dropout > 0 ? width : 0),
        tokens(ctx, width), counts(ctx, slots), rounds(ctx, slots), finite_slots(ctx, slots) {
    factors.map().setZero();
  }

  /// The slot of chunk c of a round, c >= -before: the same wherever the walk began.
  [[nodiscard]] index_t slot(index_t c) const { return (c + head.before) % slots; }

  /// Gathers what stands at chunk c of a round, and asks for what comes after it.
  void load(index_t round, index_t c) {
    const index_t s = slot(c), base = s * chunk;
    const run_of_tokens now = find(round, c);
    counts[s] = now.count;
    rounds[s] = now.round;
    for (index_t i = 0; i < now.count; ++i) {
      const index_t j = base + i;
      const position_t t = now.tokens[i];
      tokens[j] = t;
      scales[j] = head.scales[t];
      codes[j] = position_code<S>(t);
      seen_from[j] = head.valid != nullptr && head.valid[t] == 0 ? infinity : head.causal ? codes[j] : -infinity;
      hidden[j] = static_cast<S>(head.hidden.value);
      pad(head.q.row(t), D, queries.row(j), query_stride);
      pad(head.v.row(t), head.v.cols(), values.row(j), value_stride);
    }
    for (index_t j = base + now.count; j < base + chunk; ++j) {  // nobody's: weighs nothing
      scales[j] = 0;
      codes[j] = -1;
      seen_from[j] = infinity;
      hidden[j] = -infinity;
      std::fill_n(queries.row(j), query_stride, S(0));
      std::fill_n(values.row(j), value_stride, S(0));
    }
    finite_slots[s] = tile::all_finite(values.row(base), chunk * value_stride);
    pack_transposed(queries.row(base), query_stride, chunk, D, keys.row(s * D), chunk);
    using row = Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>>;
    for (index_t k = 0; k < D; ++k) row(keys.row(s * D + k), chunk) *= row(scales.data() + base, chunk);
    const run_of_tokens next = find(round, c + 1);
    prefetch(head.q, next.tokens, next.count);
    prefetch(head.v, next.tokens, next.count);
    prefetch(head.scales, next.tokens, next.count);
  }

  /// Whether no value in the window is a NaN or an infinity.
  [[nodiscard]] bool finite() const { return std::all_of(finite_slots.data(), finite_slots.data() + slots, [](std::uint8_t f) { return f != 0; }); }

  /// Brings what m holds of n tokens nearer (to the second-level cache, rows would overrun the first): rows of a matrix or single numbers, of
  /// tokens given or in the ring from row `base` on.
  template <class M>
  void prefetch(M m, index_t base, index_t n) const {
    prefetch(m, tokens.data() + base, n);
  }
  template <class E>
  static void prefetch(matrix_view<E> m, const position_t* which, index_t n) {
    for (index_t i = 0; i < n; ++i)
      for (index_t k = 0; k < m.cols(); k += line) __builtin_prefetch(m.row(which[i]) + k, 0, 2);
  }
  static void prefetch(const S* m, const position_t* which, index_t n) {
    for (index_t i = 0; m != nullptr && i < n; ++i) __builtin_prefetch(m + which[i], 0, 2);
  }

  /// scores [M x width] of the M queries from row `first` of the ring on, before any mask.
  void score(index_t first, index_t M, S* scores) const {
    for (index_t s = 0; s < slots; ++s)
      tile::product<S>(M, chunk, D, tile::by_rows<S>{queries.row(first), query_stride}, keys.row(s * D), chunk, scores + s * chunk, width);
  }

  /// Masks the scores s of the query in row i of the ring, which is of this round; returns the largest. `live`, unless it is null, receives 1
  /// where the score still depends on the query, 0 where it was replaced.
  S mask(index_t round, index_t i, S* s, S* live) const {
    using namespace Eigen::internal;
    using P = tile::packet<S>;
    if (live != nullptr) std::fill_n(live, width, S(1));
    if (!head.other_bucket.idle()) hide_other_buckets(round, i, s, live);
    if (head.places.data() != nullptr) count_once(round, i, s);
    const P me = pset1<P>(codes[i]), self = pset1<P>(static_cast<S>(head.self.value)), zero = pset1<P>(S(0));
    const P keep_self = pset1<P>(S(head.self.replace ? 0 : 1));
    P most = pset1<P>(-infinity);
    for (index_t j = 0; j < width; j += tile::lanes<S>) {
      const P hides = pcmp_lt(me, ploadu<P>(seen_from.data() + j)), mine = pcmp_eq(me, ploadu<P>(codes.data() + j));
      P x = ploadu<P>(s + j);
      const P kept = head.hidden.replace ? zero : pselect(pcmp_eq(x, x), x, zero);  // a NaN that is hidden stays so
      x = pselect(hides, padd(kept, ploadu<P>(hidden.data() + j)), x);
      x = pselect(mine, pmadd(x, keep_self, self), x);
      pstoreu(s + j, x);
      most = pmax(most, x);
      if (live == nullptr) continue;
      P l = ploadu<P>(live + j);
      if (head.hidden.replace) l = pselect(hides, zero, l);
      if (head.self.replace) l = pselect(mine, zero, l);
      pstoreu(live + j, l);
    }
    return predux_max(most);
  }

  /// s becomes exp(s - shift); returns the sum.
  S exponentials(S* s, S shift) const {
    using namespace Eigen::internal;
    using P = tile::packet<S>;
    const P offset = pset1<P>(shift);
    P total = pset1<P>(S(0));
    for (index_t j = 0; j < width; j += tile::lanes<S>) {
      const P p = tile::exp_or_zero<S>(psub(ploadu<P>(s + j), offset));
      pstoreu(s + j, p);
      total = padd(total, p);
    }
    return predux(total);
  }

  /// The dropout factors of the weights of the query in row i of the ring.
  const S* draw(index_t round, index_t i) const {
    const index_t row = head.row + round * head.round_rows + tokens[i];
    for (index_t s = 0; s < slots; ++s)
      draw_factors(head.key, static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(s * head.chunk), head.chunk, head.dropout,
                   factors.data() + s * chunk);
    return factors.data();
  }

 private:
  struct run_of_tokens {
    index_t round, count;
    const position_t* tokens;
  };
  [[nodiscard]] run_of_tokens find(index_t round, index_t c) const {
    const auto [from_round, from] = head.find(round, c);
    if (from < 0) return {from_round, 0, nullptr};
    const index_t first = from * head.chunk;
    return {from_round, std::clamp<index_t>(head.length() - first, 0, head.chunk), head.order.row(from_round) + first};
  }
  static constexpr index_t line = 64 / static_cast<index_t>(sizeof(S));
  static void pad(const S* from, index_t n, S* to, index_t stride) { std::fill(std::copy_n(from, n, to), to + stride, S(0)); }

  [[nodiscard]] bool same_bucket(index_t round, index_t i, index_t from_round, index_t j) const {
    return from_round == round && head.ids(round, tokens[i]) == head.ids(round, tokens[j]);
  }
  void hide_other_buckets(index_t round, index_t i, S* s, S* live) const {
    each_key([&](index_t slot, index_t j) {
      if (same_bucket(round, i, rounds[slot], j)) return;
      s[j] = (head.other_bucket.replace ? S(0) : s[j]) + static_cast<S>(head.other_bucket.value);
      if (live != nullptr && head.other_bucket.replace) live[j] = 0;
    });
  }
  // s_ij -= log N_ij, N_ij = the number of slots that hold j in the windows of i over all rounds.
  void count_once(index_t round, index_t i, S* s) const {
    const bool buckets = !head.other_bucket.idle();
    each_key([&](index_t slot, index_t j) {
      if (buckets && !same_bucket(round, i, rounds[slot], j)) return;
      index_t n = 0;
      for (index_t r = 0; r < head.rounds(); ++r)
        for (index_t c = head.places(r, tokens[i]) / head.chunk, offset = -head.before; offset <= head.after; ++offset) {
          const auto [from_round, from] = head.find(r, c + offset);
          if (from < 0 || head.places(from_round, tokens[j]) / head.chunk != from) continue;
          n += !buckets || same_bucket(r, i, from_round, j) ? 1 : 0;
        }
      s[j] -= std::log(static_cast<S>(n));
    });
  }
  template <class F>
  void each_key(F&& f) const {
    for (index_t s = 0; s < slots; ++s)
      for (index_t j = s * chunk; j < s * chunk + counts[s]; ++j) f(s, j);
  }
};

}  // namespace detail

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace lithe::inline LITHE_ABI
