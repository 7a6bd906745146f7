#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <initializer_list>

#include "lithe/kernels/gemm.hpp"

namespace lithe::inline LITHE_ABI {

// Locality-sensitive hashing: T tokens, R rounds, D features of a query, N directions a round.

/// A bucket of one round. Two bytes, because the ids of all layers outlive their forward pass.
using bucket_t = std::uint16_t;
inline constexpr index_t max_buckets = 65535;  ///< of a round; padding takes one id more

/// How the bits of a sign hash become a bucket: `inverse`, bucket b has the bits b ^ (b >> 1), so neighbours differ in one plane; `forward`, the
/// bucket itself is k ^ (k >> 1), as in the authors' code of arXiv 2310.05869; `none`, the bits as they are.
enum class gray_code { inverse, forward, none };

/// The number of buckets of a round, as a product of up to 16 factors: {512}, or {16, 32}, which hashes at the cost of 48. Empty: automatic.
struct bucket_factors {
  std::array<index_t, 16> factor{};
  std::size_t count = 0;

  bucket_factors() = default;
  /// {16, 32}: 512 buckets; throws config_error for more than 16 factors.
  bucket_factors(std::initializer_list<index_t> f) : bucket_factors(std::span<const index_t>(f.begin(), f.size())) {}
  /// The same from a span.
  explicit bucket_factors(std::span<const index_t> f) : count(f.size()) {
    require<config_error>(count <= factor.size(), "bucket_factors: expected at most ", factor.size(), " factors, got ", count);
    std::copy(f.begin(), f.end(), factor.begin());
  }
  /// Whether the number of buckets is chosen automatically.
  [[nodiscard]] bool empty() const { return count == 0; }
  /// The `count` factors there are.
  [[nodiscard]] std::span<const index_t> span() const { return {factor.data(), count}; }
  /// Their product, or something above `max_buckets`; 0 with a factor below 1.
  [[nodiscard]] index_t total() const {
    index_t n = 1;
    for (const index_t f : span()) n = std::min(n, max_buckets + 1) * std::clamp<index_t>(f, 0, max_buckets + 1);
    return n;
  }
  /// The random directions that a round of `hash_rotations` needs: half of their sum.
  [[nodiscard]] index_t directions() const {
    index_t n = 0;
    for (const index_t f : span()) n += f / 2;
    return n;
  }
  /// "4 x 8", for messages.
  friend std::ostream& operator<<(std::ostream& out, const bucket_factors& f) {
    for (std::size_t i = 0; i < f.count; ++i) out << (i == 0 ? "" : " x ") << f.factor[i];
    return out;
  }
  /// Whether the factors are the same, in the same order.
  friend bool operator==(const bucket_factors& a, const bucket_factors& b) { return std::equal(a.span().begin(), a.span().end(), b.span().begin(), b.span().end()); }
};

/// The published ways to choose the number of buckets n for L tokens in chunks of m, L/m an integer division. `power_of_two` (Hugging Face):
/// n = 2^⌊log2(2 L/m)⌋, above 2 max(⌊√(P/m)⌋, m) as {2^⌊e/2⌋, 2^⌈e/2⌉} with e = log2 n and P the most positions; `trax`: n = 2 max(1, L/m), above
/// 128 as {v, 2 (n / 2v)} with v = 2^⌈log2 √n⌉; `two_per_chunk`: 2 L/m; `one_per_chunk`: L/m, rounded up to even. L/m above 32767 counts as that,
/// so that `bucket_t` holds the ids.
enum class bucket_rule { power_of_two, trax, two_per_chunk, one_per_chunk };

/// The number of buckets by a rule. `most_positions` 0: L.
[[nodiscard]] inline bucket_factors automatic_buckets(bucket_rule rule, index_t length, index_t chunk, index_t most_positions = 0) {
  const index_t chunks = std::clamp<index_t>(length / chunk, 1, max_buckets / 2);
  switch (rule) {
    case bucket_rule::trax: {
      const index_t n = 2 * chunks;
      if (n <= 128) return {n};
      const index_t v = index_t{1} << static_cast<int>(std::ceil(std::log2(std::sqrt(static_cast<double>(n)))));
      return {v, 2 * (n / (2 * v))};
    }
    case bucket_rule::two_per_chunk: return {2 * chunks};
    case bucket_rule::one_per_chunk: return {chunks + chunks % 2};
    case bucket_rule::power_of_two: break;
  }
  const int e = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(2 * chunks))) - 1;
  const auto root = static_cast<index_t>(std::sqrt(static_cast<double>((most_positions > 0 ? most_positions : length) / chunk)));
  if (index_t{1} << e <= 2 * std::max(root, chunk)) return {index_t{1} << e};
  return {index_t{1} << (e / 2), index_t{1} << (e - e / 2)};
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // Eigen's packets as template arguments

