// A call for the kernels to be tested by: a case, which says what it has, and its tensors, of random numbers. Arrays
// have exactly the size that a call may touch, so that AddressSanitizer sees the first byte past it; what has to be
// written before it is read starts as NaN.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../problem.h"

namespace heedful {

inline std::mt19937_64 random_bits(1);

inline int64_t below(int64_t end) { return int64_t(random_bits() % uint64_t(end)); }
inline int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
inline bool one_in(int64_t n) { return below(n) == 0; }

// ---- arrays ---------------------------------------------------------------------------------------------------------

// Rows one after the other; heads inside rows, and gaps between them; columns one after the other.
enum class Layout { rows, heads_inside, columns };

using Shape = std::array<int64_t, 4>;

struct Array {
  DType dtype = DType::f32;
  Shape shape = {}, stride = {};
  std::vector<unsigned char> bytes;

  Array() = default;
  Array(DType type, Shape s, Layout layout = Layout::rows) : dtype(type), shape(s) {
    const auto [a, b, c, d] = s;
    if (layout == Layout::rows) stride = {b * c * d, c * d, d, 1};
    if (layout == Layout::heads_inside) stride = {b * c * (d + 3), d + 3, b * (d + 3), 1};
    if (layout == Layout::columns) stride = {b * c * d, c * d, 1, c};
    int64_t size = 1;
    for (int n = 0; n < 4; ++n) size += (s[n] - 1) * stride[n];
    bytes.assign(a && b && c && d ? size_t(size) * width() : 0, 0xff);  // NaN
  }
  size_t width() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  // A dimension of size 1 broadcasts where `broadcast` is set.
  View view(bool broadcast = false) {
    View view{bytes.empty() ? nullptr : bytes.data(), {}};
    for (int n = 0; n < 4; ++n) view.stride[n] = broadcast && shape[n] == 1 ? 0 : stride[n];
    return view;
  }

