// The row kernels for float32 logits.
#include "backward.h"

namespace dpo_fast {

DPO_FAST_ROW_KERNELS(template, Float32)

}  // namespace dpo_fast
