#pragma once

#include "lithe/layers/attention/key_value_cache.hpp"
#include "lithe/layers/attention/lsh_config.hpp"

namespace lithe::inline LITHE_ABI {

/// What decoding LSH attention remembers: queries and values, and for each head and round the tokens by bucket, as lists that grow at their
/// ends, so that nothing is sorted for a token. The number of buckets and the directions are chosen when the cache is made.
template <class S>
struct lsh_cache {
  key_value_cache<S> tokens;   ///< queries stand where the keys would
  token_hash<S> hash;          ///< with buckets and directions fixed: of all slots one by one, if sequences have their own
  std::vector<index_t> sequence;      ///< the slot in which the text of a slot began, and whose directions it has
  std::vector<index_t> old_sequence;  // `permute` needs it
  matrix<S> scales;            ///< of the keys, [(place, head) x capacity]
  matrix<bucket_t> ids;        ///< [(place, head, round) x capacity]
  matrix<position_t> next, previous;  ///< the tokens behind and before it in its bucket, or -1, [(place, head, round) x capacity]
  matrix<position_t> first, last, count;  ///< of each bucket, [(place, head, round) x buckets]
  std::vector<std::uint8_t> hashed;  ///< of each place: whether its sequence began with more than `exact_up_to` tokens

  lsh_cache() = default;
  /// Empty slots of up to `capacity` tokens, with the buckets of a sequence of that length. Throws config_error.
  lsh_cache(const token_hash<S>& h, const lsh_attention_config& c, index_t slots, index_t capacity)
      : tokens("lsh_attention", slots, capacity, c.heads, c.head_width), hash(h) {
    const index_t padded = std::max<index_t>(1, (capacity + c.pad_to - 1) / c.pad_to) * c.pad_to;
    hash.config.buckets = hash.buckets("lsh_attention", padded, c.chunk);
    const index_t n = c.hash.rounds * hash.directions(hash.config.buckets), lists = slots * c.heads * c.hash.rounds, buckets = hash.config.buckets.total();
    const index_t sequences = alone() ? slots : 1;
    matrix<S> directions(sequences * c.heads * n, c.head_width);
    for (index_t i = 0; n != 0 && i < sequences * c.heads; ++i)
      hash.draw("lsh_attention", i % c.heads, c.heads, i / c.heads, hash.config.buckets,
                view(directions).slice_rows(i * n, n), {});
    sequence.assign(static_cast<std::size_t>(slots), 0);
    old_sequence = sequence;
    hash.given = std::move(directions);
    scales.resize(slots * c.heads, capacity);
    ids.resize(lists, capacity);
    next.resize(lists, capacity);
    previous.resize(lists, capacity);
    hashed.resize(static_cast<std::size_t>(slots));
    for (auto* m : {&first, &last, &count}) m->setZero(lists, buckets);
  }

  /// Throws, before anything has changed, unless the cache is one of such a layer and the T new rows that ctx describes
  /// fit their slots.
  void check(const lsh_attention_config& c, index_t T, const context& ctx) {
    require<state_error>(hash.config.rounds == c.hash.rounds && hash.config.family == c.hash.family &&
                             hash.config.sharing == c.hash.sharing,
                         "lsh_attention: the cache is of another layer: expected ", c.hash.rounds,
                         " rounds of the same hash, got ", hash.config.rounds);
    tokens.check("lsh_attention", T, ctx, c.heads, c.head_width);
  }
  /// Whether each sequence has directions of its own.
  [[nodiscard]] bool alone() const { return hash.config.sharing == direction_sharing::head_and_sequence; }
  /// The directions of a head for the text of a slot.
  [[nodiscard]] matrix_view<const S> directions(index_t slot, index_t head) const {
    const index_t n = hash.config.rounds * hash.directions(hash.config.buckets),
                  s = alone() ? sequence[static_cast<std::size_t>(slot)] : 0;
    return view(hash.given).slice_rows((s * tokens.heads + head) * n, n);
  }
  /// The row of `scales` for a head of a slot.
  [[nodiscard]] index_t head_row(index_t slot, index_t head) const { return place(slot) * tokens.heads + head; }
  /// The row of `ids` and of the lists for a round of a head of a slot.
  [[nodiscard]] index_t list_row(index_t slot, index_t head, index_t round) const { return head_row(slot, head) * hash.config.rounds + round; }

