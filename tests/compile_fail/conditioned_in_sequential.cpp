// expect: lithe: this layer needs a second input (a memory); use it inside a decoder block.
#include "lithe/compose/sequential.hpp"

struct reads_memory {
  using scalar = double;
  struct record {};
  struct gradient {};
  using view = lithe::matrix_view<double>;
  using const_view = lithe::matrix_view<const double>;
  using memory = lithe::memory_view<double>;
  lithe::shape output_shape(const_view x) const { return {x.rows(), x.cols()}; }
  void forward(const_view, memory, view, const lithe::context&) const {}
  void forward(const_view, memory, view, record&, const lithe::context&) const {}
  void backward(const_view, memory, const record&, const_view, view, view, gradient&, const lithe::context&) const {}
};
static_assert(lithe::conditioned_layer<reads_memory>);
lithe::sequential<reads_memory> refused;
