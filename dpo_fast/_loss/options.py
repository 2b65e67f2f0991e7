"""Which preference loss, with which parameters: the checks that the torch and the NumPy functions share.

A loss is a weighted sum of terms. Most are sums over pairs: their values and derivatives are in
csrc/preference_loss.h, and their names, flags and parameters come from its tables. The others couple the pairs of a
batch (sorting) or are a function given by the user: those are in coupled.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypedDict

from dpo_fast import _cpu
from dpo_fast._checks import check_reduction, number, refuse_unknown, truth


class LossFlags:
    """Bits for what a loss reads and asks for (enum LossFlags in csrc/preference_loss.h)."""

    DIVERGENCE = 1
    SMOOTHING = 2
    SMOOTHING_OVER_0 = 4
    SMOOTHING_UNDER_HALF = 8
    BETA_OVER_0 = 16
    LENGTHS = 32
    SUMS = 64
    AVERAGES = 128
    REFERENCE_FREE = 256
    UNPAIRED = 512
    TAU = 1024
    GAMMA = 2048
    BASELINE = 4096
    SIDE_WEIGHTS = 8192
    MARGIN = 16384


PARAMETER_NAMES = _cpu.loss_parameters()
PAIR_LOSSES = {name: (number, flags) for number, (name, flags) in enumerate(_cpu.loss_types())}
COUPLED_LOSSES = {"aot": LossFlags.SMOOTHING, "aot_unpaired": LossFlags.SMOOTHING}
LOSS_TYPES = (*PAIR_LOSSES, *COUPLED_LOSSES)

# By number, as enum Divergence has them.
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

MAX_TERMS = 8

LossFunction = Callable[..., Any]
LossType = str | LossFunction | Sequence[str | LossFunction]


class LossOptions(NamedTuple):
    """The terms that are sums over pairs, as the kernels and operators take them."""

    types: tuple[int, ...]
    weights: tuple[float, ...]
    parameters: tuple[float, ...]  # in the order of DPO_FAST_LOSS_PARAMETERS
    divergence: int
    average: bool  # the log-probs are averages over tokens


class Parameter(NamedTuple):
    """A number that some losses read: its default, and the flag of those that do."""

    default: float
    flag: int


# The parameters of DPO_FAST_LOSS_PARAMETERS that are keywords of their own; the others are set by `choose_loss`.
PARAMETERS = {
    "discopop_tau": Parameter(0.05, LossFlags.TAU),
    "simpo_gamma": Parameter(0.5, LossFlags.GAMMA),
    "desirable_weight": Parameter(1.0, LossFlags.SIDE_WEIGHTS),
    "undesirable_weight": Parameter(1.0, LossFlags.SIDE_WEIGHTS),
    "dpop_lambda": Parameter(0.0, LossFlags.MARGIN),
    "length_penalty": Parameter(0.0, LossFlags.MARGIN),
}


class PairNumbers(NamedTuple):
    """Numbers of each pair, [P] or None, in the order of DPO_FAST_PAIR_NUMBERS."""

    pair_weights: Any = None
    pair_beta: Any = None
    margin: Any = None


# Of a loss that has none: asked for by identity.
NO_NUMBERS = PairNumbers()

# The numbers of pairs that are keywords of a loss, with the flag of the losses that read them.
PAIR_KEYWORDS = {"margin": LossFlags.MARGIN}


class Given(NamedTuple):
    """Which arrays a loss is given, for checks that look at nothing else of them."""

    reference: bool = False
    baseline: bool = False
    token_weights: bool = False
    numbers: tuple[bool, ...] = (False,) * len(PairNumbers._fields)

    @classmethod
    def of(cls, reference: Any, baseline: Any, token_weights: Any, numbers: PairNumbers) -> Given:
        """From the arrays themselves, which may be None."""
        given = _NOT_GIVEN if numbers is NO_NUMBERS else tuple([array is not None for array in numbers])
        return cls(reference is not None, baseline is not None, token_weights is not None, given)


_NOT_GIVEN = (False,) * len(PairNumbers._fields)

# In place of an ld_alpha of 0 where tokens of weight 0 are still looked at: a weight of 0 would mark them as ignored.
TINY_WEIGHT = 1e-300


class Loss(NamedTuple):
    """A checked loss."""

    options: LossOptions
    beta: float
    label_smoothing: float
    z_loss_weight: float
    coupled: tuple[tuple[str | LossFunction, float], ...]  # terms of coupled.py, with their weights
    unpaired: bool  # completions are alone, desirable or not
    reads_lengths: bool
    divisor: float  # of the sum over pairs; 0: their number
    num_pairs: float | None  # the sum is divided by this after that

    def check_lengths(self, given: bool) -> None:
        """Raises ValueError where a term reads lengths that are not there."""
        if self.reads_lengths and not given:
            raise ValueError("this loss needs lengths, the number of tokens of each sequence")

    def check_completions(self, *, pairs: bool = False, desirable: bool = False, ld_alpha: bool = False) -> None:
        """Raises ValueError where something is given that completions in pairs, or alone, do not have."""
        if self.unpaired and pairs:
            raise ValueError("losses of single completions ('kto', 'bco') take `desirable` [S], not pairs")
        if self.unpaired and ld_alpha:
            raise ValueError("ld_alpha compares the completions of pairs: losses of single completions have none")
        if desirable and not self.unpaired:
            raise ValueError("desirable is for losses of single completions ('kto', 'bco'); name pairs by `pairs`")


class LossKeywords(TypedDict, total=False):
    """Options of a loss beside its name, beta and label_smoothing, each read by some of the losses only.

    loss_weights: one number per loss type, by default 1.
    f_divergence: "reverse_kl" (default), "forward_kl", "js_divergence" or "alpha_divergence" in place of log-ratios
        (f-DPO, Wang et al. 2023, arXiv:2309.16240); f_alpha_divergence_coef: alpha of the last, by default 0.5.
    discopop_tau: temperature of "discopop", by default 0.05.
    simpo_gamma: target margin of "simpo", by default 0.5.
    desirable_weight, undesirable_weight: of "kto", by default 1.
    dpop_lambda: weight, at least 0, of the penalty on a chosen completion that falls below the reference's
        log-probability: beta (r - dpop_lambda max(0, -ratio of the chosen)) in place of beta r (DPO-Positive, Pal et
        al. 2024, arXiv:2402.13228, eq. 3).
    length_penalty: alpha (n_chosen - n_rejected) is added to beta r, with n the numbers of tokens (R-DPO, Park et al.
        2024, arXiv:2403.19159).
    margin: [P], subtracted from beta r (ODPO, Amini et al. 2024, arXiv:2402.10571); no gradient.
    z_loss_weight: adds this times the mean, over the tokens that count of the sequences in the pairs, of the squared
        log-sum-exp of the logits; not from log-probs alone, nor with reduction "none".
    num_pairs: the sum of the losses is divided by this for reduction "mean", instead of the number of pairs here: the
        pairs of all microbatches, over the number of data-parallel ranks that average their gradients. There may then
        be no pair here.
    num_chosen_tokens: the same for the tokens of "sft", needed beside num_pairs; the tokens of a chosen completion
        count once for each of its pairs.
    """

    loss_weights: Sequence[float] | None
    f_divergence: str
    f_alpha_divergence_coef: float | None
    discopop_tau: float | None
    simpo_gamma: float | None
    desirable_weight: float | None
    undesirable_weight: float | None
    dpop_lambda: float | None
    length_penalty: float | None
    margin: Any
    z_loss_weight: float | None
    num_pairs: float | None
    num_chosen_tokens: float | None


def split_pair_numbers(options: dict[str, Any], pair_weights: Any, beta: Any) -> PairNumbers:
    """Takes the numbers of pairs out of a loss's keywords; beta: None where it is one number for all."""
    others = [options.pop(name, None) for name in PAIR_KEYWORDS] if options else []
    if pair_weights is None and beta is None and all(array is None for array in others):
        return NO_NUMBERS
    return PairNumbers(pair_weights, beta, *others)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join("your own function" if callable(name) else repr(name) for name in names)


