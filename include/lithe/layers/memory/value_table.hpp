#pragma once

#include "lithe/kernels/gather.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/tensor/large_array.hpp"

namespace lithe::inline LITHE_ABI {

/// Rows that memory layers read and update: N = slots() rows of D = cols() numbers, D and N below 2^31. slots() is how many rows a pick
/// may name; rows() is how many this process holds, which gradients, moments and savers number from 0 (a sharded table holds fewer).
/// Calls stand outside of executor loops and come equally often on every rank, because scatter_add may be collective.
///
///     gather_sum(p, y, ctx, mode)           // y_t = or += Σ_j w_tj row[slot_tj]
///     row_dots(slots, per_token, dy, dw, ctx)   // dw_tj = <dy_t, row[slot_tj]>
///     scatter_add(p, dy, g, ctx)            // g[slot_tj] += w_tj dy_t
///     read_row(i, out), write_row(i, in)    // one row, for loading, saving and checks
///
/// The kernels (kernels/gather.hpp) say what slot -1 and `mode` mean.
template <class T>
concept value_table = std::copyable<T> && std::floating_point<typename T::scalar> && sparse_gradient<typename T::gradient> &&
                      requires(const T t, T m, picks<typename T::scalar> p, matrix_view<typename T::scalar> y, matrix_view<const typename T::scalar> dy,
                               std::span<typename T::scalar> out, std::span<const typename T::scalar> in, typename T::gradient g, index_t i,
                               const context& ctx) {
                        { t.slots() } -> std::same_as<index_t>;
                        { t.rows() } -> std::same_as<index_t>;
                        { t.cols() } -> std::same_as<index_t>;
                        t.gather_sum(p, y, ctx, update::assign);
                        t.row_dots(p.slots, i, dy, out, ctx);
                        t.scatter_add(p, dy, g, ctx);
                        t.read_row(i, out);
                        m.write_row(i, in);
                      };

namespace detail {

/// to[0..n) = row `row` of a table of normal numbers (Box-Muller, both numbers of each pair, on Eigen's arrays: tables are large).
template <class S>
void fill_normal_row(S* to, index_t n, double deviation, rng_key key, index_t row) {
  constexpr int block = 64;
  using array = Eigen::Array<S, block, 1>;
  for (index_t c = 0; c < n; c += 2 * block) {
    array u, v;
    for (int i = 0; i < block; i += 2) {
      const auto word = philox(key, static_cast<std::uint64_t>((c + 2 * i) / 4), static_cast<std::uint64_t>(row));
      u[i] = (static_cast<S>(word[0]) + S(0.5)) * S(0x1p-32);
      v[i] = static_cast<S>(word[1]) * S(0x1p-32);
      u[i + 1] = (static_cast<S>(word[2]) + S(0.5)) * S(0x1p-32);
      v[i + 1] = static_cast<S>(word[3]) * S(0x1p-32);
    }
    const array radius = static_cast<S>(deviation) * (S(-2) * u.log()).sqrt(), angle = S(2 * std::numbers::pi) * v;
    const array first = radius * angle.cos(), second = radius * angle.sin();
    std::copy_n(first.data(), std::min<index_t>(block, n - c), to + c);
    if (n - c > block) std::copy_n(second.data(), std::min<index_t>(block, n - c - block), to + c + block);
  }
}

}  // namespace detail

/// A table in memory, its rows aligned to 64 bytes; huge pages are asked for. Copies are deep.
///
/// Throws config_error for sizes below 1 or of 2^31 rows and more; read_row and write_row throw index_error and shape_error.
template <std::floating_point S>
class dense_table {
 public:
  using scalar = S;
  /// The rows that were touched, and no others.
  using gradient = row_gradient<S>;

  dense_table() = default;
  /// All zero.
  dense_table(index_t rows, index_t cols) : rows_(rows), cols_(cols), stride_((cols + line - 1) / line * line) {
    require<config_error>(rows >= 1 && cols >= 1, "dense_table: expected at least 1 row and 1 column, got ", to_text(rows, cols));
    require<config_error>(rows < index_t{1} << 31 && cols < index_t{1} << 31, "dense_table: expected fewer than 2^31 rows and columns, got ",
                          to_text(rows, cols));
    memory_ = detail::large_array<S>(rows * stride_);
  }
  /// Normal numbers of mean 0 and standard deviation 1/√cols; `exec` shares the work, the numbers do not depend on it.
  dense_table(index_t rows, index_t cols, rng_key key, const executor& exec = serial_executor) : dense_table(rows, cols) {
    fill_normal(1 / std::sqrt(static_cast<double>(cols)), key, exec);
  }

  /// N, the rows that a pick may name.
  [[nodiscard]] index_t slots() const { return rows(); }
  /// N: this process holds all of them.
  [[nodiscard]] index_t rows() const { return memory_.empty() ? 0 : rows_; }  // a table that was moved from has none
  /// D, the numbers of a row.
  [[nodiscard]] index_t cols() const { return cols_; }
  /// All rows in place, [N x D]; their stride may be more than D.
  [[nodiscard]] matrix_view<S> view() { return {memory_.data(), rows(), cols_, stride_}; }
  /// All rows in place, [N x D]; their stride may be more than D.
  [[nodiscard]] matrix_view<const S> view() const { return {memory_.data(), rows(), cols_, stride_}; }

