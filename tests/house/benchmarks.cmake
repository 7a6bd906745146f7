# Benchmarks and tables, which no test builds, still compile.
include(${SETTINGS})
include(${CMAKE_CURRENT_LIST_DIR}/check_syntax.cmake)
file(GLOB sources ${project_dir}/bench/*.cpp ${project_dir}/bench/tables/*.cpp)
check_syntax("-DLITHE_BENCH_FLAGS=\"\";-I${project_dir}/examples/train_language_model" ${sources})
