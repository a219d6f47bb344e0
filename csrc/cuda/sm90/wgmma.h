// wgmma: a warpgroup's products, from shared memory to registers, asynchronously. Included by ptx.h.
//
//   fence_wgmma();                              // after the last touch of accumulators and of A's registers
//   wgmma_zero<BFloat16>(d, a, b);              // d [64][N] = a [64][16] b [N][16]^T
//   wgmma<BFloat16>(d, advance(a, 32), advance(b, 32));  // d += ...
//   commit_wgmma();
//   wait_wgmma<0>();                            // from here on d may be read, and the operands overwritten
//   pin(d);
//
// N is twice the length of d: each thread holds half a row of N. The operands are descriptors (descriptor.h), or for A
// four registers, as mma.m16n8k16 has it for each warp's 16 rows.
#pragma once

namespace heedful::cuda {

HEEDFUL_DEVICE void fence_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HEEDFUL_DEVICE void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than the last kGroups groups are under way.
template <int kGroups>
HEEDFUL_DEVICE void wait_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// NOTE: the compiler does not know that a wait ends the products: this keeps what reads the accumulators behind it.
template <int kCount>
HEEDFUL_DEVICE void pin(float (&d)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) asm volatile("" : "+f"(d[n])::"memory");
}

// Accumulators 4 to N / 2 - 1 in fours; the first four stand where these lists are used.
#define HEEDFUL_MORE_8(F)
#define HEEDFUL_MORE_16(F) HEEDFUL_MORE_8(F) F(4, 5, 6, 7)
#define HEEDFUL_MORE_24(F) HEEDFUL_MORE_16(F) F(8, 9, 10, 11)
#define HEEDFUL_MORE_32(F) HEEDFUL_MORE_24(F) F(12, 13, 14, 15)
#define HEEDFUL_MORE_40(F) HEEDFUL_MORE_32(F) F(16, 17, 18, 19)
#define HEEDFUL_MORE_48(F) HEEDFUL_MORE_40(F) F(20, 21, 22, 23)
#define HEEDFUL_MORE_56(F) HEEDFUL_MORE_48(F) F(24, 25, 26, 27)
#define HEEDFUL_MORE_64(F) HEEDFUL_MORE_56(F) F(28, 29, 30, 31)
#define HEEDFUL_MORE_72(F) HEEDFUL_MORE_64(F) F(32, 33, 34, 35)
#define HEEDFUL_MORE_80(F) HEEDFUL_MORE_72(F) F(36, 37, 38, 39)
#define HEEDFUL_MORE_88(F) HEEDFUL_MORE_80(F) F(40, 41, 42, 43)
#define HEEDFUL_MORE_96(F) HEEDFUL_MORE_88(F) F(44, 45, 46, 47)
#define HEEDFUL_MORE_104(F) HEEDFUL_MORE_96(F) F(48, 49, 50, 51)
#define HEEDFUL_MORE_112(F) HEEDFUL_MORE_104(F) F(52, 53, 54, 55)
#define HEEDFUL_MORE_120(F) HEEDFUL_MORE_112(F) F(56, 57, 58, 59)
#define HEEDFUL_MORE_128(F) HEEDFUL_MORE_120(F) F(60, 61, 62, 63)
#define HEEDFUL_MORE_136(F) HEEDFUL_MORE_128(F) F(64, 65, 66, 67)
#define HEEDFUL_MORE_144(F) HEEDFUL_MORE_136(F) F(68, 69, 70, 71)
#define HEEDFUL_MORE_152(F) HEEDFUL_MORE_144(F) F(72, 73, 74, 75)
#define HEEDFUL_MORE_160(F) HEEDFUL_MORE_152(F) F(76, 77, 78, 79)
#define HEEDFUL_MORE_168(F) HEEDFUL_MORE_160(F) F(80, 81, 82, 83)
#define HEEDFUL_MORE_176(F) HEEDFUL_MORE_168(F) F(84, 85, 86, 87)
#define HEEDFUL_MORE_184(F) HEEDFUL_MORE_176(F) F(88, 89, 90, 91)
#define HEEDFUL_MORE_192(F) HEEDFUL_MORE_184(F) F(92, 93, 94, 95)
#define HEEDFUL_MORE_200(F) HEEDFUL_MORE_192(F) F(96, 97, 98, 99)
#define HEEDFUL_MORE_208(F) HEEDFUL_MORE_200(F) F(100, 101, 102, 103)
#define HEEDFUL_MORE_216(F) HEEDFUL_MORE_208(F) F(104, 105, 106, 107)
#define HEEDFUL_MORE_224(F) HEEDFUL_MORE_216(F) F(108, 109, 110, 111)
#define HEEDFUL_MORE_232(F) HEEDFUL_MORE_224(F) F(112, 113, 114, 115)
#define HEEDFUL_MORE_240(F) HEEDFUL_MORE_232(F) F(116, 117, 118, 119)
#define HEEDFUL_MORE_248(F) HEEDFUL_MORE_240(F) F(120, 121, 122, 123)
#define HEEDFUL_MORE_256(F) HEEDFUL_MORE_248(F) F(124, 125, 126, 127)

