# Without any build system: -I and nothing else.
include(${SETTINGS})
step("compiling tests/consumer/main.cpp" COMMAND ${compile} -pthread ${project_dir}/tests/consumer/main.cpp -o ${work_dir}/plain_include)
step("running it" COMMAND ${work_dir}/plain_include)
