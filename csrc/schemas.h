// The schemas of the operators. What the arguments mean stands in python/heedful/definition.py.
#pragma once

#define HEEDFUL_TENSORS                                                                                      \
  "Tensor? bias=None, Tensor? scales=None, Tensor? sinks=None, Tensor? slopes=None, Tensor? table=None, "    \
  "Tensor? buckets=None, Tensor? mask=None, Tensor? tiles=None, Tensor? bits=None, Tensor? q_lengths=None, " \
  "Tensor? k_lengths=None, Tensor? q_starts=None, Tensor? q_offsets=None, Tensor? k_offsets=None, "          \
  "Tensor? seed=None, *, "
#define HEEDFUL_PLAIN_OPTIONS "SymInt q_start=0, int? left=None, int? right=None, float? scale=None"
#define HEEDFUL_OPTIONS                                                         \
  HEEDFUL_PLAIN_OPTIONS                                                         \
  ", float? softcap=None, str similarity=\"dot\", str normalizer=\"softmax\", " \
  "float dropout_p=0.0, int dropout_batch=0, bool allow_tf32=False"

namespace heedful {

constexpr const char* kForwardSchema =
    "attention_forward(Tensor q, Tensor k, Tensor v, " HEEDFUL_TENSORS HEEDFUL_OPTIONS ") -> (Tensor out, Tensor lse)";
constexpr const char* kBackwardSchema =
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "  //
    HEEDFUL_TENSORS HEEDFUL_OPTIONS
    ", bool bias_grad=False, bool scales_grad=False, bool sinks_grad=False, bool slopes_grad=False, "
    "bool table_grad=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor? dbias, Tensor? dscales, Tensor? dsinks, "
    "Tensor? dslopes, Tensor? dtable)";

// The same with all else left at its default: torch takes as long to look up 28 arguments as for all the rest of a
// small call. They are called where nothing looks on (ops.py); to whoever does, they are the above.
constexpr const char* kPlainForwardSchema =
    "plain_forward(Tensor q, Tensor k, Tensor v, *, " HEEDFUL_PLAIN_OPTIONS ") -> (Tensor out, Tensor lse)";
constexpr const char* kPlainBackwardSchema =
    "plain_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, " HEEDFUL_PLAIN_OPTIONS
    ") -> (Tensor dq, Tensor dk, Tensor dv)";

template <class Library>
void define_operators(Library& library) {
  for (const char* schema : {kForwardSchema, kBackwardSchema, kPlainForwardSchema, kPlainBackwardSchema})
    library.def(schema);
}

}  // namespace heedful
