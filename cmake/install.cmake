# The library, its headers, a CMake package (adaattn::adaattn) and adaattn.pc; all of it relocatable.
include(CMakePackageConfigHelpers)

set(adaattn_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/adaattn)

install(TARGETS adaattn EXPORT adaattn-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/adaattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(EXPORT adaattn-targets NAMESPACE adaattn:: DESTINATION ${adaattn_package_dir})

# Before 1.0 a new minor version may change what a program was compiled against.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/adaattn-config-version.cmake COMPATIBILITY SameMinorVersion)
configure_package_config_file(cmake/adaattn-config.cmake.in ${PROJECT_BINARY_DIR}/adaattn-config.cmake
  INSTALL_DESTINATION ${adaattn_package_dir} NO_SET_AND_CHECK_MACRO)
install(FILES ${PROJECT_BINARY_DIR}/adaattn-config.cmake ${PROJECT_BINARY_DIR}/adaattn-config-version.cmake
  DESTINATION ${adaattn_package_dir})

# pkg-config finds the prefix from where the file lies, so that a moved tree still works.
file(RELATIVE_PATH adaattn_pc_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
string(REGEX REPLACE "/$" "" adaattn_pc_prefix "${adaattn_pc_prefix}")
configure_file(cmake/adaattn.pc.in ${PROJECT_BINARY_DIR}/adaattn.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/adaattn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
