#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
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

// An int64 tensor of this shape, kept for as long as the call.
const int64_t* integers(const char* name, const Tensor& t, const Shape& shape, const char* layout, const Tensor& q,
                        Call& call) {
  expect_shape(name, t, shape, layout);
  expect_dtype(name, t, ScalarType::Long, "");
  expect_device(name, t, q);
  call.kept.push_back(torch::stable::contiguous(t));
  return static_cast<const int64_t*>(call.kept.back().data_ptr());
}

const int64_t* per_sequence(const char* name, const std::optional<Tensor>& t, const Tensor& q, Call& call) {
  return t ? integers(name, *t, {call.problem.B}, "[B]", q, call) : nullptr;
}

// Sequences packed one after the other: their number, and a length that none exceeds: that of the longest, where
// offsets are read.
const int64_t* packed(const char* name, const std::optional<Tensor>& t, const Tensor& q, int64_t rows, Call& call,
                      int64_t* longest) {
  if (t->dim() != 1 || t->size(0) < 1) fail(name, "a tensor [sequences + 1]", text(shape_of(*t)));
  const int64_t count = t->size(0), *offsets = integers(name, *t, {count}, "[sequences + 1]", q, call);
  *longest = rows;
  if (call.memory == Memory::device) return offsets;
  *longest = 0;
  for (int64_t b = 0; b < count; ++b) {
    if (offsets[b] < (b ? offsets[b - 1] : 0) || offsets[b] > rows)
      fail(name, "offsets that do not decrease, from 0 to at most " + std::to_string(rows), std::to_string(offsets[b]));
    if (b) *longest = std::max(*longest, offsets[b] - offsets[b - 1]);
  }
  return offsets;
}

// Where offsets are not read, sequences are as long as masks and biases are made for.
void bound_lengths(const Arguments& a, Problem& p) {
  const auto bound = [&](const std::optional<Tensor>& t, int64_t unit) {
    if (!t || t->dim() != 4) return;
    if (unit > 1 || t->size(2) != 1) p.Sq = std::min(p.Sq, t->size(2) * unit);
    if (unit > 1 || t->size(3) != 1) p.Sk = std::min(p.Sk, t->size(3) * unit);
  };
  bound(a.mask, 1), bound(a.bias, 1), bound(a.tiles, kMaskTile);
}

// Numbers for each head: [(rows,) Hq], or with a batch dimension in front.
Parameter parameter(const char* name, const std::optional<Tensor>& t, const Tensor& q, int64_t rows, bool has_rows,
                    Call& call) {
  if (!t) return {};
  const Problem& p = call.problem;
  Shape one = {p.Hq}, each = {p.B, p.Hq};
  if (has_rows) one = {rows, p.Hq}, each = {p.B, rows, p.Hq};
  const Shape shape = shape_of(*t);
  if (shape != one && shape != each)
    fail(name, (has_rows ? "[rows, Hq] = " : "[Hq] = ") + text(one) + " or, for each sequence, " + text(each),
         text(shape));
  const ScalarType type = t->scalar_type();
  if (type != q.scalar_type() && type != ScalarType::Float)
    fail(name, text(q.scalar_type()) + ", as q, or float32", text(type));
  expect_device(name, *t, q);
  const ScalarType compute = compute_type(p.dtype);
  call.kept.push_back(torch::stable::contiguous(type == compute ? *t : torch::stable::to(*t, compute)));
  return {call.kept.back().data_ptr(), shape == one ? 0 : rows * p.Hq, nullptr};
}

// Finds the first element of an integer tensor outside [low, end).
template <class T>
void expect_range(const char* name, const Tensor& t, int64_t low, int64_t end, const Call& call) {
  if (call.memory == Memory::device) return;
  const Tensor flat = torch::stable::contiguous(t);
  const T* data = static_cast<const T*>(flat.data_ptr());
  for (int64_t i = 0; i < flat.numel(); ++i)
    if (data[i] < low || data[i] >= end)
      fail(name, "values from " + std::to_string(low) + " to below " + std::to_string(end), std::to_string(data[i]));
}

