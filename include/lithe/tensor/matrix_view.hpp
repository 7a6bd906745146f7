#pragma once

#include <Eigen/Core>
#include <concepts>
#include <type_traits>

#include "lithe/core/error.hpp"

namespace lithe::inline LITHE_ABI {

static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0), "lithe: Eigen 3.4 or newer is needed.");

/// An owning matrix [rows x columns], row-major: one row is one token.
template <class S>
using matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Specialise this for a matrix type of your own:
///
///     template <> struct lithe::matrix_access<my_matrix> {
///       static double* data(my_matrix& m);  static const double* data(const my_matrix& m);
///       static std::ptrdiff_t rows(const my_matrix& m), cols(const my_matrix& m), stride(const my_matrix& m);  // row stride, in elements
///     };
template <class T>
struct matrix_access;

template <class S>
class matrix_view;

namespace detail {

template <class T>
inline constexpr bool is_view = false;
template <class S>
inline constexpr bool is_view<matrix_view<S>> = true;

template <class T>
concept eigen_type = requires {
  typename T::PlainObject;
  typename T::Scalar;
  static_cast<int>(T::IsRowMajor);
};
template <class T>
concept eigen_direct = eigen_type<T> && requires(T& t) {
  t.data();
  t.outerStride();
  t.innerStride();
};
template <class T>
concept eigen_rows = eigen_direct<T> && (bool(T::IsRowMajor) || bool(T::IsVectorAtCompileTime)) && (int(T::InnerStrideAtCompileTime) == 1);
/// Anything shaped like a rank-2 std::mdspan, recognised by its members.
template <class T>
concept mdspan_shaped = !eigen_type<T> && !is_view<std::remove_cv_t<T>> && requires(T& t) {
  *t.data_handle();
  static_cast<index_t>(t.extent(0));
  static_cast<index_t>(t.extent(1));
  static_cast<index_t>(t.stride(0));
  static_cast<index_t>(t.stride(1));
};
template <class T>
concept has_access = requires(T& t) {
  *matrix_access<std::remove_cv_t<T>>::data(t);
  static_cast<index_t>(matrix_access<std::remove_cv_t<T>>::rows(t));
  static_cast<index_t>(matrix_access<std::remove_cv_t<T>>::cols(t));
  static_cast<index_t>(matrix_access<std::remove_cv_t<T>>::stride(t));
};

template <class E>
struct layout {
  E* data;
  index_t rows, cols, stride;
};
template <class E>
layout(E*, index_t, index_t, index_t) -> layout<E>;

}  // namespace detail

/// A type whose rows Lithe can read in place: a view, a row-major Eigen matrix, map, block of rows or vector, anything shaped like
/// a rank-2 mdspan, or a type with a `matrix_access`.
template <class T>
concept matrix_like = detail::is_view<std::remove_cvref_t<T>> || detail::has_access<std::remove_reference_t<T>> ||
                      detail::mdspan_shaped<std::remove_reference_t<T>> || detail::eigen_rows<std::remove_reference_t<T>>;

namespace detail {

template <matrix_like T>
auto layout_of(T& t) {
  using U = std::remove_cv_t<T>;
  if constexpr (is_view<U>) {
    return layout{t.data(), t.rows(), t.cols(), t.stride()};
  } else if constexpr (has_access<T>) {
    using A = matrix_access<U>;
    return layout{A::data(t), static_cast<index_t>(A::rows(t)), static_cast<index_t>(A::cols(t)), static_cast<index_t>(A::stride(t))};
  } else if constexpr (mdspan_shaped<T>) {
    require<shape_error>(t.extent(1) <= 1 || t.stride(1) == 1, "matrix_view: the elements of a row must be contiguous, got an mdspan with inner stride ",
                         t.stride(1));
    return layout{&*t.data_handle(), static_cast<index_t>(t.extent(0)), static_cast<index_t>(t.extent(1)), static_cast<index_t>(t.stride(0))};
  } else if constexpr (U::IsVectorAtCompileTime && !U::IsRowMajor) {  // a column: rows of one element
    return layout{t.data(), t.rows(), t.cols(), t.cols()};
  } else {
    return layout{t.data(), t.rows(), t.cols(), t.outerStride()};
  }
}

}  // namespace detail

/// A matrix somebody else owns: data, rows, columns, row stride (elements; inner stride 1). Trivially copyable; S may be const.
///
/// Its converting constructor is the one door through which tensors enter the library; what it refuses, it refuses in a sentence.
template <class S>
class matrix_view {
 public:
  using scalar = std::remove_const_t<S>;
  /// Eigen's map of all rows, with their stride.
  using map_type = Eigen::Map<std::conditional_t<std::is_const_v<S>, const matrix<scalar>, matrix<scalar>>, 0, Eigen::OuterStride<>>;

  /// Eigen's map of one row, as an array.
  using row_type = Eigen::Map<std::conditional_t<std::is_const_v<S>, const Eigen::Array<scalar, 1, Eigen::Dynamic>, Eigen::Array<scalar, 1, Eigen::Dynamic>>>;

  constexpr matrix_view() = default;
  /// `stride` elements lie between the beginnings of two rows.
  constexpr matrix_view(S* data, index_t rows, index_t cols, index_t stride) : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  /// Rows that follow one another: the stride is cols.
  constexpr matrix_view(S* data, index_t rows, index_t cols) : matrix_view(data, rows, cols, cols) {}

