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

    loss: by reduction, [] or [P]. losses: [P], one per pair (per sequence for losses of single completions).
    chosen_rewards, rejected_rewards: [P], beta times the log-ratio of policy and reference, without gradient; NaN for a
    side that is not there. logps: [S], the sequences' log-probs. loss, losses and logps are differentiable. pairs:
    [P, 2] in use, None for the default (first half chosen, second half rejected), -1 for a side that is not there
    (`unpaired`: there are such). tokens: the statistics of tokens that were asked for; token_sums: their sums over the
    tokens of each sequence that count, and the number of these as "lengths", [S] each.
    """

    loss: Any
    losses: Any
    chosen_rewards: Any
    rejected_rewards: Any
    logps: Any
    pairs: Any = None
    unpaired: bool = False
    tokens: TokenOutput | None = None
    token_sums: dict[str, Any] | None = None

    def _side(self, k: int, values: Any) -> Any:
        """[S] -> those of the chosen (0) or rejected (1) sequences, in the order of the pairs, 0 for absent ones."""
        n_pairs = self.losses.shape[0]
        if self.pairs is None:
            return values[k * n_pairs : (k + 1) * n_pairs]
        # as int64: a uint8 tensor as index would be a mask
        pairs = self.pairs.long() if hasattr(self.pairs, "long") else self.pairs
        found = values[pairs[:, k]]
        return found * (pairs[:, k] >= 0) if self.unpaired else found

    def _mean(self, k: int, values: Any) -> Any:
        """Mean over the pairs of a side's [P] values."""
        if not self.unpaired:
            return values.mean()
        there = self.pairs[:, k] >= 0
        values = values + 0  # a copy
        values[~there] = 0  # was NaN
        return values.sum() / there.sum()

    def _means(self) -> dict[str, Any]:
        chosen, rejected = self.chosen_rewards, self.rejected_rewards
        means = {"rewards/chosen": self._mean(0, chosen), "rewards/rejected": self._mean(1, rejected)}
        if not self.unpaired:
            n_better = (chosen > rejected).sum()
            n_better = n_better.to(chosen.dtype) if hasattr(n_better, "to") else n_better
            means["rewards/accuracies"] = n_better / chosen.shape[0]
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        for k, name in enumerate(("chosen", "rejected")):
            means[f"logps/{name}"] = self._mean(k, self._side(k, self.logps))
        sums = self.token_sums
        if sums is None:
            return means
        if "mean_logits" in sums:
            for k, name in enumerate(("chosen", "rejected")):
                means[f"logits/{name}"] = (
                    self._side(k, sums["mean_logits"]).sum() / self._side(k, sums["lengths"]).sum()
                )
        if "entropy" in sums:
            means["entropy"] = sums["entropy"].sum() / sums["lengths"].sum()
        if "is_top1" in sums:
            means["mean_token_accuracy"] = self._side(0, sums["is_top1"]).sum() / self._side(0, sums["lengths"]).sum()
        return means

    def metrics(self) -> dict[str, float]:
        """Means under TRL's names; tensors reach the host in one transfer.

        rewards/* and logps/* are means over the pairs, accuracies the share of pairs whose chosen reward is strictly
        larger (absent for losses of single completions). With the statistics of tokens asked for: logits/chosen and
        logits/rejected, means of mean_logits over the tokens of these completions; entropy, in nats, over all tokens
        that count; mean_token_accuracy, the share of the chosen completions' tokens that are the largest logit.
        """
        means = self._means()
        if hasattr(self.losses, "detach"):
            import torch

            values = torch.stack([mean.detach().to(self.losses.dtype) for mean in means.values()]).tolist()
        else:
            values = [float(mean) for mean in means.values()]
        return dict(zip(means, values, strict=True))
