"""Checks that the torch and the NumPy functions share: numbers, options, shapes and layouts, without either library.

Every message names the argument, what was found and what was expected.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypedDict


class Statistic(NamedTuple):
    """A statistic of each token, beside its log-probability."""

    name: str
    is_truth: bool = False  # bool; else the type of log-probs
    per_target: bool = False  # one for each target of a row; else one for each row
    differentiable: bool = False


# In the order of DPO_FAST_STATISTICS (csrc/row_math.h).
STATISTICS = (
    Statistic("entropy", differentiable=True),
    Statistic("mean_logits"),
    Statistic("is_top1", is_truth=True, per_target=True),
    Statistic("log_sum_sq_probs"),
    Statistic("lse", differentiable=True),
)
_STATISTIC_NAMES = tuple(statistic.name for statistic in STATISTICS)
TOKEN_OUTPUTS = ("logps", *_STATISTIC_NAMES)
# A set of statistics is a number: the sum of these bits.
STATISTIC_BITS = {statistic.name: 1 << i for i, statistic in enumerate(STATISTICS)}

REDUCTIONS = ("mean", "sum", "none")

# The ignore_index by which no target is ignored (kIgnoreNothing in csrc/cpu/rows.h).
IGNORE_NOTHING = -(2**63)


# --- numbers ----------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Where a number may lie."""

    low: float = -math.inf
    high: float = math.inf
    with_low: bool = False
    with_high: bool = False

    def holds(self, x: float) -> bool:
        """Whether x, which may be NaN, is inside."""
        return (self.low < x or (self.with_low and x == self.low)) and (
            x < self.high or (self.with_high and x == self.high)
        )

    def __str__(self) -> str:
        if self == FINITE:
            return "finite"
        if self == POSITIVE:
            return "positive and finite"
        if self == NOT_NEGATIVE:
            return "at least 0 and finite"
        return f"in {'[' if self.with_low else '('}{self.low:g}, {self.high:g}{']' if self.with_high else ')'}"


FINITE, POSITIVE, NOT_NEGATIVE = Range(), Range(0), Range(0, with_low=True)

# Every option that is one plain number.
NUMBERS = {
    "temperature": POSITIVE,
    "logit_scale": POSITIVE,
    "softcap": POSITIVE,
    "beta": NOT_NEGATIVE,
    "label_smoothing": Range(0, 0.5, True, True),
    "ld_alpha": Range(0, 1, True, True),
    "baseline": FINITE,
    "loss_weights": FINITE,
    "f_alpha_divergence_coef": FINITE,
    "discopop_tau": POSITIVE,
    "simpo_gamma": FINITE,
    "desirable_weight": FINITE,
    "undesirable_weight": FINITE,
    "dpop_lambda": NOT_NEGATIVE,
    "length_penalty": NOT_NEGATIVE,
    "z_loss_weight": NOT_NEGATIVE,
    "num_pairs": POSITIVE,
    "num_chosen_tokens": POSITIVE,
    "lora scaling": FINITE,
    "grad_tolerance": Range(0, 1, with_low=True),
}


def number(name: str, value: Any) -> float:
    """One plain number in its range.

    Raises:
        TypeError: not a number (None, text, an array, a tensor, a truth value).
        ValueError: outside its range, or NaN.
    """
    kind = type(value)
    if (kind is not float and kind is not int) and (
        not isinstance(value, numbers.Real) or isinstance(value, bool)  # NumPy's scalars are real numbers
    ):
        raise TypeError(f"{name} must be a number, found {value!r} of type {kind.__name__}")
    if not NUMBERS[name].holds(value):
        raise ValueError(f"{name} must be {NUMBERS[name]}, found {value}")
    return float(value)


def grad_tolerances(value: Any) -> tuple[float, float]:
    """The tolerances of `grad_tolerance`, by way of the hidden states and of the head's rows: one number or a pair.

    Raises:
        TypeError, ValueError: as `number`, and for sequences other than pairs.
    """
    if not isinstance(value, (tuple, list)):
        return (number("grad_tolerance", value),) * 2
    if len(value) != 2:
        raise ValueError(f"grad_tolerance must be one number or a pair (hidden, weight), found {value!r}")
    return number("grad_tolerance", value[0]), number("grad_tolerance", value[1])