  void gather_sum(picks<S> p, matrix_view<S> y, const context& ctx, update mode = update::assign) const {
    lithe::gather_sum<S>(view(), p, y, ctx, mode);
  }
  void row_dots(std::span<const slot_t> slots, index_t per_token, matrix_view<const S> dy, std::span<S> dw, const context& ctx) const {
    lithe::row_dots<S>(view(), slots, per_token, dy, dw, ctx);
  }
  void scatter_add(picks<S> p, matrix_view<const S> dy, gradient& g, const context& ctx) const { lithe::scatter_add<S>(p, dy, g, ctx); }

  void read_row(index_t i, std::span<S> out) const {
    check(i, out.size());
    std::copy_n(view().row(i), cols_, out.begin());
  }
  void write_row(index_t i, std::span<const S> in) {
    check(i, in.size());
    std::copy(in.begin(), in.end(), view().row(i));
  }
  /// Normal numbers of mean 0 and the given standard deviation in every row.
  void fill_normal(double deviation, rng_key key, const executor& exec = serial_executor) {
    exec.run(rows(), std::max<index_t>(1, 16384 / cols_), [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) detail::fill_normal_row(view().row(i), cols_, deviation, key, i);
    });
  }

 private:
  static constexpr index_t line = 64 / static_cast<index_t>(sizeof(S));

  void check(index_t i, std::size_t n) const {
    require<index_error>(i >= 0 && i < rows(), "dense_table: expected a row below ", rows(), ", got ", i);
    require<shape_error>(static_cast<index_t>(n) == cols_, "dense_table: expected a row of ", cols_, " columns, got ", n);
  }

  index_t rows_ = 0, cols_ = 0, stride_ = 0;
  detail::large_array<S> memory_;
};

/// A handle on a table that several layers share; it is itself a value table. Copying a model copies the handle, `clone` the rows.
template <value_table T>
class shared_table {
 public:
  using scalar = typename T::scalar;
  /// A handle on the touched rows, which the holders of the table share.
  using gradient = shared_gradient<scalar>;

  shared_table() = default;
  /// Takes the table over; copies of the handle share it.
  explicit shared_table(T table) : table_(std::make_shared<T>(std::move(table))) {}

  /// N, the rows that a pick may name; 0 for a handle on nothing.
  [[nodiscard]] index_t slots() const { return table_ ? table_->slots() : 0; }
  /// How many rows this process holds; 0 for a handle on nothing.
  [[nodiscard]] index_t rows() const { return table_ ? table_->rows() : 0; }
  /// D, the numbers of a row; 0 for a handle on nothing.
  [[nodiscard]] index_t cols() const { return table_ ? table_->cols() : 0; }
  /// What is shared; there must be a table.
  [[nodiscard]] T& table() { return *table_; }
  /// What is shared; there must be a table.
  [[nodiscard]] const T& table() const { return *table_; }
  /// Equal for the handles of one table.
  [[nodiscard]] const void* identity() const { return table_.get(); }

  void gather_sum(picks<scalar> p, matrix_view<scalar> y, const context& ctx, update mode = update::assign) const {
    table_->gather_sum(p, y, ctx, mode);
  }
  void row_dots(std::span<const slot_t> slots, index_t per_token, matrix_view<const scalar> dy, std::span<scalar> dw, const context& ctx) const {
    table_->row_dots(slots, per_token, dy, dw, ctx);
  }
  void scatter_add(picks<scalar> p, matrix_view<const scalar> dy, gradient& g, const context& ctx) const {
    table_->scatter_add(p, dy, rows_of(g), ctx);
  }
  void read_row(index_t i, std::span<scalar> out) const { table_->read_row(i, out); }
  void write_row(index_t i, std::span<const scalar> in) { table_->write_row(i, in); }

  /// Makes g the gradient that the holders of `handle` share; the first of them creates it.
  void share_gradient(std::shared_ptr<void>& handle, gradient& g) const {
    if (!handle) {
      auto target = std::make_shared<row_gradient<scalar>>();
      target->total_rows = rows();
      target->cols = cols();
      handle = std::move(target);
    }
    g.target = std::static_pointer_cast<row_gradient<scalar>>(handle);
  }
  /// Leaves the shared table for the copy in `handle`; the first to come makes the copy.
  void separate(std::shared_ptr<void>& handle) {
    if (!handle && table_) handle = std::make_shared<T>(*table_);
    table_ = std::static_pointer_cast<T>(handle);
  }

 private:
  std::shared_ptr<T> table_;
};

/// A copy of a model (or of a single handle) that shares no table with the original; its layers share theirs as the original's do.
template <class L>
[[nodiscard]] L clone(const L& l) {
  L copy = l;
  std::map<const void*, std::shared_ptr<void>> copies;
  const auto separate = [&](auto& table) {
    if constexpr (requires { table.separate(copies[nullptr]); }) table.separate(copies[table.identity()]);
  };
  if constexpr (has_parameters<L>)
    walk([](const auto&...) {}, [&](const std::string&, role, auto& a) { separate(a); }, "", copy);
  else
    separate(copy);
  return copy;
}

}  // namespace lithe::inline LITHE_ABI
