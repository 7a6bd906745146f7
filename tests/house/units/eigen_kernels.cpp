#include "units.hpp"

unit eigen_kernels() { return describe<float>(); }
