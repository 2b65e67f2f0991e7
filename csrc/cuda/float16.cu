// The row kernels for float16 logits.
#include "backward.h"

namespace dpo_fast {

DPO_FAST_ROW_KERNELS(template, Float16)

}  // namespace dpo_fast
