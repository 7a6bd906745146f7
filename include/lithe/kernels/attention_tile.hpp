#pragma once

#include <cmath>
#include <limits>
#include <numbers>

#include "lithe/kernels/gemm_kernel.hpp"
#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

// Attention, one head and one tile at a time: M queries against N keys, D features of queries and keys, V features of values.
// Nothing here knows of layers, heads or sequences.

inline constexpr index_t attention_keys = 192;    ///< keys in one tile, at most
inline constexpr index_t attention_queries = 48;  ///< queries whose scores are held at once: with the keys' 36 KiB of float scores

// GCC reports the undefined registers inside its own intrinsics wherever they are inlined, and packets for their alignment.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace detail::tile {

template <class S>
using packet = typename Eigen::internal::packet_traits<S>::type;
template <class S>
inline constexpr index_t lanes = Eigen::internal::unpacket_traits<packet<S>>::size;
template <class S>
constexpr index_t round_up(index_t n) {
  return (n + lanes<S> - 1) / lanes<S> * lanes<S>;
}
using Eigen::internal::pload;
using Eigen::internal::ploadu;
using Eigen::internal::pmadd;
using Eigen::internal::pset1;
using Eigen::internal::pstoreu;

// Accumulators fill three quarters of the vector registers; the rest holds a row of b and a broadcast element of a.
inline constexpr bool many_registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32;
inline constexpr int widest = many_registers ? 4 : 2;
template <int V>
inline constexpr int tallest = std::min(12, (many_registers ? 24 : 12) / V);

/// Left factor stored by rows; the stride of score tiles is a constant, so that the rows of a block need one pointer.
template <class S, class Stride = index_t>
struct by_rows {
  const S* data;
  Stride stride;
  [[gnu::always_inline]] S operator()(index_t i, index_t k) const { return data[i * stride + k]; }
  by_rows from(index_t i, index_t k) const { return {data + i * stride + k, stride}; }
};
/// Left factor stored by columns: the transpose of a score tile.
template <class S, class Stride = index_t>
struct by_columns {
  const S* data;
  Stride stride;
  [[gnu::always_inline]] S operator()(index_t i, index_t k) const { return data[k * stride + i]; }
  by_columns from(index_t i, index_t k) const { return {data + k * stride + i, stride}; }
};
using score_stride = std::integral_constant<index_t, attention_keys>;

