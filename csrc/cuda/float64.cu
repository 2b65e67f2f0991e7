// The row kernels for float64 logits.
#include "backward.h"

namespace dpo_fast {

DPO_FAST_ROW_KERNELS(template, Float64)

}  // namespace dpo_fast
