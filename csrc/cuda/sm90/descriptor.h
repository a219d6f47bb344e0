// How wgmma is told where an operand lies in shared memory (PTX manual, "Matrix Descriptor Format").
//
// Units are 16 bytes: 8 numbers along the direction in which the operand is contiguous. A swizzled row is as wide as
// its swizzle. Along the contiguous direction units follow each other, rows of a group of 8 likewise; two offsets say
// the rest:
//
//   K-major             stride: to the next 8 rows of M or N
//   K-major, no swizzle the same, and leading: to the next 8 numbers of K (a group is 8 units of 16 bytes)
//   MN-major            stride: to the next 8 rows of K; leading: to the next swizzle's width of M or N
//   MN-major, no swizzle  stride: to the next 8 numbers of M or N; leading: to the next 8 rows of K
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEEDFUL_HOST_DEVICE __host__ __device__
#else
#define HEEDFUL_HOST_DEVICE
#endif

namespace heedful::cuda {

// The value is the descriptor's field.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// Which 16-byte units a swizzle exchanges: of an address, the bits above 16 bytes by as many bits above 128 bytes.
HEEDFUL_HOST_DEVICE constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t mask = swizzle == Swizzle::none ? 0 : 15u >> uint32_t(swizzle);
  return address ^ (address >> 7 & mask) << 4;
}
HEEDFUL_HOST_DEVICE constexpr uint32_t width(Swizzle swizzle) {
  return swizzle == Swizzle::none ? 16 : 256u >> uint32_t(swizzle);
}

struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes, multiples of 16
  Swizzle swizzle;

  HEEDFUL_HOST_DEVICE constexpr uint64_t bits() const {
    const auto field = [](uint32_t bytes) { return uint64_t(bytes >> 4 & 0x3fff); };
    return field(start) | field(leading) << 16 | field(stride) << 32 | uint64_t(swizzle) << 62;
  }
};
// The same operand some bytes further on.
HEEDFUL_HOST_DEVICE constexpr uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// The direction in which an operand is contiguous.
enum class Major { k, mn };

}  // namespace heedful::cuda