  /// Puts token t, which is later than all of a list's, into its bucket.
  void link(index_t row, position_t t) {
    const bucket_t b = ids(row, t);
    const bool alone = count(row, b)++ == 0;
    previous(row, t) = alone ? -1 : last(row, b);
    (alone ? first(row, b) : next(row, last(row, b))) = t;
    last(row, b) = t;
    next(row, t) = -1;
  }
  /// The flag in `hashed` of the place where a slot's rows are.
  [[nodiscard]] std::uint8_t& began_hashed(index_t slot) { return hashed[static_cast<std::size_t>(place(slot))]; }
  /// Whether a slot's sequence began with more than `exact_up_to` tokens.
  [[nodiscard]] bool began_hashed(index_t slot) const { return hashed[static_cast<std::size_t>(place(slot))] != 0; }
  /// The rank of the newest token of a bucket in the order by (bucket, position).
  [[nodiscard]] index_t rank(index_t row, bucket_t b) const {
    index_t n = -1;
    for (index_t i = 0; i <= b; ++i) n += count(row, i);
    return n;
  }
  /// f(token) for `n` ranks from `start` on, around the end. A bucket is entered from its nearer end: a window is near the end of the newest's.
  template <class F>
  void each_rank(index_t row, index_t start, index_t n, F&& f) const {
    if (n <= 0) return;
    index_t b = 0;
    for (; start >= count(row, b); ++b) start -= count(row, b);
    const index_t behind = count(row, b) - 1 - start;
    position_t t = start <= behind ? first(row, b) : last(row, b);
    for (index_t i = 0; i < std::min(start, behind); ++i) t = start <= behind ? next(row, t) : previous(row, t);
    for (;; t = next(row, t)) {
      while (t < 0) {
        b = (b + 1) % count.cols();
        t = count(row, b) == 0 ? -1 : first(row, b);
      }
      f(t);
      if (--n == 0) return;
    }
  }

  /// Costs as much as the tokens that are forgotten.
  void truncate(index_t slot, index_t length) {
    const index_t before = slot >= 0 && slot < static_cast<index_t>(tokens.length.size()) ? tokens.tokens(slot) : 0;
    tokens.truncate("lsh_attention", slot, length);
    const index_t lists = tokens.heads * hash.config.rounds;
    for (index_t row = place(slot) * lists; row < (place(slot) + 1) * lists; ++row)
      if (length == 0)
        count.row(row).setZero();
      else
        for (auto t = static_cast<position_t>(before - 1); t >= length; --t) unlink(row, t);
  }
  void permute(std::span<const index_t> order) {
    const index_t H = tokens.heads, lists = H * hash.config.rounds;
    tokens.permute("lsh_attention", order, [&](index_t from, index_t to, index_t n) {
      scales.block(to * H, 0, H, n) = scales.block(from * H, 0, H, n);
      ids.block(to * lists, 0, lists, n) = ids.block(from * lists, 0, lists, n);
      next.block(to * lists, 0, lists, n) = next.block(from * lists, 0, lists, n);
      previous.block(to * lists, 0, lists, n) = previous.block(from * lists, 0, lists, n);
      hashed[static_cast<std::size_t>(to)] = hashed[static_cast<std::size_t>(from)];
      for (auto* m : {&first, &last, &count}) m->middleRows(to * lists, lists) = m->middleRows(from * lists, lists);
    });
    old_sequence.swap(sequence);
    for (std::size_t i = 0; i < order.size(); ++i) sequence[i] = old_sequence[static_cast<std::size_t>(order[i])];
  }

