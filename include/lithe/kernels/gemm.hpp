#pragma once

#include "lithe/kernels/matrix_vector.hpp"
#include "lithe/tensor/large_array.hpp"
#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// Whether a product replaces its output or is added to it.
enum class update { assign, add };

namespace detail {

/// How the right-hand side of a product is stored.
enum class storage {
  rows,        // [k x n]
  transposed,  // [n x k]
  panels       // by packed_matrix
};

/// c = begin + a b with a(i, k) at a[i * a_row + k * a_k].
template <class S>
struct product {
  index_t rows, cols, depth;
  const S* a;
  index_t a_row, a_k;
  const S* b;
  index_t b_stride;
  storage b_storage;
  S* c;
  index_t c_stride;
  start<S> begin;
};

inline constexpr index_t few_rows = 8;         // of c: from here on a transposed b is worth packing
inline constexpr index_t shallow_rows = 16;    // of c: up to here rows of b are read in place, few at a time
inline constexpr index_t shallow_depth = 16;   // that many
// Each pass closes its sums, so none is much longer than longest_sum.
inline constexpr index_t panel_depth = 1024;   // of one pass: a panel of 64 columns then fills a quarter of a 1 MiB cache
inline constexpr index_t block_depth = 512;    // of one pass when all panels of a piece are packed at once
inline constexpr index_t least_depth = 128;    // of one pass through narrow rows of b in place: below it c is read and written too often
inline constexpr index_t cached_size = 16384;  // numbers that stay in the nearest caches however they are strided

template <class S>
constexpr index_t round_up(index_t n) {
  return (n + tile_shape<S>::lanes - 1) / tile_shape<S>::lanes * tile_shape<S>::lanes;
}

/// The part of a packed b that multiply_piece reads after panel j at depth k0, in its own columns or in those of the next piece; the same part if
/// it is the last.
template <class S>
const S* panel_after(const product<S>& p, index_t j, index_t k0, index_t first_col, index_t cols, index_t longest) {
  using shape = tile_shape<S>;
  const auto part = [&](index_t col, index_t k) { return p.b + col * p.depth + k * round_up<S>(std::min(p.cols - col, shape::width)); };
  if (j + shape::width < first_col + cols) return part(j + shape::width, k0);
  if (k0 + longest < p.depth) return part(first_col, k0 + longest);
  return j + shape::width < p.cols ? part(j + shape::width, 0) : part(j, k0);
}

template <class S>
void multiply_piece(const product<S>& p, index_t first_row, index_t rows, index_t first_col, index_t cols,
                    const context& ctx);

/// One piece of a product with few rows, which visits c every few terms: sums that are long enough are closed apart
/// from c.
template <class S>
void multiply_long(const product<S>& p, index_t first_row, index_t rows, index_t first_col, index_t cols,
                   const context& ctx) {
  const scratch<S> part(ctx, rows, cols);
  start<S> begin = p.begin.at(first_row, first_col);
  S* const c = p.c + first_row * p.c_stride + first_col;
  for (index_t k0 = 0; k0 < p.depth; k0 += longest_sum, begin = {c, p.c_stride}) {
    const S* const a = p.a + first_row * p.a_row + k0 * p.a_k;
    const S* const b = p.b + k0 * p.b_stride + first_col;
    const index_t depth = std::min(longest_sum, p.depth - k0);
    multiply_piece<S>({rows, cols, depth, a, p.a_row, p.a_k, b, p.b_stride, p.b_storage, part.data(), cols, {}}, 0,
                      rows, 0, cols, ctx);
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols; ++j)
        c[i * p.c_stride + j] = (begin.from != nullptr ? begin.from[i * begin.row + j] : S(0)) + part.row(i)[j];
  }
}

