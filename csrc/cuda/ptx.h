// One thin wrapper for each instruction that kernels use. The kernels call nothing else of CUDA, so that the same
// sources run on the CPU, with csrc/emulator/ptx.h in this header's place.
#pragma once

#ifndef __CUDACC__
#include "../emulator/ptx.h"
#else

#include <cstdint>

#define HEEDFUL_TARGET cuda
#define HEEDFUL_DEVICE __device__ __forceinline__
#define HEEDFUL_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define HEEDFUL_PARAMETER const __grid_constant__

#pragma nv_diag_suppress 1675  // "unrecognized GCC pragma": those are for CPUs

#include "../score/target.h"

namespace heedful::cuda {

// ---- threads --------------------------------------------------------------------------------------------------------

HEEDFUL_DEVICE int thread_index() { return int(threadIdx.x); }
HEEDFUL_DEVICE int block_index() { return int(blockIdx.x); }

HEEDFUL_DEVICE void sync_block() { __syncthreads(); }
HEEDFUL_DEVICE void sync_warp() { __syncwarp(); }

// Reads the value of lane `other`.
template <class T>
HEEDFUL_DEVICE T shuffle(T value, int other) {
  return __shfl_sync(0xffffffffu, value, other);
}
template <class T>
HEEDFUL_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Whether any lane of the warp says so.
HEEDFUL_DEVICE bool any_lane(bool mine) { return __any_sync(0xffffffffu, mine); }

// ---- arithmetic -----------------------------------------------------------------------------------------------------

HEEDFUL_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HEEDFUL_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- numbers in memory ----------------------------------------------------------------------------------------------

HEEDFUL_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
HEEDFUL_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }

HEEDFUL_DEVICE float widen(float x) { return x; }
HEEDFUL_DEVICE double widen(double x) { return x; }
HEEDFUL_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
HEEDFUL_DEVICE float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// To the nearest, of two equally near ones to the even one.
template <class T, class C>
HEEDFUL_DEVICE T narrow(C x) {
  return T(x);
}
template <>
HEEDFUL_DEVICE BFloat16 narrow<BFloat16, float>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
HEEDFUL_DEVICE Float16 narrow<Float16, float>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two numbers; the first one goes to the low half.
template <class T>
HEEDFUL_DEVICE uint32_t pack(float low, float high);
template <>
HEEDFUL_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
HEEDFUL_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// To TensorFloat-32, which has 10 bits of mantissa: to the nearest, of two equally near ones to the one farther from 0.
// A NaN with none but lower bits becomes infinite.
HEEDFUL_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// ---- products -------------------------------------------------------------------------------------------------------

// c [16][8] += a [16][16] b [16][8], which lie over the warp's registers as the PTX manual's "Matrix Fragments for
// mma.m16n8k16" has it. Of float32, which has to be in TensorFloat-32: a [16][8] b [8][8], as for mma.m16n8k8.
template <class T>
HEEDFUL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
HEEDFUL_DEVICE void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
HEEDFUL_DEVICE void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
HEEDFUL_DEVICE void mma<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- shared memory --------------------------------------------------------------------------------------------------

// NOTE: volatile and "memory" keep these in order with each other and with barriers; the compiler knows nothing of
// what lies behind the addresses.

// Where the block's dynamic shared memory starts; its addresses are 32 bits.
HEEDFUL_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared_memory));
}

template <class T>
HEEDFUL_DEVICE T load_shared(uint32_t address);
template <class T>
HEEDFUL_DEVICE void store_shared(uint32_t address, T x);
template <>
HEEDFUL_DEVICE float load_shared<float>(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
template <>
HEEDFUL_DEVICE void store_shared<float>(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
template <>
HEEDFUL_DEVICE uint32_t load_shared<uint32_t>(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
template <>
HEEDFUL_DEVICE void store_shared<uint32_t>(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
template <>
HEEDFUL_DEVICE double load_shared<double>(uint32_t address) {
  double x;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(address) : "memory");
  return x;
}
template <>
HEEDFUL_DEVICE void store_shared<double>(uint32_t address, double x) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(address), "d"(x) : "memory");
}
template <>
HEEDFUL_DEVICE uint4 load_shared<uint4>(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
template <>
HEEDFUL_DEVICE void store_shared<uint4>(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane n brings the address of row n % 8 of matrix n / 8, and takes of each
// matrix two neighbours of row n / 4 (of column n / 4 where it is transposed).
HEEDFUL_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
HEEDFUL_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- global memory --------------------------------------------------------------------------------------------------

template <class T>
HEEDFUL_DEVICE T load_global(const T* from) {
  return *from;
}
template <class T>
HEEDFUL_DEVICE void store_global(T* to, T x) {
  *to = x;
}

// Copies the first `bytes` of 16 to shared memory and fills the rest with zeros, asynchronously.
HEEDFUL_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
HEEDFUL_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than the last kGroups groups are under way.
template <int kGroups>
HEEDFUL_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace heedful::cuda

#endif