 private:
  /// Takes token t, the newest of a list, out of its bucket; it may be that a call which failed has not put it there.
  void unlink(index_t row, position_t t) {
    const bucket_t b = ids(row, t);
    if (count(row, b) == 0 || last(row, b) != t) return;
    last(row, b) = previous(row, t);
    if (--count(row, b) > 0) next(row, last(row, b)) = -1;
  }
  [[nodiscard]] index_t place(index_t slot) const { return tokens.place[static_cast<std::size_t>(slot)]; }
};

namespace detail {

/// The newest linked token t of one head of a slot against those before it: per round the window around its rank (spec of the published
/// decoder: ranks (p / m - before) m and the w m that follow, around the end of the order), or all tokens while there are few. A sequence that
/// began with so few sees all of them up to a chunk.
template <class S>
void attend_cached(const lsh_attention_config& config, const lsh_cache<S>& c, index_t slot, index_t head, position_t t, S* o, const context& ctx) {
  const index_t R = config.hash.rounds, m = config.chunk, window = (config.before + 1 + config.after) * m, length = t + 1, d = config.head_width;
  const bool exact = length <= (c.began_hashed(slot) ? config.exact_up_to : std::max(config.exact_up_to, m));
  const index_t rounds = exact ? 1 : R, most = exact ? length : window;
  const matrix_view<const S> q = view(c.tokens.keys).slice_rows(c.tokens.row(slot, head), length), v = view(c.tokens.values).slice_rows(c.tokens.row(slot, head), length);
  const S* scales = c.scales.row(c.head_row(slot, head)).data();
  const scratch<position_t> keys(ctx, rounds, most), met(ctx, config.count_once && !exact ? length : 0);
  const scratch<index_t> counts(ctx, rounds);
  const scratch<S> scores(ctx, rounds, most);
  met.map().setZero();
  const auto meets = [&](index_t r, position_t j) {
    const index_t row = c.list_row(slot, head, r);
    return config.other_bucket.idle() || c.ids(row, j) == c.ids(row, t);
  };
  for (index_t r = 0; r < rounds; ++r) {
    index_t n = 0;
    if (exact) {
      for (; n < length; ++n) keys.row(r)[n] = static_cast<position_t>(n);
    } else {
      const index_t row = c.list_row(slot, head, r);
      index_t start = (c.rank(row, c.ids(row, t)) / m - config.before) * m, ranks = window;
      if (config.wrap == chunk_wrap::none) {
        ranks = std::min(start + window, length) - std::max<index_t>(0, start);
        start = std::max<index_t>(0, start);
      }
      c.each_rank(row, (start % length + length) % length, ranks, [&](position_t j) {
        keys.row(r)[n++] = j;
        if (met.cols() != 0 && meets(r, j)) ++met[j];
      });
    }
    counts[r] = n;
  }
  const auto change = [](S& s, const mask_rule& rule) { s = (rule.replace ? S(0) : s) + static_cast<S>(rule.value); };
  for (index_t r = 0; r < rounds; ++r)
    for (index_t i = 0; i < counts[r]; ++i) {
      const position_t j = keys.row(r)[i];
      S& s = scores.row(r)[i];
      s = scales[j] * (q.row_array(t) * q.row_array(j)).sum();
      if (!exact && !meets(r, j))
        change(s, config.other_bucket);
      else if (met.cols() != 0)
        s -= std::log(static_cast<S>(met[j]));
      if (j == t) change(s, config.self);
    }
  Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>> out(o, d);
  out.setZero();
  const auto join = [&](index_t first, index_t last, S share) {
    S most_score = -std::numeric_limits<S>::infinity(), sum = 0;
    for (index_t r = first; r < last; ++r)
      for (index_t i = 0; i < counts[r]; ++i) most_score = std::max(most_score, scores.row(r)[i]);
    for (index_t r = first; r < last; ++r)
      for (index_t i = 0; i < counts[r]; ++i) sum += scores.row(r)[i] = std::exp(scores.row(r)[i] - most_score);
    for (index_t r = first; r < last; ++r)
      for (index_t i = 0; i < counts[r]; ++i) out += share / sum * scores.row(r)[i] * v.slice_cols(0, d).row_array(keys.row(r)[i]);
  };
  if (config.merge == round_merge::softmax || exact)
    join(0, rounds, S(1));
  else
    for (index_t r = 0; r < rounds; ++r) join(r, r + 1, 1 / static_cast<S>(rounds));
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
