// expect: lithe: a layer needs the member types scalar, record and gradient.
#include "lithe/compose/residual.hpp"

struct broken {
  using scalar = double;
  struct record {};
  template <class F, class... T>
  static void visit(F&&, T&...) {}
};
lithe::residual<broken> refused;