#define HEEDFUL_NAME(i, j, k, l) ", %" #i ", %" #j ", %" #k ", %" #l
#define HEEDFUL_ADD_TO(i, j, k, l) , "+f"(d[i]), "+f"(d[j]), "+f"(d[k]), "+f"(d[l])
#define HEEDFUL_SET(i, j, k, l) , "=f"(d[i]), "=f"(d[j]), "=f"(d[k]), "=f"(d[l])

// One instruction: `keep` 1 adds to d, 0 sets it; `operands` are a's and b's, `flags` the transpositions.
#define HEEDFUL_WGMMA_OF(N, type, keep, FOUR, operands, flags, ...)                                           \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " #keep ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
               "k16.f32." type "." type                                                                       \
               " {%0, %1, %2, %3" HEEDFUL_MORE_##N(HEEDFUL_NAME) "}, " operands ", keep, 1, 1, " flags ";\n}" \
               : HEEDFUL_FIRST_##FOUR HEEDFUL_MORE_##N(HEEDFUL_##FOUR)                                        \
               : __VA_ARGS__)
#define HEEDFUL_FIRST_ADD_TO "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define HEEDFUL_FIRST_SET "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])

#define HEEDFUL_WGMMA_TYPED(N, keep, FOUR, operands, flags, ...)           \
  if constexpr (std::is_same_v<T, BFloat16>)                               \
    HEEDFUL_WGMMA_OF(N, "bf16", keep, FOUR, operands, flags, __VA_ARGS__); \
  else                                                                     \
    HEEDFUL_WGMMA_OF(N, "f16", keep, FOUR, operands, flags, __VA_ARGS__)

// NOTE: operands come after the N / 2 accumulators, and inline assembly knows them by number alone.
#define HEEDFUL_WGMMA(N, o0, o1, o2, o3, o4, o5)                                                                     \
  template <class T, Major kMajorA = Major::k, Major kMajorB = Major::k>                                             \
  HEEDFUL_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {                                             \
    HEEDFUL_WGMMA_TYPED(N, 1, ADD_TO, "%" #o0 ", %" #o1, "%" #o2 ", %" #o3, "l"(a), "l"(b), "n"(int(kMajorA)),       \
                        "n"(int(kMajorB)));                                                                          \
  }                                                                                                                  \
  template <class T, Major kMajorA = Major::k, Major kMajorB = Major::k>                                             \
  HEEDFUL_DEVICE void wgmma_zero(float (&d)[N / 2], uint64_t a, uint64_t b) {                                        \
    HEEDFUL_WGMMA_TYPED(N, 0, SET, "%" #o0 ", %" #o1, "%" #o2 ", %" #o3, "l"(a), "l"(b), "n"(int(kMajorA)),          \
                        "n"(int(kMajorB)));                                                                          \
  }                                                                                                                  \
  template <class T, Major kMajorB = Major::k>                                                                       \
  HEEDFUL_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {                                 \
    HEEDFUL_WGMMA_TYPED(N, 1, ADD_TO, "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4, "%" #o5, "r"(a[0]),         \
                        "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kMajorB)));                                 \
  }                                                                                                                  \
  template <class T, Major kMajorB = Major::k>                                                                       \
  HEEDFUL_DEVICE void wgmma_zero(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {                            \
    HEEDFUL_WGMMA_TYPED(N, 0, SET, "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4, "%" #o5, "r"(a[0]), "r"(a[1]), \
                        "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kMajorB)));                                            \
  }

HEEDFUL_WGMMA(8, 4, 5, 6, 7, 8, 9)
HEEDFUL_WGMMA(16, 8, 9, 10, 11, 12, 13)
HEEDFUL_WGMMA(24, 12, 13, 14, 15, 16, 17)
HEEDFUL_WGMMA(32, 16, 17, 18, 19, 20, 21)
HEEDFUL_WGMMA(40, 20, 21, 22, 23, 24, 25)
HEEDFUL_WGMMA(48, 24, 25, 26, 27, 28, 29)
HEEDFUL_WGMMA(64, 32, 33, 34, 35, 36, 37)
HEEDFUL_WGMMA(80, 40, 41, 42, 43, 44, 45)
HEEDFUL_WGMMA(96, 48, 49, 50, 51, 52, 53)
HEEDFUL_WGMMA(112, 56, 57, 58, 59, 60, 61)
HEEDFUL_WGMMA(128, 64, 65, 66, 67, 68, 69)
HEEDFUL_WGMMA(144, 72, 73, 74, 75, 76, 77)
HEEDFUL_WGMMA(160, 80, 81, 82, 83, 84, 85)
HEEDFUL_WGMMA(176, 88, 89, 90, 91, 92, 93)
HEEDFUL_WGMMA(192, 96, 97, 98, 99, 100, 101)
HEEDFUL_WGMMA(224, 112, 113, 114, 115, 116, 117)
HEEDFUL_WGMMA(256, 128, 129, 130, 131, 132, 133)

}  // namespace heedful::cuda
