#pragma once

#include <algorithm>
#include <span>

#include "lithe/kernels/prefetch.hpp"
#include "lithe/kernels/sums.hpp"
#include "lithe/tensor/row_gradient.hpp"

// Sums and dot products over rows that lie anywhere in a big table, on Eigen's packets. Reading 1 KiB of many rows instead of whole
// rows, with the rows to come prefetched, keeps many memory requests in flight.

namespace lithe::inline LITHE_ABI::detail {

inline constexpr index_t stream_bytes = index_t{4} << 20;  // outputs beyond the second-level caches are written around them
/// Columns of one piece of a row: 1 KiB, sixteen registers of AVX-512.
template <class S>
inline constexpr index_t sum_columns = 1024 / static_cast<index_t>(sizeof(S));

inline bool slots_in_range(std::span<const slot_t> slots, index_t rows) {
  return std::all_of(slots.begin(), slots.end(), [&](slot_t s) { return s >= -1 && s < rows; });
}

// Stores around the caches, where the machine has them; `to` is aligned to the packet. The fence makes them visible to whoever
// synchronises with this thread.
template <class S, class Packet>
void stream_packet(S* to, const Packet& p) {
  Eigen::internal::pstoreu(to, p);
}
#if defined(LITHE_AVX512)
inline void stream_packet(float* to, const __m512& p) { _mm512_stream_ps(to, p); }
inline void stream_packet(double* to, const __m512d& p) { _mm512_stream_pd(to, p); }
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream_fence() {}
#endif

/// out = init + Σ_j weight[j] table[index[j]] for V packets of columns; init may be out or null (zero); index -1 is left out. There are
/// `ahead` >= count indices, of which those behind count will be wanted next. One chain: for at most longest_sum terms.
template <class S, int V>
void sum_packets(const S* table, index_t stride, const slot_t* index, const S* weight, index_t count, index_t ahead, const S* init, S* out,
                 bool stream) {
  using namespace Eigen::internal;
  using packet = typename packet_traits<S>::type;
  constexpr index_t lanes = packet_traits<S>::size, distance = 8;
  // With few registers the sums live in the first-level cache, and taking four rows at once saves their loads and stores.
  constexpr int R = V <= EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS / 2 ? 1 : 4;
  packet sum[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v] = init != nullptr ? ploadu<packet>(init + v * lanes) : pset1<packet>(S(0));
  for (index_t j = 0; j < count;) {
    const S* row[R];
    packet w[R];
    int r = 0;
    for (; j < count && r < R; ++j) {
      if (j + distance < ahead) prefetch<V * lanes * static_cast<index_t>(sizeof(S))>(table + std::max<index_t>(0, index[j + distance]) * stride);
      if (index[j] < 0) continue;
      row[r] = table + index[j] * stride;
      w[r++] = pset1<packet>(weight[j]);
    }
    if (r == R) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        packet s = sum[v];
#pragma GCC unroll 4
        for (int q = 0; q < R; ++q) s = pmadd(w[q], ploadu<packet>(row[q] + v * lanes), s);
        sum[v] = s;
      }
    } else {
      for (int q = 0; q < r; ++q)
        for (int v = 0; v < V; ++v) sum[v] = pmadd(w[q], ploadu<packet>(row[q] + v * lanes), sum[v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
    if (stream)
      stream_packet(out + v * lanes, sum[v]);
    else
      pstoreu(out + v * lanes, sum[v]);
}

/// The same for more terms than one sum may have: sums of longest_sum terms, each closed before it is added to out.
template <class S, int V>
[[gnu::noinline]] void sum_long(const S* table, index_t stride, const slot_t* index, const S* weight, index_t count, index_t ahead, const S* init, S* out) {
  constexpr index_t columns = V * Eigen::internal::packet_traits<S>::size;
  S part[columns];
  for (index_t j = 0; j < count; j += longest_sum, init = out) {
    sum_packets<S, V>(table, stride, index + j, weight + j, std::min(longest_sum, count - j), ahead - j, nullptr, part, false);
    for (index_t c = 0; c < columns; ++c) out[c] = (init != nullptr ? init[c] : S(0)) + part[c];
  }
}

/// The same for fewer columns than a packet has.
template <class S>
void sum_tail(const S* table, index_t stride, index_t width, const slot_t* index, const S* weight, index_t count, const S* init, S* out) {
  for (index_t c = 0; c < width; ++c) {
    S total = init != nullptr ? init[c] : S(0);
    for (index_t j = 0; j < count;) {
      S sum = 0;
      for (const index_t end = std::min(count, j + longest_sum); j < end; ++j)
        if (index[j] >= 0) sum += weight[j] * table[index[j] * stride + c];
      total += sum;
    }
    out[c] = total;
  }
}

/// The same for `width` <= sum_columns columns: powers of two of packets, widest first, then the tail.
template <class S, int V = static_cast<int>(sum_columns<S>) / Eigen::internal::packet_traits<S>::size>
void sum_rows(const S* table, index_t stride, index_t width, const slot_t* index, const S* weight, index_t count, index_t ahead, const S* init, S* out,
              bool stream) {
  constexpr index_t columns = V * Eigen::internal::packet_traits<S>::size;
  if (width >= columns) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(out) % line_bytes == 0;
    if (count <= longest_sum)
      sum_packets<S, V>(table, stride, index, weight, count, ahead, init, out, stream && aligned);
    else
      sum_long<S, V>(table, stride, index, weight, count, ahead, init, out);
    if (width == columns) return;
    table += columns;
    init = init != nullptr ? init + columns : nullptr;
    out += columns;
    width -= columns;
  }
  if constexpr (V > 1)
    sum_rows<S, V / 2>(table, stride, width, index, weight, count, ahead, init, out, stream);
  else
    sum_tail(table, stride, width, index, weight, count, init, out);
}

/// out[q] = <x, row[q]> for R rows; a sum is built the same way whatever R is. Prefetches the rows `next` alongside.
template <class S, int R>
void dot_packets(const S* const* row, const S* const* next, const S* x, index_t n, S* out) {
  using namespace Eigen::internal;
  using packet = typename packet_traits<S>::type;
  constexpr index_t lanes = packet_traits<S>::size, step = 2 * lanes, bytes = step * static_cast<index_t>(sizeof(S));
  const index_t whole = n - n % step;
  S total[R] = {};
  for (index_t c = 0; c < whole;) {
    packet even[R], odd[R];
#pragma GCC unroll 4
    for (int q = 0; q < R; ++q) even[q] = odd[q] = pset1<packet>(S(0));
    for (const index_t end = std::min(whole, c + longest_sum * step); c < end; c += step) {
      const packet a = ploadu<packet>(x + c), b = ploadu<packet>(x + c + lanes);
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q) {
        prefetch<bytes>(next[q] + c);
        even[q] = pmadd(a, ploadu<packet>(row[q] + c), even[q]);
        odd[q] = pmadd(b, ploadu<packet>(row[q] + c + lanes), odd[q]);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < R; ++q) {
      S sum[lanes];  // not predux: GCC 12 warns about it for doubles of AVX-512, in its own header
      pstoreu(sum, padd(even[q], odd[q]));
      for (index_t half = lanes / 2; half > 0; half /= 2)
        for (index_t i = 0; i < half; ++i) sum[i] += sum[i + half];
      total[q] += sum[0];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < R; ++q) {
    for (index_t i = whole; i < n; ++i) total[q] += x[i] * row[q][i];
    out[q] = total[q];
  }
}

/// out[j] = <x, table[index[j]]> for j < count, 0 for index -1. Of the `ahead` >= count indices those behind count are wanted next.
template <class S>
void dot_rows(matrix_view<const S> table, const slot_t* index, index_t count, index_t ahead, const S* x, S* out) {
  constexpr int R = 4;
  const auto row = [&](index_t j) { return j < ahead && index[j] >= 0 ? table.row(index[j]) : x; };  // x is at hand, its product unused
  for (index_t j = 0; j < count; j += R) {
    const S *now[R], *next[R];
    for (int q = 0; q < R; ++q) {
      now[q] = row(j + q);
      next[q] = row(j + R + q);
    }
    const index_t n = std::min<index_t>(R, count - j);
    if (n == R)
      dot_packets<S, R>(now, next, x, table.cols(), out + j);
    else
      for (index_t q = 0; q < n; ++q) dot_packets<S, 1>(now + q, next + q, x, table.cols(), out + j + q);
    for (index_t q = j; q < j + n; ++q) out[q] = index[q] < 0 ? S(0) : out[q];
  }
}

}  // namespace lithe::inline LITHE_ABI::detail