/// One piece of a product, on one worker: its columns panel by panel, each packed where it must be.
template <class S>
void multiply_piece(const product<S>& p, index_t first_row, index_t rows, index_t first_col, index_t cols, const context& ctx) {
  using shape = tile_shape<S>;
  if (p.b_storage == storage::transposed && p.rows < few_rows)
    return dot_rows(rows, cols, p.depth, p.a + first_row * p.a_row, p.a_row, p.b + first_col * p.b_stride, p.b_stride,
                    p.c + first_row * p.c_stride + first_col, p.c_stride, p.begin.at(first_row, first_col));
  if (p.b_storage == storage::panels && p.rows == 1) {
    const auto whole_panels = [&]<int P>(std::integral_constant<int, P>) {
      for (constexpr index_t step = P * shape::width; cols >= step; first_col += step, cols -= step)
        for (index_t k0 = 0; k0 == 0 || k0 < p.depth; k0 += panel_depth) {
          const start<S> begin = k0 != 0 ? start<S>{p.c, 0} : p.begin;
          multiply_row<P>(std::min(p.depth - k0, panel_depth), p.a + k0, p.b + first_col * p.depth + k0 * shape::width,
                          p.depth * shape::width, p.c + first_col, begin.at(0, first_col));
        }
    };
    whole_panels(std::integral_constant<int, 4>{});
    whole_panels(std::integral_constant<int, 2>{});
  }
  const bool by_rows = p.b_storage == storage::rows, shallow = by_rows && p.rows <= shallow_rows;
  if (shallow && p.depth > longest_sum) return multiply_long(p, first_row, rows, first_col, cols, ctx);
  const bool in_place = shallow || (by_rows && p.b_stride * std::min(p.depth, least_depth) <= cached_size);
  const index_t narrow = std::min(block_depth, cached_size / std::max<index_t>(1, p.b_stride));
  const index_t limit = shallow ? shallow_depth : in_place ? narrow : by_rows ? block_depth : panel_depth;
  const index_t longest = std::max<index_t>(1, std::min(p.depth, limit));
  const index_t packed_cols = p.b_storage == storage::panels ? 0 : !by_rows || in_place ? shape::width : round_up<S>(cols);
  const scratch<S> panel(ctx, longest * packed_cols);
  const bool pack_a = p.a_k != 1 && rows * longest > cached_size / 2;
  const index_t a_padded = round_up<S>(longest) + shape::lanes;
  const scratch<S> a_copy(ctx, pack_a ? rows * a_padded : 0);
  S edge[shape::rows * shape::width];
  for (index_t k0 = 0; k0 == 0 || k0 < p.depth; k0 += longest) {
    const index_t depth = std::min(p.depth - k0, longest);
    const start<S> begin = (k0 != 0 ? start<S>{p.c, p.c_stride, p.depth <= longest_sum} : p.begin).at(first_row, 0);
    const S* a = p.a + first_row * p.a_row + k0 * p.a_k;
    index_t a_row = p.a_row, a_k = p.a_k;
    if (pack_a) {
      pack_transposed(a, a_k, depth, rows, a_copy.data(), a_padded);
      a = a_copy.data();
      a_row = a_padded;
      a_k = 1;
    }
    // Whole stretches of the rows of b, because memory is read best that way.
    if (by_rows && !in_place) pack_rows(p.b + k0 * p.b_stride + first_col, p.b_stride, cols, depth, panel.data());
    for (index_t j = first_col; j < first_col + cols; j += shape::width) {
      const index_t n = std::min(p.cols - j, shape::width), width = round_up<S>(n);
      const S* b = panel.data();
      index_t b_k = width;
      if (p.b_storage == storage::panels) {
        b = p.b + j * p.depth + k0 * width;
      } else if (p.b_storage == storage::transposed) {
        pack_transposed(p.b + j * p.b_stride + k0, p.b_stride, n, depth, panel.data(), width);
      } else if (in_place && n == width) {
        b = p.b + k0 * p.b_stride + j;
        b_k = p.b_stride;
      } else if (in_place) {
        pack_rows(p.b + k0 * p.b_stride + j, p.b_stride, n, depth, panel.data());
      } else {
        b += (j - first_col) * depth;
      }
      const int vectors = static_cast<int>(width / shape::lanes);
      S* c = p.c + first_row * p.c_stride + j;
      if (n == width) {
        const S* const next = p.b_storage == storage::panels ? panel_after(p, j, k0, first_col, cols, longest) : nullptr;
        multiply_panel<S>(vectors, rows, depth, a, a_row, a_k, b, b_k, c, p.c_stride, begin.at(0, j), next);
        continue;
      }
      // A last packet that reaches over the edge goes through a tile of its own.
      for (index_t i = 0; i < rows; i += shape::rows) {
        const index_t m = std::min<index_t>(rows - i, shape::rows);
        const start<S> here = begin.at(i, j);
        for (index_t r = 0; r < m; ++r) {
          S* to = here.from == nullptr ? edge + r * width : std::copy_n(here.from + r * here.row, n, edge + r * width);
          std::fill(to, edge + (r + 1) * width, S(0));
        }
        multiply_panel<S>(vectors, m, depth, a + i * a_row, a_row, a_k, b, b_k, edge, width, {edge, width, here.first});
        for (index_t r = 0; r < m; ++r) std::copy_n(edge + r * width, n, c + (i + r) * p.c_stride);
      }
    }
  }
}