  double get(const Shape& at) const {
    if (dtype == DType::f64) return read<double>(at);
    if (dtype == DType::f32) return read<float>(at);
    const uint16_t bits = read<uint16_t>(at);
    if (dtype == DType::bf16) {
      const uint32_t wide = uint32_t(bits) << 16;
      float x;
      std::memcpy(&x, &wide, 4);
      return x;
    }
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                            : std::ldexp(mantissa, -24);
    return bits >> 15 ? -magnitude : magnitude;
  }
  // x is rounded toward zero in the two half types: inputs need be exact only in what is read back.
  void set(const Shape& at, double x) {
    const float f = float(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (dtype == DType::f64) return write(at, x);
    if (dtype == DType::f32) return write(at, f);
    if (dtype == DType::bf16) return write(at, uint16_t(bits >> 16));
    const int exponent = std::clamp(int(bits >> 23 & 255) - 112, 0, 31);
    write(at, uint16_t((bits >> 16 & 0x8000) | (exponent ? exponent << 10 | (bits >> 13 & 1023) : 0)));
  }
  template <class F>
  void for_each(F&& f) const {
    for (int64_t a = 0; a < shape[0]; ++a)
      for (int64_t b = 0; b < shape[1]; ++b)
        for (int64_t c = 0; c < shape[2]; ++c)
          for (int64_t d = 0; d < shape[3]; ++d) f(Shape{a, b, c, d});
  }
  Array in_float64() const {
    Array wide(DType::f64, shape);
    for_each([&](const Shape& at) { wide.set(at, get(at)); });
    return wide;
  }

  // One row of each head.
  void set_row(int64_t batch, int64_t row, double value) {
    for (int64_t h = 0; h < shape[1]; ++h)
      for (int64_t d = 0; d < shape[3]; ++d) set({batch, h, row, d}, value);
  }

 private:
  size_t offset(const Shape& at) const {
    return size_t(at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2] + at[3] * stride[3]) * width();
  }
  template <class T>
  T read(const Shape& at) const {
    T x;
    std::memcpy(&x, &bytes[offset(at)], sizeof x);
    return x;
  }
  template <class T>
  void write(const Shape& at, T x) {
    std::memcpy(&bytes[offset(at)], &x, sizeof x);
  }
};

// ---- calls ----------------------------------------------------------------------------------------------------------

enum class Per { none, head, sequence };  // what has a number of its own

// Dimensions of a [B, Hq, Sq, Sk] tensor by their letters in "bhij": the others broadcast. Empty: no such tensor.
using Dims = const char*;

struct Case {
  DType dtype = DType::f32;
  bool tf32 = false;
  int64_t B = 1, Hq = 1, Hk = 1, Sq = 1, Sk = 1, D = 4, Dv = 4;
  Layout layout = Layout::rows;
  bool packed = false, lengths = false, starts = false;
  bool poison = false;     // NaN wherever no pair may look
  bool zero_rows = false;  // a row of zeros in q and in k
  bool wanted = true;      // gradients of bias and parameters
  bool dlse = true;        // a gradient arrives at lse
  int64_t start = 0, left = kUnbounded, right = kUnbounded;
  Dims mask = "", tiles = "", bias = "";
  bool bias_f32 = false;
  double scale = 0.3, softcap = 0;
  Per scales = Per::none, sinks = Per::none, slopes = Per::none, table = Per::none;
  Similarity similarity = Similarity::dot;
  bool hard = false;
  double dropout = 0;
  int64_t dropout_batch = B;
};

inline std::string describe(const Case& c) {
  std::string text = "dtype " + std::to_string(int(c.dtype));
  const auto add = [&](const char* name, auto value) {
    if (value) text += std::string(" ") + name + " " + std::to_string(value);
  };
  const auto add_dims = [&](const char* name, Dims dims) {
    if (*dims) text += std::string(" ") + name + " " + dims;
  };
  add("tf32", c.tf32), add("B", c.B), add("Hq", c.Hq), add("Hk", c.Hk), add("Sq", c.Sq), add("Sk", c.Sk), add("D", c.D),
      add("Dv", c.Dv);
  add("layout", int(c.layout)), add("packed", c.packed), add("lengths", c.lengths), add("starts", c.starts);
  add("poison", c.poison), add("zero_rows", c.zero_rows), add("unwanted", !c.wanted), add("no dlse", !c.dlse),
      add("start", c.start);
  if (c.left != kUnbounded) text += " left " + std::to_string(c.left);
  if (c.right != kUnbounded) text += " right " + std::to_string(c.right);
  add_dims("mask", c.mask), add_dims("tiles", c.tiles), add_dims("bias", c.bias), add("bias_f32", c.bias_f32);
  add("scale", c.scale), add("softcap", c.softcap), add("scales", int(c.scales)), add("sinks", int(c.sinks));
  add("slopes", int(c.slopes)), add("table", int(c.table)), add("similarity", int(c.similarity)), add("hard", c.hard);
  add("dropout", c.dropout), add("dropout_batch", c.dropout_batch);
  return text;
}

// The tensors of one call, all that it reads and writes.
struct Call {
  Case c;
  int64_t q_rows = c.Sq, k_rows = c.Sk, table_rows = 5, max_distance = between(0, 20);
  Array q, k, v, out, lse, dout, dlse, dq, dk, dv, bias, dbias;
  bool writes_dbias;
  Array scales, sinks, slopes, table, dscales, dsinks, dslopes, dtable;
  std::vector<int64_t> q_offsets, k_offsets, q_lengths, k_lengths, q_starts, buckets, bits, seeds;
  std::vector<unsigned char> mask;
  Shape mask_stride = {};
  std::vector<int32_t> tiles;

