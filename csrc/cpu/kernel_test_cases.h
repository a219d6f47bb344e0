// Cases that kernels of every device are tested on: each feature, and all of them at random.
#pragma once

#include "kernel_test_call.h"

namespace heedful {

// Every feature on its own, and some together.
inline std::vector<Case> features_of(const Case& plain) {
  std::vector<Case> cases;
  const auto add = [&](auto change) {
    cases.push_back(plain);
    change(cases.back());
  };
  for (double scale : {-0.3, 0.0, 1e-30}) add([&](Case& c) { c.scale = scale; });
  for (double softcap : {0.5, 30.0}) add([&](Case& c) { c.softcap = softcap; });
  for (Per per : {Per::head, Per::sequence}) {
    add([&](Case& c) { c.scales = per; });
    add([&](Case& c) { c.sinks = per; });
    add([&](Case& c) { c.slopes = per; });
    add([&](Case& c) { c.table = per; });
  }
  for (Similarity similarity : {Similarity::cosine, Similarity::gaussian}) {
    add([&](Case& c) { c.similarity = similarity; });
    add([&](Case& c) { c.similarity = similarity, c.scales = Per::head; });
  }
  if (plain.dtype != DType::f16)  // 1 / eps
    add([&](Case& c) { c.similarity = Similarity::cosine, c.zero_rows = true; });
  for (double dropout : {0.3, 1.0}) add([&](Case& c) { c.dropout = dropout; });
  for (Dims dims : {"ij", "bij", "hij", "bhij"}) add([&](Case& c) { c.tiles = dims; });
  for (Dims dims : {"1", "b", "h", "i", "j", "ij", "bhij"}) add([&](Case& c) { c.bias = dims, c.bias_f32 = true; });
  for (Dims dims : {"ij", "bhij"}) add([&](Case& c) { c.bias = dims; });
  for (Layout layout : {Layout::rows, Layout::heads_inside, Layout::columns})
    for (Dims dims : {"bhij", "j", "i", "b"}) add([&](Case& c) { c.layout = layout, c.mask = dims; });
  add([&](Case& c) { c.packed = true; });
  add([&](Case& c) { c.packed = c.poison = true, c.B = 4, c.right = 0; });
  add([&](Case& c) { c.starts = true, c.left = 9, c.right = 1; });
  add([&](Case& c) { c.layout = Layout::columns; });
  add([&](Case& c) { c.layout = Layout::heads_inside; });
  add([&](Case& c) { c.poison = c.lengths = true; });
  add([&](Case& c) { c.poison = c.lengths = true, c.mask = "ij"; });
  add([&](Case& c) { c.poison = true, c.bias = "ij"; });
  // Hard attention: softcap rounds scores, but equal ones equally.
  add([&](Case& c) { c.hard = true, c.scale = 0.25; });
  add([&](Case& c) { c.hard = true, c.scale = 0.25, c.softcap = 30; });
  add([&](Case& c) { c.hard = true, c.scale = 0.25, c.sinks = Per::head, c.dropout = 0.3; });
  return cases;
}

// A case of these sizes with all features at random.
inline Case with_random_features(Case c) {
  const auto dims = [](int64_t absent) {
    constexpr Dims kAll[] = {"bhij", "hij", "ij", "bij", "bi", "j", "hj", "bh"};
    return one_in(absent) ? kAll[below(8)] : "";
  };
  const auto per = [] { return one_in(3) ? Per(between(1, 2)) : Per::none; };
  const auto bound = [] { return one_in(3) ? between(-2, 80) : kUnbounded; };
  c.layout = Layout(below(3));
  c.packed = one_in(3), c.lengths = one_in(3), c.starts = one_in(3), c.poison = one_in(3), c.wanted = !one_in(6);
  c.dlse = !one_in(6);
  c.start = between(-20, 20), c.left = bound(), c.right = bound();
  c.mask = dims(4), c.bias = dims(3), c.bias_f32 = one_in(2);
  constexpr Dims kTiles[] = {"ij", "bij", "hij", "bhij"};
  if (one_in(3)) c.tiles = kTiles[below(4)];
  if (c.poison && *c.mask) c.mask = "bhij";
  c.scales = per(), c.sinks = per(), c.slopes = per(), c.table = per();
  c.similarity = Similarity(below(3)), c.hard = one_in(5);
  c.dropout_batch = between(1, c.B);
  if (one_in(3)) c.dropout = 0.4;
  if (c.hard) {
    c.scale = 0.25;
    if (c.similarity == Similarity::cosine) c.similarity = Similarity::dot;
  } else if (one_in(3)) {
    c.softcap = 2;
  }
  return c;
}

}  // namespace heedful
