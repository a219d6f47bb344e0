// Attention and its gradients by their definition: in float64, one pair of a query and a key after the other. It takes
// what the kernels take, a Problem, all of whose floating-point tensors are float64 with last strides of 1.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../problem.h"

namespace heedful {

// Philox 4x32-10 (Salmon et al., 2011) on scalars.
inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint64_t key) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    const uint64_t x = uint64_t(c[0]) * 0xD2511F53, y = uint64_t(c[2]) * 0xCD9E8D57;
    c = {uint32_t(y >> 32) ^ c[1] ^ key0, uint32_t(y), uint32_t(x >> 32) ^ c[3] ^ key1, uint32_t(x)};
  }
  return c;
}

// To the nearest number of a type.
inline double rounded(double x, DType dtype) {
  constexpr int kDigits[] = {24, 53, 8, 11};  // by DType
  int exponent = 0;
  std::frexp(x, &exponent);
  const int digits = kDigits[int(dtype)] - exponent;
  return std::ldexp(std::nearbyint(std::ldexp(x, digits)), -digits);
}

template <class T = double>
T& at(const View& x, int64_t a, int64_t b, int64_t c, int64_t d) {
  return static_cast<T*>(x.data)[a * x.stride[0] + b * x.stride[1] + c * x.stride[2] + d * x.stride[3]];
}

// A similarity of q and k, with its derivatives: d/dq = cross * k - own_q * q, d/dk = cross * q - own_k * k.
struct Similar {
  double value, cross, own_q, own_k;
};

inline Similar similar(const Problem& p, const double* q, const double* k) {
  double qk = 0, qq = 0, kk = 0;
  for (int64_t d = 0; d < p.D; ++d) qk += q[d] * k[d], qq += q[d] * q[d], kk += k[d] * k[d];
  if (p.similarity == Similarity::dot) return {qk, 1, 0, 0};
  if (p.similarity == Similarity::gaussian) return {qk - qq / 2 - kk / 2, 1, 1, 1};
  constexpr double kEps = 1e-8;
  const double cross = 1 / (std::max(std::sqrt(qq), kEps) * std::max(std::sqrt(kk), kEps)), cosine = qk * cross;
  return {cosine, cross, qq > kEps * kEps ? cosine / qq : 0, kk > kEps * kEps ? cosine / kk : 0};
}

// One query of one head, with the keys that it sees.
struct DefinedRow {
  struct Pair {
    int64_t key, distance;
    Similar similar;
    double score, cap_slope, z, prob;
  };

  const Problem& p;
  const DType stored;  // what out is
  const int64_t b, h, i;
  // Where the sequence lies in memory.
  const int64_t batch = p.q_offsets ? 0 : b, row = (p.q_offsets ? p.q_offsets[b] : 0) + i;
  const int64_t k_row = p.k_offsets ? p.k_offsets[b] : 0, hk = h / (p.Hq / p.Hk);
  const double* q = &at(p.q, batch, h, row, 0);

  double number(const Parameter& x, int64_t n = 0) const {
    return static_cast<const double*>(x.data)[b * x.batch_stride + n * p.Hq + h];
  }
  void add_to(const Parameter& x, int64_t n, double gradient) const {
    if (x.gradient) x.gradient[b * x.batch_stride + n * p.Hq + h] += gradient;
  }
  double factor() const { return p.scales.data ? number(p.scales) : p.scale; }
  int64_t bucket(int64_t distance) const {
    return p.buckets[std::clamp(distance, -p.max_distance, p.max_distance) + p.max_distance];
  }

  bool sees(int64_t j, int64_t distance) const {
    if (p.left != kUnbounded && distance < -p.left) return false;
    if (p.right != kUnbounded && distance > p.right) return false;
    if (p.k_lengths && j >= p.k_lengths[b]) return false;
    if (p.mask.data && !at<bool>(p.mask, b, h, i, j)) return false;
    if (p.bias.data && at(p.bias, b, h, i, j) == -INFINITY) return false;
    const int32_t tile = p.tiles.data ? at<int32_t>(p.tiles, b, h, i / kMaskTile, j / kMaskTile) : kFullTile;
    if (tile < kFirstPartialTile) return tile == kFullTile;
    return p.bits[(tile - kFirstPartialTile) * kMaskTile + i % kMaskTile] >> (j % kMaskTile) & 1;
  }

  double dropout(int64_t j) const {
    if (p.keep == kKeepAll) return 1;
    const auto words = philox({uint32_t(j / 8), uint32_t(i), uint32_t(h), uint32_t(b % p.dropout_batch)},
                              uint64_t(p.seeds[b * p.seeds_stride]));
    const uint32_t random = words[size_t(j % 8 / 2)] >> (16 * (j % 2)) & 0xffff;
    return random < p.keep ? 65536.0 / p.keep : 0;
  }