  /// The rows of anything `matrix_like`, in place. Throws shape_error for an mdspan whose rows are not contiguous.
  template <class T>
    requires(!std::same_as<std::remove_cvref_t<T>, matrix_view>)
  matrix_view(T&& t) {  // implicit: every entry point takes views and is given matrices
    using U = std::remove_reference_t<T>;
    if constexpr (detail::eigen_type<U> && !detail::eigen_direct<U>)
      static_assert(matrix_like<T>, "lithe: this is an unevaluated Eigen expression; write .eval() or assign it to a row-major matrix first.");
    else if constexpr (detail::eigen_type<U>)
      static_assert(matrix_like<T>, "lithe: this matrix is column-major (or has an inner stride); Lithe reads rows in place, use Eigen::RowMajor.");
    else
      static_assert(matrix_like<T>, "lithe: this type is not a matrix Lithe can read; specialise lithe::matrix_access for it (data, rows, cols, stride).");
    if constexpr (matrix_like<T>) {
      const auto l = detail::layout_of(t);
      using E = std::remove_pointer_t<decltype(l.data)>;
      static_assert(std::same_as<std::remove_const_t<E>, scalar>, "lithe: the scalar type differs from the layer's; convert the matrix first.");
      static_assert(std::is_const_v<S> || !std::is_const_v<E>, "lithe: this argument is written to, so it must not be const.");
      if constexpr (std::is_convertible_v<E*, S*>) *this = matrix_view(l.data, l.rows, l.cols, l.stride);
    }
  }

  [[nodiscard]] constexpr S* data() const { return data_; }               ///< the first element
  [[nodiscard]] constexpr index_t rows() const { return rows_; }          ///< how many there are
  [[nodiscard]] constexpr index_t cols() const { return cols_; }          ///< elements of a row
  [[nodiscard]] constexpr index_t stride() const { return stride_; }      ///< elements from the beginning of a row to that of the next
  [[nodiscard]] constexpr index_t size() const { return rows_ * cols_; }  ///< elements of all rows
  /// The first element of row i; nothing is checked.
  [[nodiscard]] constexpr S* row(index_t i) const { return data_ + i * stride_; }
  /// Element j of row i; nothing is checked.
  [[nodiscard]] constexpr S& operator()(index_t i, index_t j) const { return data_[i * stride_ + j]; }
  /// The same matrix for Eigen's expressions.
  [[nodiscard]] map_type map() const { return map_type(data_, rows_, cols_, Eigen::OuterStride<>(stride_)); }
  /// One row for Eigen's coefficient-wise expressions.
  [[nodiscard]] row_type row_array(index_t i) const { return row_type(row(i), cols_); }
  /// The n rows from `first` on, in place.
  [[nodiscard]] constexpr matrix_view slice_rows(index_t first, index_t n) const { return {data_ == nullptr ? data_ : row(first), n, cols_, stride_}; }
  /// The n columns from `first` on, in place: the stride stays.
  [[nodiscard]] constexpr matrix_view slice_cols(index_t first, index_t n) const { return {data_ == nullptr ? data_ : data_ + first, rows_, n, stride_}; }
  /// Each row cut into rows of `width` elements, in place. Throws shape_error unless `width` divides the columns and
  /// the rows follow one another (the stride is cols): no view reaches the pieces of rows that lie apart.
  [[nodiscard]] matrix_view cut_rows(index_t width) const {
    require<shape_error>(cols_ == 0 || (width > 0 && cols_ % width == 0),
                         "matrix_view: expected rows of a multiple of ", width, " elements, got ", cols_);
    require<shape_error>(stride_ == cols_ || rows_ <= 1, "matrix_view: expected rows of ", cols_,
                         " elements that follow one another, got a stride of ", stride_);
    return {data_, cols_ == 0 ? 0 : rows_ * (cols_ / width), width};
  }

 private:
  S* data_ = nullptr;
  index_t rows_ = 0, cols_ = 0, stride_ = 0;
};

/// The view of anything `matrix_like`, its scalar (const or not) deduced.
template <class T>
auto view(T&& t) {
  if constexpr (matrix_like<T>)
    return matrix_view<std::remove_pointer_t<decltype(detail::layout_of(t).data)>>(t);
  else
    return matrix_view<float>(t);  // refused, with the constructor's sentence
}

namespace detail {

struct shape_text {
  index_t rows, cols;
  friend std::ostream& operator<<(std::ostream& out, const shape_text& s) { return out << '[' << s.rows << " x " << s.cols << ']'; }
};

}  // namespace detail

/// "[rows x cols]", for messages: written only if one is.
inline detail::shape_text to_text(index_t rows, index_t cols) { return {rows, cols}; }

/// Throws shape_error unless m is [rows x cols].
template <class S>
void require_shape(const char* who, const char* what, matrix_view<S> m, index_t rows, index_t cols) {
  require<shape_error>(m.rows() == rows && m.cols() == cols, who, ": expected ", what, " of shape ", to_text(rows, cols), ", got ",
                       to_text(m.rows(), m.cols()));
}

}  // namespace lithe::inline LITHE_ABI
