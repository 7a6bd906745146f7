#include "units.hpp"

unit second() { return describe<float>(); }