def _readers(flag: int) -> str:
    return _listed(name for name, (_, flags) in PAIR_LOSSES.items() if flags & flag)


def _terms(
    loss_type: LossType, loss_weights: Sequence[float] | None
) -> tuple[list[str | LossFunction], list[float], list[int]]:
    single = isinstance(loss_type, str) or callable(loss_type)
    if not single and not isinstance(loss_type, Sequence):
        raise ValueError(f"loss_type must be one of {_listed(LOSS_TYPES)}, a function or a list, found {loss_type!r}")
    types: list[Any] = [loss_type] if single else list(loss_type)  # type: ignore[arg-type]
    if not 0 < len(types) <= MAX_TERMS:
        raise ValueError(f"loss_type must name 1 to {MAX_TERMS} losses, found {len(types)}")
    flags = []
    for name in types:
        if callable(name):
            flags.append(0)
        elif isinstance(name, str) and name in PAIR_LOSSES:
            flags.append(PAIR_LOSSES[name][1])
        elif isinstance(name, str) and name in COUPLED_LOSSES:
            flags.append(COUPLED_LOSSES[name])
        else:
            raise ValueError(f"loss_type must be one of {_listed(LOSS_TYPES)}, or a function, found {name!r}")
    if loss_weights is not None and not isinstance(loss_weights, Sequence):
        raise ValueError(f"loss_weights must be a list of {len(types)} numbers, found {loss_weights!r}")
    weights = [1.0] * len(types) if loss_weights is None else [number("loss_weights", w) for w in loss_weights]
    if len(weights) != len(types):
        raise ValueError(f"loss_weights must have one number per loss type, {len(types)}, found {len(weights)}")
    return types, weights, flags


