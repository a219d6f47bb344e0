// The schema of every operator, and nothing else. What the arguments mean stands in python/heedful/functional.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(heedful, library) {
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? bias=None, "
      "Tensor? q_lengths=None, Tensor? k_lengths=None, Tensor? q_starts=None, *, SymInt q_start=0, "
      "int? left=None, int? right=None, float? scale=None) -> (Tensor out, Tensor lse)");
  library.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? mask=None, Tensor? bias=None, Tensor? q_lengths=None, Tensor? k_lengths=None, Tensor? q_starts=None, *, "
      "SymInt q_start=0, int? left=None, int? right=None, float? scale=None, bool bias_grad=False) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor? dbias)");
}
