// Gradients of what scores are made of beside q and k: the bias, and the numbers of each head. Each of their elements
// belongs to a block or a warp, which goes over all pairs that it takes part in, in a fixed order: no atomics, and the
// same bits every time.
#pragma once

#include "backward_rows.cuh"

namespace heedful::HEEDFUL_TARGET {

enum class Number { scale, sink, slope, row_of_table };

// A block has one number of one head, of one sequence or of all of them.
constexpr int kNumberWarps = 8;

template <class S>
HEEDFUL_DEVICE double number_of_row(const HeadGradients<S>& head, const Span& span, Number number, int64_t n, int i) {
  using C = Compute<S>;
  const int lane = thread_index() % 32;
  if (number == Number::sink) {
    const C lse = load_global(head.lse + i);
    if (lane || lse == -kInfinity<C>) return 0;
    return sink_gradient(double(exp2_of((head.scores.sink() - lse) * C(kLog2e))), double(load_global(head.delta + i)));
  }
  double sum = 0;
  for (int j = span.first_key(i) + lane; j < span.end_key(i); j += 32) {
    const int64_t distance = head.scores.distance(i, j);
    if (number == Number::row_of_table && head.scores.distances().bucket(distance) != n) continue;
    const auto pair = head.pair(i, j);
    if (!pair.present) continue;
    if (number == Number::scale) sum += double(pair.dt) * double(pair.similar.value);
    if (number == Number::slope) sum -= double(pair.ds) * double(distance < 0 ? -distance : distance);
    if (number == Number::row_of_table) sum += double(pair.ds);
  }
  return sum;
}

template <class S, Number number>
HEEDFUL_KERNEL(32 * kNumberWarps, 1)
void gradient_of_numbers(HEEDFUL_PARAMETER Problem p) {
  const Parameter& parameter = number == Number::scale   ? p.scales
                               : number == Number::sink  ? p.sinks
                               : number == Number::slope ? p.slopes
                                                         : p.table;
  const int64_t rows = number == Number::row_of_table ? p.table_rows : 1, of_sequence = rows * p.Hq;
  const int64_t b = block_index() / of_sequence, n = block_index() % of_sequence / p.Hq, h = block_index() % p.Hq;
  const bool shared = parameter.batch_stride == 0;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  double sum = 0;
  for (int sequence = shared ? 0 : int(b); sequence < (shared ? int(p.B) : int(b) + 1); ++sequence) {
    const Band band(p, sequence);
    const Span span(band);
    const HeadGradients<S> head(p, band, sequence, int(h));
    for (int i = warp; i < span.queries; i += kNumberWarps) sum += number_of_row(head, span, number, n, i);
  }
  sum = sum_of_warp(sum);
  if (lane == 0) store_shared(shared_base() + uint32_t(8 * warp), sum);
  sync_block();
  if (thread_index()) return;
  sum = 0;
  for (int w = 0; w < kNumberWarps; ++w) sum += load_shared<double>(shared_base() + uint32_t(8 * w));
  store_global(parameter.gradient + b * parameter.batch_stride + n * p.Hq + h, sum);
}

// A warp has one element of the bias.
template <class S>
HEEDFUL_KERNEL(128, 1)
void gradient_of_bias(HEEDFUL_PARAMETER Problem p) {
  using C = Compute<S>;
  const int64_t sizes[4] = {p.B, p.Hq, p.Sq, p.Sk};
  int64_t own[4], others[4], at[4], elements = 1, pairs = 1;
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    own[d] = p.dbias.stride[d] ? sizes[d] : 1;
    others[d] = p.dbias.stride[d] ? 1 : sizes[d];
    elements *= own[d], pairs *= others[d];
  }
  const int64_t element = int64_t(block_index()) * 4 + thread_index() / 32;
  if (element >= elements) return;
  int64_t rest = element, offset = 0;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    at[d] = rest % own[d], rest /= own[d];
    offset += at[d] * p.dbias.stride[d];
  }
  double sum = 0;
  for (int64_t n = thread_index() % 32; n < pairs; n += 32) {
    int64_t x[4], index = n;
#pragma unroll
    for (int d = 3; d >= 0; --d) x[d] = at[d] + index % others[d], index /= others[d];
    const Band band(p, x[0]);
    const Span span(band);
    const int i = int(x[2]), j = int(x[3]);
    if (i >= span.queries || j < span.first_key(i) || j >= span.end_key(i)) continue;
    const auto pair = HeadGradients<S>(p, band, int(x[0]), int(x[1])).pair(i, j);
    if (pair.present) sum += double(pair.ds);
  }
  sum = sum_of_warp(sum);
  if (thread_index() % 32 == 0) store_global(static_cast<C*>(p.dbias.data) + offset, C(sum));
}

template <class S>
void plan_parameters(const Problem& p, cuda::Plan* plan) {
  if (p.normalizer == Normalizer::hard) return;  // they are zero, and zeroed
  const auto add = [&](const Parameter& x, int64_t rows, cuda::Kernel kernel, const char* name) {
    const int64_t blocks = (x.batch_stride ? p.B : 1) * rows * p.Hq;
    if (x.data && x.gradient) plan->add({kernel, blocks, 32 * kNumberWarps, 8 * kNumberWarps, name});
  };
  add(p.scales, 1, &gradient_of_numbers<S, Number::scale>, "gradient of scales");
  add(p.sinks, 1, &gradient_of_numbers<S, Number::sink>, "gradient of sinks");
  add(p.slopes, 1, &gradient_of_numbers<S, Number::slope>, "gradient of slopes");
  add(p.table, p.table_rows, &gradient_of_numbers<S, Number::row_of_table>, "gradient of table");
  if (!p.dbias.data) return;
  int64_t elements = 1;
  const int64_t sizes[4] = {p.B, p.Hq, p.Sq, p.Sk};
  for (int d = 0; d < 4; ++d) elements *= p.dbias.stride[d] ? sizes[d] : 1;
  plan->add({&gradient_of_bias<S>, (elements + 3) / 4, 128, 0, "gradient of bias"});
}

}  // namespace heedful::HEEDFUL_TARGET
