// expect: lithe: a sequential needs at least one layer.
#include "lithe/compose/sequential.hpp"

lithe::sequential<> refused;
