// Defines the operators; each device's kernels are registered by its own register.cpp.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(heedful, library) { heedful::define_operators(library); }
