// expect: lithe: a decoder block whose feed looks across tokens cannot skip a token
#include "lithe/compose/decoder_block.hpp"
#include "lithe/layers/attention/attention.hpp"
using block = lithe::decoder_block<lithe::attention<float>, lithe::attention<float>>;
void refused(const block& b, block::cache& c, lithe::matrix_view<const float> x) { b.fill(x, c, {}); }