void check_table(const Arguments& a, const Tensor& q, Call& call) {
  Problem& p = call.problem;
  if (bool(a.table) != bool(a.buckets))
    fail(a.table ? "buckets" : "table", a.table ? "a tensor beside table" : "a tensor beside buckets", "None");
  if (!a.table) return;
  const int64_t rank = a.table->dim();
  if (rank != 2 && rank != 3) fail("table", "2 dimensions [rows, Hq] or 3 [B, rows, Hq]", text(shape_of(*a.table)));
  p.table_rows = a.table->size(rank - 2);
  if (p.table_rows == 0) fail("table", "a row at least", text(shape_of(*a.table)));
  p.table = parameter("table", a.table, q, p.table_rows, true, call);
  if (a.buckets->dim() != 1 || a.buckets->size(0) % 2 == 0)
    fail("buckets", "a tensor [2 max_distance + 1]", text(shape_of(*a.buckets)));
  p.max_distance = a.buckets->size(0) / 2;
  p.buckets = integers("buckets", *a.buckets, shape_of(*a.buckets), "[2 max_distance + 1]", q, call);
  expect_range<int64_t>("buckets", call.kept.back(), 0, p.table_rows, call);
}

void check_tiles(const Arguments& a, const Tensor& q, Call& call) {
  Problem& p = call.problem;
  if (a.bits && !a.tiles) fail("tiles", "a tensor beside bits", "None");
  if (!a.tiles) return;
  const auto count = [](int64_t rows) { return (rows + kMaskTile - 1) / kMaskTile; };
  const Shape shape = shape_of(*a.tiles), full = {p.B, p.Hq, count(p.Sq), count(p.Sk)};
  bool fits = shape.size() == 4 && shape[2] == full[2] && shape[3] == full[3];
  for (size_t i = 0; fits && i < 2; ++i) fits = shape[i] == full[i] || shape[i] == 1;
  if (!fits) fail("tiles", "[B or 1, Hq or 1, Sq / 64, Sk / 64], rounded up, = " + text(full), text(shape));
  expect_dtype("tiles", *a.tiles, ScalarType::Int, "");
  expect_device("tiles", *a.tiles, q);
  int64_t partial = 0;
  if (a.bits) {
    if (a.bits->dim() != 2 || a.bits->size(1) != kMaskTile)
      fail("bits", "[partial tiles, 64]", text(shape_of(*a.bits)));
    partial = a.bits->size(0);
    p.bits = integers("bits", *a.bits, {partial, kMaskTile}, "[partial tiles, 64]", q, call);
  }
  expect_range<int32_t>("tiles", *a.tiles, kEmptyTile, kFirstPartialTile + partial, call);
  p.end_tile = int32_t(std::min<int64_t>(kFirstPartialTile + partial, INT32_MAX));
  p.tiles = broadcast_view(*a.tiles);
}

void check_dropout(const Arguments& a, const Tensor& q, Call& call) {
  Problem& p = call.problem;
  if (!(a.dropout_p >= 0 && a.dropout_p <= 1)) fail("dropout_p", "a probability", std::to_string(a.dropout_p));
  p.keep = uint32_t(std::nearbyint((1 - a.dropout_p) * kKeepAll));
  if (a.dropout_batch < 0) fail("dropout_batch", "0 or more", std::to_string(a.dropout_batch));
  p.dropout_batch = a.dropout_batch ? a.dropout_batch : std::max<int64_t>(p.B, 1);
  if (a.dropout_p > 0 && !a.seed) fail("seed", "a tensor where dropout_p is above 0", "None");
  if (!a.seed) return;
  const int64_t count = a.seed->numel();
  if (a.seed->dim() > 1 || (count != 1 && count != p.B)) fail("seed", "one number, or [B]", text(shape_of(*a.seed)));
  p.seeds = integers("seed", *a.seed, shape_of(*a.seed), "[B]", q, call);
  p.seeds_stride = count == 1 ? 0 : 1;
}

