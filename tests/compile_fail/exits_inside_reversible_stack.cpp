// expect: lithe: a reversible_stack needs blocks with forward_in_place and reverse, such as `reversible`.
#include "lithe/compose/adaptive_depth_stack.hpp"
#include "lithe/compose/reversible_stack.hpp"
#include "lithe/layers/linear.hpp"
// Exits keep the state of every block, which a reversible stack is there not to keep: they stand around reversible stacks.
lithe::reversible_stack<lithe::adaptive_stack<lithe::linear<float>>> s;
