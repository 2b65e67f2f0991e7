"""Gradients of the head from those entries of the logits' gradient that carry its mass: `grad_tolerance`.

With g_n the gradient of a row's log-prob and m_n the softmax mass that the row leaves out,

    sum_n |g_n| m_n <= tolerance * sum_n |g_n|

for each of the two kinds of products: into the hidden states (and LoRA's A) and into the head (weight, bias, LoRA's B).
On the CPU rows become sparse (csrc/cpu/sparse_head.h); elsewhere columns are left out that no row of the tile misses,
and the products stay dense. Gradients of statistics, float64 and what cannot be left out go the exact way.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast import _cpu
from dpo_fast._arguments import KernelSelected, KernelSparse
from dpo_fast._torch.addresses import Addresses
from dpo_fast._torch.checks import LOGIT_TYPES
from dpo_fast._torch.head import HeadSums
from dpo_fast._torch.operators import HEAD_INPUTS, Grads, Head, Rows
from dpo_fast._torch.plain import CHUNK_LOGITS, transform
from dpo_fast._torch.sequences import accurate_type

# The kinds of products, and which inputs of the head get their gradients from each.
KINDS = {"hidden": ("hidden", "lora_a"), "weight": ("weight", "bias", "lora_b")}

# Below this, rounding takes what could be left out (kHalfMassError in csrc/cpu/sparse_head.cpp).
LEAST_TOLERANCE = 4e-5

# A row is kept sparse up to this share of the columns, where the dense product would cost as much: measured with
# AVX-512 and AVX2 at 49152 x 576 (docs/performance.md). A table and not a clock: results are the same in every run.
DENSE_FROM = 1 / 5
# So few dense rows would cost as much as many, by one read of the head and one of its gradient: they stay sparse up to
# the share below.
FEW_DENSE = 8
# Dense columns are gathered up to this share.
GATHER_BELOW = 0.6

_WHOLE = 2.0  # may leave out all but the target
_DENSE = -1.0  # may leave out nothing


class Allowance(NamedTuple):
    """The softmax mass that each row may leave out of a kind of product, [R] each; None: the kind is exact."""

    hidden: Tensor | None
    weight: Tensor | None

    def of(self, rows: Tensor | slice) -> Allowance:
        """That of some rows."""
        return Allowance(*[None if each is None else each[rows] for each in self])


def allowance(head: Head, needs: tuple[bool, ...], grad: Grads, counted: Tensor | int) -> Allowance | None:
    """What rows with these incoming gradients [R], 0 for those that do not count, may leave out; None: nothing.

    counted: how many do count, for the mean of |g|.
    """
    g = grad.logps
    exact = g is None or g.dtype is torch.float64 or any(each is not None for each in grad.statistics)
    if exact or g is None or max(head.hidden_tolerance, head.weight_tolerance) < LEAST_TOLERANCE:
        return None
    wanted = dict(zip(HEAD_INPUTS, needs, strict=True))
    masses = [
        _masses(g, tolerance, counted) if tolerance >= LEAST_TOLERANCE and any(wanted[name] for name in names) else None
        for tolerance, names in zip((head.hidden_tolerance, head.weight_tolerance), KINDS.values(), strict=True)
    ]
    return None if masses == [None, None] else Allowance(*masses)


def _masses(grad: Tensor, tolerance: float, counted: Tensor | int) -> Tensor:
    """Each row may leave out the tolerance; one whose |g| is below half of it times the mean, all but its target.

    These rows' |g| is at most half of what may be left out altogether, and is taken off the others' share.
    """
    size = grad.to(accurate_type(grad.device)).abs()
    total = size.sum()
    small = size < tolerance / 2 * total / counted
    used = torch.where(small, size, torch.zeros_like(size)).sum()
    rest = (tolerance * total - used) / (total - used)
    masses = torch.where(small, torch.full_like(size, _WHOLE), rest.clamp(max=tolerance))
    return torch.where(total.isfinite(), masses, torch.full_like(size, _DENSE)).float()


class Skipped:
    """How much of its gradients' mass a call has left out."""

    def __init__(self, head: Head, hidden: Tensor) -> None:
        self.may = bool(head.hidden_tolerance or head.weight_tolerance)
        if not self.may:
            return
        self.left_out = torch.zeros(2, dtype=accurate_type(hidden.device), device=hidden.device)
        self.total = torch.zeros_like(self.left_out[0])

    def count(self, grad: Tensor) -> None:
        """Takes in the gradients of some rows' log-probs."""
        if self.may:
            self.total += grad.to(self.total.dtype).abs().sum()

    def add(self, left_out: Tensor | None) -> bool:
        """Takes in what `add_tile` returns; False where it did nothing."""
        if left_out is None:
            return False
        self.left_out += left_out
        return True

    def share(self) -> Tensor | None:
        """sum_n |g_n| m_n / sum_n |g_n|, [], of the kind of products that left out more; None where nothing may be."""
        if not self.may:
            return None
        share = self.left_out.amax() / self.total
        return torch.where(self.left_out.amax() > 0, share, torch.zeros_like(share)).float()


