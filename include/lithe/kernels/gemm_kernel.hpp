#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <type_traits>

#include "lithe/kernels/prefetch.hpp"
#include "lithe/kernels/sums.hpp"

// The register tile under every matrix product but those inside attention (attention_tile.hpp), on Eigen's packets: one source for every
// instruction set Eigen knows, with fused multiply-adds wherever the machine has them. There is no intrinsic in it, so there is no second path
// beside it.

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // Eigen's packets as template arguments

namespace lithe::inline LITHE_ABI::detail {

/// What fits the registers of this machine: `rows` x `vectors` accumulators, a row of B and a number of A.
template <class S>
struct tile_shape {
  using packet = typename Eigen::internal::packet_traits<S>::type;
  // At most 256 bits: Eigen transposes and folds 512 with intrinsics that GCC 12 takes for uninitialised and warns about.
  using short_packet = std::conditional_t<(sizeof(packet) > 32), typename Eigen::internal::unpacket_traits<packet>::half, packet>;
  static constexpr index_t lanes = Eigen::internal::unpacket_traits<packet>::size;
  static constexpr int vectors = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 4 : 2;
  static constexpr int rows = 6;
  static constexpr index_t width = vectors * lanes;  // 64 floats with AVX-512, 16 with AVX2
};

/// What a product is added to: row i, column j at `from[i * row + j]`, or zero. c itself, when the product is added to
/// it; with row = 0 one row for all.
template <class S>
struct start {
  const S* from = nullptr;
  index_t row = 0;
  bool first = false;  // the sums begin there, because they are short: memory is then read before it is waited for; else it is added to their end
  [[nodiscard]] start at(index_t i, index_t j) const { return from == nullptr ? start{} : start{from + i * row + j, row, first}; }
};

/// What is fetched from memory meanwhile, with every step of a product's depth: a row of b into the nearest cache, or into the second the line of
/// an address that moves on by `bytes`.
struct read_ahead {
  const char* from = nullptr;
  index_t bytes = 0;
  bool row = false;
};

/// c = begin + Σ_k a(:, k) b(k, :) for a tile of R rows and V packets of columns; a(i, k) stands at a[i * a_row + k *
/// a_k], b(k, j) at b[k * b_k + j]. Each element is one chain of multiply-adds in the order of k, from begin on or added
/// to it, whatever R and V are.
template <class S, int R, int V>
void multiply_tile(index_t depth, const S* a, index_t a_row, index_t a_k, const S* b, index_t b_k, S* c, index_t c_row, start<S> begin,
                   read_ahead next) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::packet;
  constexpr index_t lanes = tile_shape<S>::lanes;
  constexpr index_t line = std::max<index_t>(1, line_bytes / static_cast<index_t>(sizeof(packet)));  // in packets
  packet sum[R][V];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; v += line) __builtin_prefetch(c + i * c_row + v * lanes, 1);
      // Without the pragmas GCC leaves the accumulators in memory below -O3.
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = begin.first ? ploadu<packet>(begin.from + i * begin.row + v * lanes) : pset1<packet>(S(0));
  constexpr index_t row_bytes = V * static_cast<index_t>(sizeof(packet));
  for (index_t k = 0; k < depth; ++k, a += a_k, b += b_k) {
    if (next.row) {
      prefetch<row_bytes>(next.from);
      next.from += row_bytes;
    } else {
      __builtin_prefetch(next.from, 0, 2);
      next.from += next.bytes;
    }
    packet row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = ploadu<packet>(b + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const packet x = pset1<packet>(a[i * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i][v] = pmadd(x, row[v], sum[i][v]);
    }
  }
  if (begin.from != nullptr && !begin.first) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i][v] = padd(ploadu<packet>(begin.from + i * begin.row + v * lanes), sum[i][v]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) pstoreu(c + i * c_row + v * lanes, sum[i][v]);
}

/// The same for `rows` rows, cut into tiles. `next`: the panel that is read after this one; b itself if b comes from memory but is the last; else null.
template <class S, int V>
void multiply_rows(index_t rows, index_t depth, const S* a, index_t a_row, index_t a_k, const S* b, index_t b_k, S* c, index_t c_row,
                   start<S> begin, const S* next) {
  constexpr index_t full = tile_shape<S>::rows, row_bytes = V * static_cast<index_t>(sizeof(typename tile_shape<S>::packet));
  constexpr index_t near = index_t{1} << 14;  // bytes: the way of 0.3 us
  // Many tiles have the time to fetch the whole next panel. With few the first, which waits for memory, reads ahead in its own, and the others begin
  // with the next.
  const index_t tiles = std::max<index_t>(1, rows / full);
  const bool few = next != nullptr && tiles * line_bytes < row_bytes;
  const index_t step = next == nullptr || next == b ? 0 : std::min(line_bytes, (row_bytes + tiles - 1) / tiles);
  const auto at = [](const S* p) { return reinterpret_cast<const char*>(p); };
  read_ahead ahead{at(next != nullptr ? next : b), step};
  if (few) ahead = {at(b) + near, 0, true};
  index_t i = 0;
  for (; i + full <= rows; i += full) {
    multiply_tile<S, full, V>(depth, a + i * a_row, a_row, a_k, b, b_k, c + i * c_row, c_row, begin.at(i, 0), ahead);
    ahead = ahead.row ? read_ahead{at(next), step} : read_ahead{ahead.from + depth * step, step};
  }
  a += i * a_row;
  c += i * c_row;
  begin = begin.at(i, 0);
  switch (rows - i) {
    case 1:
      return multiply_tile<S, 1, V>(depth, a, a_row, a_k, b, b_k, c, c_row, begin, ahead);
    case 2:
      return multiply_tile<S, 2, V>(depth, a, a_row, a_k, b, b_k, c, c_row, begin, ahead);
    case 3:
      return multiply_tile<S, 3, V>(depth, a, a_row, a_k, b, b_k, c, c_row, begin, ahead);
    case 4:
      return multiply_tile<S, 4, V>(depth, a, a_row, a_k, b, b_k, c, c_row, begin, ahead);
    case 5:
      return multiply_tile<S, 5, V>(depth, a, a_row, a_k, b, b_k, c, c_row, begin, ahead);
    default:
      return;
  }
}

