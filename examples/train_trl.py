"""TRL's DPOTrainer alone, with `use_dpo_fast`, and dpo_fast's DPOTrainer with packing: the same steps, side by side.

python examples/train_trl.py --steps 3          SmolLM2-135M-Instruct on the CPU, some minutes

In a script of your own one of these is enough:

    use_dpo_fast(trainer)                                               # TRL's trainer, its log-probs by dpo_fast
    from dpo_fast.integrations.trl_trainer import DPOTrainer            # in place of TRL's class:
    trainer = DPOTrainer(model=model, args=args, ..., packing=True)     # no padding, each prompt once
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset, load_dataset
from language_model import find_model, load_model
from preference_data import DemoError, read_preferences
from transformers import PrinterCallback, TrainerCallback

from dpo_fast.integrations import trl_trainer
from dpo_fast.integrations.trl import use_dpo_fast

WAYS = {
    "trl": "TRL's DPOTrainer",
    "use_dpo_fast": "TRL's DPOTrainer, use_dpo_fast",
    "packed": "dpo_fast's DPOTrainer(packing=True)",
}


class Run(NamedTuple):
    """What a way's steps took and gave."""

    seconds: list[float]
    losses: list[float]
    rows: tuple[int, int] | None  # padded, and as run; None where they are the same


class StepTimes(TrainerCallback):
    """Seconds of each step, its data, metrics and optimizer included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self.began)


def choose_pairs(options: argparse.Namespace, tokenizer: Any, folder: str) -> Dataset:
    """As many pairs as are trained on: references are computed in advance, of all that are given."""
    read_preferences(options.data)  # raises for mistakes
    pairs = load_dataset("json", data_files=str(options.data), split="train", cache_dir=folder).shuffle(seed=0)

    def fits(pair: dict[str, Any]) -> bool:  # TRL drops the others
        text = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text).input_ids) < options.max_length

    pairs = pairs.filter(fits)
    return pairs.select(range(min(len(pairs), options.steps * options.batch)))


def run(way: str, options: argparse.Namespace, model: Any, tokenizer: Any, pairs: Dataset, folder: str) -> Run:
    """Trains the model over the pairs, one way."""
    print(f"{WAYS[way]} ...", file=sys.stderr, flush=True)
    times = StepTimes()
    settings = trl.DPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        max_length=options.max_length,
        learning_rate=1e-5,
        precompute_ref_log_probs=True,
        gradient_checkpointing=options.checkpointing,
        bf16=options.bf16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
    )
    made = {"args": settings, "train_dataset": pairs, "processing_class": tokenizer, "callbacks": [times]}
    with use_dpo_fast() if way == "use_dpo_fast" else contextlib.nullcontext():
        if way == "packed":
            trainer = trl_trainer.DPOTrainer(model, **made, packing=True)  # <- dpo_fast
        else:
            trainer = trl.DPOTrainer(model, **made)
        trainer.remove_callback(PrinterCallback)
        done = getattr(trainer, "shared_prompts", None)
        before = (done.rows_given, done.rows_run) if done else (0, 0)  # of the references
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(times.seconds, losses, (done.rows_given - before[0], done.rows_run - before[1]) if done else None)


def show(runs: dict[str, Run]) -> None:
    """A line for each way; the ratio is the median over steps of the same pairs."""
    rows = next((found.rows for found in runs.values() if found.rows), None)
    print(f"\n{'':37}{'tokens run':>12}{'s a step':>10}{'faster':>8}  losses")
    for way, found in runs.items():
        tokens = "" if rows is None else f"{rows[found.rows is not None]:,}"
        line = f"{WAYS[way]:37}{tokens:>12}{statistics.median(found.seconds):>10.2f}"
        ratio = ""
        if "trl" in runs:
            both = zip(runs["trl"].seconds, found.seconds, strict=True)
            ratio = f"{statistics.median(a / b for a, b in both):.2f}x"
        print(f"{line}{ratio:>8}  {' '.join(f'{loss:.4f}' for loss in found.losses)}")


def main() -> int:
    """Trains a few steps each way and prints them side by side."""
    parser = argparse.ArgumentParser(description="TRL's DPOTrainer and dpo_fast's, the same steps.")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / "data" / "preferences.jsonl")
    parser.add_argument("--model", default=None, help="folder, name or GGUF file (default: the packaged SmolLM2)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 by autocast")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing (TRL's default)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    try:
        model, tokenizer = load_model(*find_model(options.model), torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            pairs = choose_pairs(options, tokenizer, folder)
            show({way: run(way, options, copy.deepcopy(model), tokenizer, pairs, folder) for way in options.ways})
    except DemoError as error:
        print(f"train_trl.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
