// heedful without Python: runs the model that export.py compiled, and calls the operator itself.
//
//   main block.pt2 expected.pt
//
// Nothing of heedful is included: libheedful.so, which this program is linked with, registers the operators with torch.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The results of an operator of heedful, by the names of its schema; arguments that are not given have their default.
std::vector<c10::IValue> call(const std::string& name, const std::map<std::string, c10::IValue>& given) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("heedful::" + name).c_str(), "");
  std::vector<c10::IValue> stack;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto found = given.find(argument.name());
    stack.push_back(found != given.end() ? found->second : argument.default_value().value());
  }
  op.callBoxed(stack);
  return stack;
}

void expect_close(const char* what, const at::Tensor& got, const at::Tensor& expected) {
  const double error = got.sub(expected).abs().max().item().toDouble();
  std::printf("%-40s largest difference %.1e\n", what, error);
  if (!(error < 1e-5)) throw std::runtime_error(std::string(what) + ": expected a difference below 1e-5");
}

void run_model(const std::string& model, const std::string& cases) {
  torch::inductor::AOTIModelPackageLoader block(model);
  std::ifstream file(cases, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  for (const c10::IValue& item : torch::jit::pickle_load(bytes).toList()) {
    const auto& elements = item.toTupleRef().elements();
    const at::Tensor x = elements[0].toTensor(), lengths = elements[1].toTensor(), expected = elements[2].toTensor();
    const std::string what = "block, batch " + std::to_string(x.size(0)) + ", length " + std::to_string(x.size(1));
    expect_close(what.c_str(), block.run({x, lengths}).at(0), expected);
  }
}

// Causal attention with four query heads to a key/value head, beside the same with torch's own operators.
void call_operator() {
  const at::Tensor q = at::randn({2, 8, 50, 32}), k = at::randn({2, 2, 50, 32}), v = at::randn({2, 2, 50, 16});
  const at::Tensor out = call("attention_forward", {{"q", q}, {"k", k}, {"v", v}, {"right", 0}})[0].toTensor();
  const at::Tensor scores = q.matmul(k.repeat_interleave(4, 1).mT()).div(std::sqrt(32.0));
  const at::Tensor above = at::ones({50, 50}, at::kBool).triu(1);
  const at::Tensor weights = scores.masked_fill(above, -INFINITY).softmax(-1);
  expect_close("heedful::attention_forward", out, weights.matmul(v.repeat_interleave(4, 1)));
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 3) throw std::runtime_error("usage: main block.pt2 expected.pt");
  const c10::InferenceMode inference;
  run_model(arguments[1], arguments[2]);
  call_operator();
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
