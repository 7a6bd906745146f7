# Without any build system: -I and nothing else.
include(${SETTINGS})
execute_process(COMMAND ${compile} -pthread ${project_dir}/tests/consumer/main.cpp -o ${work_dir}/plain_include COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${work_dir}/plain_include COMMAND_ERROR_IS_FATAL ANY)
