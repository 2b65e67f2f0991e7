"""Which logits and hidden states are timed, by device. Each shape carries the name of a real model."""

from __future__ import annotations

from dataclasses import replace

from dpo_fast.bench import Case

FLOATS = ("float32", "bfloat16", "float16")

# (model, sequences, tokens of each): the rows that the targets are about, and the same scaled to a GPU.
TARGET_SHAPES = {
    "cpu": (("Llama-2", 4, 512), ("Llama-3", 4, 128)),
    "cuda": (("Llama-3", 8, 1024), ("Llama-2", 16, 2048)),
}
MODELS_BY_VOCAB = ("Llama-2", "SmolLM2", "Llama-3", "Qwen2.5", "Gemma")
GROWTH_DTYPE = "bfloat16"


def target_cases(device: str) -> list[Case]:
    """All tokens kept, every type, both shapes."""
    return [
        Case(model, dtype, n_seqs, length, device=device)
        for model, n_seqs, length in TARGET_SHAPES[device]
        for dtype in FLOATS
    ]


def ignored_cases(device: str) -> list[Case]:
    """The largest of the target shapes with half and nine tenths of the tokens ignored, as in preference data."""
    model, n_seqs, length = TARGET_SHAPES[device][device == "cpu"]
    return [
        Case(model, dtype, n_seqs, length, ignored, device=device)
        for dtype in ("float32", "bfloat16")
        for ignored in (0.5, 0.9)
    ]


def level_cases(device: str) -> list[Case]:
    """What the token and sequence levels are timed on: V = 128256, none and half of the tokens ignored."""
    large = [case for case in target_cases(device) if case.model == "Llama-3"]
    return [replace(case, ignored=ignored) for case in large for ignored in (0.0, 0.5) if case.dtype != "float16"]


def growth_by_vocab(device: str) -> list[Case]:
    """The same tokens under growing vocabularies."""
    length = 128 if device == "cpu" else 2048
    return [Case(model, GROWTH_DTYPE, 2, length, device=device) for model in MODELS_BY_VOCAB]


def growth_by_length(device: str) -> list[Case]:
    """Growing sequences under one vocabulary."""
    lengths = (32, 128, 512, 1024) if device == "cpu" else (512, 2048, 8192, 16384)
    return [Case("SmolLM2", GROWTH_DTYPE, 2, length, device=device) for length in lengths]


def small_cases(device: str) -> list[Case]:
    """Calls that last microseconds: many short rows, and one pair of 16 tokens."""
    return [
        Case("8x512x1000", "float32", 8, 512, device=device, vocab=1000),
        Case("pair-of-16", "float32", 2, 16, device=device, vocab=1000),
        Case("SmolLM2", "float32", 2, 16, device=device),
        Case("pair-of-16", "bfloat16", 2, 16, device=device, vocab=1000),
    ]


def varying_cases(device: str) -> list[Case]:
    """One pair, padded to another length in every call: 2 to a case's. The shorter, the more a call itself counts."""
    return [Case("varying", "float32", 2, length, vocab=1000) for length in (400, 200)] if device == "cpu" else []


def varying_lengths(case: Case) -> tuple[list[int], list[int]]:
    """The lengths that are timed (399 and 199), and others, which are called before."""
    return list(range(2, case.length + 1)), list(range(case.length + 1, case.length + 81))


def linear_cases(device: str) -> list[Case]:
    """Hidden states under a model's head; half of the tokens ignored is what the target is about."""
    if device == "cpu":
        smol = [Case("SmolLM2", dtype, 4, 256, 0.5, hidden=576) for dtype in ("float32", "bfloat16")]
        return [*smol, replace(smol[1], ignored=0.0), replace(smol[1], ignored=0.9), LINEAR_LARGE]
    llama = Case("Llama-3", "bfloat16", 8, 1024, 0.5, device=device, hidden=4096)
    return [
        *(replace(llama, ignored=ignored) for ignored in (0.5, 0.0, 0.9)),
        Case("Qwen2.5", "bfloat16", 8, 1024, 0.5, device=device, hidden=3584),
        Case("SmolLM2", "float32", 8, 1024, 0.5, device=device, hidden=576),
    ]


def tolerance_cases(device: str) -> list[Case]:
    """Completion tokens of the demo's data under its model's head."""
    return [Case("SmolLM2", dtype, 1, 512, hidden=576) for dtype in FLOATS] if device == "cpu" else []


def tolerance_products(device: str) -> list[Case]:
    """Those in float32: half types may find dense products faster."""
    return tolerance_cases(device)[:1]


# Qwen2.5-0.5B's head: as much as two cores do in a second or two.
LINEAR_LARGE = Case("Qwen2.5", "bfloat16", 2, 256, 0.5, hidden=896)


def quick_subset(cases: list[Case]) -> list[Case]:
    """One or two cases: enough to see that everything runs."""
    return [case for case in cases if case.dtype == "bfloat16"][:1] or cases[:1]
