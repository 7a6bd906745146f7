// expect: lithe: a layer needs `forward(x, y, ctx) const`.
#include "lithe/compose/sequential.hpp"

struct broken {
  using scalar = double;
  struct record {};
  struct gradient {};
  lithe::shape output_shape(lithe::matrix_view<const double> x) const { return {x.rows(), x.cols()}; }
  void forward(lithe::matrix_view<const double>, lithe::matrix_view<double>, record&, const lithe::context&) const {}
  void backward(lithe::matrix_view<const double>, const record&, lithe::matrix_view<const double>, lithe::matrix_view<double>, gradient&,
                const lithe::context&) const {}
  template <class F, class... T>
  static void visit(F&&, T&...) {}
};
lithe::sequential<broken> refused;
