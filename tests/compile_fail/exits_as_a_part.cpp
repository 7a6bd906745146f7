// expect: a stack with exits decodes in an exit_decoder.
#include "lithe/compose/adaptive_depth.hpp"
#include "lithe/compose/generator.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/embedding.hpp"
using model = lithe::sequential<lithe::embedding<float>, lithe::adaptive_depth<lithe::linear<float>>>;
void refused(lithe::generator<model>& g) { g.start({}, {}, {}); }
