// expect: lithe: this argument is written to, so it must not be const.
#include "lithe/tensor/matrix_view.hpp"

void write(lithe::matrix_view<double>);
void refused(lithe::matrix_view<const double> m) { write(m); }
