"""Trains a language model by DPO: packed batches with shared prompts, references computed once, resumable at any step.

    python examples/train_dpo.py --output run              SmolLM2-135M-Instruct on the data that ships with the demo
    python examples/train_dpo.py --data my.jsonl --model my_model_folder --lora 16 --epochs 2 --output run
    python examples/train_dpo.py ... --output run --resume      goes on where the run was killed, to the same bits

A line of the data has prompt, chosen and rejected, each a list of {"role", "content"} messages. The output folder gets
references.safetensors, checkpoint.pt, log.jsonl, training.png and, at the end, the model.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language_model import (
    HelpFormatter,
    add_common_arguments,
    autocast,
    check_inputs,
    check_packages,
    load_model,
    model_name,
    not_negative,
    positive,
    reporter,
    share,
)
from preference_data import DemoError, Example, choose_pairs
from torch import Tensor
from training_plot import draw
from training_state import CHECKPOINT, Log, load_checkpoint, save_checkpoint

import dpo_fast
from dpo_fast.sampler import pack

# Losses of the sums of log-probs, pair by pair, without further parameters.
LOSSES = ("sigmoid", "hinge", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
# What a run's numbers depend on: a checkpoint is continued with the same ones only.
SETTINGS = (
    *("data", "model", "max_length", "max_prompt_length", "dtype", "device", "beta", "loss_type", "lr", "seed"),
    *("pairs", "epochs", "steps", "token_budget", "accumulate", "warmup", "weight_decay", "max_grad_norm", "lora"),
    "held_out",
)


# --- One optimizer step -----------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What is trained, on what."""

    model: Any
    examples: list[Example]  # the training ones, then those held out
    n_train: int
    refs: Tensor  # [S] of all examples, in reference_logps's order
    where: dpo_fast.SequenceNumbers
    args: argparse.Namespace

    def loss(self, numbers: list[int], num_pairs: int) -> tuple[Tensor, Tensor]:
        """A batch's share of the mean over num_pairs pairs.

        Returns:
            The loss, to go backward from, and [3]: the shares of loss, margin and accuracy.
        """
        device = self.refs.device
        batch = dpo_fast.packed_batch([self.examples[i] for i in numbers], share_prompts=True, mask="none")
        batch = {name: value.to(device) for name, value in batch.items()}
        with autocast(device, self.args.dtype):
            out = dpo_fast.linear_dpo_loss(
                dpo_fast.packed_hidden(self.model, batch),
                targets=batch["targets"],
                ref_logps=self.refs[self.where(numbers, share_prompts=True).to(device)],
                pairs=batch["pairs"],
                cu_seqlens=batch["cu_seqlens"],
                num_pairs=num_pairs,  # of the whole step: how it is cut into batches changes no gradient
                beta=self.args.beta,
                loss_type=self.args.loss_type,
                **dpo_fast.head_options(self.model),
            )
        margins = out.chosen_rewards - out.rejected_rewards
        shares = [margins.sum() / num_pairs, (margins > 0).to(margins.dtype).sum() / num_pairs]
        return out.loss, torch.stack([out.loss, *shares]).detach()

    def gradient(self, batches: list[list[int]]) -> list[float]:
        """Adds the gradient of these batches' mean loss to the parameters'; returns loss, margin and accuracy."""
        num_pairs = sum(map(len, batches))
        found: Any = 0
        for numbers in batches:
            loss, shares = self.loss(numbers, num_pairs)
            loss.backward()
            found = found + shares
        return found.tolist()

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, margin and accuracy of the pairs that are not trained on."""
        batches = pack(dpo_fast.packed_lengths(self.examples[self.n_train :]), self.args.token_budget)
        num_pairs = len(self.examples) - self.n_train
        self.model.eval()
        found = sum(self.loss([self.n_train + i for i in numbers], num_pairs)[1] for numbers in batches)
        self.model.train()
        return dict(zip(("held_out_loss", "held_out_margin", "held_out_accuracy"), found.tolist(), strict=True))


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then linear decay to 0. A function of the step alone, so there is nothing to save."""
    warm = max(1, round(args.warmup * total))
    return args.lr * min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm + 1)))