class Tile(NamedTuple):
    """A tile of rows: logits, which are written over, and what backward has beside them."""

    z: Tensor  # [R, V]
    hidden: Tensor  # [R, H]
    numbers: Tensor  # [R], of the rows in the whole
    rows: Rows
    logps: Tensor  # [R]
    stats: Tensor  # [R, 2]
    grad: Tensor  # [R], of the log-probs
    scale: Tensor | None  # of dense gradients in float16

    def of(self, part: Tensor | slice) -> Tile:
        """Some rows of it."""
        z, hidden, numbers, rows, logps, stats, grad, scale = self
        rows = rows._replace(targets=rows.targets[part])
        return Tile(z[part], hidden[part], numbers[part], rows, logps[part], stats[part], grad[part], scale)


def add_tile(sums: HeadSums, tile: Tile, allowed: Allowance, logits_gradient: Any) -> Tensor | None:
    """Adds a tile's gradients; returns the sum of |g_n| m_n for both kinds, [2].

    None, and nothing done: the tile has to go the exact way. logits_gradient(z, rows, logps, stats, grads) writes the
    dense gradient of logits over them.
    """
    if tile.z.shape[0] == 0:
        return None
    if not tile.z.is_cpu:
        return _add_columns(sums, tile, allowed, logits_gradient)
    tables = [table for table in (sums.head.weight, sums.head.lora_b) if table is not None]
    if not _sparse_pays(tile.z.dtype) or any(table.stride(1) != 1 for table in tables):
        return None
    return _add_sparse(sums, tile, allowed, logits_gradient)


def _dense_gradient(tile: Tile, z: Tensor, part: Tensor | slice, logits_gradient: Any) -> None:
    """Writes the dense gradient of some rows over their logits z."""
    rows = tile.rows._replace(targets=tile.rows.targets[part])
    grad = tile.grad[part] if tile.scale is None else tile.grad[part] * tile.scale
    logits_gradient(z, rows, tile.logps[part], tile.stats[part], None, Grads(grad))


# --- sparse rows, on the CPU ------------------------------------------------------------------------------------------


class Selected(NamedTuple):
    """Rows of a tile in slots, as selection leaves them."""

    columns: Tensor  # [R, most]
    values: Tensor  # [R, most]
    counts: Tensor  # [R, blocks]; -1 in a dense row's first
    skipped: Tensor  # [R]
    vocab: int

    def arguments(self) -> KernelSelected:
        """As the kernels take it."""
        columns, values, counts, skipped = (tensor.data_ptr() for tensor in self[:4])
        n_rows, most = self.columns.shape
        return KernelSelected(columns, values, counts, skipped, n_rows, self.vocab, most)