def _parameter(name: str, value: float | None, flags: int, found: Sequence[Any]) -> float:
    """The value of a parameter that only some losses read; given where none reads it, it is refused."""
    default, flag = PARAMETERS[name]
    if value is None:
        return default
    if not flag & flags:
        raise ValueError(f"{name} is read by {_readers(flag)} only, found loss_type {_listed(found)}")
    return number(name, value)


def _check_smoothing(label_smoothing: float, flags: int, found: Sequence[Any]) -> None:
    if label_smoothing and not flags & LossFlags.SMOOTHING:
        readers = [name for name, (_, other) in PAIR_LOSSES.items() if other & LossFlags.SMOOTHING]
        readers += list(COUPLED_LOSSES)
        raise ValueError(
            f"label_smoothing is read by {_listed(readers)} only, found {label_smoothing} with loss_type "
            f"{_listed(found)}"
        )
    if flags & LossFlags.SMOOTHING_OVER_0 and label_smoothing == 0:
        raise ValueError("'exo_pair' needs label_smoothing in (0, 0.5] (its paper recommends 1e-3), found 0")
    if flags & LossFlags.SMOOTHING_UNDER_HALF and label_smoothing == 0.5:
        raise ValueError("'robust' needs label_smoothing in [0, 0.5), found 0.5")


def _divergence(f_divergence: str, coefficient: float | None, types: Sequence[Any], each: Sequence[int]) -> int:
    if f_divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence must be one of {_listed(DIVERGENCES)}, found {f_divergence!r}")
    if coefficient is not None and f_divergence != "alpha_divergence":
        raise ValueError(f"f_alpha_divergence_coef is read by 'alpha_divergence' only, found {f_divergence!r}")
    if f_divergence != "reverse_kl":
        able = [name for name, (_, flags) in PAIR_LOSSES.items() if flags & LossFlags.DIVERGENCE]
        wrong = [t for t, flags in zip(types, each, strict=True) if not flags & LossFlags.DIVERGENCE and t != "sft"]
        if wrong or all(t == "sft" for t in types):
            raise ValueError(
                f"f_divergence {f_divergence!r} is for {_listed(able)} (beside which 'sft' may stand), found "
                f"loss_type {_listed(types)}"
            )
    return DIVERGENCES.index(f_divergence)