def batches_of_steps(
    sampler: dpo_fast.PackedSampler, args: argparse.Namespace, total: int, step: int
) -> Iterator[list[list[int]]]:
    """The batches of each optimizer step from `step` on; an epoch's last one may have fewer than --accumulate."""
    epoch = sampler.epoch
    while step < total:
        sampler.set_epoch(epoch)
        batches: list[list[int]] = []
        for numbers in sampler:
            batches.append(numbers)
            if len(batches) == args.accumulate or sampler.state_dict()["batches"] == len(sampler):
                yield batches
                batches, step = [], step + 1
                if step == total:
                    return
        epoch += 1


def total_steps(sampler: dpo_fast.PackedSampler, args: argparse.Namespace) -> int:
    """Optimizer steps of the whole run."""
    if args.steps:
        return args.steps
    total = 0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total += -(-len(sampler) // args.accumulate)
    sampler.set_epoch(0)
    return total


# --- The run ----------------------------------------------------------------------------------------------------------


def train(task: Task, sampler: dpo_fast.PackedSampler, args: argparse.Namespace) -> Log:
    """All steps, from the checkpoint on if there is one to go on from."""
    from tqdm import tqdm

    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    total, step = total_steps(sampler, args), 0
    if (args.output / CHECKPOINT).exists():
        step = restore(load_checkpoint(args.output, settings_of(args)), trained, optimizer, sampler)
    log = Log(args.json, step)
    lengths = sampler.lengths
    task.model.train()
    bar = tqdm(batches_of_steps(sampler, args, total, step), total=total, initial=step, unit="step", desc="Training")
    for batches in bar:
        started = time.perf_counter()
        loss, margin, accuracy = task.gradient(batches)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens = sum(lengths[i] for numbers in batches for i in numbers)
        row = {"step": step, "epoch": sampler.epoch, "loss": loss, "margin": margin, "accuracy": accuracy}
        row |= {"gradient_norm": norm.item(), "lr": group["lr"], "pairs": sum(map(len, batches)), "tokens": tokens}
        log.write(row | {"tokens_per_second": tokens / (time.perf_counter() - started)})
        bar.set_postfix(loss=f"{loss:.4f}", margin=f"{margin:+.4f}", lr=f"{group['lr']:.1e}")
        last = step == total
        if task.n_train < len(task.examples) and (last or step % args.evaluate_every == 0):
            row = {"step": step, **task.held_out()}
            log.write(row)
            bar.write(f"step {step}, held out: " + ", ".join(f"{k[9:]} {v:.4f}" for k, v in row.items() if k != "step"))
        if last or step % args.save_every == 0:
            save_checkpoint(args.output, snapshot(step, trained, optimizer, sampler, args))
    return log


def snapshot(
    step: int, trained: dict[str, Tensor], optimizer: Any, sampler: dpo_fast.PackedSampler, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that the next step depends on, but what the settings give again (data, references, frozen weights)."""
    return {
        "settings": settings_of(args),
        "step": step,
        "weights": {name: p.detach() for name, p in trained.items()},
        "optimizer": optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "random": torch.get_rng_state(),  # of LoRA's dropout
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


@torch.no_grad()
def restore(state: dict[str, Any], trained: dict[str, Tensor], optimizer: Any, sampler: dpo_fast.PackedSampler) -> int:
    """Puts a snapshot back; returns its step."""
    for name, p in trained.items():
        p.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    try:
        sampler.load_state_dict(state["sampler"])
    except ValueError as error:
        raise DemoError(f"--resume: {error}") from None
    torch.set_rng_state(state["random"])
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return state["step"]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings as a checkpoint keeps them."""
    return {name: value if isinstance(value := getattr(args, name), (int, float)) else str(value) for name in SETTINGS}


def with_lora(model: Any, args: argparse.Namespace) -> Any:
    """The model with LoRA on its linear layers, all else frozen."""
    check_packages(("peft",))
    import peft

    config = peft.LoraConfig(
        r=args.lora, lora_alpha=2 * args.lora, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def references(model: Any, examples: list[Example], device: torch.device, args: argparse.Namespace) -> Tensor:
    """The untrained model's log-probs, from the file of an earlier start if there is one."""
    try:
        with autocast(device, args.dtype):
            refs = dpo_fast.reference_logps(
                model, examples, path=args.output / "references.safetensors", token_budget=args.token_budget
            )
    except (ValueError, TypeError) as error:
        raise DemoError(str(error)) from None
    return refs.to(device)


def run(args: argparse.Namespace) -> None:
    """Loads, scores, trains, evaluates and saves."""
    say = reporter()
    packages = ("transformers", "jinja2", "matplotlib", "safetensors", "tqdm")
    folder, gguf_file, records, device = check_inputs(args, packages)
    if not args.resume and (args.output / CHECKPOINT).exists():
        raise DemoError(f"--output {args.output} holds a run: go on with --resume, or give another folder")

    torch.manual_seed(args.seed)
    name = model_name(folder, gguf_file)
    say(f"Loading {name}")
    model, tokenizer = load_model(folder, gguf_file, device)
    examples, n_skipped = choose_pairs(
        args.data, records, tokenizer, args.pairs, args.max_length, random.Random(args.seed), args.max_prompt_length
    )
    if n_skipped:
        say(f"Pairs skipped, no token of a completion being left within --max-length {args.max_length}: {n_skipped}")
    n_train = len(examples) - round(args.held_out * len(examples))
    if n_train < 1:
        raise DemoError(f"--held-out {args.held_out}: no pair is left to train on")
    if args.lora:
        model = with_lora(model, args)
    sampler = dpo_fast.PackedSampler(dpo_fast.packed_lengths(examples[:n_train]), args.token_budget, seed=args.seed)
    say(
        f"{n_train} pairs to train on, {len(examples) - n_train} held out; {len(sampler)} batches an epoch, "
        f"{sampler.fill:.1%} full"
    )
    refs = references(model, examples, device, args)
    task = Task(model, examples, n_train, refs, dpo_fast.SequenceNumbers(examples), args)
    log = train(task, sampler, args)
    save_results(model, tokenizer, log, name, args)
    say(f"Wrote {args.output / 'model'}, {args.json} and {args.output / 'training.png'}")


def save_results(model: Any, tokenizer: Any, log: Log, name: str, args: argparse.Namespace) -> None:
    """The model (the adapters alone with LoRA) and the picture."""
    new, final = args.output / ".model.new", args.output / "model"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    draw(
        log,
        f"DPO of {name}{f', LoRA {args.lora}' if args.lora else ''} on {args.data.name}",
        args.output / "training.png",
    )


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="DPO: packed batches with shared prompts, references computed once, resumable at any step.",
        formatter_class=HelpFormatter,
    )
    add_common_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("run"), help="folder of everything that is written")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, if there is one")
    parser.add_argument("--pairs", type=positive(int), help="use so many pairs of the data (default: all)")
    parser.add_argument("--held-out", type=share, default=0.1, help="share of the pairs that are only evaluated")
    parser.add_argument("--epochs", type=positive(int), default=1, help="passes over the data")
    parser.add_argument("--steps", type=positive(int), help="optimizer steps, in place of --epochs")
    parser.add_argument("--token-budget", type=positive(int), default=2048, help="tokens of one forward pass")
    parser.add_argument("--accumulate", type=positive(int), default=1, help="forward passes of an optimizer step")
    parser.add_argument("--lora", type=positive(int), metavar="RANK", help="train LoRA adapters (default: all weights)")
    parser.add_argument("--loss-type", choices=LOSSES, default="sigmoid", help="see docs/losses.md")
    parser.add_argument("--warmup", type=share, default=0.1, help="share of the steps in which the rate rises")
    parser.add_argument("--weight-decay", type=not_negative, default=0.0, help="of AdamW")
    parser.add_argument("--max-grad-norm", type=not_negative, default=1.0, help="0: no clipping")
    parser.add_argument(
        "--evaluate-every", type=positive(int), default=50, metavar="STEPS", help="on the pairs held out"
    )
    parser.add_argument("--save-every", type=positive(int), default=50, metavar="STEPS", help="a checkpoint")
    parser.add_argument("--json", type=Path, help="the log, one JSON object a line (default: log.jsonl in --output)")
    args = parser.parse_args()
    args.json = args.json or args.output / "log.jsonl"
    args.dtype = getattr(torch, args.dtype)
    return args


def main() -> int:
    """Trains; a mistake in the input ends it with one sentence and status 2."""
    try:
        run(parse_args())
    except DemoError as error:
        print(f"train_dpo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
