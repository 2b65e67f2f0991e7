"""Everything that is timed, by level and name: dpo_fast's own ways, the peers, and the limits of the machine.

`build` returns a call that takes a copy of the input (logits, hidden states or log-probs) and returns a value and
gradients. What cannot be built here raises `AbsentError` with the reason, which the report repeats.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_fast
from benchmarks.common.formulas import FORWARD
from dpo_fast.bench import (
    BETA,
    IGNORE_INDEX,
    Case,
    compiled,
    forward_and_gradient,
    make_inputs,
    make_targets,
    naive_token_logps,
    plain_read,
    preference_of,
)

TOKENS, SEQUENCES, DPO, THREADS, HUGE_PAGES, VARYING, PREFERENCE, LINEAR = (
    "token_logps",
    "sequence_logps",
    "dpo_loss",
    "dpo_loss by threads",
    "dpo_loss with huge pages",
    "dpo_loss on varying shapes",
    "preference_loss",
    "linear_dpo_loss",
)

# grad_tolerance: its level, its works and their candidates
TOLERANCE = "grad_tolerance"
REAL_PRODUCTS, REAL_BACKWARD, FLAT_BACKWARD = "products, real tokens", "backward, real tokens", "backward, flat rows"
TWO_PRODUCTS, EXACT = "two dense products", "exact"
TOLERANCES = {"2^-8": 2.0**-8, "2^-10": 2.0**-10}

FAST = "dpo_fast"
INPLACE = "dpo_fast, in place"
PACKED = "dpo_fast, packed, in place"
EXTRAS = "dpo_fast, all statistics"
FUNCTIONS = (FAST, INPLACE, PACKED, EXTRAS)
ROW_KERNELS = "row kernels alone"
HALF = ", half ignored"
WEIGHTED = ", pairs and weights"
ONE_THREAD = ", 1 thread"

NAIVE = "naive torch"
COMPILE = "torch.compile"
TRL = "TRL selective_log_softmax"
TRL_TRITON = "TRL Triton kernel"
TRL_CHUNKED = "TRL chunked log-probs"
CROSS_ENTROPY = "torch linear_cross_entropy"
CHUNKED_CROSS_ENTROPY = "torch linear_cross_entropy, in chunks"
LIGER = "Liger fused linear DPO"
LOGITS_PEERS = (NAIVE, COMPILE, TRL, TRL_TRITON)
LINEAR_PEERS = (NAIVE, COMPILE, CROSS_ENTROPY, CHUNKED_CROSS_ENTROPY, TRL_CHUNKED, LIGER)

READ = "plain read"
COPY = "copy"
PRODUCTS = "three bare products"
LIMITS = (READ, COPY, PRODUCTS)

PACKAGES = ("trl", "transformers", "liger-kernel", "triton", "numpy", "pytest-benchmark")

Call = Callable[[Tensor], Any]


class AbsentError(Exception):
    """A peer that cannot run here, and why."""


class LevelInputs(NamedTuple):
    """The tensors of one case; `x` is what a call gets a copy of."""

    case: Case
    x: Tensor  # [S, T, V] logits, [S, T, H] hidden states, or [S] log-probs
    targets: Tensor  # [S, T]
    half_targets: Tensor  # [S, T], half of them ignored
    ref_logps: Tensor | None  # [S]
    weight: Tensor | None = None  # [V, H]
    pairs: Tensor | None = None  # [P, 2]
    token_weights: Tensor | None = None  # [S, T]


def make_level_inputs(level: str, case: Case) -> LevelInputs:
    """Random inputs of a level; the linear head and its reference-free loss are what Liger can do as well."""
    generator = torch.Generator().manual_seed(1)
    half = make_targets(case, generator, 0.5)
    if level == PREFERENCE:
        logps = -100 * torch.rand(case.n_seqs, generator=generator).to(case.device)
        return LevelInputs(case, logps, half, half, logps + torch.randn(case.n_seqs, generator=generator).to(logps))
    if level != LINEAR:
        logits, targets, ref_logps = make_inputs(case)
        return LevelInputs(case, logits, targets, half, ref_logps)
    targets = make_targets(case, generator)
    on_device = torch.Generator(case.device).manual_seed(2)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=on_device, device=case.device)

    hidden = randn(case.n_seqs, case.length, case.hidden)
    weight = randn(case.V, case.hidden) * (3.0 / case.hidden**0.5)  # logits spread by 3
    dtype = case.torch_dtype
    return LevelInputs(case, hidden.to(dtype), targets, half, None, weight.to(dtype))


def weighted(inputs: LevelInputs) -> LevelInputs:
    """With explicit pairs, the second half of the sequences chosen, and a weight for each token."""
    numbers = torch.arange(inputs.case.n_seqs, device=inputs.case.device).view(2, -1)
    weights = torch.rand(inputs.targets.shape, generator=torch.Generator().manual_seed(4)) + 0.5
    return inputs._replace(pairs=numbers.flip(0).t().contiguous(), token_weights=weights.to(inputs.case.device))


def build(level: str, name: str, inputs: LevelInputs, work: str) -> Call:
    """The call that a name stands for.

    Raises:
        AbsentError: it cannot run here.
    """
    name = name.removesuffix(ONE_THREAD)
    if name.endswith(WEIGHTED):
        name, inputs = name.removesuffix(WEIGHTED), weighted(inputs)
    if name.endswith(HALF):
        name, inputs = name.removesuffix(HALF), inputs._replace(targets=inputs.half_targets)
    if name == READ:
        return plain_read
    if name == COPY:
        target = torch.empty_like(inputs.x)
        return target.copy_
    if level == LINEAR:
        return _build_linear(name, inputs)
    if name == ROW_KERNELS:
        return _row_kernels(inputs, work)
    loss, grad_output = _loss_of(level, name, inputs)

    def call(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if work == FORWARD:
            with torch.no_grad():
                return loss(x), ()
        return forward_and_gradient(loss, [x], grad_output)

    return call


# --- losses from logits -----------------------------------------------------------------------------------------------


def _loss_of(level: str, name: str, inputs: LevelInputs) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    case, targets, ref_logps, weights = inputs.case, inputs.targets, inputs.ref_logps, inputs.token_weights
    grad_output = None
    if level in (TOKENS, SEQUENCES):
        shape = targets.shape if level == TOKENS else targets.shape[:1]
        generator = torch.Generator().manual_seed(3)
        grad_output = torch.rand(shape, generator=generator).to(case.device) + 0.5
        if case.dtype == "float64" and name in FUNCTIONS:
            grad_output = grad_output.double()
    if name in FUNCTIONS:
        return _dpo_fast_loss(level, name, inputs), grad_output

    def loss(x: Tensor, token_logps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if level == PREFERENCE:
            return preference_of(x, ref_logps)
        logps = token_logps(x, targets)
        if weights is not None:
            logps = logps * weights
        if level == TOKENS:
            return logps
        if level == SEQUENCES:
            return logps.sum(-1)
        return _preference_of(logps.sum(-1), ref_logps, inputs.pairs)

    if name == COMPILE:
        whole = compiled(lambda x: loss(x, naive_token_logps))
        return whole, grad_output
    token_logps = {
        NAIVE: lambda: naive_token_logps,
        TRL: lambda: _trl_torch(case),
        TRL_TRITON: lambda: _trl_triton(case),
    }[name]()
    return lambda x: loss(x, token_logps), grad_output


def _preference_of(logps: Tensor, ref_logps: Tensor | None, pairs: Tensor | None) -> Tensor:
    """The DPO loss of log-probs [S], of the pairs given or of the two halves."""
    if pairs is None or ref_logps is None:
        return preference_of(logps, ref_logps)
    ratios = logps - ref_logps
    return -F.logsigmoid(BETA * (ratios[pairs[:, 0]] - ratios[pairs[:, 1]])).mean()


def _dpo_fast_loss(level: str, name: str, inputs: LevelInputs) -> Callable[[Tensor], Tensor]:
    case, targets, ref_logps = inputs.case, inputs.targets, inputs.ref_logps
    inplace = name in (INPLACE, PACKED)
    if level == PREFERENCE:
        return lambda x: dpo_fast.preference_loss(x, ref_logps, beta=BETA).loss
    if level == TOKENS:
        every = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        outputs = every if name == EXTRAS else ("logps",)
        return lambda x: dpo_fast.token_logps(x, targets, outputs=outputs, inplace_backward=inplace).logps
    if name == PACKED:
        starts = torch.arange(0, case.rows + 1, case.length, dtype=torch.int32, device=targets.device)
        flat = targets.reshape(-1)
        return lambda x: dpo_fast.sequence_logps(
            x.view(case.rows, case.V), flat, cu_seqlens=starts, inplace_backward=True
        )
    if level == SEQUENCES:
        return lambda x: dpo_fast.sequence_logps(x, targets, inplace_backward=inplace)
    pairs, weights = inputs.pairs, inputs.token_weights
    return lambda x: (
        dpo_fast.dpo_loss(
            x, targets, ref_logps, beta=BETA, pairs=pairs, token_weights=weights, inplace_backward=inplace
        ).loss
    )


def _row_kernels(inputs: LevelInputs, work: str) -> Call:
    """The token operators without autograd, sum, reference and loss; the gradient is written over the logits."""
    importlib.import_module("dpo_fast.ops")
    operators = importlib.import_module("dpo_fast._torch.operators")
    options = importlib.import_module("dpo_fast._checks").LogitOptions(ignore_index=IGNORE_INDEX)
    rows = operators.Rows(inputs.targets, None, None, options)
    forward = operators.TokenForward(rows, 0, True)
    # with the gradient that the loss sends: of another size, more or fewer results are subnormal
    logps = operators.call(operators.TOKEN_FORWARD, inputs.x, forward).logps.requires_grad_()
    [grad_logps] = torch.autograd.grad(preference_of(logps.sum(-1), inputs.ref_logps), logps)

    def call(x: Tensor) -> None:
        logps, stats, _ = operators.call(operators.TOKEN_FORWARD, x, forward)
        if work != FORWARD:
            saved, grad = operators.Saved(logps, stats, None, None, None), operators.Grads(logps=grad_logps)
            seqs = operators.Sequences(None, False)
            backward = operators.RowsBackward(rows, seqs, None, 1.0, saved, grad)
            operators.call(operators.ROWS_BACKWARD_INPLACE, x, backward)

    return call


def _kept(targets: Tensor, case: Case) -> Tensor | None:
    """TRL's row mask, or None where no token is ignored; without waiting for the device."""
    return None if case.kept == case.rows else targets != IGNORE_INDEX


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that is there may still fail to import
        if importlib.util.find_spec(package) is None:
            raise AbsentError(f"{package} is not installed") from error
        raise AbsentError(f"{module} cannot be imported: {first_line(error)}") from error


