// expect: lithe: a layer needs the member types scalar, record and gradient.
#include "lithe/compose/residual.hpp"

lithe::residual<double> refused;
