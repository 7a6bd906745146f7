// expect: lithe: only the first layer of a sequential may take tokens.
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/linear.hpp"

lithe::sequential<lithe::linear<double>, lithe::embedding<double>> refused;
