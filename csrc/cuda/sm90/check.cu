// Every wrapper of ptx.h, and the kernels of the emulator's tests, for tools/sm90_code.py to see what nvcc makes of
// them. No library holds these.
#include "../../emulator/sm90/kernels.cuh"

namespace heedful::cuda {

template __global__ void product<BFloat16>(HEEDFUL_PARAMETER TensorMap, HEEDFUL_PARAMETER TensorMap,
                                           HEEDFUL_PARAMETER TensorMap, HEEDFUL_PARAMETER TensorMap);
template __global__ void product<Float16>(HEEDFUL_PARAMETER TensorMap, HEEDFUL_PARAMETER TensorMap,
                                          HEEDFUL_PARAMETER TensorMap, HEEDFUL_PARAMETER TensorMap);

template __global__ void ordered_sums<4>(HEEDFUL_PARAMETER TensorMap, float*, const float*);

template <int kDimensions>
__global__ void tiles(HEEDFUL_PARAMETER TensorMap map) {
  int at[kDimensions];
  for (int n = 0; n < kDimensions; ++n) at[n] = block_index() + n;
  const uint32_t mbarrier = shared_base(), tile = mbarrier + 1024;
  prefetch(map);
  init_mbarrier(mbarrier, 1);
  fence_mbarrier_init();
  arrive_expecting(mbarrier, 4096);
  load_tile(tile, map, mbarrier, at);
  wait_mbarrier(mbarrier, 0);
  store_tile(map, tile, at);
  add_tile(map, tile, at);
  commit_stores();
  wait_stores<0>();
}
template __global__ void tiles<2>(HEEDFUL_PARAMETER TensorMap);
template __global__ void tiles<3>(HEEDFUL_PARAMETER TensorMap);
template __global__ void tiles<4>(HEEDFUL_PARAMETER TensorMap);

__global__ void bulk_and_barriers(float* to, const float* from) {
  const uint32_t mbarrier = shared_base(), stretch = mbarrier + 1024;
  if (thread_index() == 0) {
    init_mbarrier(mbarrier, 1);
    fence_mbarrier_init();
    arrive_expecting(mbarrier, 512);
    load_bulk(stretch, from, 512, mbarrier);
    arrive(mbarrier);
  }
  if (!try_wait(mbarrier, 1)) wait_mbarrier(mbarrier, 1);
  uint32_t r[4];
  ldmatrix(r, stretch);
  stmatrix(stretch + 512, r);
  stmatrix_transposed(stretch + 1024, r);
  fence_async_shared();
  if (thread_index() < 32) arrive_named(1, 64);
  if (thread_index() >= 32) sync_named(1, 64);
  if (thread_index() != 32) return;
  add_bulk(to, stretch, 512);
  commit_stores();
  wait_stores_read<0>();
  wait_stores<0>();
  fence_async_global();
}

template <class T, int kColumns>
__global__ void __launch_bounds__(128, 1) products(float* out, const uint32_t* from, uint64_t a, uint64_t b) {
  float d[kColumns / 2];
  uint32_t registers[4];
  for (int n = 0; n < 4; ++n) registers[n] = from[thread_index() * 4 + n];
  fence_wgmma();
  if constexpr (std::is_same_v<T, BFloat16>)
    wgmma_zero<T, Major::mn, Major::k>(d, a, b);
  else
    wgmma_zero<T, Major::mn>(d, registers, b);
  wgmma<T, Major::k, Major::mn>(d, a, b);
  wgmma<T>(d, registers, b);
  commit_wgmma();
  wait_wgmma<0>();
  pin(d);
  for (int n = 0; n < kColumns / 2; ++n) out[thread_index() * kColumns / 2 + n] = d[n];
}
#define HEEDFUL_PRODUCTS(N)                                                                    \
  template __global__ void products<BFloat16, N>(float*, const uint32_t*, uint64_t, uint64_t); \
  template __global__ void products<Float16, N>(float*, const uint32_t*, uint64_t, uint64_t);
HEEDFUL_PRODUCTS(8)
HEEDFUL_PRODUCTS(16)
HEEDFUL_PRODUCTS(24)
HEEDFUL_PRODUCTS(32)
HEEDFUL_PRODUCTS(40)
HEEDFUL_PRODUCTS(48)
HEEDFUL_PRODUCTS(64)
HEEDFUL_PRODUCTS(80)
HEEDFUL_PRODUCTS(96)
HEEDFUL_PRODUCTS(112)
HEEDFUL_PRODUCTS(128)
HEEDFUL_PRODUCTS(144)
HEEDFUL_PRODUCTS(160)
HEEDFUL_PRODUCTS(176)
HEEDFUL_PRODUCTS(192)
HEEDFUL_PRODUCTS(224)
HEEDFUL_PRODUCTS(256)

}  // namespace heedful::cuda