/// What a product of this mode and depth is added to; `row` is added to every row of c.
template <class S>
start<S> start_of(matrix_view<S> c, update mode, const S* row, index_t depth) {
  LITHE_ASSERT(mode == update::assign || row == nullptr);
  const start<S> s = mode == update::add ? start<S>{c.data(), c.stride()} : start<S>{row, 0};
  return {s.from, s.row, s.from != nullptr && depth <= longest_sum};
}

template <class S>
void multiply(const product<S>& p, const context& ctx) {
  using shape = tile_shape<S>;
  if (p.rows <= 0 || p.cols <= 0) return;
  constexpr index_t least = index_t{1} << 19;  // multiply-adds worth a piece of its own: some 20 microseconds
  const auto count = [](index_t n, index_t piece) { return (n + piece - 1) / piece; };
  const auto row_blocks = [&](index_t n) { return count(count(p.rows, n), shape::rows) * shape::rows; };  // n blocks as equal as tiles allow
  index_t down = count(p.rows, 512), rows = row_blocks(down), panels = std::min<index_t>(count(p.cols, shape::width), 4);
  const auto pieces = [&] { return count(p.rows, rows) * count(p.cols, panels * shape::width); };
  const index_t enough = p.b_storage == storage::panels ? 16 : 8;
  // A block of rows packs its columns of b again and (for tn) a block of columns its rows of a, so the longer side is cut.
  while (pieces() < enough && rows * panels * shape::width * p.depth >= 2 * least) {
    if (panels > 1 && (panels * shape::width >= rows || (p.b_storage == storage::transposed && rows <= 512)))
      panels = count(panels, 2);
    else if (rows >= 8 * shape::rows)
      rows = row_blocks(down *= 2);
    else
      break;
  }
  const index_t columns = panels * shape::width, across = count(p.cols, columns), total = pieces();
  if (total == 1) return multiply_piece(p, 0, p.rows, 0, p.cols, ctx);
  ctx.exec->run(total, 1, [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t) {
      const index_t i = t / across * rows, j = t % across * columns;
      multiply_piece(p, i, std::min(rows, p.rows - i), j, std::min(columns, p.cols - j), ctx);
    }
  });
}

}  // namespace detail

/// c = 1 rowᵀ + a bᵀ or c += a bᵀ; a [m x k], b [n x k], c [m x n], row [n] or null for none.
template <class S>
void gemm_nt(matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode = update::assign,
             const S* row = nullptr) {
  LITHE_ASSERT(a.cols() == b.cols() && c.rows() == a.rows() && c.cols() == b.rows());
  detail::multiply<S>({c.rows(), c.cols(), a.cols(), a.data(), a.stride(), 1, b.data(), b.stride(), detail::storage::transposed, c.data(), c.stride(),
                       detail::start_of(c, mode, row, a.cols())},
                      ctx);
}

