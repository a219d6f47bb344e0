// From tensors to the plain Problem that kernels take. All validation is here, for every device: a wrong argument
// raises one message that names it, what was expected and what came, before anything is computed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace heedful {

using torch::stable::Tensor;

// The arguments that forward and backward share, in the schema's order (schemas.h).
struct Arguments {
  const std::optional<Tensor>&bias, &scales, &sinks, &slopes, &table, &buckets, &mask, &tiles, &bits, &q_lengths,
      &k_lengths, &q_starts, &q_offsets, &k_offsets, &seed;
  int64_t q_start;
  std::optional<int64_t> left, right;
  std::optional<double> scale, softcap;
  const std::string &similarity, &normalizer;
  double dropout_p;
  int64_t dropout_batch;
  bool allow_tf32;
};

// Whether the numbers in tensors may be read here. A GPU's may not: that would wait for all work before this call.
// There wrong offsets, buckets and tiles raise nothing: results are wrong then, but kernels stay inside of the tensors.
enum class Memory { host, device };

// A checked problem, and the tensors that its pointers belong to.
struct Call {
  Memory memory;
  Problem problem;
  std::vector<Tensor> kept;
};

Call check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& arguments, Memory memory);
void check_backward(Call& call, const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                    const Tensor& out, const Tensor& lse);
// That a gradient is asked for only of what was given.
void check_wanted(const char* name, bool wanted, const std::optional<Tensor>& tensor);

torch::headeronly::ScalarType compute_type(DType dtype);

// A new [B, H, S, D] tensor with the memory order of `like`: heads inside the sequence where they are so there.
Tensor empty_like_layout(const Tensor& like, int64_t heads, int64_t rows, int64_t dim);

// [B, heads, rows] of the compute type.
Tensor empty_lse(const Tensor& q, int64_t heads, int64_t rows, DType dtype);

View view_of(const Tensor& tensor);
// The same, with strides of 0 where `tensor` has a size of 1.
View broadcast_view(const Tensor& tensor);

}  // namespace heedful
