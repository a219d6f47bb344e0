#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <stdexcept>
#include <string>

namespace heedful {
namespace {

using torch::headeronly::ScalarType;
using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

std::string text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

[[noreturn]] void fail(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error("heedful.attention: " + argument + ": expected " + expected + ", got " + got);
}

void expect_rank(const char* name, const Tensor& t, const char* layout) {
  if (t.dim() != 4) fail(name, std::string("4 dimensions ") + layout, text(shape_of(t)));
}

void expect_shape(const char* name, const Tensor& t, const Shape& shape, const char* layout) {
  if (shape_of(t) != shape) fail(name, std::string(layout) + " = " + text(shape), text(shape_of(t)));
}

void expect_dtype(const char* name, const Tensor& t, ScalarType type, const char* why) {
  if (t.scalar_type() != type) fail(name, text(type) + why, text(t.scalar_type()));
}

void expect_device(const char* name, const Tensor& t, const Tensor& q) {
  if (device_of(t) != device_of(q)) fail(name, "device " + device_of(q) + ", as q", device_of(t));
}

// Each dimension is that of [B, Hq, Sq, Sk], or 1.
void expect_broadcastable(const char* name, const Tensor& t, const Problem& p) {
  const Shape full = {p.B, p.Hq, p.Sq, p.Sk}, shape = shape_of(t);
  bool fits = shape.size() == 4;
  for (size_t i = 0; fits && i < 4; ++i) fits = shape[i] == full[i] || shape[i] == 1;
  if (!fits)
    fail(name, "a shape that broadcasts to [B, Hq, Sq, Sk] = " + text(full) + ", in 4 dimensions", text(shape));
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(name, "float32, float64, bfloat16 or float16", text(t.scalar_type()));
  }
}

const int64_t* per_sequence(const char* name, const std::optional<Tensor>& t, const Tensor& q, Call& call) {
  if (!t) return nullptr;
  expect_shape(name, *t, {call.problem.B}, "[B]");
  expect_dtype(name, *t, ScalarType::Long, "");
  expect_device(name, *t, q);
  call.kept.push_back(torch::stable::contiguous(*t));
  return static_cast<const int64_t*>(call.kept.back().data_ptr());
}

}  // namespace

ScalarType compute_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

View view_of(const Tensor& tensor) {
  View view{tensor.data_ptr(), {0, 0, 0, 0}};
  for (int64_t i = 0; i < tensor.dim(); ++i) view.stride[i] = tensor.stride(i);
  return view;
}

View broadcast_view(const Tensor& tensor) {
  View view = view_of(tensor);
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) == 1) view.stride[i] = 0;
  return view;
}

Tensor empty_like_layout(const Tensor& like, int64_t heads, int64_t rows, int64_t dim) {
  const int64_t batch = like.size(0);
  if (like.stride(1) < like.stride(2))
    return torch::stable::transpose(torch::stable::new_empty(like, Shape{batch, rows, heads, dim}), 1, 2);
  return torch::stable::new_empty(like, Shape{batch, heads, rows, dim});
}

Call check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  Call call{};
  Problem& p = call.problem;
  expect_rank("q", q, "[B, Hq, Sq, D]");
  expect_rank("k", k, "[B, Hk, Sk, D]");
  expect_rank("v", v, "[B, Hk, Sk, Dv]");
  p.B = q.size(0), p.Hq = q.size(1), p.Sq = q.size(2), p.D = q.size(3);
  p.Hk = k.size(1), p.Sk = k.size(2), p.Dv = v.size(3);
  expect_shape("k", k, {p.B, p.Hk, p.Sk, p.D}, "[B, Hk, Sk, D], with B and D as q's,");
  expect_shape("v", v, {p.B, p.Hk, p.Sk, p.Dv}, "[B, Hk, Sk, Dv], with B, Hk and Sk as k's,");
  if (p.Hk == 0 ? p.Hq != 0 : p.Hq % p.Hk != 0)
    fail("q", "a number of heads that is a multiple of k's " + std::to_string(p.Hk), std::to_string(p.Hq));
  p.dtype = dtype_of("q", q);
  expect_dtype("k", k, q.scalar_type(), ", as q");
  expect_dtype("v", v, q.scalar_type(), ", as q");
  expect_device("k", k, q);
  expect_device("v", v, q);
  p.q = view_of(q), p.k = view_of(k), p.v = view_of(v);

  if (options.mask) {
    expect_broadcastable("mask", *options.mask, p);
    expect_dtype("mask", *options.mask, ScalarType::Bool, "");
    expect_device("mask", *options.mask, q);
    p.mask = broadcast_view(*options.mask);
  }
  if (options.bias) {
    expect_broadcastable("bias", *options.bias, p);
    const ScalarType type = options.bias->scalar_type();
    if (type != q.scalar_type() && type != ScalarType::Float)
      fail("bias", text(q.scalar_type()) + ", as q, or float32", text(type));
    expect_device("bias", *options.bias, q);
    p.bias = broadcast_view(*options.bias);
    p.bias_dtype = dtype_of("bias", *options.bias);
  }
  call.kept.reserve(3);
  p.q_lengths = per_sequence("q_lengths", options.q_lengths, q, call);
  p.k_lengths = per_sequence("k_lengths", options.k_lengths, q, call);
  p.q_starts = per_sequence("q_starts", options.q_starts, q, call);
  p.q_start = options.q_start;
  p.left = options.left.value_or(kUnbounded);
  p.right = options.right.value_or(kUnbounded);
  p.scale = options.scale.value_or(p.D ? 1 / std::sqrt(double(p.D)) : 1.0);
  if (!std::isfinite(p.scale)) fail("scale", "a finite number", std::to_string(p.scale));
  return call;
}

void check_backward(Call& call, const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                    const Tensor& out, const Tensor& lse, bool bias_grad, const std::optional<Tensor>& bias) {
  Problem& p = call.problem;
  const Shape result = {p.B, p.Hq, p.Sq, p.Dv}, rows = {p.B, p.Hq, p.Sq};
  const ScalarType compute = compute_type(p.dtype);
  expect_shape("dout", dout, result, "[B, Hq, Sq, Dv]");
  expect_shape("out", out, result, "[B, Hq, Sq, Dv]");
  expect_shape("lse", lse, rows, "[B, Hq, Sq]");
  expect_dtype("dout", dout, q.scalar_type(), ", as q");
  expect_dtype("out", out, q.scalar_type(), ", as q");
  expect_dtype("lse", lse, compute, "");
  expect_device("dout", dout, q);
  expect_device("out", out, q);
  expect_device("lse", lse, q);
  if (bias_grad && !bias) fail("bias_grad", "False where there is no bias", "True");
  p.dout = view_of(dout);
  p.out = view_of(out);
  call.kept.push_back(torch::stable::contiguous(lse));
  p.lse = call.kept.back().data_ptr();
  if (dlse) {
    expect_shape("dlse", *dlse, rows, "[B, Hq, Sq]");
    expect_dtype("dlse", *dlse, compute, "");
    expect_device("dlse", *dlse, q);
    p.dlse = view_of(*dlse);
  }
}

}  // namespace heedful