class SparseRows:
    """The gradient of a tile's logits as sparse rows, and its products with tables of float32 or half types."""

    def __init__(self, selected: Selected, n_entries: int) -> None:
        n_rows, n_blocks = selected.counts.shape
        self.columns = torch.empty(max(n_entries, 1), dtype=torch.int32)
        self.values = torch.empty(max(n_entries, 1))
        self.positions = torch.empty(n_rows * n_blocks + 1, dtype=torch.int64)
        columns, values, positions = (tensor.data_ptr() for tensor in (self.columns, self.values, self.positions))
        self.arguments = KernelSparse(columns, values, positions, n_rows, selected.vocab, n_entries)
        _cpu.pack_sparse(selected.arguments(), torch.get_num_threads(), self.arguments)

    def _table(self, table: Tensor) -> tuple[KernelSparse, int, int, int, int]:
        return self.arguments, LOGIT_TYPES[table.dtype], table.data_ptr(), table.stride(0), table.shape[1]

    def times(self, table: Tensor) -> Tensor:
        """[R, W] (float32) = rows @ table [V, W]."""
        out = torch.empty(self.arguments.n_rows, table.shape[1])
        _cpu.sparse_times_table(*self._table(table), torch.get_num_threads(), out.data_ptr())
        return out

    def add_transposed_times(self, table: Tensor, sums: HeadSums, name: str) -> None:
        """Adds rows^T @ table [R, W] to a sum [V, W]."""
        table = table.contiguous()
        out, add = sums.accumulator(name, (self.arguments.vocab, table.shape[1]))
        if not add:
            _cpu.expect_writes(out.data_ptr(), out.nbytes)
        _cpu.sparse_transposed_times_table(*self._table(table), add, torch.get_num_threads(), out.data_ptr())

    def add_column_sums(self, sums: HeadSums, name: str) -> None:
        """Adds the sum of the rows to a sum [V]."""
        out, add = sums.accumulator(name, (self.arguments.vocab,))
        _cpu.sparse_column_sums(self.arguments, add, torch.get_num_threads(), out.data_ptr())


@functools.cache
def _sparse_pays(dtype: torch.dtype) -> bool:
    """Whether sparse products may beat dense ones: not those of bfloat16 on tile registers (AMX), ten times as fast."""
    if dtype is not torch.bfloat16:
        return True
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return not (dict(_cpu.isas()).get("avx512_bf16", False) if has_tiles is None else has_tiles())


def _select(tile: Tile, allowed: Tensor, dense_from: float) -> tuple[Selected, int] | None:
    """A tile's largest entries and their number; None where most rows would be dense."""
    n_rows, vocab = tile.z.shape
    most = max(1, int(vocab * dense_from))
    selected = Selected(
        torch.empty((n_rows, most), dtype=torch.int32),
        torch.empty((n_rows, most)),
        torch.empty((n_rows, _cpu.column_blocks(vocab)), dtype=torch.int32),
        torch.empty(n_rows),
        vocab,
    )
    at, float32 = Addresses(), torch.float32
    logps, stats, grad = (at("saved", x, float32) for x in (tile.logps, tile.stats, tile.grad))
    masses, rows, threads = at("allowed", allowed, float32), at.rows(tile.z, tile.rows), torch.get_num_threads()
    found = _cpu.select_sparse(rows, threads, logps, stats, grad, masses, selected.arguments())
    return None if found < 0 else (selected, found)