// What no memory could hold, but empty dimensions let through: counts of tasks and bytes have to fit 64 bits.
void check_size(const Problem& p) {
  const auto product = [](std::initializer_list<int64_t> sizes) {
    double product = 1;
    for (int64_t n : sizes) product *= double(std::max<int64_t>(n, 1));
    return product;
  };
  // Packed sequences have the rows that there are, however long each may be.
  const double pairs = std::min(product({p.B, p.Sq, p.Sk}), p.q_offsets ? product({p.q_rows, p.k_rows}) : HUGE_VAL);
  const double products = pairs * product({std::max(p.Hq, p.Hk), p.D + p.Dv, 1 + p.table_rows});
  if (!(products < 0x1p60)) fail("q, k, v", "sizes whose product is below 2^60", std::to_string(products));
  if (p.normalizer == Normalizer::hard && p.Sk > INT32_MAX)
    fail("k", "at most 2147483647 keys where normalizer is \"hard\"", std::to_string(p.Sk));
}

Similarity similarity_of(const std::string& name) {
  if (name == "dot") return Similarity::dot;
  if (name == "cosine") return Similarity::cosine;
  if (name == "gaussian") return Similarity::gaussian;
  fail("similarity", "\"dot\", \"cosine\" or \"gaussian\"", "\"" + name + "\"");
}

Normalizer normalizer_of(const std::string& name) {
  if (name == "softmax") return Normalizer::softmax;
  if (name == "hard") return Normalizer::hard;
  fail("normalizer", "\"softmax\" or \"hard\"", "\"" + name + "\"");
}

// As torch::stable::new_empty, which looks its operator up by name: that takes longer than a small call's kernel.
template <size_t n>
Tensor empty(const Tensor& like, int32_t dtype, const int64_t (&sizes)[n], const int64_t (&strides)[n]) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(n, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
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
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  const int64_t sizes[] = {like.size(0), heads, rows, dim};
  const auto [h, r, d] = std::array{std::max<int64_t>(heads, 1), std::max<int64_t>(rows, 1), std::max<int64_t>(dim, 1)};
  if (like.stride(1) < like.stride(2)) return empty(like, dtype, sizes, {h * r * d, d, h * d, 1});
  return empty(like, dtype, sizes, {h * r * d, r * d, d, 1});
}

Tensor empty_lse(const Tensor& q, int64_t heads, int64_t rows, DType dtype) {
  const int64_t sizes[] = {q.size(0), heads, rows}, r = std::max<int64_t>(rows, 1);
  return empty(q, dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), sizes,
               {std::max<int64_t>(heads, 1) * r, r, 1});
}

