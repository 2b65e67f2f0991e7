"""The share of a whole training step: SmolLM2 from the demo, and TRL's DPOTrainer, with dpo_fast and without.

python -m benchmarks.step [--device cpu|cuda] [--quick] [--output step.json]

All ways take the same steps in turn, on the same batches and the same weights: the learning rate is 0, which costs what
any other does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.memory import CLEAR_REFS, peak_growth
from benchmarks.common.peers import first_line

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DATA = EXAMPLES / "data" / "preferences.jsonl"
PAIRS, TRL_PAIRS, MAX_LENGTH, ROUNDS, TRL_ROUNDS = 2, 1, 256, 5, 3
SECONDS = 60

Found = dict[str, dict[str, float]]


class Meter:
    """Times of steps and the most memory that one of them took."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.step_s: list[float] = []
        self.loss_s: list[float] = []
        self.peak_bytes = 0

    def measure(self, step: Callable[[], float]) -> None:
        """Runs a step, which returns the seconds that its loss took."""

        def timed() -> None:
            self.synchronize()
            started = time.perf_counter()
            self.loss_s.append(step())
            self.synchronize()
            self.step_s.append(time.perf_counter() - started)

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            timed()
            grown = torch.cuda.max_memory_allocated() - before
        elif CLEAR_REFS.exists():
            grown = peak_growth(timed)
        else:
            timed()
            grown = 0
        self.peak_bytes = max(self.peak_bytes, grown)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def found(self) -> dict[str, float]:
        """Medians."""
        return {
            "step_ms": 1e3 * statistics.median(self.step_s),
            "loss_ms": 1e3 * statistics.median(self.loss_s),
            "peak_mb": self.peak_bytes / 1e6,
            "steps": len(self.step_s),
        }


def rounds_of(steps: dict[str, Callable[[], float]], device: str, rounds: int) -> Found:
    """Every step once a round, after one round of warm-up; no third round once they have taken SECONDS."""
    meters = {name: Meter(device) for name in steps}
    started = time.perf_counter()
    for i in range(rounds + 1):
        if i > 2 and time.perf_counter() - started > SECONDS:
            break
        for name, step in steps.items():
            print(f"step.py: {name}, {'warm-up' if i == 0 else f'round {i} of {rounds}'}", flush=True)
            if i == 0:
                step()
            else:
                meters[name].measure(step)
    return {name: meter.found() for name, meter in meters.items()}


def demo_steps(args: argparse.Namespace) -> Found:
    """The demo's step: naive, from logits in place, with the head inside the loss, and packed with shared prompts."""
    import demo
    import language_model
    import preference_data

    import dpo_fast

    device = torch.device(args.device)
    model, tokenizer = language_model.load_model(*language_model.find_model(None), device)
    records = preference_data.read_preferences(DATA)
    pairs, _ = preference_data.choose_pairs(DATA, records, tokenizer, args.pairs, args.max_length, random.Random(0))
    refs = dpo_fast.reference_logps(model, pairs, progress=False)
    where, numbers = dpo_fast.SequenceNumbers(pairs), list(range(len(pairs)))
    padded = {name: value.to(device) for name, value in dpo_fast.padded_batch(pairs, 0).items()}
    packed = dpo_fast.packed_batch(pairs, share_prompts=True, mask="none")
    packed = {name: value.to(device) for name, value in packed.items()}
    ref_logps, packed_refs = refs.to(device), refs[where(numbers, share_prompts=True)].to(device)
    inputs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "use_cache": False}
    head, layout = dpo_fast.head_options(model), {name: packed[name] for name in ("targets", "pairs", "cu_seqlens")}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step_of(run: Callable[[], Any], loss_of: Callable[[Any], Any]) -> Callable[[], float]:
        def step() -> float:
            outputs = run()
            synchronize(device)
            started = time.perf_counter()
            # apart from the model, so that the loss can be timed
            leaf = outputs.detach().requires_grad_()
            loss_of(leaf).backward()
            synchronize(device)
            seconds = time.perf_counter() - started
            outputs.backward(leaf.grad)
            optimizer.step()
            optimizer.zero_grad()
            return seconds

        return step

    def logits() -> Any:
        return model(**inputs).logits

    def hidden() -> Any:
        return model.base_model(**inputs).last_hidden_state

    synchronize = demo.synchronize
    steps = {
        "naive": step_of(logits, lambda x: demo.naive_loss(x, padded["targets"], ref_logps, 0.1)),
        "dpo_fast, logits in place": step_of(
            logits, lambda x: dpo_fast.dpo_loss(x, padded["targets"], ref_logps, inplace_backward=True).loss
        ),
        "dpo_fast, fused head": step_of(
            hidden,
            lambda x: dpo_fast.linear_dpo_loss(x, targets=padded["targets"], ref_logps=ref_logps, **head).loss,
        ),
        "dpo_fast, packed, shared prompts": step_of(
            lambda: dpo_fast.packed_hidden(model, packed),
            lambda x: dpo_fast.linear_dpo_loss(x, ref_logps=packed_refs, **layout, **head).loss,
        ),
    }
    return rounds_of(steps, args.device, args.rounds)


def trl_steps(args: argparse.Namespace) -> Found:
    """One training step of TRL's DPOTrainer, without and with `use_dpo_fast`."""
    import language_model
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    from dpo_fast.integrations.trl import use_dpo_fast

    device = torch.device(args.device)
    model, tokenizer = language_model.load_model(*language_model.find_model(None), device)
    ref_model, _ = language_model.load_model(*language_model.find_model(None), device)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=TRL_PAIRS,
            max_length=args.max_length,
            learning_rate=0.0,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=args.device == "cpu",
            seed=0,
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=config,
            train_dataset=load_dataset("json", data_files=str(DATA), split="train"),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # train() would set it

        def plain() -> float:
            trainer.training_step(trainer.model, dict(batch))
            optimizer.step()
            optimizer.zero_grad()
            return 0.0

        def fast() -> float:
            with use_dpo_fast(trainer):
                return plain()

        found = rounds_of({"plain": plain, "with use_dpo_fast": fast}, args.device, args.trl_rounds)
    return found


def main() -> int:
    """Measures both; what cannot run is named in the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Whole training steps.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one round on short sequences")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    args.pairs, args.max_length = (1, 64) if args.quick else (PAIRS, MAX_LENGTH)
    args.rounds, args.trl_rounds = (1, 1) if args.quick else (ROUNDS, TRL_ROUNDS)
    sys.path.insert(0, str(EXAMPLES))
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {
        "settings": f"SmolLM2-135M, float32, up to {args.max_length} tokens a sequence. The demo: {args.pairs} pair(s) "
        f"a step, TRL: {TRL_PAIRS} pair(s); medians of steps taken in turn.",
        "problems": [],
    }
    for name, measure in (("demo", demo_steps), ("trl", trl_steps)):
        try:
            result[name] = measure(args)
        except Exception as error:  # a missing package or model takes one of the two away, not both
            result["problems"].append(f"{name} ({first_line(error)})")
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
