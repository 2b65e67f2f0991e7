"""Results keep every bit from one version of the code to the next, on a fixed set of cases.

tests/bit_identity.json has a digest of each case by instruction set. A change that is meant to change bits makes it anew
with `python tests/test_bit_identity.py`, in a commit that says so. The last bit of log and exp in double is the C
library's: the digests hold for the one that they name.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo_fast
from dpo_fast import _cpu

FILE = Path(__file__).with_name("bit_identity.json")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABS = (7, 507, 2049, 32769)
TRANSFORMS = {"plain": {}, "capped": {"temperature": 0.7, "logit_scale": 1.3, "softcap": 9.0}}


def problem(dtype, vocab):
    rng = np.random.default_rng(vocab)
    x = torch.tensor(3 * rng.standard_normal((4, 5, vocab))).to(dtype)
    targets = torch.tensor(rng.integers(0, vocab, (4, 5)))
    targets[torch.tensor(rng.random((4, 5)) < 0.3)] = -100
    return x, targets, torch.tensor(rng.standard_normal(4)).float(), torch.tensor(rng.random((4, 5)))


def results(dtype, vocab, options):
    """Values and gradients at each level."""
    x, targets, ref, weights = problem(dtype, vocab)
    cu, pairs = torch.tensor([0, 3, 9, 9, 20]), torch.tensor([[0, 1], [3, 2], [0, 3]])
    flat = {"cu_seqlens": cu, "token_weights": weights.flatten(), **options}
    calls = {
        "tokens": lambda z: dpo_fast.token_logps(z, targets, **options).logps,
        "sequences": lambda z: dpo_fast.sequence_logps(z, targets, token_weights=weights, **options),
        "packed": lambda z: dpo_fast.sequence_logps(z.view(20, vocab), targets.flatten(), **flat),
        "dpo": lambda z: dpo_fast.dpo_loss(z, targets, ref, label_smoothing=0.1, **options).loss,
        "pairs": lambda z: dpo_fast.dpo_loss(z, targets, ref, pairs=pairs, loss_type="apo_down", **options).losses,
        "ipo": lambda z: dpo_fast.dpo_loss(z, targets, loss_type="ipo", f_divergence="reverse_kl", **options).losses,
        "columns": lambda z: dpo_fast.dpo_loss(z.transpose(0, 1)[:4, :4], targets[:4, :4].T, **options).losses,
    }
    for name, call in calls.items():
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        g = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
        yield name, (out.detach(), *torch.autograd.grad(out, leaf, g))


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(
            tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()
        )
    return found.hexdigest()[:16]


def digests():
    """Of every case, with the instruction set in use."""
    return {
        f"{name}-{dtype}-{vocab}-{transform}": digest(tensors)
        for dtype, kind in DTYPES.items()
        for vocab in VOCABS
        for transform, options in TRANSFORMS.items()
        for name, tensors in results(kind, vocab, options)
    }


def library():
    return " ".join((platform.machine(), *platform.libc_ver()))


@pytest.mark.cpu_only
def test_same_bits(isa):
    recorded = json.loads(FILE.read_text())
    if recorded["library"] != library():
        pytest.skip(f"the digests are for {recorded['library']}, this is {library()}")
    found, expected = digests(), recorded[isa]
    assert [name for name in found if found[name] != expected[name]] == []
    assert found.keys() == expected.keys()


if __name__ == "__main__":
    made = {"library": library()}
    for isa_name, supported in _cpu.isas():
        if supported:
            _cpu.set_isa(isa_name)
            made[isa_name] = digests()
    FILE.write_text(json.dumps(made, indent=0) + "\n")
