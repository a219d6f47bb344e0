// The operators on the emulator, for tests: heedful_emulated::attention_forward and attention_backward take tensors on
// the CPU and run the CUDA kernels' sources, compiled for the CPU. As on a GPU, no number in a tensor is read before.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "../cuda/plans.h"
#include "../operators.h"
#include "../schemas.h"
#include "block.h"

namespace heedful::emulator {
namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The arrays that the kernels of a problem may touch.
class Arrays {
 public:
  Arrays(const Problem& p, bool backward, size_t workspace_bytes) : p_(p) {
    const int64_t number = bytes_of(p.dtype), wide = p.dtype == DType::f64 ? 8 : 4;
    const int64_t sequences = p.q_offsets ? 1 : p.B;
    const auto queries = [&](int64_t dim) { return Shape{sequences, p.Hq, p.q_rows, dim}; };
    const auto keys = [&](int64_t dim) { return Shape{sequences, p.Hk, p.k_rows, dim}; };
    const Shape pairs = {p.B, p.Hq, p.Sq, p.Sk};
    input("q", p.q, queries(p.D), number), input("k", p.k, keys(p.D), number), input("v", p.v, keys(p.Dv), number);
    input("bias", p.bias, pairs, bytes_of(p.bias_dtype)), input("mask", p.mask, pairs, 1);
    parameter("scales", p.scales, 1), parameter("sinks", p.sinks, 1), parameter("slopes", p.slopes, 1);
    parameter("table", p.table, p.table_rows);
    input("bits", p.bits, (p.end_tile - kFirstPartialTile) * kMaskTile * 8);
    const int64_t lse_bytes = sequences * p.Hq * p.q_rows * wide;
    if (backward) {
      input("out", p.out, queries(p.Dv), number), input("lse", p.lse, lse_bytes);
      input("dout", p.dout, queries(p.Dv), number), input("dlse", p.dlse, queries(1), wide);
      result("dq", p.dq, queries(p.D), number), result("dk", p.dk, keys(p.D), number);
      result("dv", p.dv, keys(p.Dv), number), result("dbias", p.dbias, pairs, wide);
    } else {
      result("out", p.out, queries(p.Dv), number), result("lse", p.lse, lse_bytes);
    }
    machine().memory.add("workspace", p.workspace, workspace_bytes, Use::any);
    add_inputs();
  }
  ~Arrays() { machine().memory.clear(); }

 private:
  using Shape = std::array<int64_t, 4>;
  struct Input {
    std::string name;
    const char *begin, *end;
  };

  static int64_t extent(const View& view, const Shape& shape, int64_t element) {
    int64_t last = 0;
    for (size_t n = 0; n < 4; ++n) {
      if (view.stride[n] == 0) continue;  // broadcast, over nothing too
      if (shape[n] == 0) return 0;
      last += (shape[n] - 1) * view.stride[n];
    }
    return (last + 1) * element;
  }

  void input(const char* name, const void* data, int64_t bytes) {
    const char* begin = static_cast<const char*>(data);
    if (begin && bytes) inputs_.push_back({name, begin, begin + bytes});
  }
  void input(const char* name, const View& view, const Shape& shape, int64_t element) {
    input(name, view.data, extent(view, shape, element));
  }
  void parameter(const char* name, const Parameter& x, int64_t rows) {
    const int64_t numbers = (x.batch_stride ? p_.B : 1) * rows * p_.Hq;
    input(name, x.data, numbers * (p_.dtype == DType::f64 ? 8 : 4));
    result(name, x.gradient, numbers * 8);
  }
  static void result(const char* name, const void* data, int64_t bytes) {
    if (data) machine().memory.add(name, data, size_t(bytes), Use::write_once);
  }
  static void result(const char* name, const View& view, const Shape& shape, int64_t element) {
    result(name, view.data, extent(view, shape, element));
  }

  // Inputs may be parts of one tensor: those that overlap count as one.
  void add_inputs() {
    std::sort(inputs_.begin(), inputs_.end(), [](const Input& a, const Input& b) { return a.begin < b.begin; });
    for (size_t n = 0; n < inputs_.size();) {
      Input joined = inputs_[n++];
      for (; n < inputs_.size() && inputs_[n].begin < joined.end; ++n) {
        joined.name += ", " + inputs_[n].name;
        joined.end = std::max(joined.end, inputs_[n].end);
      }
      machine().memory.add(joined.name, joined.begin, size_t(joined.end - joined.begin), Use::read);
    }
  }

  const Problem& p_;
  std::vector<Input> inputs_;
};

struct Device {
  static constexpr Memory kMemory = Memory::device;

  // One call at a time: there is one machine.
  static void run(Problem& p, bool backward, const Tensor& like) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    cuda::Plan plan;
    (backward ? emulated::plan_backward : emulated::plan_forward)(p, &plan);
    constexpr size_t kAlignment = 256;
    const int64_t size = int64_t(plan.workspace_bytes + kAlignment);
    const Tensor workspace = torch::stable::new_empty(like, {&size, 1}, torch::headeronly::ScalarType::Byte);
    std::memset(workspace.data_ptr(), 0xff, size_t(size));
    p.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data_ptr()) + kAlignment - 1) & -kAlignment);
    const Arrays arrays(p, backward, plan.workspace_bytes);
    ++machine().seed;  // Another timing each time.
    for (int n = 0; n < plan.launch_count; ++n) {
      const cuda::Launch& x = plan.launches[n];
      try {
        launch({x.blocks, x.threads, x.shared_bytes}, [&] { x.kernel(p); });
      } catch (const Fault& fault) {
        throw std::runtime_error(std::string("heedful.attention, emulated: ") + x.name + ": " + fault.what());
      }
    }
  }
};

}  // namespace
}  // namespace heedful::emulator

STABLE_TORCH_LIBRARY(heedful_emulated, library) { heedful::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(heedful_emulated, CPU, library) {
  heedful::register_operators<heedful::emulator::Device>(library);
}
