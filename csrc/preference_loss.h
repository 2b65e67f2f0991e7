// Every preference loss that is a sum over pairs: the value for one pair and its derivatives, shared by the CPU and
// CUDA kernels. A new loss is one function here and one line in DPO_FAST_LOSSES; a number that a loss reads is one line
// in DPO_FAST_LOSS_PARAMETERS, or in DPO_FAST_PAIR_NUMBERS if each pair has its own (docs/losses.md).
//
// With log pi(y|x) the log-probability of a completion, its ratio is log pi(y|x) - log pi_ref(y|x) (without a
// reference, the log-probability itself) and its score is that ratio under the divergence chosen (equal to it for
// reverse KL).
#pragma once

#include <math.h>

#include "row_math.h"

namespace dpo_fast {

// The options that a loss reads or refuses, for the checks in Python.
enum LossFlags {
  kDivergence = 1,          // reads scores: any f-divergence
  kSmoothing = 2,           // reads label_smoothing, in [0, 0.5]
  kSmoothingOver0 = 4,      // ... and not 0
  kSmoothingUnderHalf = 8,  // ... and not 0.5
  kBetaOver0 = 16,          // divides by beta
  kLengths = 32,            // reads the lengths of the sequences
  kSums = 64,               // wants log-probs summed over tokens
  kAverages = 128,          // wants log-probs averaged over tokens
  kReferenceFree = 256,
  kUnpaired = 512,      // one completion at a time, desirable or not
  kTau = 1024,          // reads discopop_tau
  kGamma = 2048,        // reads simpo_gamma
  kBaseline = 4096,     // reads baseline
  kSideWeights = 8192,  // reads desirable_weight and undesirable_weight
  kMargin = 16384,      // reads the score margin, with dpop_lambda, length_penalty and margin in it
};

// name, flags
#define DPO_FAST_LOSSES(X)                                            \
  X(sigmoid, kDivergence | kMargin | kSmoothing)                      \
  X(hinge, kDivergence | kMargin)                                     \
  X(ipo, kDivergence | kBetaOver0 | kLengths | kSums)                 \
  X(exo_pair, kDivergence | kMargin | kSmoothing | kSmoothingOver0)   \
  X(nca_pair, 0)                                                      \
  X(robust, kDivergence | kMargin | kSmoothing | kSmoothingUnderHalf) \
  X(bco_pair, 0)                                                      \
  X(sppo_hard, kBetaOver0)                                            \
  X(apo_zero, 0)                                                      \
  X(apo_down, 0)                                                      \
  X(discopop, kDivergence | kMargin | kTau)                           \
  X(sigmoid_norm, kDivergence | kLengths | kSums)                     \
  X(sft, kLengths)                                                    \
  X(simpo, kSmoothing | kAverages | kReferenceFree | kGamma)          \
  X(cpo, kSmoothing | kSums | kReferenceFree)                         \
  X(orpo, kAverages | kReferenceFree)                                 \
  X(kto, kUnpaired | kBaseline | kSideWeights)                        \
  X(bco, kUnpaired | kBaseline)

enum LossType {
#define DPO_FAST_LOSS(name, flags) k_##name,
  DPO_FAST_LOSSES(DPO_FAST_LOSS)
#undef DPO_FAST_LOSS
      kLossTypes
};

// By number, for the names and the checks that the callers need.
DPO_FAST_HD const char* loss_name(int type) {
  switch (type) {
#define DPO_FAST_LOSS(name, flags) \
  case k_##name: return #name;
    DPO_FAST_LOSSES(DPO_FAST_LOSS)
#undef DPO_FAST_LOSS
    default: return "";
  }
}

DPO_FAST_HD int loss_flags(int type) {
  switch (type) {
#define DPO_FAST_LOSS(name, flags) \
  case k_##name: return flags;
    DPO_FAST_LOSSES(DPO_FAST_LOSS)
#undef DPO_FAST_LOSS
    default: return 0;
  }
}

// f'(t) at t = pi / pi_ref in place of log t (f-DPO, Wang et al. 2023, arXiv:2309.16240).
enum Divergence { kReverseKL = 0, kForwardKL = 1, kJensenShannon = 2, kAlpha = 3 };
constexpr int kDivergences = 4;

constexpr int kMaxLossTerms = 8;

// The numbers that a loss reads, as options hold them.
#define DPO_FAST_LOSS_PARAMETERS(X)                                          \
  X(beta)                                                                    \
  X(label_smoothing)                                                         \
  X(discopop_tau)                                                            \
  X(simpo_gamma)                                                             \
  X(alpha)              /* of the alpha-divergence */                        \
  X(desirable_weight)   /* kto */                                            \
  X(undesirable_weight) /* kto */                                            \
  X(tokens_per_pair)    /* sft: chosen tokens over pairs; 0: counted */      \
  X(dpop_lambda)        /* score margin: weight of a chosen ratio below 0 */ \
  X(length_penalty)     /* score margin: for each token of difference */

struct LossOptions {
  int n_terms;  // the loss is the sum over them of weight * loss
  int types[kMaxLossTerms];
  double weights[kMaxLossTerms];
#define DPO_FAST_PARAMETER(name) double name;
  DPO_FAST_LOSS_PARAMETERS(DPO_FAST_PARAMETER)
#undef DPO_FAST_PARAMETER
  int divergence;
  double baseline;  // kto: the KL estimate, times beta the reference point; bco: delta
  bool average;     // the log-probs are averages over tokens
};

enum LossParameter {
#define DPO_FAST_PARAMETER(name) kParameter_##name,
  DPO_FAST_LOSS_PARAMETERS(DPO_FAST_PARAMETER)
#undef DPO_FAST_PARAMETER
      kLossParameters
};

DPO_FAST_HD const char* loss_parameter_name(int parameter) {
  switch (parameter) {
#define DPO_FAST_PARAMETER(name) \
  case kParameter_##name: return #name;
    DPO_FAST_LOSS_PARAMETERS(DPO_FAST_PARAMETER)
#undef DPO_FAST_PARAMETER
    default: return "";
  }
}

DPO_FAST_HD void set_loss_parameter(LossOptions& o, int parameter, double value) {
  switch (parameter) {
#define DPO_FAST_PARAMETER(name) \
  case kParameter_##name: o.name = value; break;
    DPO_FAST_LOSS_PARAMETERS(DPO_FAST_PARAMETER)
#undef DPO_FAST_PARAMETER
  }
}

// Whether a term of the loss has one of these flags.
DPO_FAST_HD bool any_term(const LossOptions& o, int flags) {
  for (int i = 0; i < o.n_terms; ++i)
    if (loss_flags(o.types[i]) & flags) return true;
  return false;
}

DPO_FAST_HD bool reads_lengths(const LossOptions& o) { return o.length_penalty != 0 || any_term(o, kLengths); }

// The numbers that each pair may have of its own: the name, and the value where none are given.
#define DPO_FAST_PAIR_NUMBERS(X)                             \
  X(weight, 1) /* of its loss; 0: the pair counts as none */ \
  X(beta, o.beta)                                            \
  X(margin, 0) /* taken off the score margin */

enum PairNumber {
#define DPO_FAST_NUMBER(name, otherwise) kNumber_##name,
  DPO_FAST_PAIR_NUMBERS(DPO_FAST_NUMBER)
#undef DPO_FAST_NUMBER
      kPairNumbers
};

DPO_FAST_HD const char* pair_number_name(int number) {
  switch (number) {
#define DPO_FAST_NUMBER(name, otherwise) \
  case kNumber_##name: return #name;
    DPO_FAST_PAIR_NUMBERS(DPO_FAST_NUMBER)
#undef DPO_FAST_NUMBER
    default: return "";
  }
}

// One completion of a pair.
struct Side {
  bool present;  // a loss of unpaired completions has but one side
  double logp;
  double ratio;
  double length;  // tokens
  double score;   // filled in by pair_loss
  double slope;   // dscore / dratio
};

struct Pair {
  bool present;  // false: of weight 0, which counts as no pair
  Side chosen, rejected;
#define DPO_FAST_NUMBER(name, otherwise) double name;
  DPO_FAST_PAIR_NUMBERS(DPO_FAST_NUMBER)
#undef DPO_FAST_NUMBER
};

struct PairLoss {
  double loss;
  double d_chosen;  // dloss / dlogp of the chosen completion
  double d_rejected;
};

// A function's value and derivative.
struct Curve {
  double value, slope;
};

// log(1 + exp(x)); the two branches keep exp from overflowing.
DPO_FAST_HD double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

// 1 / (1 + exp(-x))
DPO_FAST_HD double sigmoid(double x) {
  if (x >= 0) return 1 / (1 + exp(-x));
  const double e = exp(x);
  return e / (1 + e);
}

// a * b where a vanishing a wins over an infinite b.
DPO_FAST_HD double vanishing(double a, double b) { return a == 0 ? 0 : a * b; }

// -(1 - e) log sigmoid(x) - e log sigmoid(-x)
DPO_FAST_HD Curve smoothed_logistic(double x, double e) {
  Curve c = {(1 - e) * softplus(-x), -(1 - e) * sigmoid(-x)};
  if (e > 0) {  // otherwise 0 * inf would turn an infinite margin into NaN
    c.value += e * softplus(x);
    c.slope += e * sigmoid(x);
  }
  return c;
}

// beta (score of the chosen - score of the rejected), with what may be added to it:
//   beta lambda max(0, -ratio of the chosen), subtracted (DPO-Positive, Pal et al. 2024, arXiv:2402.13228);
//   alpha (length of the chosen - length of the rejected) (R-DPO, Park et al. 2024, arXiv:2403.19159);
//   the pair's own margin, subtracted (ODPO, Amini et al. 2024, arXiv:2402.10571).
DPO_FAST_HD double score_margin(const Pair& p, const LossOptions& o) {
  double score = p.chosen.score - p.rejected.score;
  if (o.dpop_lambda != 0 && p.chosen.ratio < 0) score += o.dpop_lambda * p.chosen.ratio;
  return p.beta * score + o.length_penalty * (p.chosen.length - p.rejected.length) - p.margin;
}

DPO_FAST_HD PairLoss of_score_margin(Curve c, const Pair& p, const LossOptions& o) {
  double slope = p.chosen.slope;
  if (o.dpop_lambda != 0 && p.chosen.ratio < 0) slope += o.dpop_lambda;
  return PairLoss{c.value, p.beta * c.slope * slope, -p.beta * c.slope * p.rejected.slope};
}

// DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with label smoothing conservative DPO.
DPO_FAST_HD PairLoss sigmoid_loss(const Pair& p, const LossOptions& o) {
  return of_score_margin(smoothed_logistic(score_margin(p, o), o.label_smoothing), p, o);
}

// RSO / SLiC (Liu et al. 2023, arXiv:2309.06657)
DPO_FAST_HD PairLoss hinge_loss(const Pair& p, const LossOptions& o) {
  const double y = 1 - score_margin(p, o);
  return of_score_margin(y > 0 || y != y ? Curve{y, -1} : Curve{0, 0}, p, o);
}

// 1 / tokens, for scores averaged over tokens; a completion without tokens keeps its score (of 0).
DPO_FAST_HD double per_token(const Side& side) { return 1 / (side.length > 1 ? side.length : 1); }

DPO_FAST_HD double average_score_margin(const Pair& p) {
  return p.chosen.score * per_token(p.chosen) - p.rejected.score * per_token(p.rejected);
}

DPO_FAST_HD PairLoss of_average_score_margin(Curve c, const Pair& p) {
  return PairLoss{c.value, c.slope * p.chosen.slope * per_token(p.chosen),
                  -c.slope * p.rejected.slope * per_token(p.rejected)};
}

// IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), on averages over tokens.
DPO_FAST_HD PairLoss ipo_loss(const Pair& p, const LossOptions&) {
  const double d = average_score_margin(p) - 1 / (2 * p.beta);
  return of_average_score_margin(Curve{d * d, 2 * d}, p);
}

// The sigmoid loss on averages over tokens.
DPO_FAST_HD PairLoss sigmoid_norm_loss(const Pair& p, const LossOptions&) {
  const Curve c = smoothed_logistic(p.beta * average_score_margin(p), 0);
  return of_average_score_margin(Curve{c.value, p.beta * c.slope}, p);
}

// EXO (Ji et al. 2024, arXiv:2402.00856, eq. 16): KL((q, 1 - q) || (1 - e, e)), q = sigmoid(x).
DPO_FAST_HD PairLoss exo_pair_loss(const Pair& p, const LossOptions& o) {
  const double x = score_margin(p, o), e = o.label_smoothing;
  const double q = sigmoid(x), not_q = sigmoid(-x);
  const double log_p = log1p(-e), log_not_p = log(e);
  const double value = vanishing(q, -softplus(-x) - log_p) + vanishing(not_q, -softplus(x) - log_not_p);
  return of_score_margin(Curve{value, vanishing(q * not_q, x - log_p + log_not_p)}, p, o);
}

// Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased under labels that flip with probability e.
DPO_FAST_HD PairLoss robust_loss(const Pair& p, const LossOptions& o) {
  const double x = score_margin(p, o), e = o.label_smoothing;
  const Curve kept = smoothed_logistic(x, 0), flipped = smoothed_logistic(-x, 0);
  const double scale = 1 / (1 - 2 * e);
  return of_score_margin(Curve{((1 - e) * kept.value - vanishing(e, flipped.value)) * scale,
                               ((1 - e) * kept.slope + vanishing(e, flipped.slope)) * scale},
                         p, o);
}

// DiscoPOP (Lu et al. 2024, arXiv:2406.08414, eq. 5): m exp(-x) + (1 - m) softplus(-x), m = sigmoid(x / tau).
DPO_FAST_HD PairLoss discopop_loss(const Pair& p, const LossOptions& o) {
  const double x = score_margin(p, o), tau = o.discopop_tau;
  const double m = sigmoid(x / tau), not_m = sigmoid(-x / tau);
  // as one exponential: m may vanish where exp(-x) overflows
  const double exponential = exp(-x - softplus(-x / tau));
  const double logistic = softplus(-x);
  const double value = exponential + vanishing(not_m, logistic);
  const double slope =
      vanishing(exponential, not_m / tau - 1) - sigmoid(-x) * not_m - vanishing(m * not_m, logistic / tau);
  return of_score_margin(Curve{value, slope}, p, o);
}

// A loss that is f(beta * ratio of the chosen) + g(beta * ratio of the rejected).
DPO_FAST_HD PairLoss of_rewards(Curve chosen, Curve rejected, const Pair& p) {
  return PairLoss{chosen.value + rejected.value, p.beta * chosen.slope, p.beta * rejected.slope};
}

DPO_FAST_HD Curve sigmoid_curve(double x) {
  const double s = sigmoid(x);
  return Curve{s, s * sigmoid(-x)};
}

// NCA (Chen et al. 2024, arXiv:2402.05369)
DPO_FAST_HD PairLoss nca_pair_loss(const Pair& p, const LossOptions&) {
  const double c = p.beta * p.chosen.ratio, d = p.beta * p.rejected.ratio;
  return of_rewards(Curve{softplus(-c) + 0.5 * softplus(c), 0.5 * sigmoid(c) - sigmoid(-c)},
                    Curve{0.5 * softplus(d), 0.5 * sigmoid(d)}, p);
}

// BCO without its running mean (Jung et al. 2024, arXiv:2404.04656)
DPO_FAST_HD PairLoss bco_pair_loss(const Pair& p, const LossOptions&) {
  const double c = p.beta * p.chosen.ratio, d = p.beta * p.rejected.ratio;
  return of_rewards(Curve{softplus(-c), -sigmoid(-c)}, Curve{softplus(d), sigmoid(d)}, p);
}

// SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)
DPO_FAST_HD PairLoss sppo_hard_loss(const Pair& p, const LossOptions&) {
  const double c = p.chosen.ratio - 0.5 / p.beta, d = p.rejected.ratio + 0.5 / p.beta;
  return PairLoss{c * c + d * d, 2 * c, 2 * d};
}

// APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7)
DPO_FAST_HD PairLoss apo_zero_loss(const Pair& p, const LossOptions&) {
  const Curve c = sigmoid_curve(-p.beta * p.chosen.ratio);
  return of_rewards(Curve{c.value, -c.slope}, sigmoid_curve(p.beta * p.rejected.ratio), p);
}

// APO-down (the same, eq. 8)
DPO_FAST_HD PairLoss apo_down_loss(const Pair& p, const LossOptions&) {
  const Curve c = sigmoid_curve(p.beta * p.chosen.ratio);
  const Curve m = sigmoid_curve(-p.beta * (p.chosen.ratio - p.rejected.ratio));
  return of_rewards(Curve{c.value + m.value, c.slope - m.slope}, Curve{0, m.slope}, p);
}

// The negative log-likelihood of the chosen completions: summed over pairs and divided by their number, it is the mean
// over their tokens.
DPO_FAST_HD PairLoss sft_loss(const Pair& p, const LossOptions& o) {
  if (o.tokens_per_pair == 0) return PairLoss{0, 0, 0};
  const double scale = (o.average ? p.chosen.length : 1) / o.tokens_per_pair;
  return PairLoss{-p.chosen.logp * scale, -scale, 0};
}

// SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): averages over tokens, a target margin gamma, no reference.
DPO_FAST_HD PairLoss simpo_loss(const Pair& p, const LossOptions& o) {
  const double x = p.beta * (p.chosen.logp - p.rejected.logp) - o.simpo_gamma;
  const Curve c = smoothed_logistic(x, o.label_smoothing);
  return PairLoss{c.value, p.beta * c.slope, -p.beta * c.slope};
}

// CPO (Xu et al. 2024, arXiv:2401.08417, eq. 5): the preference term and the chosen completion's own log-likelihood.
DPO_FAST_HD PairLoss cpo_loss(const Pair& p, const LossOptions& o) {
  const Curve c = smoothed_logistic(p.beta * (p.chosen.logp - p.rejected.logp), o.label_smoothing);
  return PairLoss{c.value - p.chosen.logp, p.beta * c.slope - 1, -p.beta * c.slope};
}

// log(1 - exp(x)) for x <= 0; which form keeps the digits depends on the side of -log 2 (Maechler 2012, "Accurately
// computing log(1 - exp(-|a|))").
DPO_FAST_HD double log1mexp(double x) { return x > -0.6931471805599453 ? log(-expm1(x)) : log1p(-exp(x)); }

// log(p / (1 - p)) at log p = x. Certain completions (empty ones, and those that rounding makes so) would have infinite
// odds: flat above exp(-1e-12).
DPO_FAST_HD Curve log_odds(double x) {
  if (x > -1e-12) return Curve{-1e-12 - log1mexp(-1e-12), 0};
  return Curve{x - log1mexp(x), -1 / expm1(x)};
}

// ORPO (Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7): averages over tokens, beta is the paper's lambda.
DPO_FAST_HD PairLoss orpo_loss(const Pair& p, const LossOptions&) {
  const Curve c = log_odds(p.chosen.logp), d = log_odds(p.rejected.logp);
  const Curve curve = smoothed_logistic(c.value - d.value, 0);
  return PairLoss{p.beta * curve.value - p.chosen.logp, p.beta * vanishing(curve.slope, c.slope) - 1,
                  -p.beta * vanishing(curve.slope, d.slope)};
}

// KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8)
DPO_FAST_HD PairLoss kto_loss(const Pair& p, const LossOptions& o) {
  PairLoss out = {0, 0, 0};
  if (p.chosen.present) {
    const Curve c = sigmoid_curve(-p.beta * (p.chosen.ratio - o.baseline));
    out.loss += o.desirable_weight * c.value;
    out.d_chosen = -o.desirable_weight * p.beta * c.slope;
  }
  if (p.rejected.present) {
    const Curve c = sigmoid_curve(-p.beta * (o.baseline - p.rejected.ratio));
    out.loss += o.undesirable_weight * c.value;
    out.d_rejected = o.undesirable_weight * p.beta * c.slope;
  }
  return out;
}

// BCO (Jung et al. 2024, arXiv:2404.04656, eq. 9) with its reward shift delta given.
DPO_FAST_HD PairLoss bco_loss(const Pair& p, const LossOptions& o) {
  PairLoss out = {0, 0, 0};
  if (p.chosen.present) {
    const double x = p.beta * p.chosen.ratio - o.baseline;
    out.loss += softplus(-x);
    out.d_chosen = -p.beta * sigmoid(-x);
  }
  if (p.rejected.present) {
    const double x = p.beta * p.rejected.ratio - o.baseline;
    out.loss += softplus(x);
    out.d_rejected = p.beta * sigmoid(x);
  }
  return out;
}

// Powers of the likelihood ratio beyond exp(80) are cut off there, flat: their differences would be inf - inf.
constexpr double kMaxExponent = 80;

// (t^(a - 1) - 1) / (a - 1) for t = exp(ratio), a != 1
DPO_FAST_HD Curve power_score(double ratio, double a) {
  const double x = (a - 1) * ratio;
  if (x > kMaxExponent) return Curve{expm1(kMaxExponent) / (a - 1), 0};
  return Curve{expm1(x) / (a - 1), exp(x)};
}

DPO_FAST_HD Curve divergence_score(double ratio, const LossOptions& o) {
  switch (o.divergence) {
    case kForwardKL: return power_score(ratio, 0);  // f'(t) = 1 - 1 / t
    case kJensenShannon:                            // f'(t) = log(2 t / (1 + t))
      return Curve{0.6931471805599453 - softplus(-ratio), sigmoid(-ratio)};
    case kAlpha:
      if (fabs(o.alpha - 1) >= 1e-6) return power_score(ratio, o.alpha);
      return Curve{ratio, 1};  // the limit
    default: return Curve{ratio, 1};
  }
}

DPO_FAST_HD PairLoss loss_term(int type, const Pair& p, const LossOptions& o) {
  switch (type) {
#define DPO_FAST_LOSS(name, flags) \
  case k_##name: return name##_loss(p, o);
    DPO_FAST_LOSSES(DPO_FAST_LOSS)
#undef DPO_FAST_LOSS
    default:  // the callers have checked the name
      return PairLoss{NAN, NAN, NAN};
  }
}

// The weighted sum of the loss's terms.
DPO_FAST_HD PairLoss pair_loss(Pair p, const LossOptions& o) {
  Curve c = divergence_score(p.chosen.ratio, o);
  p.chosen.score = c.value;
  p.chosen.slope = c.slope;
  c = divergence_score(p.rejected.ratio, o);
  p.rejected.score = c.value;
  p.rejected.slope = c.slope;
  PairLoss sum = {0, 0, 0};
  for (int i = 0; i < o.n_terms; ++i) {
    const PairLoss term = loss_term(o.types[i], p, o);
    sum.loss += o.weights[i] * term.loss;
    sum.d_chosen += o.weights[i] * term.d_chosen;
    sum.d_rejected += o.weights[i] * term.d_rejected;
  }
  return sum;
}

}  // namespace dpo_fast
