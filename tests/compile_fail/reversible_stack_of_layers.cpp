// expect: lithe: a reversible_stack needs blocks with forward_in_place and reverse, such as `reversible`.
#include "lithe/compose/reversible_stack.hpp"
#include "lithe/layers/linear.hpp"
lithe::reversible_stack<lithe::linear<float>> s;