/// c = a b or c += a b; a [m x k], b [k x n], c [m x n].
template <class S>
void gemm_nn(matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode = update::assign) {
  LITHE_ASSERT(a.cols() == b.rows() && c.rows() == a.rows() && c.cols() == b.cols());
  detail::multiply<S>({c.rows(), c.cols(), a.cols(), a.data(), a.stride(), 1, b.data(), b.stride(), detail::storage::rows, c.data(), c.stride(),
                       detail::start_of<S>(c, mode, nullptr, a.cols())},
                      ctx);
}

/// c = aᵀ b or c += aᵀ b; a [k x m], b [k x n], c [m x n].
template <class S>
void gemm_tn(matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode = update::assign) {
  LITHE_ASSERT(a.rows() == b.rows() && c.rows() == a.cols() && c.cols() == b.cols());
  detail::multiply<S>({c.rows(), c.cols(), a.rows(), a.data(), 1, a.stride(), b.data(), b.stride(), detail::storage::rows, c.data(), c.stride(),
                       detail::start_of<S>(c, mode, nullptr, a.rows())},
                      ctx);
}

/// Rows [n x k] of a packed_matrix.
template <class S>
struct packed_view {
  const S* data;
  index_t rows, cols;

  /// `n` rows from `first` on: both multiples of tile_shape<S>::width, but that the last rows may be fewer.
  [[nodiscard]] packed_view slice_rows(index_t first, index_t n) const {
    LITHE_ASSERT(first % detail::tile_shape<S>::width == 0 && (n % detail::tile_shape<S>::width == 0 || first + n == rows));
    return {data + first * cols, n, cols};
  }
};

/// Weights [n x k], one or several of one shape below each other, stored so that products x wᵀ need no packing: each as panels of
/// tile_shape<S>::width of its rows, transposed, the last one as wide as whole packets need. Empty until `assign`.
template <class S>
class packed_matrix {
 public:
  /// Whether nothing has been packed.
  [[nodiscard]] bool empty() const { return panels_.empty(); }
  /// The i-th weight.
  [[nodiscard]] packed_view<S> part(index_t i) const { return {panels_.data() + i * detail::round_up<S>(rows_) * cols_, rows_, cols_}; }
  /// The first weight, or the only one.
  operator packed_view<S>() const { return part(0); }
  /// Packs w, `parts` weights of equally many rows below each other; memory of the right size is used again.
  void assign(matrix_view<const S> w, index_t parts = 1) {
    LITHE_ASSERT(w.rows() % parts == 0);
    rows_ = w.rows() / parts;
    cols_ = w.cols();
    const index_t padded = detail::round_up<S>(rows_), size = parts * padded * cols_;
    if (panels_.size() != size) panels_ = detail::large_array<S>(size);
    for (index_t i = 0; i < parts; ++i)
      for (index_t j = 0; j < rows_; j += detail::tile_shape<S>::width) {
        const index_t n = std::min(rows_ - j, detail::tile_shape<S>::width);
        detail::pack_transposed(w.row(i * rows_ + j), w.stride(), n, cols_, panels_.data() + (i * padded + j) * cols_, detail::round_up<S>(n));
      }
  }
  /// Gives the memory back.
  void clear() { *this = {}; }

 private:
  index_t rows_ = 0, cols_ = 0;
  detail::large_array<S> panels_;
};

/// c = 1 rowᵀ + a wᵀ or c += a wᵀ for a packed w; a [m x k], w [n x k], c [m x n], row [n] or null for none.
template <class S>
void gemm_packed(matrix_view<const S> a, packed_view<S> w, matrix_view<S> c, const context& ctx, update mode = update::assign,
                 const S* row = nullptr) {
  LITHE_ASSERT(a.cols() == w.cols && c.rows() == a.rows() && c.cols() == w.rows);
  detail::multiply<S>({c.rows(), c.cols(), a.cols(), a.data(), a.stride(), 1, w.data, 0, detail::storage::panels, c.data(), c.stride(),
                       detail::start_of(c, mode, row, a.cols())},
                      ctx);
}

}  // namespace lithe::inline LITHE_ABI
