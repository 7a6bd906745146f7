# The CMake project in SOURCE finds or adds Lithe, by OPTIONS, builds without optimisation, and its PROGRAM runs, if one is named.
include(${SETTINGS})
set(build ${work_dir}/consumer_${NAME})
list(GET compile 0 compiler)
step("configuring ${SOURCE}" COMMAND ${CMAKE_COMMAND} -S ${SOURCE} -B ${build} -G ${GENERATOR} -D CMAKE_CXX_COMPILER=${compiler}
                                     -D CMAKE_BUILD_TYPE=Debug -D CMAKE_CXX_FLAGS_DEBUG=-O0 ${OPTIONS})
step("building it" COMMAND ${CMAKE_COMMAND} --build ${build})
if(PROGRAM)
  step("running ${PROGRAM}" COMMAND ${build}/${PROGRAM})
endif()
