// expect: lithe: this type is not a matrix Lithe can read; specialise lithe::matrix_access for it (data, rows, cols, stride).
#include "lithe/tensor/matrix_view.hpp"

void refused() { (void)lithe::view(3); }
