// expect: lithe: this type is not a matrix Lithe can read; specialise lithe::matrix_access for it (data, rows, cols, stride).
#include "lithe/tensor/matrix_view.hpp"

struct table {
  double* numbers;
};
void read(lithe::matrix_view<const double>);
void refused(const table& t) { read(t); }
