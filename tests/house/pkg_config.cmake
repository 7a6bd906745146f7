# pkg-config alone says how to compile against what was installed into PREFIX.
include(${SETTINGS})
find_program(pkg_config NAMES pkg-config pkgconf REQUIRED)
set(ENV{PKG_CONFIG_PATH} ${PREFIX}/share/pkgconfig)
execute_process(COMMAND ${pkg_config} --cflags --libs lithe OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags UNIX_COMMAND "${flags}")
list(GET compile 0 compiler)
step("compiling tests/consumer/main.cpp with the flags of pkg-config"
     COMMAND ${compiler} -std=c++20 ${project_dir}/tests/consumer/main.cpp ${flags} -o ${work_dir}/pkg_config)
step("running it" COMMAND ${work_dir}/pkg_config)
