// Calls every row kernel once on a fixed row, for callgrind to count (tests/test_instruction_counts.py). `measured` is
// where counting is switched on; each call of it is dumped on its own, and the names go to the standard output in
// order.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "cpu/rows.h"

using namespace dpo_fast;

namespace {

constexpr int64_t kVocab = 32000;

uint16_t bfloat16_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return (uint16_t)(u >> 16);
}

// Truncation will do: the logits only have to look like logits.
uint16_t float16_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  const int exponent = (int)((u >> 23) & 0xff) - 112;
  if (exponent <= 0) return (uint16_t)((u >> 16) & 0x8000);
  return (uint16_t)(((u >> 16) & 0x8000) | (exponent << 10) | ((u >> 13) & 0x3ff));
}

// About normal, with a standard deviation of 3: a sum of twelve uniform numbers.
std::vector<float> random_logits() {
  std::vector<float> x(kVocab);
  uint64_t state = 1;
  for (float& value : x) {
    double sum = -6;
    for (int i = 0; i < 12; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += (double)(state >> 40) / (1 << 24);
    }
    value = (float)(3 * sum);
  }
  return x;
}

struct Call {
  const RowKernels* kernels;
  int type;
  bool backward, extras;
  const void* x;
  void* dx;
};

}  // namespace

extern "C" __attribute__((noinline)) double measured(const Call* call) {
  const LogitTransform transform{1, 1, 0};
  const TypeKernels& kernels = call->kernels->types[call->type];
  if (!call->backward) return kernels.forward[kPlain][call->extras](call->x, 1, kVocab, transform).sum;
  const RowGrad grad = row_grad(9.0, 1e-4, 8.0, {0.05, call->extras ? 0.01 : 0.0, 0.0, true});
  kernels.backward[kPlain][call->extras](call->x, 1, call->dx, 1, kVocab, transform, grad);
  return 0;
}

int main(int argc, char** argv) {
  const char* type_names[] = {"float32", "float64", "bfloat16", "float16"};
  const std::vector<float> x = random_logits();
  std::vector<double> wide(x.begin(), x.end());
  std::vector<uint16_t> halves[2];
  for (float value : x) {
    halves[0].push_back(bfloat16_bits(value));
    halves[1].push_back(float16_bits(value));
  }
  const void* inputs[] = {x.data(), wide.data(), halves[0].data(), halves[1].data()};
  std::vector<double> out(kVocab);
  double sum = 0;
  for (int a = 1; a < argc; ++a)
    for (int i = 0; compiled_kernels(i); ++i) {
      if (strcmp(compiled_kernels(i)->isa, argv[a])) continue;
      for (int type = 0; type < kLogitTypes; ++type)
        for (int pass = 0; pass < 4; ++pass) {
          const Call call{compiled_kernels(i), type, pass >= 2, pass % 2 == 1, inputs[type], out.data()};
          sum += measured(&call);
          printf("%s %s %s%s\n", argv[a], type_names[type], pass >= 2 ? "backward" : "forward",
                 pass % 2 ? (pass >= 2 ? " with entropy" : " with statistics") : "");
        }
    }
  return sum > 0 ? 0 : 1;
}
