#include "lithe/lithe.hpp"
