# Debian's cross compiler, its tests run by user-mode emulation. ADAATTN_ARM64_DEPS is a prefix that holds what the
# tests need for AArch64 and Debian packages only for the host (GoogleTest, the Highway headers); ./dev check fills it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -L /usr/aarch64-linux-gnu)

get_filename_component(project_dir ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
set(ADAATTN_ARM64_DEPS ${project_dir}/build/arm64-deps CACHE PATH "Prefix of the AArch64 test dependencies")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ADAATTN_ARM64_DEPS)
set(CMAKE_FIND_ROOT_PATH ${ADAATTN_ARM64_DEPS} /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
