// expect: lithe: the scalar type differs from the layer's; convert the matrix first.
#include "lithe/tensor/matrix_view.hpp"

void read(lithe::matrix_view<const double>);
void refused(const lithe::matrix<float>& m) { read(m); }
