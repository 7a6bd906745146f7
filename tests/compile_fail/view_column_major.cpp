// expect: lithe: this matrix is column-major (or has an inner stride); Lithe reads rows in place, use Eigen::RowMajor.
#include "lithe/tensor/matrix_view.hpp"

void read(lithe::matrix_view<const double>);
void refused(const Eigen::MatrixXd& m) { read(m); }