def _trl_torch(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    function = _import("trl.trainer.utils", "trl").selective_log_softmax

    def token_logps(x: Tensor, targets: Tensor) -> Tensor:
        # float: its half-precision results would lose a whole sequence's sum
        return function(x, targets.clamp(min=0), row_mask=_kept(targets, case)).float()  # type: ignore[no-any-return]

    return token_logps


def _trl_triton(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    if not case.device.startswith("cuda"):
        raise AbsentError("needs a CUDA device")
    kernels = _import("trl.kernels", "trl")
    if not hasattr(kernels, "selective_log_softmax_and_entropy"):
        raise AbsentError("Triton is not installed")

    def token_logps(x: Tensor, targets: Tensor) -> Tensor:
        logps, _ = kernels.selective_log_softmax_and_entropy(x, targets.clamp(min=0), row_mask=_kept(targets, case))
        return logps  # type: ignore[no-any-return]

    return token_logps


# --- losses from hidden states ----------------------------------------------------------------------------------------


def _build_linear(name: str, inputs: LevelInputs) -> Call:
    targets, weight = inputs.targets, inputs.weight
    assert weight is not None
    if name == PRODUCTS:
        return _three_products(inputs)

    def fast(hidden: Tensor, head: Tensor) -> Tensor:
        loss: Tensor = dpo_fast.linear_dpo_loss(hidden, head, targets, beta=BETA).loss
        return loss

    def naive(hidden: Tensor, head: Tensor) -> Tensor:
        return preference_of(naive_token_logps(hidden @ head.t(), targets).sum(-1), None)

    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        FAST: lambda: fast,
        NAIVE: lambda: naive,
        COMPILE: lambda: compiled(naive),
        CROSS_ENTROPY: lambda: _linear_cross_entropy(targets, chunks=False),
        CHUNKED_CROSS_ENTROPY: lambda: _linear_cross_entropy(targets, chunks=True),
        TRL_CHUNKED: lambda: _trl_chunked(targets),
        LIGER: lambda: _liger(targets),
    }
    loss = makers[name]()
    return lambda hidden: forward_and_gradient(loss, [hidden, weight])


def _three_products(inputs: LevelInputs) -> Call:
    weight = inputs.weight
    assert weight is not None
    kept = inputs.x[inputs.targets != IGNORE_INDEX]  # [K, H]

    @torch.no_grad()
    def call(_: Tensor) -> None:
        logits = torch.mm(kept, weight.t())
        gradients = torch.mm(logits, weight), torch.mm(logits.t(), kept)
        del gradients

    return call


def _linear_cross_entropy(targets: Tensor, chunks: bool) -> Callable[[Tensor, Tensor], Tensor]:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise AbsentError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunks else {}  # its own choice of the chunks' size

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = function(
            hidden.flatten(0, 1), weight, targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX, **options
        )
        return preference_of(-losses.float().view(targets.shape).sum(-1), None)

    return loss


def _trl_chunked(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    utils = _import("trl.trainer.utils", "trl")
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if function is None:
        raise AbsentError("this version of TRL has no chunked log-prob function")
    chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    kept = targets != IGNORE_INDEX

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # rows dropped before, as TRL does where Triton runs
        logps = function.apply(hidden[kept], weight, None, targets[kept], 1.0, chunk, None, 1.0, ())[0]
        spread = logps.new_zeros(targets.shape).masked_scatter(kept, logps)
        return preference_of(spread.sum(-1), None)

    return loss


def _liger(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    losses = _import("liger_kernel.chunked_loss", "liger_kernel")
    torch._dynamo.reset()
    function = losses.LigerFusedLinearDPOLoss(
        ignore_index=IGNORE_INDEX, beta=BETA, use_ref_model=False, compiled=True, average_log_prob=False
    )

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = function(weight, hidden, targets)[0]
        return value

    return loss


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
