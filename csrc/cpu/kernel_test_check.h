// How near a kernel's results have to be to those of the definition in double precision.
#pragma once

#include "../test_report.h"
#include "kernel_test_call.h"

namespace heedful {

// The largest difference, over the largest value expected or `size`, that of what gradients are differences of.
inline void compare(const std::string& name, const char* what, const Case& c, const Array& got, const Array& expected,
                    double size = 1) {
  if (got.bytes.empty()) return;
  double error = 0;
  got.for_each([&](const Shape& at) {
    const double x = got.get(at), y = expected.get(at);
    if (std::isfinite(x) && std::isfinite(y))
      error = std::max(error, std::fabs(x - y)), size = std::max(size, std::fabs(y));
    else if (x != y && !(std::isnan(x) && std::isnan(y)))
      error = INFINITY;
  });
  constexpr double kAllowed[] = {3e-5, 1e-12, 3e-2, 4e-3};  // by DType
  const double allowed = c.tf32 && c.dtype == DType::f32 ? 1e-2 : kAllowed[int(c.dtype)];
  report(error <= allowed * size, name + ": " + describe(c) + ": " + what + " is off by " + std::to_string(error) +
                                      " of " + std::to_string(size));
}

inline void compare_results(const std::string& name, const Call& got, const Call& expected) {
  compare(name, "out", got.c, got.out, expected.out);
  compare(name, "lse", got.c, got.lse, expected.lse);
}

inline void compare_gradients(const std::string& name, const Call& got, const Call& expected) {
  const Case& c = got.c;
  const auto check = [&](const char* what, Array Call::* result, double size = 1) {
    compare(name, what, c, got.*result, expected.*result, size);
  };
  check("dq", &Call::dq), check("dk", &Call::dk), check("dv", &Call::dv);
  // Sums over queries or heads, each rounded on its own, of what scores are made of.
  const double queries = std::sqrt(double(c.B * c.Sq)), heads = std::sqrt(double(c.Hq));
  check("dbias", &Call::dbias, (std::strchr(c.bias, 'i') ? 1 : queries) * (std::strchr(c.bias, 'h') ? 1 : heads));
  check("dsinks", &Call::dsinks, queries), check("dtable", &Call::dtable, queries);
  check("dscales", &Call::dscales, queries * double(c.D));
  const double farthest = double(std::max(c.Sk, c.Sq + std::abs(c.start)));
  check("dslopes", &Call::dslopes, queries * farthest);
}

}  // namespace heedful