Call check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& a, Memory memory) {
  Call call{};
  call.memory = memory;
  Problem& p = call.problem;
  expect_rank("q", q, "[B, Hq, Sq, D]");
  expect_rank("k", k, "[B, Hk, Sk, D]");
  expect_rank("v", v, "[B, Hk, Sk, Dv]");
  p.B = q.size(0), p.Hq = q.size(1), p.Sq = q.size(2), p.D = q.size(3);
  p.Hk = k.size(1), p.Sk = k.size(2), p.Dv = v.size(3);
  p.q_rows = p.Sq, p.k_rows = p.Sk;
  expect_shape("k", k, {p.B, p.Hk, p.Sk, p.D}, "[B, Hk, Sk, D], with B and D as q's,");
  expect_shape("v", v, {p.B, p.Hk, p.Sk, p.Dv}, "[B, Hk, Sk, Dv], with B, Hk and Sk as k's,");
  if (p.Hk == 0 ? p.Hq != 0 : p.Hq % p.Hk != 0)
    fail("q", "a number of heads that is a multiple of k's " + std::to_string(p.Hk), std::to_string(p.Hq));
  p.dtype = dtype_of("q", q);
  p.allow_tf32 = a.allow_tf32;
  expect_dtype("k", k, q.scalar_type(), ", as q");
  expect_dtype("v", v, q.scalar_type(), ", as q");
  expect_device("k", k, q);
  expect_device("v", v, q);
  p.q = view_of(q), p.k = view_of(k), p.v = view_of(v);

  if (bool(a.q_offsets) != bool(a.k_offsets))
    fail(a.q_offsets ? "k_offsets" : "q_offsets", "a tensor: both or neither are packed", "None");
  if (a.q_offsets) {
    if (p.B != 1) fail("q", "a batch of 1 where sequences are packed", std::to_string(p.B));
    p.q_offsets = packed("q_offsets", a.q_offsets, q, p.q_rows, call, &p.Sq);
    p.k_offsets = packed("k_offsets", a.k_offsets, q, p.k_rows, call, &p.Sk);
    if (a.k_offsets->size(0) != a.q_offsets->size(0))
      fail("k_offsets", "as many sequences as q_offsets, " + std::to_string(a.q_offsets->size(0) - 1),
           std::to_string(a.k_offsets->size(0) - 1));
    p.B = a.q_offsets->size(0) - 1;
    if (memory == Memory::device) bound_lengths(a, p);
  }
  p.q_lengths = per_sequence("q_lengths", a.q_lengths, q, call);
  p.k_lengths = per_sequence("k_lengths", a.k_lengths, q, call);
  p.q_starts = per_sequence("q_starts", a.q_starts, q, call);
  p.q_start = a.q_start;
  p.left = a.left.value_or(kUnbounded);
  p.right = a.right.value_or(kUnbounded);
  if (a.mask) {
    expect_broadcastable("mask", *a.mask, p);
    expect_dtype("mask", *a.mask, ScalarType::Bool, "");
    expect_device("mask", *a.mask, q);
    p.mask = broadcast_view(*a.mask);
  }
  check_tiles(a, q, call);

  p.similarity = similarity_of(a.similarity);
  p.normalizer = normalizer_of(a.normalizer);
  if (a.scale && a.scales) fail("scale", "None where scales is given", std::to_string(*a.scale));
  p.scale = a.scale.value_or(p.D && p.similarity == Similarity::dot ? 1 / std::sqrt(double(p.D)) : 1.0);
  // Kernels take both in the compute type.
  const bool wide = p.dtype == DType::f64;
  if (!std::isfinite(wide ? p.scale : float(p.scale))) fail("scale", "a finite number", std::to_string(p.scale));
  p.softcap = a.softcap.value_or(0);
  if (a.softcap && !(p.softcap > 0 && std::isnormal(wide ? p.softcap : float(p.softcap)) &&
                     std::isnormal(wide ? 1 / p.softcap : float(1 / p.softcap))))
    fail("softcap", "a normal number with a normal inverse, above 0", std::to_string(p.softcap));
  p.scales = parameter("scales", a.scales, q, 1, false, call);
  p.sinks = parameter("sinks", a.sinks, q, 1, false, call);
  p.slopes = parameter("slopes", a.slopes, q, 1, false, call);
  check_table(a, q, call);
  if (a.bias) {
    expect_broadcastable("bias", *a.bias, p);
    const ScalarType type = a.bias->scalar_type();
    if (type != q.scalar_type() && type != ScalarType::Float)
      fail("bias", text(q.scalar_type()) + ", as q, or float32", text(type));
    expect_device("bias", *a.bias, q);
    p.bias = broadcast_view(*a.bias);
    p.bias_dtype = dtype_of("bias", *a.bias);
  }
  check_dropout(a, q, call);
  check_size(p);
  return call;
}

void check_wanted(const char* name, bool wanted, const std::optional<Tensor>& tensor) {
  if (wanted && !tensor) fail(name, "False where there is none of it", "True");
}

void check_backward(Call& call, const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                    const Tensor& out, const Tensor& lse) {
  Problem& p = call.problem;
  const Shape result = {q.size(0), p.Hq, p.q_rows, p.Dv}, rows = {q.size(0), p.Hq, p.q_rows};
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
