// Score features are written once for CPU lanes and for CUDA. Whoever includes them names the target's own namespace in
// HEEDFUL_TARGET, so that no inline function is shared by code compiled for different instruction sets.
#pragma once

#ifndef HEEDFUL_TARGET
#error "define HEEDFUL_TARGET (a namespace below heedful) before including score headers"
#endif

#ifdef __CUDACC__
#define HEEDFUL_FN __host__ __device__ __forceinline__
#else
#define HEEDFUL_FN inline __attribute__((always_inline))
#endif

// Called by its own code: worth a call, too large to copy to every caller.
#define HEEDFUL_CALLED __attribute__((noinline))
