# The API reference: `cmake --build build/release --target reference`, then build/release/reference/html/index.html.
find_program(LITHE_DOXYGEN doxygen)
mark_as_advanced(LITHE_DOXYGEN)
if(LITHE_DOXYGEN)
  configure_file(cmake/Doxyfile.in Doxyfile @ONLY)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/reference)
  add_custom_target(reference COMMAND ${LITHE_DOXYGEN} ${PROJECT_BINARY_DIR}/Doxyfile VERBATIM)
else()
  message(STATUS "doxygen was not found, which only the API reference needs")
  add_custom_target(reference COMMAND ${CMAKE_COMMAND} -E echo "doxygen was not found: sh cmake/install-debian.sh doxygen, then configure again"
                              COMMAND ${CMAKE_COMMAND} -E false VERBATIM)
endif()