def _add_sparse(
    sums: HeadSums, tile: Tile, allowed: Allowance, logits_gradient: Any, dense_from: float = DENSE_FROM
) -> Tensor | None:
    given = {kind: each for kind, each in zip(KINDS, allowed, strict=True) if each is not None}
    # the stricter kind first: a row that it leaves dense is dense for both, and no other is
    order = sorted(given, key=lambda kind: given[kind].clamp(max=1).amin().item())
    chosen: dict[str, tuple[Selected, int]] = {}
    for kind in order:
        first = chosen.get(order[0])
        if first is not None and torch.equal(given[kind], given[order[0]]):
            chosen[kind] = first
            continue
        masses = given[kind] if first is None else given[kind].masked_fill(first[0].counts[:, 0] < 0, _DENSE)
        found = _select(tile, masses, dense_from)
        if found is None:
            return None
        chosen[kind] = found
    left_out = torch.zeros(2, dtype=torch.float64)
    packed: dict[int, SparseRows] = {}
    for kind, (selected, n_entries) in chosen.items():
        if id(selected) not in packed:
            packed[id(selected)] = SparseRows(selected, n_entries)
        (_add_to_hidden if kind == "hidden" else _add_to_weight)(sums, tile, packed[id(selected)])
        left_out[list(KINDS).index(kind)] = (tile.grad.double().abs() * selected.skipped).sum()
    dense = (chosen[order[0]][0].counts[:, 0] < 0).nonzero().squeeze(-1)
    if (
        0 < dense.shape[0] <= FEW_DENSE
        and len(chosen) == len(given) == _kinds_needed(sums)
        and dense_from < GATHER_BELOW
    ):
        of_few = _add_sparse(sums, tile.of(dense), allowed.of(dense), logits_gradient, GATHER_BELOW)
        if of_few is not None:
            return left_out + of_few
    _add_dense_rows(sums, tile, dense, [kind for kind in KINDS if kind not in chosen], logits_gradient)
    return left_out


def _kinds_needed(sums: HeadSums) -> int:
    return sum(any(sums.needs[name] for name in names) for names in KINDS.values())


def _add_to_hidden(sums: HeadSums, tile: Tile, dz: SparseRows) -> None:
    """As HeadSums.add_to_hidden, from sparse rows."""
    head = sums.head
    grad = dz.times(head.weight) if sums.hidden is not None else None
    if head.lora_a is not None and head.lora_b is not None:
        du = dz.times(head.lora_b) * head.lora_scaling
        if sums.needs["lora_a"]:
            sums._sum("lora_a", du.t(), tile.hidden.float())
        if grad is not None:
            grad = grad.addmm_(du, head.lora_a.float())
    if grad is not None and sums.hidden is not None:
        sums.hidden[tile.numbers] = grad.to(sums.hidden.dtype)


def _add_to_weight(sums: HeadSums, tile: Tile, dz: SparseRows) -> None:
    """As HeadSums.add_to_weight, from sparse rows."""
    head = sums.head
    if sums.needs["weight"]:
        dz.add_transposed_times(tile.hidden, sums, "weight")
    if sums.needs["bias"]:
        dz.add_column_sums(sums, "bias")
    if sums.needs["lora_b"] and head.lora_a is not None:
        dz.add_transposed_times((tile.hidden @ head.lora_a.t()).float() * head.lora_scaling, sums, "lora_b")


def _add_dense_rows(sums: HeadSums, tile: Tile, dense: Tensor, exact: list[str], logits_gradient: Any) -> None:
    """Adds the rows that selection left dense, and of the exact kinds all rows."""
    scale = 1.0 if tile.scale is None else 1 / tile.scale
    n_dense = dense.shape[0]
    add = {"hidden": sums.add_to_hidden, "weight": sums.add_to_weight}
    z = tile.z
    if any(sums.needs[name] for kind in exact for name in KINDS[kind]):
        _dense_gradient(tile, z, slice(None), logits_gradient)
        for kind in exact:
            add[kind](z, _moved(tile, slice(None)), tile.numbers, scale)
        z = z[dense]
    elif n_dense:
        for k, row in enumerate(dense.tolist()):  # to the front: no memory for a copy
            if k != row:
                z[k].copy_(z[row])
        z = z[:n_dense]
        _dense_gradient(tile, z, dense, logits_gradient)
    if n_dense:
        for kind in KINDS:
            if kind not in exact:
                add[kind](z, _moved(tile, dense), tile.numbers[dense], scale)


