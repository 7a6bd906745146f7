// expect: lithe: this matrix is column-major (or has an inner stride); Lithe reads rows in place, use Eigen::RowMajor.
#include "lithe/tensor/matrix_view.hpp"

void read(lithe::matrix_view<const double>);
void refused(double* p) { read(Eigen::Map<lithe::matrix<double>, 0, Eigen::Stride<Eigen::Dynamic, 2>>(p, 2, 2, Eigen::Stride<Eigen::Dynamic, 2>(8, 2))); }
