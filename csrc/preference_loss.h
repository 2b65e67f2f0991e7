// Every preference loss: the value for one pair and its derivatives, shared by the CPU and CUDA kernels.
//
// lr_chosen and lr_rejected are the log-ratios log pi(y|x) - log pi_ref(y|x) of the two completions (without a
// reference, the log-probabilities themselves). A new loss is one function here, one value of LossType and one case in
// preference_loss().
#pragma once

#include <math.h>

#include "row_math.h"

namespace dpo_fast {

enum LossType { kSigmoid = 0 };

struct LossOptions {
  int loss_type;  // LossType
  double beta;
  double label_smoothing;
};

struct PairLoss {
  double loss;
  double d_chosen;    // dloss / d lr_chosen
  double d_rejected;  // dloss / d lr_rejected
};

// log(1 + exp(x)); the two branches keep exp from overflowing.
DPO_FAST_HD double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

// 1 / (1 + exp(-x))
DPO_FAST_HD double sigmoid(double x) {
  if (x >= 0) return 1 / (1 + exp(-x));
  const double e = exp(x);
  return e / (1 + e);
}

// -log sigmoid(beta r) (DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with label smoothing e
// -(1 - e) log sigmoid(beta r) - e log sigmoid(-beta r) (conservative DPO).
DPO_FAST_HD PairLoss sigmoid_loss(double lr_chosen, double lr_rejected, const LossOptions& o) {
  const double x = o.beta * (lr_chosen - lr_rejected);
  const double e = o.label_smoothing;
  double loss = (1 - e) * softplus(-x);
  double slope = -(1 - e) * sigmoid(-x);
  if (e > 0) {  // otherwise 0 * inf would turn an infinite margin into NaN
    loss += e * softplus(x);
    slope += e * sigmoid(x);
  }
  return PairLoss{loss, o.beta * slope, -o.beta * slope};
}

DPO_FAST_HD PairLoss preference_loss(double lr_chosen, double lr_rejected, const LossOptions& o) {
  switch (o.loss_type) {
    case kSigmoid: return sigmoid_loss(lr_chosen, lr_rejected, o);
    default:  // the callers have checked the name
      return PairLoss{NAN, NAN, NAN};
  }
}

}  // namespace dpo_fast
