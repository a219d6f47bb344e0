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
#ifdef HEEDFUL_HAVE_CUDA
  info["cuda"] = true;  // whether libheedful_cuda.so was built
#else
  info["cuda"] = false;
#endif
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

// A problem that uses these features, arguments of the operator other than their defaults; nothing of it is read.
heedful::Problem problem_with(const std::string& dtype, const std::vector<std::string>& features) {
  static char given;
  static const int64_t integers = 0;
  heedful::Problem p{};
  p.dtype = dtype_of(dtype);
  p.left = p.right = heedful::kUnbounded;
  p.keep = heedful::kKeepAll;
  for (const std::string& name : features) {
    if (name == "bias")
      p.bias.data = &given;
    else if (name == "scales")
      p.scales.data = &given;
    else if (name == "sinks")
      p.sinks.data = &given;
    else if (name == "slopes")
      p.slopes.data = &given;
    else if (name == "table" || name == "buckets")
      p.table.data = &given, p.buckets = &integers;
    else if (name == "mask")
      p.mask.data = &given;
    else if (name == "tiles" || name == "bits")
      p.tiles.data = &given, p.bits = &integers;
    else if (name == "q_lengths")
      p.q_lengths = &integers;
    else if (name == "k_lengths")
      p.k_lengths = &integers;
    else if (name == "q_starts")
      p.q_starts = &integers;
    else if (name == "q_offsets" || name == "k_offsets")
      p.q_offsets = p.k_offsets = &integers;
    else if (name == "dropout_p" || name == "seed")
      p.keep = 0, p.seeds = &integers;
    else if (name == "left" || name == "right")
      p.left = p.right = 0;
    else if (name == "softcap")
      p.softcap = 1;
    else if (name == "cosine")
      p.similarity = heedful::Similarity::cosine;
    else if (name == "gaussian")
      p.similarity = heedful::Similarity::gaussian;
    else if (name == "hard")
      p.normalizer = heedful::Normalizer::hard;
    else if (name == "allow_tf32")
      p.allow_tf32 = true;
    else if (name != "scale" && name != "q_start")
      throw py::value_error("features: no such feature: " + name);
  }
  return p;
}

// The kernels of a build with everything that run these features, each on a machine that has what it needs.
py::list kernels_for(const std::string& device, const std::string& dtype, const std::vector<std::string>& features) {
  heedful::Machine machine;
  for (const auto* isa : heedful::instruction_sets()) machine.cpu.push_back(isa->name);
  machine.cuda_capability = 80;
  py::list kernels;
  const auto add = [&] {
    const auto found = heedful::select(problem_with(dtype, features), device, machine, false);
    if (!found.kernel.empty() && !kernels.contains(found.kernel)) kernels.append(found.kernel);
    if (found.backward != found.kernel) kernels.append(found.backward + " backward");
  };
  if (device == "cuda") add();
  if (device != "cpu") return kernels;
  for (const std::string& isa : machine.cpu) {
    machine.forced = isa;
    add();
  }
  return kernels;
}

// no_cuda: why CUDA's kernels are not loaded, empty where they are.
py::dict explain(const std::string& device, const std::string& dtype, int64_t B, int64_t Hq, int64_t Hk, int64_t Sq,
                 int64_t Sk, int64_t D, int64_t Dv, const std::vector<std::string>& features,
                 const std::string& no_cuda, int cuda_capability) {
  heedful::Problem p = problem_with(dtype, features);
  p.B = B, p.Hq = Hq, p.Hk = Hk, p.Sq = Sq, p.Sk = Sk, p.D = D, p.Dv = Dv;
  heedful::Machine machine = heedful::this_machine();
  machine.no_cuda = no_cuda, machine.cuda_capability = cuda_capability;
  const heedful::Selection selection = heedful::select(p, device, machine, true);
  py::dict result, tiles;
  py::list reasons;
  for (const auto& [kernel, reason] : selection.rejected) reasons.append(kernel + ": " + reason);
  result["kernel"] = py::none();
  result["backward"] = py::none();
  result["isa"] = py::none();
  if (!selection.kernel.empty()) result["kernel"] = selection.kernel;
  if (!selection.backward.empty()) result["backward"] = selection.backward;
  if (const auto* isa = selection.cpu) {
    result["isa"] = isa->name;
    tiles["vector_bytes"] = isa->vector_bytes;
    tiles["forward_queries"] = isa->forward_tile.queries;
    // Under a block mask a tile of keys is one of the mask's.
    const auto keys = [&](int64_t of_kernel) { return p.tiles.data ? heedful::kMaskTile : of_kernel; };
    tiles["forward_keys"] = keys(isa->forward_tile.keys);
    tiles["backward_queries"] = isa->backward_tile.queries;
    tiles["backward_keys"] = keys(isa->backward_tile.keys);
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
             py::arg("Hk"), py::arg("Sq"), py::arg("Sk"), py::arg("D"), py::arg("Dv"),
             py::arg("features") = std::vector<std::string>(), py::arg("no_cuda") = "this build has no CUDA kernels",
             py::arg("cuda_capability") = 0);
  module.def("kernels_for", &kernels_for, py::kw_only(), py::arg("device"), py::arg("dtype"), py::arg("features"));
}
