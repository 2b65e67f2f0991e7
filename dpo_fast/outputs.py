"""What the functions of every level return, for torch tensors and NumPy arrays alike."""

from __future__ import annotations

from typing import Any, NamedTuple


class TokenOutput(NamedTuple):
    """Statistics of each token, in the shape of the targets; None where not asked for, 0 (False) for ignored tokens.

    logps: log p of the target. entropy: -sum_v p_v log p_v, in nats. mean_logits: mean over the vocabulary of the
    (scaled, capped) logits. is_top1: whether the target is the largest logit, ties going to the first index.
    log_sum_sq_probs: log sum_v p_v^2. logps and entropy are differentiable.
    """

    logps: Any = None
    entropy: Any = None
    mean_logits: Any = None
    is_top1: Any = None
    log_sum_sq_probs: Any = None


class DPOOutput(NamedTuple):
    """A preference loss and what it was made of.

    loss: by reduction, [] or [P]. losses: [P], one per pair. chosen_rewards, rejected_rewards: [P], beta times the
    log-ratio of policy and reference, without gradient. logps: [S], the sequences' log-probs. loss, losses and logps
    are differentiable. pairs: [P, 2] as given, None for the default (first half chosen, second half rejected).
    """

    loss: Any
    losses: Any
    chosen_rewards: Any
    rejected_rewards: Any
    logps: Any
    pairs: Any = None

    def metrics(self) -> dict[str, float]:
        """Means over the pairs, under TRL's names; tensors reach the host in one transfer.

        rewards/accuracies counts the pairs whose chosen reward is strictly larger.
        """
        n_pairs = self.losses.shape[0]
        chosen, rejected = self.chosen_rewards, self.rejected_rewards
        if self.pairs is None:
            chosen_logps, rejected_logps = self.logps[:n_pairs], self.logps[n_pairs:]
        else:
            # as int64: a uint8 tensor as index would be a mask
            pairs = self.pairs.long() if hasattr(self.pairs, "long") else self.pairs
            chosen_logps, rejected_logps = self.logps[pairs[:, 0]], self.logps[pairs[:, 1]]
        means = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": 1.0 * (chosen > rejected).sum() / n_pairs,
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": chosen_logps.mean(),
            "logps/rejected": rejected_logps.mean(),
        }
        if hasattr(self.losses, "detach"):
            import torch

            values = torch.stack([mean.detach().to(self.losses.dtype) for mean in means.values()]).tolist()
        else:
            values = [float(mean) for mean in means.values()]
        return dict(zip(means, values, strict=True))
