include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Each component is an export of its own, so that only who asks for it needs what it depends on.
install(TARGETS lithe EXPORT lithe-targets FILE_SET HEADERS)
install(TARGETS lithe_io EXPORT lithe-io-targets FILE_SET HEADERS)

set(lithe_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/lithe)
install(EXPORT lithe-targets NAMESPACE lithe:: DESTINATION ${lithe_package_dir})
install(EXPORT lithe-io-targets NAMESPACE lithe:: DESTINATION ${lithe_package_dir})
configure_package_config_file(cmake/lithe-config.cmake.in ${PROJECT_BINARY_DIR}/lithe-config.cmake INSTALL_DESTINATION ${lithe_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/lithe-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/lithe-config.cmake ${PROJECT_BINARY_DIR}/lithe-config-version.cmake DESTINATION ${lithe_package_dir})

file(RELATIVE_PATH lithe_prefix_from_pc ${CMAKE_INSTALL_FULL_DATADIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/lithe.pc.in ${PROJECT_BINARY_DIR}/lithe.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/lithe.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
