// expect: lithe: a layer must be copyable.
#include <memory>

#include "lithe/compose/residual.hpp"
#include "lithe/layers/linear.hpp"

struct owner : lithe::linear<double> {
  std::unique_ptr<int> handle;
};
lithe::residual<owner> refused;