def _moved(tile: Tile, part: Tensor | slice) -> Tensor:
    """Hidden states of some rows; a row without a gradient takes no part, whatever its numbers are."""
    return tile.hidden[part].masked_fill((tile.grad[part] == 0).unsqueeze(-1), 0)


# --- columns that no row misses, elsewhere ----------------------------------------------------------------------------

# Cuts looked at: the largest tolerance of a row times 2^-k.
_CUTS = 24
# Of the allowed mass, for the rounding of the masses.
_SAFETY = 0.98


def columns_to_keep(tile: Tile, allowed: Tensor) -> tuple[Tensor, Tensor] | None:
    """Columns in which some row has much of its mass, or its target, and the mass that each row then leaves out, [R].

    None where too many columns are kept for gathering to pay.
    """
    vocab, options = tile.z.shape[1], tile.rows.options
    targets, bound = tile.rows.targets.long(), (allowed < 1) & (tile.grad != 0)
    at_target = transform(tile.z.gather(1, targets.unsqueeze(-1)).float(), options)[0]
    lse = at_target - tile.logps.float().unsqueeze(-1)
    if not bool((lse.isfinite().squeeze(-1) | (tile.grad == 0)).all()) or bool((allowed < 0).any()):
        return None
    lse = torch.where(tile.grad.unsqueeze(-1) == 0, torch.full_like(lse, torch.inf), lse)
    step = max(1, CHUNK_LOGITS // tile.z.shape[0])

    def probabilities(start: int) -> Tensor:
        return torch.exp(transform(tile.z[:, start : start + step].float(), options)[0] - lse)

    free = (~bound).unsqueeze(-1)
    peak = torch.cat([probabilities(start).masked_fill(free, 0).amax(0) for start in range(0, vocab, step)])
    peak[targets] = torch.inf
    cuts = torch.where(bound, allowed, torch.zeros_like(allowed)).amax() * 2.0 ** -torch.arange(
        _CUTS, device=peak.device
    )
    below = (peak.unsqueeze(-1) < cuts).float()
    masses = lse.new_zeros(tile.z.shape[0], _CUTS)
    for start in range(0, vocab, step):
        masses += probabilities(start).nan_to_num(0) @ below[start : start + step]
    fits = ((masses <= _SAFETY * allowed.unsqueeze(-1)) | free).all(0)
    if not bool(fits.any()):
        return None
    k = int(fits.int().argmax())
    columns = (below[:, k] == 0).nonzero().squeeze(-1)
    return None if columns.shape[0] > GATHER_BELOW * vocab else (columns, masses[:, k])


def _add_columns(sums: HeadSums, tile: Tile, allowed: Allowance, logits_gradient: Any) -> Tensor | None:
    chosen: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, masses in zip(KINDS, allowed, strict=True):
        found = None if masses is None else columns_to_keep(tile, masses)
        if found is not None:
            chosen[kind] = found
    if not chosen:
        return None
    _dense_gradient(tile, tile.z, slice(None), logits_gradient)
    scale, hidden = 1.0 if tile.scale is None else 1 / tile.scale, _moved(tile, slice(None))
    left_out = torch.zeros(2, dtype=accurate_type(tile.z.device), device=tile.z.device)
    for i, kind in enumerate(KINDS):
        if kind not in chosen:
            (sums.add_to_hidden if kind == "hidden" else sums.add_to_weight)(tile.z, hidden, tile.numbers, scale)
            continue
        columns, masses = chosen[kind]
        sums.add_columns(kind, columns, tile.z[:, columns], hidden, tile.numbers, scale)
        left_out[i] = (tile.grad.to(left_out.dtype).abs() * masses).sum()
    return left_out
