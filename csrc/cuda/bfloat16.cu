// The row kernels for bfloat16 logits.
#include "backward.h"

namespace dpo_fast {

DPO_FAST_ROW_KERNELS(template, BFloat16)

}  // namespace dpo_fast
