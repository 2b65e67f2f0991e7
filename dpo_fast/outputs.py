"""What the functions of every level return, for torch tensors and NumPy arrays alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # NumPy's functions, whose results are not typed, put arrays in the same places
    from torch import Tensor


class TokenOutput(NamedTuple):
    """Statistics of each token, in the shape of the targets; None where not asked for, 0 (False) for ignored tokens.

    logps: log p of the target. entropy: -sum_v p_v log p_v, in nats. mean_logits: mean over the vocabulary of the
    (scaled, capped) logits. is_top1: whether the target is the largest logit, ties going to the first index.
    log_sum_sq_probs: log sum_v p_v^2. lse: log sum_v exp z_v of the (scaled, capped) logits z. logps, entropy and lse
    are differentiable. skipped: as in DPOOutput.
    """

    logps: Any = None
    entropy: Any = None
    mean_logits: Any = None
    is_top1: Any = None
    log_sum_sq_probs: Any = None
    lse: Any = None
    skipped: Any = None


class DPOOutput(NamedTuple):
    """A preference loss and what it was made of.

    loss: by reduction, [] or [P]. losses: [P], one per pair (per sequence for losses of single completions).
    chosen_rewards, rejected_rewards: [P], beta times the log-ratio of policy and reference, without gradient; NaN for a
    side that is not there, 0 for a pair of weight 0. logps: [S], the sequences' log-probs. loss, losses and logps are
    differentiable. pairs: [P, 2] in use, None for the default (first half chosen, second half rejected), -1 for a side
    that is not there (`unpaired`: there are such). tokens: the statistics of tokens that were asked for; token_sums:
    their sums over the tokens of each sequence that count, and the number of these as "lengths", [S] each.
    pair_weights: [P] as given. skipped: [], of a head with `grad_tolerance` and gradients: the share of the gradients'
    mass that the last backward pass left out, sum_n |g_n| m_n / sum_n |g_n|, NaN before it; None otherwise.
    """

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    logps: Tensor
    pairs: Any = None
    unpaired: bool = False
    tokens: TokenOutput | None = None
    token_sums: dict[str, Tensor] | None = None
    pair_weights: Any = None
    skipped: Any = None

    def _side(self, k: int, values: Any) -> Any:
        """[S] -> those of the chosen (0) or rejected (1) sequences, in the order of the pairs; 0 for absent sides and
        pairs of weight 0."""
        n_pairs = self.losses.shape[0]
        if self.pairs is None:
            found = values[k * n_pairs : (k + 1) * n_pairs]
        else:
            # as int64: a uint8 tensor as index would be a mask
            pairs = self.pairs.long() if hasattr(self.pairs, "long") else self.pairs
            found = values[pairs[:, k]]
        there = self._there(k)
        if there is not None:
            found = found + 0  # a copy
            found[~there] = 0
        return found

    def _there(self, k: int) -> Any:
        """[P]: which pairs have a side and a weight other than 0; None: all."""
        there = self.pairs[:, k] >= 0 if self.unpaired else None
        if self.pair_weights is None:
            return there
        live = self.pair_weights != 0
        return live if there is None else there & live

    def _live_tokens(self, values: Any) -> Any:
        """[S] tensor -> 0 for sequences in no pair of a weight other than 0; NumPy's losses have no tokens."""
        if self.pairs is None and self.pair_weights is None:
            return values
        from dpo_fast._torch.sequences import live_sequences

        live = live_sequences(values.shape[0], self.pairs, self.pair_weights)
        return values if live is None else values.where(live, values.new_zeros(()))

    def _sums(self) -> dict[str, tuple[Any, Any]]:
        """The metrics as sums, and what they are divided by to be means."""
        found: dict[str, tuple[Any, Any]] = {}
        for k, name in enumerate(("chosen", "rejected")):
            rewards, there = (self.chosen_rewards, self.rejected_rewards)[k], self._there(k)
            n = self.losses.shape[0] if there is None else there.sum()
            if self.unpaired:
                rewards = rewards + 0  # a copy
                rewards[~there] = 0  # was NaN
            found[f"rewards/{name}"] = rewards.sum(), n
            found[f"logps/{name}"] = self._side(k, self.logps).sum(), n
        if not self.unpaired:
            margins = self.chosen_rewards - self.rejected_rewards
            found["rewards/margins"] = margins.sum(), n
            found["rewards/accuracies"] = (self.chosen_rewards > self.rejected_rewards).sum(), n
        sums = self.token_sums or {}
        for k, name in enumerate(("chosen", "rejected")):
            if "mean_logits" in sums:
                n_tokens = self._side(k, sums["lengths"]).sum()
                found[f"logits/{name}"] = self._side(k, sums["mean_logits"]).sum(), n_tokens
        if "entropy" in sums:
            found["entropy"] = self._live_tokens(sums["entropy"]).sum(), self._live_tokens(sums["lengths"]).sum()
        if "is_top1" in sums:
            found["mean_token_accuracy"] = self._side(0, sums["is_top1"]).sum(), self._side(0, sums["lengths"]).sum()
        return found

    def metrics(self) -> dict[str, float]:
        """Means under TRL's names; tensors reach the host in one transfer.

        rewards/* and logps/* are means over the pairs, accuracies the share of pairs whose chosen reward is strictly
        larger (absent for losses of single completions, as are the means over a side that is not there). With the
        statistics of tokens asked for: logits/chosen and logits/rejected, means of mean_logits over the tokens of these
        completions; entropy, in nats, over all tokens that count; mean_token_accuracy, the share of the chosen
        completions' tokens that are the largest logit.
        """
        sums = self._sums()
        parts = [part for pair in sums.values() for part in pair]
        if hasattr(self.losses, "detach"):
            import torch

            like = self.losses.detach()
            parts = [part.detach().to(like) if hasattr(part, "detach") else like.new_full((), part) for part in parts]
            parts = torch.stack(parts).tolist()
        totals = dict(zip(sums, zip(map(float, parts[::2]), map(float, parts[1::2]), strict=True), strict=True))
        # as TRL: 0 where no token counts; nothing for a side that is not there
        means = {
            name: total / n if n else 0.0
            for name, (total, n) in totals.items()
            if n or not name.startswith(("rewards/", "logps/"))
        }
        if self.unpaired and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means
