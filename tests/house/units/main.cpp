#include <cmath>
#include <cstdio>

#include "units.hpp"

// Units with equal flags share Lithe's types, units with other kernels have types of their own, and all compute the same.
int main() {
  const unit mine = describe<float>(), same = second(), other = eigen_kernels();
#if defined(LITHE_EIGEN_KERNELS)
  const bool strangers = mine.type_name == other.type_name;  // the whole build has Eigen's kernels
#else
  const bool strangers = mine.type_name != other.type_name;
#endif
  const bool good = mine.type_name == same.type_name && strangers && mine.sum == same.sum && std::abs(mine.sum - other.sum) < 1e-4;
  if (!good)
    std::printf("%s %.9g\n%s %.9g\n%s %.9g\n", mine.type_name.c_str(), mine.sum, same.type_name.c_str(), same.sum, other.type_name.c_str(), other.sum);
  return good ? 0 : 1;
}
