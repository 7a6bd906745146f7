// expect: lithe: a layer needs `backward(x, const record&, dy, dx, gradient&, ctx) const`.
#include "lithe/compose/stack.hpp"

struct broken {
  using scalar = double;
  struct record {};
  struct gradient {};
  lithe::shape output_shape(lithe::matrix_view<const double> x) const { return {x.rows(), x.cols()}; }
  void forward(lithe::matrix_view<const double>, lithe::matrix_view<double>, const lithe::context&) const {}
  void forward(lithe::matrix_view<const double>, lithe::matrix_view<double>, record&, const lithe::context&) const {}
  template <class F, class... T>
  static void visit(F&&, T&...) {}
};
lithe::stack<broken> refused;
