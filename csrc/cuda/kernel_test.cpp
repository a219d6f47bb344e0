// Tests of the CUDA kernels without a GPU, torch or Python: their sources run on the CPU (csrc/emulator), against the
// definition of attention in double precision, over a sweep of shapes and options.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "../cpu/kernel_test_call.h"
#include "../cpu/kernel_test_definition.h"
#include "../emulator/block.h"
#include "plans.h"

namespace {

using namespace heedful;
using emulator::Fault;
using emulator::machine;
using emulator::Order;
using emulator::Use;

int checks = 0, failures = 0;

void report(bool passed, const std::string& what) {
  ++checks;
  if (passed) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// ---- one call -------------------------------------------------------------------------------------------------------

// What the kernels may touch, and how.
void register_arrays(Call& call, std::vector<unsigned char>& workspace) {
  machine().memory.clear();
  const auto add = [](const char* name, auto& x, Use use) {
    machine().memory.add(name, x.data(), x.size() * sizeof(x[0]), use);
  };
  add("q", call.q.bytes, Use::read), add("k", call.k.bytes, Use::read), add("v", call.v.bytes, Use::read);
  add("bias", call.bias.bytes, Use::read), add("mask", call.mask, Use::read), add("bits", call.bits, Use::read);
  for (auto* x : {&call.scales, &call.sinks, &call.slopes, &call.table}) add("a parameter", x->bytes, Use::read);
  add("out", call.out.bytes, Use::write_once), add("lse", call.lse.bytes, Use::write_once);
  add("workspace", workspace, Use::any);
}

void run(const cuda::Plan& plan, Problem& p, Call& call) {
  std::vector<unsigned char> workspace(plan.workspace_bytes + 256, 0xff);
  p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
  register_arrays(call, workspace);
  for (int n = 0; n < plan.launch_count; ++n) {
    const cuda::Launch& launch = plan.launches[n];
    emulator::launch({launch.blocks, launch.threads, launch.shared_bytes}, [&] { launch.kernel(p); });
  }
}

// The largest difference, over the largest value expected or 1.
void compare(const std::string& name, const char* what, const Case& c, const Array& got, const Array& expected) {
  double error = 0, size = 1;
  got.for_each([&](const Shape& at) {
    const double x = got.get(at), y = expected.get(at);
    if (std::isfinite(x) && std::isfinite(y))
      error = std::max(error, std::fabs(x - y)), size = std::max(size, std::fabs(y));
    else if (x != y && !(std::isnan(x) && std::isnan(y)))
      error = INFINITY;
  });
  constexpr double kAllowed[] = {3e-5, 1e-12, 3e-2, 4e-3};  // by DType
  report(error <= kAllowed[int(c.dtype)] * size,
         name + ": " + what + " is off by " + std::to_string(error) + " of " + std::to_string(size));
}

void test(const Case& c) {
  static uint64_t seed = 0;
  machine().seed = ++seed;
  machine().order = Order(seed % 3);
  const Call call(c);
  Call expected = call.in_float64();
  define(expected.problem());
  Call got = call;
  Problem p = got.problem();
  cuda::Plan plan;
  emulated::plan_forward(p, &plan);
  const std::string name = std::string(plan.launch_count ? plan.launches[plan.launch_count - 1].name : "no kernel") +
                           ", seed " + std::to_string(seed) + ": " + describe(c);
  try {
    run(plan, p, got);
  } catch (const Fault& fault) {
    return report(false, name + ": " + fault.what());
  }
  compare(name, "out", c, got.out, expected.out), compare(name, "lse", c, got.lse, expected.lse);
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (DType dtype : {DType::bf16, DType::f16, DType::f32, DType::f64})
    for (int64_t D : {8, 64, 100, 200})
      for (int64_t S : {1, 33, 70, 150}) {
        Case c{.dtype = dtype, .B = 1, .Hq = 2, .Sq = S, .Sk = S, .D = D, .Dv = D};
        c.scale = 1 / std::sqrt(double(D));
        Case causal = c, general = c;
        causal.right = 0;
        general.softcap = 3, general.bias = "hij", general.dropout = 0.3;
        for (const Case& x : {c, causal, general}) {
          const auto start = std::chrono::steady_clock::now();
          test(x);
          std::printf("%.3f s %s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), describe(x).c_str());
        }
      }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
