// expect: lithe: a layer needs `shape output_shape(x) const`.
#include "lithe/compose/residual.hpp"

struct broken {
  using scalar = double;
  struct record {};
  struct gradient {};
  void forward(lithe::matrix_view<const double>, lithe::matrix_view<double>, const lithe::context&) const {}
  void forward(lithe::matrix_view<const double>, lithe::matrix_view<double>, record&, const lithe::context&) const {}
  void backward(lithe::matrix_view<const double>, const record&, lithe::matrix_view<const double>, lithe::matrix_view<double>, gradient&,
                const lithe::context&) const {}
  template <class F, class... T>
  static void visit(F&&, T&...) {}
};
lithe::residual<broken> refused;
