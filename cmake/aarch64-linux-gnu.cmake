# Builds for Linux on aarch64 with Debian's packages g++-aarch64-linux-gnu and qemu-user, for the C++ test:
#   cmake -B build/aarch64 -G Ninja -DHEEDFUL_KERNEL_TEST=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
#   cmake --build build/aarch64
#   qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/heedful_kernel_test
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
