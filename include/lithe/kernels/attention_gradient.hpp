#pragma once

#include "lithe/kernels/attention_tile.hpp"

namespace lithe::inline LITHE_ABI {

inline constexpr index_t attention_gradient_queries = 96;  ///< queries whose scores are held at once in backward

/// D = Σ_j dO ∘ O for each row: what the softmax takes off every score's gradient. d [M], output_gradient and output [M x V].
template <class S>
void softmax_row_dots(matrix_view<const S> output_gradient, matrix_view<const S> output, S* d) {
  for (index_t i = 0; i < output.rows(); ++i) {
    using row = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>;
    d[i] = (row(output_gradient.row(i), output.cols()) * row(output.row(i), output.cols())).sum();
  }
}

/// The backward pass of one tile of keys against any number of queries (arXiv 2205.14135, algorithm 4). Scores are computed again:
///
///     p = exp(scale q kᵀ - log_sum_exp),  ds = p ∘ (M ∘ dO vᵀ - D),  dv = (M ∘ p)ᵀ dO,  dk = scale dsᵀ q,  dq += scale ds k
///
/// with M the factors of a mask that drops weights, else 1.
template <class S>
class key_gradient_tile {
 public:
  /// Room for one tile of keys of D = key_width and values of V = value_width numbers.
  key_gradient_tile(const context& ctx, index_t key_width, index_t value_width)
      : D_(key_width),
        V_(value_width),
        key_stride_(detail::tile::round_up<S>(D_)),
        value_stride_(detail::tile::round_up<S>(V_)),
        keys_(ctx, attention_keys, key_stride_),
        keys_transposed_(ctx, D_, attention_keys),
        values_transposed_(ctx, V_, attention_keys),
        dk_(ctx, attention_keys, key_stride_),
        dv_(ctx, attention_keys, value_stride_),
        q_(ctx, attention_gradient_queries, key_stride_),
        g_(ctx, attention_gradient_queries, value_stride_),
        p_(ctx, attention_gradient_queries, attention_keys),
        ds_(ctx, attention_gradient_queries, attention_keys),
        ones_(ctx, attention_keys) {
    ones_.map().setOnes();
  }

  /// The number of columns that `dq` of `add` must have: the key width, filled up to whole packets.
  [[nodiscard]] static index_t query_gradient_width(index_t key_width) { return detail::tile::round_up<S>(key_width); }

  /// Takes the keys k [N x D] and values v [N x V], N at most attention_keys, and starts their gradients at zero. Heads that share keys
  /// take these once and then each its values.
  void load(matrix_view<const S> k, matrix_view<const S> v, S scale) {
    load_keys(k, scale);
    load_values(v);
  }
  /// The keys alone, [N x D]; their gradient starts at zero. `load_values` comes behind it.
  void load_keys(matrix_view<const S> k, S scale) {
    LITHE_ASSERT(k.rows() <= attention_keys);
    count_ = k.rows();
    scale_ = scale;
    detail::tile::pad_rows(k, keys_.data(), scale);
    detail::tile::pack_scaled_transposed(k, keys_transposed_.data(), scale);
    dk_.map().setZero();
  }
  /// The values alone, [N x V] for the keys that were loaded; their gradient starts at zero.
  void load_values(matrix_view<const S> v) {
    LITHE_ASSERT(v.rows() == count_);
    detail::tile::pack_scaled_transposed(v, values_transposed_.data(), S(1));
    dv_.map().setZero();
  }