def _check_average(average: bool | None, types: Sequence[Any], each: Sequence[int]) -> bool:
    """Whether log-probs are averaged over tokens: as asked, or as the losses are defined."""
    averages = [t for t, flags in zip(types, each, strict=True) if flags & LossFlags.AVERAGES]
    sums = [t for t, flags in zip(types, each, strict=True) if flags & LossFlags.SUMS]
    if averages and sums:
        raise ValueError(f"{_listed(averages)} need average=True, {_listed(sums)} need average=False")
    average = None if average is None else truth("average", average)
    if averages and average is False:
        raise ValueError(f"{_listed(averages)} are defined on averages over tokens: average must be True")
    if sums and average:
        raise ValueError(f"{_listed(sums)} are defined on sums over tokens: average must be False")
    return bool(averages) if average is None else average


def _check_given(given: Given, types: Sequence[Any], flags: int, divergence: int, average: bool) -> None:
    """Raises ValueError where an array is given that the losses do not read, or is missing."""
    if given.reference and flags & LossFlags.REFERENCE_FREE:
        raise ValueError(f"{_listed(types)} have no reference: ref_* must be None")
    if given.baseline != bool(flags & LossFlags.BASELINE):
        raise ValueError(f"baseline goes with 'kto' and 'bco', which need it, found loss_type {_listed(types)}")
    sorting = any(t in COUPLED_LOSSES for t in types if isinstance(t, str))
    for name, is_given in zip(PairNumbers._fields, given.numbers, strict=True):
        if is_given and sorting:
            raise ValueError(
                f"{name.removeprefix('pair_beta') or 'beta of each pair'} is for losses of pairs, which "
                f"{_listed(types)} do not have one by one"
            )
        if is_given and name in PAIR_KEYWORDS and not flags & PAIR_KEYWORDS[name]:
            raise ValueError(f"{name} is read by {_readers(PAIR_KEYWORDS[name])} only, found {_listed(types)}")
    if divergence and not given.reference:
        raise ValueError(f"f_divergence {DIVERGENCES[divergence]!r} is from a reference: ref_* must be given")
    if "sft" in types and average and given.token_weights:
        raise ValueError("'sft' beside averages over tokens takes no token_weights")