namespace detail {

inline constexpr index_t hash_rows = 128;  // tokens hashed at once: their products with the directions stay in the second-level cache

/// products [directions x hash_rows] = directions qᵀ for a few tokens; the columns past them, up to whole packets, are 0.
template <class S>
void project_on(matrix_view<const S> directions, matrix_view<const S> q, matrix_view<S> products, const context& ctx) {
  const index_t n = q.rows(), whole = round_up<S>(n);
  gemm_nt<S>(directions, q, products.slice_cols(0, n), ctx);
  for (index_t i = 0; n < whole && i < products.rows(); ++i) std::fill(products.row(i) + n, products.row(i) + whole, S(0));
}

/// For a packet of tokens: argmax of (p, -p) over `half` rows of p, the lowest index among equals; NaN is never the largest, and where there
/// is nothing but NaN the answer is 0. The index is a number of S, which is exact: it stays below 2 max_buckets.
template <class S>
auto signed_argmax(const S* p, index_t stride, index_t half) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::packet;
  const packet none = pset1<packet>(-std::numeric_limits<S>::infinity());
  packet most = none, least = none, most_at = pset1<packet>(S(0)), least_at = pset1<packet>(static_cast<S>(half));
  for (index_t j = 0; j < half; ++j, p += stride) {
    const packet x = ploadu<packet>(p), minus = pnegate(x);
    const packet up = pcmp_lt(most, x), down = pcmp_lt(least, minus);
    most = pselect(up, x, most);
    most_at = pselect(up, pset1<packet>(static_cast<S>(j)), most_at);
    least = pselect(down, minus, least);
    least_at = pselect(down, pset1<packet>(static_cast<S>(half + j)), least_at);
  }
  return pselect(pcmp_lt(most, least), least_at, most_at);
}

}  // namespace detail

/// Buckets by random rotations (arXiv 2001.04451, section 3; Andoni et al., arXiv 1509.02897): for each round r and factor f_k, with p = A q for the
/// f_k / 2 directions A of that factor,
///
///     a_k = argmax(concat(p, -p)),      bucket = a_1 + f_1 a_2 + f_1 f_2 a_3 + ...
///
/// The lowest index wins ties, NaN never wins, all NaN gives 0. q [T x D]; directions [R N x D], one a row, round by round, N =
/// factors.directions(); ids [R x T]. Every factor is even, their product at most `max_buckets`.
template <class S>
void hash_rotations(matrix_view<const S> q, matrix_view<const S> directions, const bucket_factors& factors, matrix_view<bucket_t> ids,
                    const context& ctx) {
  using namespace Eigen::internal;
  using packet = typename detail::tile_shape<S>::packet;
  constexpr index_t lanes = detail::tile_shape<S>::lanes;
  LITHE_ASSERT(directions.rows() == ids.rows() * factors.directions() && directions.cols() == q.cols() && ids.cols() == q.rows());
  LITHE_ASSERT(factors.total() <= max_buckets);
  ctx.exec->run(q.rows(), detail::hash_rows, [&](index_t first, index_t last) {
    const index_t n = last - first;
    const scratch<S> products(ctx, directions.rows(), detail::hash_rows);
    detail::project_on<S>(directions, q.slice_rows(first, n), products, ctx);
    for (index_t round = 0; round < ids.rows(); ++round)
      for (index_t t = 0; t < n; t += lanes) {
        const S* p = products.row(round * factors.directions()) + t;
        packet id = pset1<packet>(S(0));
        index_t step = 1;
        for (const index_t f : factors.span()) {
          id = pmadd(detail::signed_argmax(p, detail::hash_rows, f / 2), pset1<packet>(static_cast<S>(step)), id);
          p += f / 2 * detail::hash_rows;
          step *= f;
        }
        S number[lanes];
        pstoreu(number, id);
        for (index_t l = 0; l < std::min(lanes, n - t); ++l) ids(round, first + t + l) = static_cast<bucket_t>(number[l]);
      }
  });
}

/// Buckets by the signs of random projections: bit k of a code is [p_k · q > 0] (false for NaN), and `gray` makes a bucket of the code.
/// q [T x D]; planes [R u x D], u <= 15 of them a round; ids [R x T], below 2^u.
template <class S>
void hash_signs(matrix_view<const S> q, matrix_view<const S> planes, gray_code gray, matrix_view<bucket_t> ids, const context& ctx) {
  if (ids.rows() == 0) return;
  const index_t bits = planes.rows() / ids.rows();
  LITHE_ASSERT(planes.rows() == ids.rows() * bits && bits < 16 && planes.cols() == q.cols() && ids.cols() == q.rows());
  ctx.exec->run(q.rows(), detail::hash_rows, [&](index_t first, index_t last) {
    const index_t n = last - first;
    const scratch<S> products(ctx, planes.rows(), detail::hash_rows);
    detail::project_on<S>(planes, q.slice_rows(first, n), products, ctx);
    for (index_t round = 0; round < ids.rows(); ++round)
      for (index_t t = 0; t < n; ++t) {
        unsigned code = 0;
        for (index_t k = 0; k < bits; ++k) code |= (products.row(round * bits + k)[t] > S(0) ? 1U : 0U) << k;
        if (gray == gray_code::forward) code ^= code >> 1;
        if (gray == gray_code::inverse)
          for (unsigned shift = 1; shift < 16; shift *= 2) code ^= code >> shift;
        ids(round, first + t) = static_cast<bucket_t>(code);
      }
  });
}

/// Padding (mask 0) goes to a bucket of its own, behind all others. ids [R x T], mask [T] or empty.
inline void hash_padding(std::span<const std::uint8_t> mask, index_t buckets, matrix_view<bucket_t> ids) {
  for (index_t t = 0; t < static_cast<index_t>(mask.size()); ++t)
    for (index_t round = 0; mask[static_cast<std::size_t>(t)] == 0 && round < ids.rows(); ++round) ids(round, t) = static_cast<bucket_t>(buckets);
}

#pragma GCC diagnostic pop

}  // namespace lithe::inline LITHE_ABI
