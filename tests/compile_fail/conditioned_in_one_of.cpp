// expect: lithe: this layer needs a second input (a memory); use it inside a decoder block.
#include "lithe/compose/one_of.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
lithe::one_of<lithe::cross_attention<float>> refused;
