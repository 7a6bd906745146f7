// expect: a reversible block keeps nothing inside that a unit could read.
#include "lithe/compose/pre_norm.hpp"
#include "lithe/compose/reversible.hpp"
#include "lithe/compose/skip_stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/ultra_mem.hpp"
using block = lithe::reversible<lithe::pre_norm<lithe::attention<float>>, lithe::pre_norm<lithe::feed_forward<float>>>;
lithe::skip_stack<block, lithe::ultra_mem<float>> s;