def integer(name: str, value: Any) -> int:
    """One whole number, as int.

    Raises:
        TypeError: anything else.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, found {value!r} of type {type(value).__name__}")
    return operator.index(value)


def truth(name: str, value: Any) -> bool:
    """True or False; also as 1 and 0.

    Raises:
        TypeError: anything else.
    """
    if value is True or value is False:
        return value
    if type(value).__name__ not in ("bool", "bool_", "int") or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, found {value!r}")
    return bool(value)


# --- options ----------------------------------------------------------------------------------------------------------


class LogitOptions(NamedTuple):
    """Which targets and columns count, and z = softcap * tanh(x * logit_scale / softcap) / temperature."""

    ignore_index: int = -100
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: no tanh
    valid_vocab: int = 0  # columns from here on are padding; 0: none is


class LogitKeywords(TypedDict, total=False):
    """How logits are read; options of every function that sees logits or a head.

    ignore_index: rows with this target are not read, and give 0 and no gradient; by default -100.
    temperature, logit_scale, softcap: z = softcap * tanh(logits * logit_scale / softcap) / temperature, without the
        tanh when softcap is None (the default); by default 1.
    valid_vocab: columns from this one on are padding of the vocabulary: they count as minus infinity, are not read, and
        get gradient 0; by default all columns are valid.
    """

    ignore_index: int
    temperature: float
    logit_scale: float
    softcap: float | None
    valid_vocab: int | None


def logit_options(
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> LogitOptions:
    """Checks the options of LogitKeywords; whether they fit the columns is for `check_options` to say."""
    return LogitOptions(
        integer("ignore_index", ignore_index),
        number("temperature", temperature),
        number("logit_scale", logit_scale),
        0.0 if softcap is None else number("softcap", softcap),
        0 if valid_vocab is None else positive_integer("valid_vocab", valid_vocab),
    )


def positive_integer(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    found = integer(name, value)
    if found < 1:
        raise ValueError(f"{name} must be at least 1, found {found}")
    return found


def refuse_unknown(function: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for keywords that a function does not have."""
    names = ", ".join(map(repr, unknown))
    if names:
        raise TypeError(f"{function} got an unexpected keyword argument {names}; options: {', '.join(known)}")


def split_logit_keywords(options: Any) -> LogitOptions:
    """Takes the options of LogitKeywords out of a function's keywords, checked."""
    if not options:
        return DEFAULT_LOGIT_OPTIONS
    return logit_options(**{name: options.pop(name) for name in _LOGIT_KEYWORDS if name in options})


_LOGIT_KEYWORDS = tuple(LogitKeywords.__annotations__)
DEFAULT_LOGIT_OPTIONS = LogitOptions()


def only_logit_keywords(function: str, options: Any) -> LogitOptions:
    """The options of a function that has no others."""
    found = split_logit_keywords(options)
    refuse_unknown(function, options, _LOGIT_KEYWORDS)
    return found


def check_options(options: LogitOptions, width: int) -> None:
    """Raises ValueError where the options do not fit the number of columns."""
    if options.valid_vocab > width:
        raise ValueError(f"valid_vocab must be at most the number of columns, {width}, found {options.valid_vocab}")


