// Forward of every type and head dim, row by row.
#include "../rows.cuh"

namespace heedful::HEEDFUL_TARGET {
template void plan_forward_rows<float>(const Problem&, cuda::Plan*);
template void plan_forward_rows<double>(const Problem&, cuda::Plan*);
template void plan_forward_rows<BFloat16>(const Problem&, cuda::Plan*);
template void plan_forward_rows<Float16>(const Problem&, cuda::Plan*);
}  // namespace heedful::HEEDFUL_TARGET
