// expect: lithe: a record has at most 8 fields; group them.
#include "lithe/layers/record.hpp"

struct nine {
  int a, b, c, d, e, f, g, h, i;
};
std::size_t refused(const nine& r) { return lithe::bytes(r); }