def check_reduction(reduction: str) -> None:
    """Checks the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, found {reduction!r}")


@functools.lru_cache(maxsize=64)
def statistic_bits(outputs: tuple[str, ...]) -> int:
    """The statistics among `outputs`, which are names of TOKEN_OUTPUTS, as a sum of STATISTIC_BITS."""
    for name in outputs:
        if name not in TOKEN_OUTPUTS:
            raise ValueError(f"outputs must be among {', '.join(map(repr, TOKEN_OUTPUTS))}, found {name!r}")
    return sum(bit for name, bit in STATISTIC_BITS.items() if name in outputs)


def wanted_statistics(outputs: Sequence[str]) -> int:
    """`statistic_bits` of any sequence of names."""
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list, set, frozenset)):
        raise TypeError(
            f"outputs must be a list of names among {', '.join(map(repr, TOKEN_OUTPUTS))}, found {outputs!r}"
        )
    return statistic_bits(tuple(outputs))


@functools.lru_cache(maxsize=64)
def named_statistics(wanted: int) -> tuple[Statistic, ...]:
    """The statistics of a sum of STATISTIC_BITS, in order."""
    return tuple(statistic for statistic in STATISTICS if STATISTIC_BITS[statistic.name] & wanted)


def of_statistic(name: str, values: Sequence[Any]) -> Any:
    """The one of this name among the values of all statistics, None where there are none."""
    return values[_STATISTIC_NAMES.index(name)] if values else None


def only_statistic(name: str, value: Any) -> tuple[Any, ...]:
    """The values of all statistics where this one alone has one."""
    return tuple([value if each == name else None for each in _STATISTIC_NAMES])


def statistic(name: str, wanted: int, values: Sequence[Any]) -> Any:
    """The one of this name among the values of the statistics wanted, None where it is not."""
    bit = STATISTIC_BITS[name]
    return values[(wanted & (bit - 1)).bit_count()] if wanted & bit else None


def check_shape(name: str, found: Sequence[int], expected: Sequence[int], reason: str, like: Any = "") -> None:
    """Raises ValueError unless the shapes are equal; `reason` and `like` say where the expectation comes from."""
    if tuple(found) != tuple(expected):
        found, expected = tuple(found), tuple(expected)
        like = tuple(like) if like != "" else ""
        raise ValueError(f"{name} must have shape {expected} {reason}{like}, found {found}")


def is_integer_type(name: str) -> bool:
    """Whether a type's name is that of integers that fit int64."""
    return name.startswith(("int", "uint")) and name != "uint64"


def check_logits_shape(logits: Sequence[int], name: str = "logits") -> None:
    """Checks for [S, T, V] or [N, V]."""
    if len(logits) not in (2, 3):
        raise ValueError(f"{name} must have shape [S, T, V], or [N, V] when packed, found {tuple(logits)}")
    if logits[-1] < 1:
        raise ValueError(f"{name} must have at least one token in the vocabulary, found shape {tuple(logits)}")


def overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a strided array may share memory (as in an expanded one)."""
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def sequence_count(shape: Sequence[int], cu_seqlens: Sequence[int] | None, name: str = "logits") -> int:
    """The number of sequences of logits (or hidden states): the first dimension, or by cu_seqlens for packed rows."""
    last = "V" if name == "logits" else "H"
    if cu_seqlens is None:
        if len(shape) != 3:
            raise ValueError(
                f"packed {name} [N, {last}] need cu_seqlens [S + 1]; without it {name} must have shape [S, T, {last}], "
                f"found {tuple(shape)}"
            )
        return shape[0]
    if len(shape) == 3 and shape[0] != 1:
        raise ValueError(f"with cu_seqlens {name} must have shape [N, {last}] or [1, N, {last}], found {tuple(shape)}")
    if len(cu_seqlens) != 1 or cu_seqlens[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1], found {tuple(cu_seqlens)}")
    return cu_seqlens[0] - 1


def pair_count(n_seqs: int, pairs: Sequence[int] | None, may_be_none: bool = False) -> int:
    """The number of pairs: those given, or half the sequences. may_be_none: 0 is allowed."""
    if pairs is None:
        if n_seqs % 2:
            raise ValueError(
                f"without pairs the first half of the sequences is chosen and the second half rejected: their number "
                f"must be even, found {n_seqs}"
            )
        count = n_seqs // 2
    else:
        if len(pairs) != 2 or pairs[1] != 2:
            raise ValueError(f"pairs must have shape [P, 2] (chosen, rejected), found {tuple(pairs)}")
        count = pairs[0]
    if count == 0 and not may_be_none:
        raise ValueError(
            f"there are no pairs (sequences: {n_seqs}): the loss of nothing is not defined; for a microbatch without "
            "pairs give num_pairs"
        )
    return count