  explicit Call(const Case& of) : c(of) {
    place_sequences();
    const DType compute = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    const int64_t B = c.packed ? 1 : c.B;
    q = Array(c.dtype, {B, c.Hq, q_rows, c.D}, c.layout), dout = Array(c.dtype, {B, c.Hq, q_rows, c.Dv}, c.layout);
    k = Array(c.dtype, {B, c.Hk, k_rows, c.D}, c.layout), v = Array(c.dtype, {B, c.Hk, k_rows, c.Dv}, c.layout);
    // Results lie by rows.
    const Layout by_rows = c.layout == Layout::columns ? Layout::rows : c.layout;
    out = Array(c.dtype, dout.shape, by_rows), dq = Array(c.dtype, q.shape, by_rows);
    dk = Array(c.dtype, k.shape, by_rows), dv = Array(c.dtype, v.shape, by_rows);
    lse = dlse = Array(compute, {1, B, c.Hq, q_rows});
    if (*c.bias) bias = Array(c.bias_f32 ? DType::f32 : c.dtype, shape_of(c.bias, c.Sq, c.Sk), c.layout);
    const auto parameter = [&](Per per, int64_t rows) {
      return per == Per::none ? Array() : Array(compute, {per == Per::sequence ? c.B : 1, rows, c.Hq, 1});
    };
    scales = parameter(c.scales, 1), sinks = parameter(c.sinks, 1);
    slopes = parameter(c.slopes, 1), table = parameter(c.table, table_rows);
    for (Array* x : {&q, &k, &v, &dout, &dlse, &bias, &scales, &sinks, &slopes, &table}) fill(*x);
    slopes.for_each([&](const Shape& at) { slopes.set(at, slopes.get(at) / 16); });
    bias.for_each([&](const Shape& at) {
      if (one_in(8)) bias.set(at, -INFINITY);
    });
    if (c.Hq > 1 && !sinks.bytes.empty()) sinks.set({0, 0, c.Hq - 1, 0}, -INFINITY);
    if (c.wanted) {
      dbias = Array(compute, bias.shape);
      for (auto [gradient, of] :
           {std::pair{&dscales, &scales}, {&dsinks, &sinks}, {&dslopes, &slopes}, {&dtable, &table}})
        *gradient = Array(DType::f64, of->shape);
    }
    for (Array* x : {&dbias, &dscales, &dsinks, &dslopes, &dtable}) x->bytes.assign(x->bytes.size(), 0);
    writes_dbias = !c.hard && dbias.shape == Shape{c.B, c.Hq, c.Sq, c.Sk};
    if (writes_dbias) dbias.bytes.assign(dbias.bytes.size(), 0xff);  // NaN, to be written

    const auto size = [](const Shape& s) { return size_t(s[0] * s[1] * s[2] * s[3]); };
    if (*c.mask) mask.resize(size(shape_of(c.mask, c.Sq, c.Sk)));
    for (auto& x : mask) x = !one_in(4);
    const int64_t partial = 3;
    if (*c.tiles) tiles.resize(size(shape_of(c.tiles, tile_count(c.Sq), tile_count(c.Sk))));
    for (auto& x : tiles) x = int32_t(below(kFirstPartialTile + partial));
    if (*c.tiles) bits.resize(size_t(partial * kMaskTile));
    for (auto& x : bits) x = int64_t(random_bits());
    if (c.table != Per::none) buckets.resize(size_t(2 * max_distance + 1));
    for (auto& x : buckets) x = below(table_rows);
    if (c.dropout > 0) seeds.resize(one_in(2) ? size_t(c.B) : 1);
    for (auto& x : seeds) x = int64_t(random_bits());
    if (c.zero_rows)
      for (Array* x : {&q, &k}) x->set_row(0, 0, 0);
    if (c.poison) poison();
    lay_out_mask();
  }

  Call in_float64() const {
    Call wide = *this;
    for (Array* x : {&wide.q, &wide.k, &wide.v, &wide.out, &wide.lse, &wide.dout, &wide.dlse, &wide.dq, &wide.dk,
                     &wide.dv, &wide.bias, &wide.dbias, &wide.scales, &wide.sinks, &wide.slopes, &wide.table})
      *x = x->in_float64();
    wide.dbias.bytes.assign(wide.dbias.bytes.size(), 0);  // to be added to
    return wide;
  }

