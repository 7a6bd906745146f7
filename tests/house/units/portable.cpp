#include "units.hpp"

unit portable() { return describe<float>(); }
