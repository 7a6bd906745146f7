#pragma once

#include "lithe/kernels/hashing.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/layers/layer.hpp"

namespace lithe::inline LITHE_ABI {

/// Where buckets come from: random rotations (`hash_rotations`), signs of random projections (`hash_signs`), the caller, or nowhere: one bucket.
enum class hash_family { rotation, sign, external, constant };

/// Which tokens are hashed with the same random directions: those of a head, of a head in one sequence, or all.
enum class direction_sharing { head, head_and_sequence, all };

struct token_hash_config {
  hash_family family = hash_family::rotation;
  index_t rounds = 1;
  bucket_factors buckets{};  ///< of a round; empty: by `rule`, from the length of the sequence
  bucket_rule rule = bucket_rule::power_of_two;
  index_t most_positions = 0;  ///< for bucket_rule::power_of_two; 0: the length of the sequence
  gray_code gray = gray_code::inverse;
  direction_sharing sharing = direction_sharing::head;
};

/// Hashes the queries of heads: R rounds, N directions a round, D features. Directions are standard normal, drawn anew
/// from the context's key in every training forward and from `key` otherwise, so inference always finds the same
/// buckets (arXiv 2001.04451, section 3). Both the key and given directions are saved with a model: other directions
/// are another function.
template <std::floating_point S>
struct token_hash {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> key, given;
  };

  token_hash_config config;
  matrix<S> key;    ///< [1 x 4] of role::key; empty: the key 0
  matrix<S> given;  ///< directions [H R N x D] to use instead, (head, round, direction) by row; empty: draw

  token_hash() = default;
  /// Throws config_error in the name of `who` without a round, and for buckets that `check` refuses.
  token_hash(const char* who, token_hash_config c, rng_key k) : config(c) {
    set_key(k);
    require<config_error>(c.rounds >= 1, who, ": expected at least 1 round of hashing, got ", c.rounds);
    require<config_error>(c.most_positions >= 0, who, ": expected most_positions of 0 (the length) or more, got ", c.most_positions);
    if (!c.buckets.empty()) check(who, c.buckets);
  }

  /// Draws directions in inference from this key.
  void set_key(rng_key k) {
    key.resize(1, 4);
    for (index_t i = 0; i < 4; ++i) key(0, i) = static_cast<S>(k.value >> (16 * i) & 0xFFFFU);
  }
  /// The key that directions are drawn from in inference.
  [[nodiscard]] rng_key drawn_from() const {
    rng_key k;
    for (index_t i = 0; i < key.size(); ++i) k.value |= static_cast<std::uint64_t>(key.data()[i]) << (16 * i);
    return k;
  }

  /// The buckets of a sequence of `length` tokens in chunks. Throws config_error if the ids do not fit `bucket_t`.
  [[nodiscard]] bucket_factors buckets(const char* who, index_t length, index_t chunk) const {
    if (config.family == hash_family::constant) return {1};
    if (!config.buckets.empty()) return config.buckets;
    const bucket_factors f = automatic_buckets(config.rule, length, chunk, config.most_positions);
    check(who, f);
    return f;
  }
  /// Directions a round.
  [[nodiscard]] index_t directions(const bucket_factors& f) const {
    if (config.family == hash_family::rotation) return f.directions();
    return config.family == hash_family::sign ? static_cast<index_t>(std::bit_width(static_cast<std::uint64_t>(f.total()))) - 1 : 0;
  }

  /// The directions of one of `heads` in a sequence, to [R N x D]; all heads and sequences may have the same. Throws shape_error if those given
  /// are not for so many heads, rounds and buckets.
  void draw(const char* who, index_t head, index_t heads, index_t sequence, const bucket_factors& f, matrix_view<S> to, const context& ctx) const {
    const index_t n = config.rounds * directions(f);
    LITHE_ASSERT(to.rows() == n);
    if (given.size() != 0) {
      require<shape_error>(given.rows() == heads * n && given.cols() == to.cols(), who, ": expected given directions of ", heads, " heads with ", n,
                           " rows each and ", to.cols(), " columns, got ", to_text(given.rows(), given.cols()));
      to.map() = given.middleRows(head * n, n);
      return;
    }
    rng_key k = ctx.train ? ctx.key.child(directions_child) : drawn_from();
    if (config.sharing != direction_sharing::all) k = k.child(static_cast<std::uint64_t>(head));
    if (config.sharing == direction_sharing::head_and_sequence) k = k.child(static_cast<std::uint64_t>(sequence));
    ctx.exec->run(n, 16, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) fill_normal<S>(to.slice_rows(i, 1), 1.0, k.child(static_cast<std::uint64_t>(i)));
    });
  }
  /// ids [R x T] of the queries q [T x D] by `directions` from `draw`.
  void hash(matrix_view<const S> q, matrix_view<const S> directions, const bucket_factors& f, matrix_view<bucket_t> ids, const context& ctx) const {
    if (config.family == hash_family::rotation) hash_rotations<S>(q, directions, f, ids, ctx);
    if (config.family == hash_family::sign) hash_signs<S>(q, directions, config.gray, ids, ctx);
    if (config.family == hash_family::constant)
      for (index_t r = 0; r < ids.rows(); ++r) std::fill_n(ids.row(r), ids.cols(), bucket_t{0});
  }

  /// Throws config_error unless the caller's ids [R x T] are below `buckets`; those of padding may be anything.
  static void check_external(const char* who, matrix_view<const bucket_t> ids, index_t buckets, std::span<const std::uint8_t> mask) {
    for (index_t r = 0; r < ids.rows(); ++r)
      for (index_t t = 0; t < ids.cols(); ++t)
        require<config_error>(ids(r, t) < buckets || (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0), who,
                              ": expected external bucket ids below ", buckets, ", got ", ids(r, t));
  }
  /// Throws config_error unless f is 1 to max_buckets buckets: of even factors for rotations, a power of 2 for signs.
  void check(const char* who, const bucket_factors& f) const {
    require<config_error>(f.total() >= 1 && f.total() <= max_buckets, who, ": expected 1 to ", max_buckets, " buckets a round, got ", f);
    if (config.family == hash_family::rotation)
      for (const index_t n : f.span())
        require<config_error>(n >= 2 && n % 2 == 0, who, ": expected every bucket count to be even and at least 2 for random rotations, got ", f);
    if (config.family == hash_family::sign)
      require<config_error>(f.total() >= 2 && std::has_single_bit(static_cast<std::uint64_t>(f.total())), who,
                            ": expected a power of 2 of at least 2 buckets for a sign hash, got ", f);
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f(field("key", role::key), s.key...);
    f(field("given", role::added_state), s.given...);
  }

 private:
  static constexpr std::uint64_t directions_child = 0x6469726563740001;  // apart from the small numbers of other draws
};

}  // namespace lithe::inline LITHE_ABI