  // It points into this call.
  Problem problem() {
    Problem p{};
    p.dtype = q.dtype, p.allow_tf32 = c.tf32;
    p.B = c.B, p.Hq = c.Hq, p.Hk = c.Hk, p.Sq = c.Sq, p.Sk = c.Sk, p.D = c.D, p.Dv = c.Dv;
    p.q_rows = q_rows, p.k_rows = k_rows;
    p.q = q.view(), p.k = k.view(), p.v = v.view(), p.out = out.view(), p.lse = lse.bytes.data();
    p.dout = dout.view(), p.dq = dq.view(), p.dk = dk.view(), p.dv = dv.view();
    if (c.dlse) p.dlse = {dlse.bytes.data(), {dlse.stride[1], dlse.stride[2], dlse.stride[3], 0}};
    const auto integers = [](auto& x) { return x.empty() ? nullptr : x.data(); };
    p.q_offsets = integers(q_offsets), p.k_offsets = integers(k_offsets);
    p.q_lengths = integers(q_lengths), p.k_lengths = integers(k_lengths);
    p.q_start = c.start, p.q_starts = integers(q_starts);
    p.left = c.left, p.right = c.right;
    p.mask = {mask.empty() ? nullptr : mask.data(), {}};
    std::copy(mask_stride.begin(), mask_stride.end(), p.mask.stride);
    p.tiles = view_of(tiles, shape_of(c.tiles, tile_count(c.Sq), tile_count(c.Sk))), p.bits = integers(bits);
    p.end_tile = kFirstPartialTile + int32_t(bits.size() / kMaskTile);
    p.scale = c.scale, p.softcap = c.softcap;
    p.similarity = c.similarity;
    p.normalizer = c.hard ? Normalizer::hard : Normalizer::softmax;
    const auto parameter = [&](Array& x, Array& gradient) -> Parameter {
      return {x.view().data, x.shape[0] > 1 ? x.stride[0] : 0, static_cast<double*>(gradient.view().data)};
    };
    p.scales = parameter(scales, dscales), p.sinks = parameter(sinks, dsinks);
    p.slopes = parameter(slopes, dslopes), p.table = parameter(table, dtable);
    p.table_rows = table_rows, p.buckets = integers(buckets), p.max_distance = max_distance;
    p.bias = bias.view(true), p.bias_dtype = bias.dtype, p.dbias = dbias.view(true);
    p.writes_dbias = writes_dbias;
    p.keep = uint32_t(std::nearbyint((1 - c.dropout) * kKeepAll));
    p.seeds = integers(seeds), p.seeds_stride = seeds.size() > 1, p.dropout_batch = c.dropout_batch;
    return p;
  }

 private:
  static int64_t tile_count(int64_t rows) { return (rows + kMaskTile - 1) / kMaskTile; }
  Shape shape_of(Dims dims, int64_t rows, int64_t columns) const {
    const auto size = [&](char letter, int64_t n) { return std::strchr(dims, letter) ? n : 1; };
    return {size('b', c.B), size('h', c.Hq), size('i', rows), size('j', columns)};
  }
  template <class T>
  static View view_of(std::vector<T>& x, const Shape& s) {
    const auto stride = [&](int n, int64_t size) { return s[size_t(n)] == 1 ? 0 : size; };
    return {x.empty() ? nullptr : x.data(),
            {stride(0, s[1] * s[2] * s[3]), stride(1, s[2] * s[3]), stride(2, s[3]), stride(3, 1)}};
  }

