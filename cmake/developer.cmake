# What Lithe's own tests, benchmarks and examples are compiled with. None of it reaches users: the interface targets set no flags.
add_library(lithe_developer INTERFACE)
target_link_libraries(lithe_developer INTERFACE lithe::lithe)
target_compile_options(lithe_developer INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror
  # GCC 12 reports these wrongly inside Eigen's headers once they are inlined.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-array-bounds -Wno-uninitialized -Wno-maybe-uninitialized>
  # Eigen's thread pool has a fence, which GCC's thread sanitizer does not follow.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
