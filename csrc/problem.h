// One attention call as every kernel sees it: pointers with their shapes, strides in elements, options. No torch here,
// and no inline functions: this header is compiled for several instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#define HEEDFUL_EXPORT __attribute__((visibility("default")))

namespace heedful {

enum class DType : int32_t { f32, f64, bf16, f16 };
enum class Similarity : int32_t { dot, cosine, gaussian };
enum class Normalizer : int32_t { softmax, hard };

// `left` or `right` of a band without a bound on that side.
constexpr int64_t kUnbounded = INT64_MAX;

// Queries and keys of a tile of a block mask; a row of it is one word of bits.
constexpr int64_t kMaskTile = 64;
constexpr int32_t kEmptyTile = 0, kFullTile = 1, kFirstPartialTile = 2;

// Dropout keeps a pair where 16 random bits are below its threshold; this many out of this many keep all.
constexpr uint32_t kKeepAll = 1 << 16;

// A tensor of four dimensions; a stride of 0 reads one element along a broadcast dimension.
struct View {
  void* data;
  int64_t stride[4];
};

// Numbers for each query head, [B or 1, rows, Hq], contiguous, compute type; data is null where the feature is absent.
struct Parameter {
  const void* data;
  int64_t batch_stride;  // 0: the same for every sequence
  double* gradient;      // of the same shape; null where unwanted
};

struct Problem {
  DType dtype;  // of q, k, v, out and their gradients; they accumulate in float32 (float64 for float64): "compute type"
  bool allow_tf32;  // whether products of float32 may round what they take to TensorFloat-32; CPUs never do
  // Sq and Sk are those of the longest sequence; q_rows and k_rows count the rows in memory, which differ when packed.
  int64_t B, Hq, Hk, Sq, Sk, D, Dv, q_rows, k_rows;
  double scale;

  View q;     // [B, Hq, Sq, D]; packed sequences (q_offsets): [1, Hq, q_rows, D], and so for all of the following
  View k;     // [B, Hk, Sk, D]
  View v;     // [B, Hk, Sk, Dv]
  View out;   // [B, Hq, Sq, Dv], last stride 1
  void* lse;  // [B, Hq, Sq], contiguous, compute type

  // Where sequences lie, and how long they are; null where absent.
  const int64_t* q_offsets;  // [B + 1]: packed, sequence b is the rows [q_offsets[b], q_offsets[b + 1])
  const int64_t* k_offsets;  // [B + 1]
  const int64_t* q_lengths;  // [B]
  const int64_t* k_lengths;  // [B]
  const int64_t* q_starts;   // [B], the position of each sequence's first query; else q_start
  int64_t q_start;

  // Masks; data is null where one is absent.
  int64_t left, right;  // keys from position - left to position + right
  View mask;            // bool [B, Hq, Sq, Sk]
  View tiles;           // int32 [B, Hq, Sq / kMaskTile, Sk / kMaskTile], rounded up: kEmptyTile and so on
  const int64_t* bits;  // [partial tiles, kMaskTile]: bit j of word i is the pair (i, j)
  int32_t end_tile;     // kFirstPartialTile + their number

  // Scores.
  Similarity similarity;
  Normalizer normalizer;
  double softcap;          // 0: none
  Parameter scales;        // [1 row], instead of scale
  Parameter sinks;         // [1 row]
  Parameter slopes;        // [1 row]
  Parameter table;         // [table_rows]
  int64_t table_rows;      // 0 without one
  const int64_t* buckets;  // [2 max_distance + 1]: the table's row for each distance from -max_distance on
  int64_t max_distance;    // farther distances count as this one
  View bias;               // [B, Hq, Sq, Sk]
  DType bias_dtype;        // dtype or f32
  uint32_t keep;           // dropout's threshold; kKeepAll: no dropout
  const int64_t* seeds;    // [B or 1]
  int64_t seeds_stride;    // 0: one for all
  int64_t dropout_batch;   // dropout counts b modulo this: B, or fewer where vmap made one batch of several

  // Backward only.
  View dout;  // [B, Hq, Sq, Dv]
  View dlse;  // [B, Hq, Sq], compute type; data is null where there is none
  View dq;    // [B, Hq, Sq, D], last stride 1
  View dk;    // [B, Hk, Sk, D], last stride 1
  View dv;    // [B, Hk, Sk, Dv], last stride 1
  // Compute type, contiguous, bias's shape with strides of 0 where bias broadcasts; data is null where unwanted.
  View dbias;
  bool writes_dbias;  // nobody zeroed it: each element is one pair's alone, and kernels write all of them
  void* workspace;    // what the plan asked for

  int64_t threads = 1;  // that run it: plans may follow them where no result does
};

}  // namespace heedful