/// The same for a panel of `vectors` packets, at most tile_shape<S>::vectors.
template <class S>
void multiply_panel(int vectors, index_t rows, index_t depth, const S* a, index_t a_row, index_t a_k, const S* b, index_t b_k, S* c, index_t c_row,
                    start<S> begin, const S* next = nullptr) {
  switch (vectors) {
    case 1:
      return multiply_rows<S, 1>(rows, depth, a, a_row, a_k, b, b_k, c, c_row, begin, next);
    case 2:
      return multiply_rows<S, 2>(rows, depth, a, a_row, a_k, b, b_k, c, c_row, begin, next);
    case 3:
      if constexpr (tile_shape<S>::vectors > 2) return multiply_rows<S, 3>(rows, depth, a, a_row, a_k, b, b_k, c, c_row, begin, next);
      break;
    default:
      if constexpr (tile_shape<S>::vectors > 2) return multiply_rows<S, 4>(rows, depth, a, a_row, a_k, b, b_k, c, c_row, begin, next);
  }
}

/// c = begin + Σ_k a[k] b(k, :) for one row of a and P whole panels, [depth x width] of each, `panel` numbers apart: as
/// many streams keep more of the memory's requests in flight. The bits are those of multiply_tile.
template <int P, class S>
void multiply_row(index_t depth, const S* a, const S* b, index_t panel, S* c, start<S> begin) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::packet;
  constexpr index_t lanes = tile_shape<S>::lanes, width = tile_shape<S>::width;
  constexpr int V = tile_shape<S>::vectors;
  packet sum[P][V];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[p][v] = begin.first ? ploadu<packet>(begin.from + p * width + v * lanes) : pset1<packet>(S(0));
  for (index_t k = 0; k < depth; ++k, b += width) {
    const packet x = pset1<packet>(a[k]);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[p][v] = pmadd(x, ploadu<packet>(b + p * panel + v * lanes), sum[p][v]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      pstoreu(c + p * width + v * lanes,
              begin.from != nullptr && !begin.first ? padd(ploadu<packet>(begin.from + p * width + v * lanes), sum[p][v]) : sum[p][v]);
}

/// panel[k * width + j] = w[j * stride + k] for j < cols, zero for the columns up to `width` (a multiple of the packet): a transpose.
template <class S>
void pack_transposed(const S* w, index_t stride, index_t cols, index_t depth, S* panel, index_t width) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::short_packet;
  constexpr index_t lanes = unpacket_traits<packet>::size;
  for (index_t j = 0; j < width; j += lanes, w += lanes * stride, panel += lanes) {
    const index_t n = std::clamp<index_t>(cols - j, 0, lanes);
    index_t k = 0;
    for (; n == lanes && k + lanes <= depth; k += lanes) {
      PacketBlock<packet, static_cast<int>(lanes)> block;
#pragma GCC unroll 8
      for (int i = 0; i < lanes; ++i) block.packet[i] = ploadu<packet>(w + i * stride + k);
      ptranspose(block);
#pragma GCC unroll 8
      for (int i = 0; i < lanes; ++i) pstoreu(panel + (k + i) * width, block.packet[i]);
    }
    for (; k < depth; ++k)
      for (index_t i = 0; i < lanes; ++i) panel[k * width + i] = i < n ? w[i * stride + k] : S(0);
  }
}

/// The rows b(k, :) at b + k * stride as panels of tile_shape<S>::width columns, one after the other, each [depth x its width]; the
/// last is as wide as whole packets need, zero past `cols`.
template <class S>
void pack_rows(const S* b, index_t stride, index_t cols, index_t depth, S* panels) {
  using namespace Eigen::internal;
  using packet = typename tile_shape<S>::packet;
  constexpr index_t lanes = tile_shape<S>::lanes, full = tile_shape<S>::width, line = 64 / sizeof(S), ahead = 8;
  for (index_t k = 0; k < depth; ++k, b += stride) {
    for (index_t j = 0; j < cols && k + ahead < depth; j += line) __builtin_prefetch(b + ahead * stride + j);  // no hardware follows such strides
    for (index_t j = 0; j < cols; j += full) {
      const index_t n = std::min(cols - j, full), width = (n + lanes - 1) / lanes * lanes;
      S* to = panels + j * depth + k * width;
      index_t i = 0;
      for (; i + lanes <= n; i += lanes) pstoreu(to + i, ploadu<packet>(b + j + i));
      if (i < width) std::fill(std::copy(b + j + i, b + j + n, to + i), to + width, S(0));
    }
  }
}

}  // namespace lithe::inline LITHE_ABI::detail

#pragma GCC diagnostic pop