  // Column by column, or with a byte after each element that says the opposite of the next.
  void lay_out_mask() {
    if (mask.empty()) return;
    const Shape shape = shape_of(c.mask, c.Sq, c.Sk);
    const View rows = view_of(mask, shape);
    std::copy(rows.stride, rows.stride + 4, mask_stride.begin());
    const std::vector<unsigned char> by_rows = mask;
    if (c.layout == Layout::heads_inside) {
      mask.resize(2 * by_rows.size() - 1);
      for (size_t x = 0; x < by_rows.size(); ++x) {
        if (x) mask[2 * x - 1] = !by_rows[x];
        mask[2 * x] = by_rows[x];
      }
      for (int64_t& stride : mask_stride) stride *= 2;
    } else if (c.layout == Layout::columns && shape[2] > 1 && shape[3] > 1) {
      const int64_t size = shape[2] * shape[3];
      for (size_t x = 0; x < mask.size(); ++x) {
        const int64_t pair = int64_t(x) % size, i = pair / shape[3], j = pair % shape[3];
        mask[x - size_t(pair) + size_t(j * shape[2] + i)] = by_rows[x];
      }
      mask_stride[2] = 1, mask_stride[3] = shape[2];
    }
  }

  // Packed sequences, the second of no queries and the last of no keys, lie between rows of nobody's.
  void place_sequences() {
    if (c.packed) {
      const int64_t most_queries = c.Sq, most_keys = c.Sk;
      c.Sq = c.Sk = 0;
      q_offsets = {2}, k_offsets = {1};
      for (int64_t b = 0; b < c.B; ++b) {
        const int64_t queries = b == 1 ? 0 : between(1, most_queries),
                      keys = b > 1 && b == c.B - 1 ? 0 : std::max<int64_t>(most_keys - b, 0);
        q_offsets.push_back(q_offsets.back() + queries), k_offsets.push_back(k_offsets.back() + keys);
        c.Sq = std::max(c.Sq, queries), c.Sk = std::max(c.Sk, keys);
      }
      q_rows = q_offsets.back() + 3, k_rows = k_offsets.back() + 2;
    }
    for (int64_t b = 0; b < c.B; ++b) {
      if (c.lengths) q_lengths.push_back(between(c.Sq / 2 - 1, c.Sq + 1)), k_lengths.push_back(c.Sk * 2 / 3 - b);
      if (c.starts) q_starts.push_back(between(-c.Sq / 2, c.Sk));
    }
  }
  // In hard attention numbers are such that scores are exact in every type, so that ties are ties.
  void fill(Array& x) const {
    std::normal_distribution<double> normal;
    x.for_each([&](const Shape& at) {
      const double number = normal(random_bits);
      x.set(at, c.hard ? std::nearbyint(2 * number) / 2 : number);
    });
  }
  // Rows past a length and outside every sequence; and the first query and key of each, which the mask then forbids, or
  // the bias.
  void poison() {
    const auto spoil = [&](const std::vector<int64_t>& offsets, const std::vector<int64_t>& lengths, int64_t rows,
                           bool first_exists, std::initializer_list<Array*> arrays) {
      for (Array* x : arrays)
        for (int64_t batch = 0; batch < x->shape[0]; ++batch)
          for (int64_t row = 0; row < x->shape[2]; ++row) {
            bool exists = false;
            for (int64_t b = c.packed ? 0 : batch; b < (c.packed ? c.B : batch + 1); ++b) {
              const int64_t first = c.packed ? offsets[size_t(b)] : 0;
              const int64_t end = c.packed ? offsets[size_t(b) + 1] : rows, i = row - first;
              exists |= i >= !first_exists && row < end && (lengths.empty() || i < lengths[size_t(b)]);
            }
            if (!exists) x->set_row(batch, row, NAN);
          }
    };
    for (size_t x = 0; x < mask.size(); ++x)
      if (x % size_t(c.Sk) == 0 || x / size_t(c.Sk) % size_t(c.Sq) == 0) mask[x] = false;
    const bool biased = std::strchr(c.bias, 'j');
    bias.for_each([&](const Shape& at) {
      if (biased && at[3] == 0) bias.set(at, -INFINITY);
    });
    const bool masked = *c.mask, sunk = c.sinks != Per::none;  // a sink gets a gradient of queries without keys, too
    spoil(q_offsets, q_lengths, c.Sq, !masked || sunk, {&q, &dout});
    spoil(k_offsets, k_lengths, c.Sk, !masked && !biased, {&k, &v});
  }
};

}  // namespace heedful