def choose_loss(
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    average: bool | None = None,
    wpo: bool = False,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
    given: Given | None = None,
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
    z_loss_weight: float | None = None,
    num_pairs: float | None = None,
    num_chosen_tokens: float | None = None,
    **parameters: Any,
) -> Loss:
    """Checks a loss's name and parameters. beta: any positive number where each pair has its own.

    Raises:
        ValueError: an unknown name, a parameter out of its range, or one that none of the losses reads.
        TypeError: an argument that is none of these, or no number where one belongs.
    """
    refuse_unknown("the loss", parameters.keys() - PARAMETERS.keys(), LossKeywords.__annotations__)
    check_reduction(reduction)
    types, weights, each = _terms(loss_type, loss_weights)
    given = given or Given()
    flags = 0
    for other in each:
        flags |= other
    beta = number("beta", beta)
    if flags & LossFlags.BETA_OVER_0 and beta <= 0:
        raise ValueError(f"{_listed(types)} divide by beta: it must be positive, found {beta}")
    label_smoothing = number("label_smoothing", label_smoothing)
    _check_smoothing(label_smoothing, flags, types)
    average = _check_average(average, types, each)
    divergence = _divergence(f_divergence, f_alpha_divergence_coef, types, each)
    _check_given(given, types, flags, divergence, average)
    wpo = truth("wpo", wpo)
    if flags & LossFlags.UNPAIRED and (not all(other & LossFlags.UNPAIRED for other in each) or wpo):
        raise ValueError(
            f"losses of unpaired completions take no others beside them and no wpo, found {_listed(types)}"
        )
    is_coupled = [callable(t) or t in COUPLED_LOSSES for t in types]
    if wpo and any(is_coupled):
        raise ValueError(f"wpo weighs the losses of the kernels, not those of {_listed(types)}")
    z_loss_weight = 0.0 if z_loss_weight is None else number("z_loss_weight", z_loss_weight)
    if z_loss_weight and reduction == "none":
        raise ValueError("z_loss_weight adds one number to the reduced loss: reduction must not be 'none'")
    divisor, total_pairs, tokens_per_pair = _normalisation(reduction, num_pairs, num_chosen_tokens, "sft" in types)
    values = {name: _parameter(name, parameters.get(name), flags, types) for name in PARAMETERS}
    if divergence and values["dpop_lambda"]:
        raise ValueError(
            f"dpop_lambda is defined on log-ratios: f_divergence must be 'reverse_kl', found {f_divergence!r}"
        )
    values |= {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "alpha": 0.5 if f_alpha_divergence_coef is None else number("f_alpha_divergence_coef", f_alpha_divergence_coef),
        "tokens_per_pair": tokens_per_pair,
    }
    options = LossOptions(
        types=tuple(PAIR_LOSSES[t][0] for t, c in zip(types, is_coupled, strict=True) if not c),  # type: ignore[index]
        weights=tuple(w for w, c in zip(weights, is_coupled, strict=True) if not c),
        parameters=tuple([values[name] for name in PARAMETER_NAMES]),
        divergence=divergence,
        average=average,
    )
    coupled = tuple((t, w) for t, w, c in zip(types, weights, is_coupled, strict=True) if c)
    unpaired = bool(flags & LossFlags.UNPAIRED)
    reads_lengths = bool(flags & LossFlags.LENGTHS) or values["length_penalty"] != 0
    return Loss(options, beta, label_smoothing, z_loss_weight, coupled, unpaired, reads_lengths, divisor, total_pairs)


def tokens_per_pair(options: LossOptions, count: Callable[[], float]) -> LossOptions:
    """The options with the chosen tokens per pair that "sft" is divided by: as given, else counted by `count`."""
    i = PARAMETER_NAMES.index("tokens_per_pair")
    if options.parameters[i] or not any(flags & LossFlags.LENGTHS for flags in flags_of(options)):
        return options
    return options._replace(parameters=(*options.parameters[:i], count(), *options.parameters[i + 1 :]))


def flags_of(options: LossOptions) -> list[int]:
    """The flags of each term."""
    every = [flags for _, flags in PAIR_LOSSES.values()]
    return [every[number] for number in options.types]


def _normalisation(
    reduction: str, num_pairs: float | None, num_chosen_tokens: float | None, has_sft: bool
) -> tuple[float, float | None, float]:
    """Divisor of the sum over pairs (0: their number), num_pairs, and chosen tokens per pair (0: counted).

    The division by num_pairs, which changes from step to step, stays outside the operators: a compiled graph takes
    their options as constants.
    """
    if num_pairs is None:
        if num_chosen_tokens is not None:
            raise ValueError("num_chosen_tokens goes with num_pairs")
        return (0.0 if reduction == "mean" else 1.0), None, 0.0
    if reduction != "mean":
        raise ValueError(f"num_pairs is for reduction 'mean', found {reduction!r}")
    if has_sft != (num_chosen_tokens is not None):
        raise ValueError("with num_pairs, 'sft' needs num_chosen_tokens, and no other loss reads it")
    pairs = number("num_pairs", num_pairs)
    tokens = 0.0 if num_chosen_tokens is None else number("num_chosen_tokens", num_chosen_tokens) / pairs
    return 1.0, num_pairs, tokens
