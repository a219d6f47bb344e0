// What a CUDA kernel is to the rest: a plan of launches, which follow each other. Every kernel takes the problem alone.
#pragma once

#include "../problem.h"

namespace heedful::cuda {

// Whether tensor cores' kernels (sm80/) leave a problem to those that go row by row (rows.cuh), and why.
enum class RowByRow { no, of_dtype, of_head_dim, of_hard, of_exact_float32 };
constexpr int64_t most_head_dim(DType dtype) { return dtype == DType::f32 ? 128 : 256; }
constexpr RowByRow row_by_row(const Problem& p, bool backward) {
  if (p.dtype == DType::f64) return RowByRow::of_dtype;
  if ((p.D < p.Dv ? p.Dv : p.D) > most_head_dim(p.dtype)) return RowByRow::of_head_dim;
  // NOTE: backward finds the best keys anew, row by row: of rounded scores another key may be best.
  if (p.normalizer == Normalizer::hard && (backward || p.dtype == DType::f32)) return RowByRow::of_hard;
  return p.dtype == DType::f32 && !p.allow_tf32 ? RowByRow::of_exact_float32 : RowByRow::no;
}
// Whether products of float32 take it as TensorFloat-32.
constexpr bool rounds_to_tf32(const Problem& p) { return p.dtype == DType::f32 && row_by_row(p, true) == RowByRow::no; }

using Kernel = void (*)(Problem);

struct Launch {
  Kernel kernel;
  int64_t blocks;
  int threads;
  uint32_t shared_bytes;
  const char* name;
};

struct Plan {
  Launch launches[12];
  int launch_count = 0;
  size_t workspace_bytes = 0;  // Problem::workspace, 256-byte aligned

  void add(const Launch& launch) {
    if (launch.blocks > 0) launches[launch_count++] = launch;
  }
};

// Kernels count rows and keys of a sequence in 32 bits.
constexpr int64_t kMostRows = int64_t{1} << 30;
// and the blocks of a launch.
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

}  // namespace heedful::cuda