/// c = a b, or with `decay` c = diag(decay) c + a b, for R rows and V packets of columns.
template <int R, int V, class S, class A>
void product_block(A a, const S* b, index_t ldb, index_t depth, S* c, index_t ldc, const S* decay) {
  using P = packet<S>;
  P sum[R][V];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = pset1<P>(S(0));
  for (index_t k = 0; k < depth; ++k, b += ldb) {
    P row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = ploadu<P>(b + v * lanes<S>);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const P x = pset1<P>(a(i, k));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = pmadd(x, row[v], sum[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i, c += ldc) {
    if (decay != nullptr) {
      const P d = pset1<P>(decay[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = pmadd(d, ploadu<P>(c + v * lanes<S>), sum[i][v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) pstoreu(c + v * lanes<S>, sum[i][v]);
  }
}

/// Which part of a product is wanted, because the rest of the scores is hidden. Each array has one entry for each row of the product
/// and does not fall; a block of rows takes what any of its rows needs.
struct bounds {
  const index_t* columns = nullptr;    ///< the first so many columns
  const index_t* depth_end = nullptr;  ///< sum over k below this
  const index_t* depth_begin = nullptr;
};

template <int R, int V, class S, class A>
void product_rows(index_t i, index_t m, index_t column, index_t depth, A a, const S* b, index_t ldb, S* c, index_t ldc, const S* decay, bounds w) {
  for (; i + R <= m; i += R) {
    const index_t first = w.depth_begin != nullptr ? std::min(depth, w.depth_begin[i]) : 0;
    const index_t last = w.depth_end != nullptr ? w.depth_end[i + R - 1] : depth;
    if ((w.columns != nullptr && w.columns[i + R - 1] <= column) || (w.depth_end != nullptr && last == 0)) continue;
    product_block<R, V>(a.from(i, first), b + first * ldb, ldb, last - first, c + i * ldc, ldc, decay != nullptr ? decay + i : nullptr);
  }
  if constexpr (R > 1) {
    constexpr int next = R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    product_rows<next, V>(i, m, column, depth, a, b, ldb, c, ldc, decay, w);
  }
}

/// c [m x n] = a [m x depth] b [depth x n], or c = diag(decay) c + a b. n is a multiple of the packet.
template <class S, class A>
void product(index_t m, index_t n, index_t depth, A a, const S* b, index_t ldb, S* c, index_t ldc, const S* decay = nullptr, bounds w = {}) {
  index_t j = 0;
  const auto panels = [&]<int V>(std::integral_constant<int, V>) {
    for (; j + V * lanes<S> <= n; j += V * lanes<S>) product_rows<tallest<V>, V>(0, m, j, depth, a, b + j, ldb, c + j, ldc, decay, w);
  };
  if constexpr (widest == 4) panels(std::integral_constant<int, 4>{});
  panels(std::integral_constant<int, 2>{});
  panels(std::integral_constant<int, 1>{});
}

/// exp(x) for x <= 0 (to some units in the last place), but exactly 0 below the smallest normal number: what is hidden weighs nothing,
/// and denormal factors would slow the products down. NaN stays NaN.
template <class S>
packet<S> exp_or_zero(packet<S> x) {
  using namespace Eigen::internal;
  using P = packet<S>;
  constexpr S least = S(0.9999 * std::numbers::ln2 * (std::numeric_limits<S>::min_exponent - 1));
  P y;
  if constexpr (std::is_same_v<S, float> && lanes < S >> 1) {
    // Half the work of Eigen's: no clamping, because what would need it is thrown away below. x = n ln 2 + r; n stands in the low bits
    // of x log2(e) + 1.5 * 2^23, and exp r = 1 + r + r² g(r), g interpolated at Chebyshev points (relative error 1.1e-8).
    using I = typename unpacket_traits<P>::integer_packet;
    const P magic = pset1<P>(12582912.0F), one = pset1<P>(1.0F);
    const P shifted = pmadd(x, pset1<P>(1.44269504F), magic);
    const P r = pmadd(psub(shifted, magic), pset1<P>(-0.693147181F), x);
    y = pmadd(r, pset1<P>(0.00139269266F), pset1<P>(0.00836377387F));
    y = pmadd(y, r, pset1<P>(0.0416665501F));
    y = pmadd(y, r, pset1<P>(0.166665734F));
    y = pmadd(y, r, pset1<P>(0.5F));
    y = pmadd(pmadd(y, r, one), r, one);
    y = pmul(y, preinterpret<P>(padd(plogical_shift_left<23>(preinterpret<I>(shifted)), preinterpret<I>(one))));
  } else {
    y = pexp(x);
  }
  return pandnot(y, pcmp_lt(x, pset1<P>(least)));
}

/// to [rows x round_up(columns)] = scale * source, filled up with zeros.
template <class S>
void pad_rows(matrix_view<const S> source, S* to, S scale = S(1)) {
  const index_t width = round_up<S>(source.cols());
  for (index_t i = 0; i < source.rows(); ++i, to += width) {
    const S* from = source.row(i);
    for (index_t j = 0; j < source.cols(); ++j) to[j] = scale * from[j];
    std::fill(to + source.cols(), to + width, S(0));
  }
}

/// to [columns x round_up(rows)] = scale * sourceᵀ, filled up with zeros.
template <class S>
void pack_scaled_transposed(matrix_view<const S> source, S* to, S scale) {
  const index_t width = round_up<S>(source.rows());
  pack_transposed(source.data(), source.stride(), source.rows(), source.cols(), to, width);
  Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>(to, source.cols() * width) *= scale;
}

}  // namespace detail::tile

/// What a query may see. Every key; the plainest of the masks that the tiles take. `visible(i)`: query i sees the first so many keys
/// (it does not fall with i); `adjust(i, first, n, scores)`: change the scores of keys first .. first+n-1 (a bias, -inf to hide);
/// `hides()`: whether `adjust` may hide a key; `collect(i, first, n, gradient)`: what backward found for those scores, and may change. A mask that
/// drops weights behind the softmax also has `drop(i, first, n, factors)`: whether it does, and if so what the weights of those keys are multiplied with.
struct see_all {
  /// Without end: all keys are seen.
  [[nodiscard]] index_t visible(index_t) const { return std::numeric_limits<index_t>::max(); }
  /// Leaves the scores as they are.
  template <class S>
  void adjust(index_t, index_t, index_t, S*) const {}
  /// Never.
  [[nodiscard]] bool hides() const { return false; }
  /// Leaves the gradients of the scores as they are.
  template <class S>
  void collect(index_t, index_t, index_t, const S*) const {}
};

namespace detail::tile {

template <class Mask, class S>
concept dropping_mask = requires(const Mask& m, index_t i, S* factors) {
  { m.drop(i, i, i, factors) } -> std::same_as<bool>;
};

/// Whether none of n numbers is a NaN or an infinity.
template <class S>
bool all_finite(const S* a, index_t n) {
  return (Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>(a, n) * S(0)).sum() == S(0);
}

/// c = diag(decay) c + a b as `product` has it, row after row and without the terms whose weight is 0: what is hidden stays hidden even if its value is
/// a NaN or an infinity.
template <class S>
void careful_product(index_t m, index_t n, index_t depth, const S* a, index_t lda, const S* b, index_t ldb, S* c, index_t ldc, const S* decay) {
  using row = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
  using const_row = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>;
  for (index_t i = 0; i < m; ++i) {
    row sum(c + i * ldc, n);
    if (decay == nullptr)
      sum.setZero();
    else
      sum *= decay[i];
    for (index_t k = 0; k < depth; ++k)
      if (const S weight = a[i * lda + k]; weight != S(0)) sum += weight * const_row(b + k * ldb, n);
  }
}

/// a *= b, n numbers.
template <class S>
void scale_by(S* a, const S* b, index_t n) {
  using row = Eigen::Array<S, Eigen::Dynamic, 1>;
  Eigen::Map<row>(a, n) *= Eigen::Map<const row>(b, n);
}

}  // namespace detail::tile

/// Keys and values of one tile, as the products want them: scale * kᵀ [D x N], v [N x V].
template <class S>
class key_tile {
 public:
  /// Room for attention_keys keys of D = key_width and values of V = value_width numbers.
  key_tile(const context& ctx, index_t key_width, index_t value_width)
      : keys_(ctx, key_width, attention_keys), values_(ctx, attention_keys, detail::tile::round_up<S>(value_width)) {}

  /// Takes the keys k [N x D] and values v [N x V], N at most attention_keys; both are copied.
  void load(matrix_view<const S> k, matrix_view<const S> v, S scale) {
    LITHE_ASSERT(k.rows() <= attention_keys && v.rows() == k.rows());
    count_ = k.rows();
    detail::tile::pack_scaled_transposed(k, keys_.data(), scale);
    detail::tile::pad_rows(v, values_.data());
  }
  /// N, the keys that were loaded last.
  [[nodiscard]] index_t count() const { return count_; }
  /// scale * kᵀ [D x N], each row filled up to whole packets.
  [[nodiscard]] const S* keys() const { return keys_.data(); }
  /// v [N x V], each row filled up to whole packets.
  [[nodiscard]] const S* values() const { return values_.data(); }
  /// Whether no value is a NaN or an infinity.
  [[nodiscard]] bool finite() const { return detail::tile::all_finite(values_.data(), count_ * values_.cols()); }

 private:
  scratch<S> keys_, values_;
  index_t count_ = 0;
};

/// Attention of up to `capacity` queries, fed with tiles of keys one after the other (online softmax, arXiv 1805.02867, algorithm 3;
/// arXiv 2205.14135, algorithm 1). With s = scale q kᵀ (after the mask), and for each query
///
///     m' = max(m, max s),  p = exp(s - m'),  l' = exp(m - m') l + Σ p,  o' = exp(m - m') o + p v;   at the end o / l and m + log l
///
/// A query that sees no key gets zeros and a log-sum-exp of -inf.
template <class S>
class query_block {
 public:
  /// Room for `capacity` queries and outputs of value_width numbers.
  query_block(const context& ctx, index_t capacity, index_t value_width)
      : width_(detail::tile::round_up<S>(value_width)),
        value_width_(value_width),
        output_(ctx, capacity, width_),
        maximum_(ctx, capacity),
        sum_(ctx, capacity),
        scores_(ctx, attention_queries, attention_keys) {}

  /// Starts anew with the queries q; their rows must stay until finish.
  void begin(matrix_view<const S> q) {
    LITHE_ASSERT(q.rows() <= output_.rows());
    q_ = q;
    std::fill_n(output_.data(), q.rows() * width_, S(0));
    std::fill_n(maximum_.data(), q.rows(), -std::numeric_limits<S>::infinity());
    std::fill_n(sum_.data(), q.rows(), S(0));
  }

  /// Lets the queries see a tile whose first key is number `first` in the mask's counting.
  template <class Mask>
  void add(const key_tile<S>& tile, index_t first, const Mask& mask) {
    using namespace detail::tile;
    const bool hidden = mask.hides() || mask.visible(0) - first < tile.count(), careful = hidden && !tile.finite();
    for (index_t i0 = 0; i0 < q_.rows(); i0 += attention_queries) {
      const index_t m = std::min(attention_queries, q_.rows() - i0);
      index_t visible[attention_queries];
      for (index_t i = 0; i < m; ++i) visible[i] = std::clamp<index_t>(mask.visible(i0 + i) - first, 0, tile.count());
      if (visible[m - 1] == 0) continue;
      const index_t n = round_up<S>(tile.count());
      S decay[round_up<S>(attention_queries)] = {};
      product<S>(m, n, q_.cols(), by_rows<S>{q_.row(i0), q_.stride()}, tile.keys(), n, scores_.data(), attention_keys, nullptr, {.columns = visible});
      for (index_t i = 0; i < m; ++i) {
        if (visible[i] != 0) mask.adjust(i0 + i, first, visible[i], scores_.row(i));
        decay[i] = raise_maximum(scores_.row(i), visible[i], i0 + i);
      }
      for (index_t i = 0; i < m; i += lanes<S>) pstoreu(decay + i, exp_or_zero<S>(ploadu<packet<S>>(decay + i)));
      for (index_t i = 0; i < m; ++i) sum_[i0 + i] = decay[i] * sum_[i0 + i] + exponentials(scores_.row(i), visible[i], n, shift(i0 + i));
      if constexpr (dropping_mask<Mask, S>) {
        S factors[attention_keys];
        for (index_t i = 0; i < m; ++i)
          if (visible[i] != 0 && mask.drop(i0 + i, first, visible[i], factors)) scale_by(scores_.row(i), factors, visible[i]);
      }
      if (careful)
        careful_product(m, width_, tile.count(), scores_.data(), attention_keys, tile.values(), width_, output_.row(i0), width_, decay);
      else
        product<S>(m, width_, tile.count(), by_rows<S, score_stride>{scores_.data(), {}}, tile.values(), width_, output_.row(i0), width_, decay,
                   {.depth_end = visible});
    }
  }

  /// o = the outputs [M x V], log_sum_exp [M].
  void finish(matrix_view<S> o, S* log_sum_exp) const {
    for (index_t i = 0; i < q_.rows(); ++i) {
      const S inverse = sum_[i] == 0 ? S(0) : 1 / sum_[i];
      for (index_t j = 0; j < value_width_; ++j) o(i, j) = inverse * output_.row(i)[j];
    }
    using row = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
    row(log_sum_exp, q_.rows()) = row(maximum_.data(), q_.rows()) + row(sum_.data(), q_.rows()).log();
  }

 private:
  // What the scores of query i are taken relative to. Nothing seen yet: exp(-inf - 0) is 0, and a NaN stays one.
  [[nodiscard]] S shift(index_t i) const { return maximum_[i] == -std::numeric_limits<S>::infinity() ? S(0) : maximum_[i]; }

  // Takes the first `visible` scores (hiding the rest of their last packet) into the maximum of query i; returns m - m'.
  S raise_maximum(S* s, index_t visible, index_t i) {
    using namespace detail::tile;
    const index_t whole = round_up<S>(visible);
    std::fill(s + visible, s + whole, -std::numeric_limits<S>::infinity());
    packet<S> most = pset1<packet<S>>(maximum_[i]);
    for (index_t j = 0; j < whole; j += lanes<S>) most = Eigen::internal::pmax(most, ploadu<packet<S>>(s + j));
    const S before = maximum_[i];
    maximum_[i] = std::max(before, Eigen::internal::predux_max(most));
    return before == maximum_[i] ? S(0) : before - shift(i);
  }

  // The first `visible` scores become exp(s - m'), the rest up to n 0; returns their sum.
  static S exponentials(S* s, index_t visible, index_t n, S shift) {
    using namespace detail::tile;
    const index_t whole = round_up<S>(visible);
    const packet<S> offset = pset1<packet<S>>(shift);
    packet<S> total = pset1<packet<S>>(S(0));
    for (index_t j = 0; j < whole; j += lanes<S>) {
      const packet<S> p = exp_or_zero<S>(Eigen::internal::psub(ploadu<packet<S>>(s + j), offset));
      pstoreu(s + j, p);
      total = Eigen::internal::padd(total, p);
    }
    std::fill(s + whole, s + n, S(0));
    return Eigen::internal::predux(total);
  }

  index_t width_, value_width_;
  matrix_view<const S> q_;
  scratch<S> output_, maximum_, sum_, scores_;
};

/// Exact attention of one head: o = softmax(scale q kᵀ) v under a mask, q [M x D], k [N x D], v [N x V], o [M x V], and log_sum_exp [M].
/// Runs on the calling worker; M should be some multiples of `attention_queries` (each tile of keys is packed once a call).
template <class S, class Mask>
void attend(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> v, S scale, const Mask& mask, matrix_view<S> o, S* log_sum_exp,
            const context& ctx) {
  LITHE_ASSERT(q.cols() == k.cols() && k.rows() == v.rows() && o.rows() == q.rows() && o.cols() == v.cols());
  if (q.rows() == 0) return;
  key_tile<S> tile(ctx, k.cols(), v.cols());
  query_block<S> block(ctx, q.rows(), v.cols());
  block.begin(q);
  const index_t end = std::min(k.rows(), mask.visible(q.rows() - 1));
  for (index_t j = 0; j < end; j += attention_keys) {
    const index_t n = std::min(attention_keys, k.rows() - j);
    tile.load(k.slice_rows(j, n), v.slice_rows(j, n), scale);
    block.add(tile, j, mask);
  }
  block.finish(o, log_sum_exp);
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace lithe::inline LITHE_ABI
