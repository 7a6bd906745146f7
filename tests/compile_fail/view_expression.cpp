// expect: lithe: this is an unevaluated Eigen expression; write .eval() or assign it to a row-major matrix first.
#include "lithe/tensor/matrix_view.hpp"

void read(lithe::matrix_view<const double>);
void refused(const lithe::matrix<double>& m) { read(m + m); }
