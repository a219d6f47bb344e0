// Tensors as the bulk copy engine (TMA) sees them: what the host says of them, and why the engine might refuse.
#pragma once

#include "descriptor.h"

namespace heedful::cuda {

enum class Element { bf16, f16, f32 };

constexpr uint32_t bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

constexpr int kMostDimensions = 4;

struct TensorLayout {
  void* data;
  Element element;
  int dimensions;                        // 2 to 4; the first one is contiguous
  uint64_t size[kMostDimensions];        // in elements
  uint64_t stride[kMostDimensions - 1];  // in bytes, of the second dimension and on
  uint32_t box[kMostDimensions];         // what one instruction copies, in elements
  Swizzle swizzle;

  // Why the engine cannot copy it; null where it can.
  const char* refusal() const {
    if (dimensions < 2 || dimensions > kMostDimensions) return "2 to 4 dimensions were expected";
    if (reinterpret_cast<uintptr_t>(data) % 16) return "the data are not 16-byte aligned";
    for (int n = 0; n < dimensions; ++n) {
      if (size[n] == 0 || size[n] > uint64_t{1} << 32) return "a size is not in 1 to 2^32";
      if (box[n] == 0 || box[n] > 256) return "a side of the box is not in 1 to 256";
      if (n && (stride[n - 1] % 16 || stride[n - 1] >= uint64_t{1} << 40))
        return "a stride is not a multiple of 16 bytes below 2^40";
    }
    const uint32_t row = box[0] * bytes_of(element);
    if (row % 16) return "the box is not a multiple of 16 bytes wide";
    if (swizzle != Swizzle::none && row != width(swizzle)) return "the box is not as wide as its swizzle";
    return nullptr;
  }
  constexpr uint32_t box_bytes() const {
    uint32_t bytes = bytes_of(element);
    for (int n = 0; n < dimensions; ++n) bytes *= box[n];
    return bytes;
  }
};

}  // namespace heedful::cuda

#ifdef __CUDACC__
#include <cudaTypedefs.h>

namespace heedful::cuda {

using TensorMap = CUtensorMap;

// By the driver's entry point, which whoever launches asks the runtime for: nothing here is linked with the driver.
inline bool encode(PFN_cuTensorMapEncodeTiled_v12000 entry, const TensorLayout& layout, TensorMap& map) {
  if (layout.refusal()) return false;
  constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  constexpr cuuint32_t steps[kMostDimensions] = {1, 1, 1, 1};
  cuuint64_t size[kMostDimensions], stride[kMostDimensions - 1];
  for (int n = 0; n < layout.dimensions; ++n) size[n] = layout.size[n];
  for (int n = 0; n + 1 < layout.dimensions; ++n) stride[n] = layout.stride[n];
  return entry(&map, types[int(layout.element)], cuuint32_t(layout.dimensions), layout.data, size, stride, layout.box,
               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[int(layout.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace heedful::cuda
#endif