  std::vector<Pair> pairs() const {
    std::vector<Pair> all;
    const int64_t position = i + (p.q_starts ? p.q_starts[b] : p.q_start);
    const int64_t keys = p.k_offsets ? p.k_offsets[b + 1] - k_row : p.Sk;
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t distance = j - position;
      if (!sees(j, distance)) continue;
      Pair x{k_row + j, distance, similar(p, q, &at(p.k, batch, hk, k_row + j, 0)), 0, 1, dropout(j), 0};
      x.score = factor() * x.similar.value;
      if (p.softcap != 0) {
        const double y = std::tanh(x.score / p.softcap);
        x.score = p.softcap * y, x.cap_slope = 1 - y * y;
      }
      if (p.bias.data) x.score += at(p.bias, b, h, i, j);
      if (p.slopes.data) x.score -= number(p.slopes) * double(std::abs(distance));
      if (p.table.data) x.score += number(p.table, bucket(distance));
      all.push_back(x);
    }
    return all;
  }

  void run() const {
    const double sink = p.sinks.data ? number(p.sinks) : -INFINITY;
    std::vector<Pair> pairs = this->pairs();
    double top = sink, sum = 0;
    for (const Pair& x : pairs) top = std::max(top, x.score);
    if (top == -INFINITY) return;
    const bool hard = p.normalizer == Normalizer::hard;
    for (Pair& x : pairs) {
      x.prob = hard ? x.score == top && sum == 0 : std::exp(x.score - top);
      sum += x.prob;
    }
    if (!hard) sum += std::exp(sink - top);
    const double lse = hard ? top : top + std::log(sum);
    static_cast<double*>(p.lse)[(batch * p.Hq + h) * p.q_rows + row] = lse;

    double delta = p.dlse.data ? -at(p.dlse, batch, h, row, 0) : 0;
    const double* dout = &at(p.dout, batch, h, row, 0);
    std::vector<double> dp;
    for (Pair& x : pairs) {
      if (!hard) x.prob /= sum;
      const double* v = &at(p.v, batch, hk, x.key, 0);
      double product = 0;
      for (int64_t d = 0; d < p.Dv; ++d) {
        at(p.out, batch, h, row, d) += x.prob * x.z * v[d];
        at(p.dv, batch, hk, x.key, d) += x.prob * x.z * dout[d];
        product += dout[d] * v[d];
      }
      dp.push_back(x.z * product);
    }
    if (hard) return;
    // Of what forward left, rounded: a tolerance for that would have to know how far scales and lengths of K take it.
    for (int64_t d = 0; d < p.Dv && !pairs.empty(); ++d)
      delta += dout[d] * rounded(at(p.out, batch, h, row, d), stored);
    if (p.sinks.data) add_to(p.sinks, 0, -std::exp(sink - lse) * delta);
    for (size_t n = 0; n < pairs.size(); ++n) {
      const Pair& x = pairs[n];
      const double ds = x.prob * (dp[n] - delta), dt = ds * x.cap_slope, dsimilar = dt * factor();
      if (p.dbias.data) at(p.dbias, b, h, i, x.key - k_row) += ds;
      if (p.slopes.data) add_to(p.slopes, 0, -ds * double(std::abs(x.distance)));
      if (p.table.data) add_to(p.table, bucket(x.distance), ds);
      add_to(p.scales, 0, dt * x.similar.value);
      const double* k = &at(p.k, batch, hk, x.key, 0);
      for (int64_t d = 0; d < p.D; ++d) {
        at(p.dq, batch, h, row, d) += dsimilar * (x.similar.cross * k[d] - x.similar.own_q * q[d]);
        at(p.dk, batch, hk, x.key, d) += dsimilar * (x.similar.cross * q[d] - x.similar.own_k * k[d]);
      }
    }
  }
};

// out, lse and all gradients, those of an out that is stored as numbers of a type; rows of packed tensors that belong
// to no sequence are left as they are.
inline void define(const Problem& p, DType stored) {
  const auto clear = [](const View& x, int64_t batch, int64_t heads, int64_t from, int64_t to, int64_t dim) {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t row = from; row < to; ++row)
        for (int64_t d = 0; d < dim; ++d) at(x, batch, h, row, d) = 0;
  };
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t batch = p.q_offsets ? 0 : b;
    const int64_t q0 = p.q_offsets ? p.q_offsets[b] : 0, q1 = p.q_offsets ? p.q_offsets[b + 1] : p.Sq;
    const int64_t k0 = p.k_offsets ? p.k_offsets[b] : 0, k1 = p.k_offsets ? p.k_offsets[b + 1] : p.Sk;
    clear(p.out, batch, p.Hq, q0, q1, p.Dv);
    clear(p.dq, batch, p.Hq, q0, q1, p.D);
    clear(p.dk, batch, p.Hk, k0, k1, p.D);
    clear(p.dv, batch, p.Hk, k0, k1, p.Dv);
    for (int64_t h = 0; h < p.Hq; ++h)
      for (int64_t i = 0; i < q1 - q0; ++i) {
        static_cast<double*>(p.lse)[(batch * p.Hq + h) * p.q_rows + q0 + i] = -INFINITY;
        if (!p.q_lengths || i < p.q_lengths[b]) DefinedRow{p, stored, b, h, i}.run();
      }
  }
}

}  // namespace heedful