  /// Queries q [M x D] and output gradients g [M x V], M at most attention_gradient_queries; log_sum_exp and d [M]; dq [M x
  /// query_gradient_width] is added to. `first` is the number of the tile's first key in the mask's counting.
  template <class Mask>
  void add(matrix_view<const S> q, matrix_view<const S> g, const S* log_sum_exp, const S* d, matrix_view<S> dq, index_t first, const Mask& mask) {
    using namespace detail::tile;
    const index_t M = q.rows();
    LITHE_ASSERT(M <= attention_gradient_queries && dq.cols() == key_stride_);
    index_t visible[attention_gradient_queries], seen_from[attention_keys];
    for (index_t i = 0; i < M; ++i) visible[i] = std::clamp<index_t>(mask.visible(i) - first, 0, count_);
    if (M == 0 || visible[M - 1] == 0) return;
    for (index_t j = 0, i = 0; j < count_; ++j) {
      while (i < M && visible[i] <= j) ++i;
      seen_from[j] = i;
    }
    pad_rows(q, q_.data());
    pad_rows(g, g_.data());
    const index_t n = round_up<S>(count_);
    const bounds scores{.columns = visible}, by_query{.depth_end = visible}, by_key{.depth_begin = seen_from};
    product<S>(M, n, D_, by_rows<S>{q_.data(), key_stride_}, keys_transposed_.data(), n, p_.data(), attention_keys, nullptr, scores);
    product<S>(M, n, V_, by_rows<S>{g_.data(), value_stride_}, values_transposed_.data(), n, ds_.data(), attention_keys, nullptr, scores);
    for (index_t i = 0; i < M; ++i) {
      if (visible[i] != 0) mask.adjust(i, first, visible[i], p_.row(i));
      S factors[dropping_mask<Mask, S> ? attention_keys : 1];
      bool drops = false;
      if constexpr (dropping_mask<Mask, S>) drops = visible[i] != 0 && mask.drop(i, first, visible[i], factors);
      if (drops) scale_by(ds_.row(i), factors, visible[i]);
      differentiate(p_.row(i), ds_.row(i), visible[i], n, log_sum_exp[i], d[i]);
      if (drops) scale_by(p_.row(i), factors, visible[i]);
      if (visible[i] != 0) mask.collect(i, first, visible[i], ds_.row(i));
    }
    product<S>(count_, value_stride_, M, by_columns<S, score_stride>{p_.data(), {}}, g_.data(), value_stride_, dv_.data(), value_stride_,
               ones_.data(), by_key);
    product<S>(count_, key_stride_, M, by_columns<S, score_stride>{ds_.data(), {}}, q_.data(), key_stride_, dk_.data(), key_stride_, ones_.data(),
               by_key);
    product<S>(M, key_stride_, count_, by_rows<S, score_stride>{ds_.data(), {}}, keys_.data(), key_stride_, dq.data(), dq.stride(), ones_.data(),
               by_query);
  }

  /// Writes the gradients of the tile's keys and values.
  void finish(matrix_view<S> dk, matrix_view<S> dv) const {
    finish_keys(dk);
    finish_values(dv);
  }
  /// Writes the gradient of the keys, dk [N x D].
  void finish_keys(matrix_view<S> dk) const {
    for (index_t i = 0; i < count_; ++i)
      for (index_t j = 0; j < D_; ++j) dk(i, j) = scale_ * dk_.row(i)[j];
  }
  /// Writes the gradient of the values, dv [N x V].
  void finish_values(matrix_view<S> dv) const {
    for (index_t i = 0; i < count_; ++i) std::copy_n(dv_.row(i), V_, dv.row(i));
  }

 private:
  // s: scores -> p; g: dO vᵀ -> ds; both 0 behind the visible keys.
  static void differentiate(S* s, S* g, index_t visible, index_t n, S log_sum_exp, S d) {
    using namespace detail::tile;
    const index_t whole = round_up<S>(visible);
    std::fill(s + visible, s + whole, -std::numeric_limits<S>::infinity());
    std::fill(g + visible, g + whole, S(0));
    const packet<S> shift = pset1<packet<S>>(log_sum_exp == -std::numeric_limits<S>::infinity() ? S(0) : log_sum_exp);
    const packet<S> off = pset1<packet<S>>(d);
    for (index_t j = 0; j < whole; j += lanes<S>) {
      const packet<S> p = exp_or_zero<S>(Eigen::internal::psub(ploadu<packet<S>>(s + j), shift));
      pstoreu(s + j, p);
      pstoreu(g + j, Eigen::internal::pmul(p, Eigen::internal::psub(ploadu<packet<S>>(g + j), off)));
    }
    std::fill(s + whole, s + n, S(0));
    std::fill(g + whole, g + n, S(0));
  }

  index_t D_, V_, key_stride_, value_stride_, count_ = 0;
  S scale_ = 1;
  scratch<S> keys_, keys_transposed_, values_transposed_, dk_, dv_, q_, g_, p_, ds_, ones_;
};

}  // namespace lithe::inline LITHE_ABI
