// expect: lithe: this layer needs a second input (a memory); use it inside a decoder block.
#include "lithe/compose/stack.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
lithe::stack<lithe::cross_attention<float>> refused;
