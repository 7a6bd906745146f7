#pragma once

#include "lithe/kernels/gemm_kernel.hpp"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // Eigen's packets as template arguments

namespace lithe::inline LITHE_ABI::detail {

inline constexpr int dot_columns = 8;  // rows of the weight read at once: as many streams keep more of the memory's requests in flight

/// The sum of the numbers in a packet.
template <class S>
S fold(const typename tile_shape<S>::packet& p) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::packet;
  using half = typename tile_shape<S>::short_packet;
  if constexpr (std::is_same_v<packet, half>) {
    return predux(p);
  } else {
    S lanes[tile_shape<S>::lanes];
    pstoreu(lanes, p);
    return predux(padd(ploadu<half>(lanes), ploadu<half>(lanes + tile_shape<S>::lanes / 2)));
  }
}

/// c[i * c_row + j] = begin + Σ_k a[i * a_row + k] w[j * w_row + k] for R rows of a and N rows of w. The bits of an
/// element depend on neither R nor N: packets of partial sums, folded now and then, and the terms after the last whole
/// packet.
template <class S, int R, int N>
void dot_tile(index_t depth, const S* a, index_t a_row, const S* w, index_t w_row, S* c, index_t c_row, start<S> begin) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::packet;
  constexpr index_t lanes = tile_shape<S>::lanes;
  const index_t whole = depth - depth % lanes;
  S total[R][N] = {};
  for (index_t k = 0; k < whole;) {
    packet sum[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] = pset1<packet>(S(0));
    for (const index_t end = std::min(whole, k + longest_sum * lanes); k < end; k += lanes) {
      packet x[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) x[i] = ploadu<packet>(a + i * a_row + k);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const packet y = ploadu<packet>(w + j * w_row + k);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sum[i][j] = pmadd(x[i], y, sum[i][j]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) total[i][j] += fold<S>(sum[i][j]);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < N; ++j) {
      S all = total[i][j];
      for (index_t t = whole; t < depth; ++t) all += a[i * a_row + t] * w[j * w_row + t];
      c[i * c_row + j] = begin.from != nullptr ? begin.from[i * begin.row + j] + all : all;
    }
}

/// The same for any number of rows of a and of w: each row of w is read from memory once.
template <class S>
void dot_rows(index_t rows, index_t cols, index_t depth, const S* a, index_t a_row, const S* w, index_t w_row, S* c, index_t c_row, start<S> begin) {
  constexpr int wide = dot_columns, tall = tile_shape<S>::vectors, half = wide / 2;  // `tall` rows by `half` fill the registers
  for (; cols >= wide; cols -= wide, w += wide * w_row, c += wide, begin = begin.at(0, wide)) {
    index_t i = 0;
    for (; i + tall <= rows; i += tall)
      for (int j = 0; j < wide; j += half)
        dot_tile<S, tall, half>(depth, a + i * a_row, a_row, w + j * w_row, w_row, c + i * c_row + j, c_row, begin.at(i, j));
    for (; i < rows; ++i) dot_tile<S, 1, wide>(depth, a + i * a_row, a_row, w, w_row, c + i * c_row, c_row, begin.at(i, 0));
  }
  for (; cols > 0; --cols, w += w_row, ++c, begin = begin.at(0, 1))
    for (index_t i = 0; i < rows; ++i) dot_tile<S, 1, 1>(depth, a + i * a_row, a_row, w, w_row, c + i * c_row, c_row, begin.at(i, 0));
}

}  // namespace lithe::inline LITHE_ABI::detail

#pragma GCC diagnostic pop
