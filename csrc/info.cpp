// heedful._info: what was built, what this machine runs, and which kernel a call gets. No tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "select.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list isas;
  for (const auto* isa : heedful::instruction_sets()) isas.append(isa->name);
  py::dict info;
  info["version"] = HEEDFUL_VERSION;
  info["torch_target"] = "2.10";
  info["cuda"] = false;  // CUDA kernels; the score headers alone are compiled for CUDA, as a check
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["isas"] = isas;
  return info;
}

heedful::DType dtype_of(const std::string& name) {
  if (name == "float32") return heedful::DType::f32;
  if (name == "float64") return heedful::DType::f64;
  if (name == "bfloat16") return heedful::DType::bf16;
  if (name == "float16") return heedful::DType::f16;
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got " + name);
}

py::dict explain(const std::string& device, const std::string& dtype, int64_t B, int64_t Hq, int64_t Hk, int64_t Sq,
                 int64_t Sk, int64_t D, int64_t Dv) {
  heedful::Problem p{};
  p.dtype = dtype_of(dtype);
  p.B = B, p.Hq = Hq, p.Hk = Hk, p.Sq = Sq, p.Sk = Sk, p.D = D, p.Dv = Dv;
  const heedful::Selection selection = heedful::select(p, device, heedful::this_machine(), true);
  py::dict result, tiles;
  py::list reasons;
  for (const auto& [kernel, reason] : selection.rejected) reasons.append(kernel + ": " + reason);
  result["kernel"] = py::none();
  result["isa"] = py::none();
  if (const auto* isa = selection.cpu) {
    result["kernel"] = std::string("cpu/") + isa->name;
    result["isa"] = isa->name;
    tiles["vector_bytes"] = isa->vector_bytes;
    tiles["forward_queries"] = isa->forward_tile.queries;
    tiles["forward_keys"] = isa->forward_tile.keys;
    tiles["backward_queries"] = isa->backward_tile.queries;
    tiles["backward_keys"] = isa->backward_tile.keys;
  }
  result["tiles"] = tiles;
  result["reasons"] = reasons;
  return result;
}

}  // namespace

PYBIND11_MODULE(_info, module) {
  module.doc() = "What was built, what this machine runs, and which kernel a call gets.";
  module.def("build_info", &build_info);
  module.def("cpu_capability", [] { return heedful::this_machine().cpu.front(); });
  module.def("explain", &explain, py::kw_only(), py::arg("device"), py::arg("dtype"), py::arg("B"), py::arg("Hq"),
             py::arg("Hk"), py::arg("Sq"), py::arg("Sk"), py::arg("D"), py::arg("Dv"));
}
