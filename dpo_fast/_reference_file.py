"""Reference log-probs on disk: one safetensors file that says what data and which model they are of.

The digests are SHA-256 over everything that the numbers depend on but rounding: the token ids of every sequence (no
tokenizer: equal ids are equal data) and the model's configuration and all the bytes of its weights, by name. Reading
all of them takes well below the time of one batch; a sample would miss an edited layer. Adapters that are off are left
out, so a model gives one digest before and after it is wrapped for LoRA.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KEY = "ref_logps"
_PREFIX = "dpo_fast."
# What each part of the identity means to the user.
_PARTS = {
    "version": "version of this file format",
    "data": "data (token ids, their order, or where they are cut)",
    "model": "model (configuration or weights)",
    "adapters": "state of the adapters (on or off)",
    "arithmetic": "arithmetic (autocast)",
}
# Where the files are or which library wrote them changes no log-prob; the weights' own types are in the digest.
_NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "use_cache", "output_hidden_states", "return_dict")


def identity_of(model: Any, sequences: Iterable[tuple[list[int], list[int]]], adapters: bool) -> dict[str, str]:
    """What reference log-probs are of: parts to compare, each a text."""
    device = next(model.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    return {
        "version": "1",
        "data": data_digest(sequences),
        "model": model_digest(model, adapters),
        "adapters": "on" if adapters else "off",
        "arithmetic": autocast,
    }


def data_digest(sequences: Iterable[tuple[list[int], list[int]]]) -> str:
    """Of the sequences' prompts and completions, in their order."""
    digest = hashlib.sha256()
    for prompt, completion in sequences:
        digest.update(array("q", [len(prompt), len(completion), *prompt, *completion]))
    return digest.hexdigest()


def model_digest(model: Any, adapters: bool) -> str:
    """Of the configuration and the weights; of the adapters' own only if `adapters`."""
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    skipped = () if adapters else tuple(_adapter_prefixes(model))
    named = {_bare(name): tensor for name, tensor in _state(model).items() if not name.startswith(skipped)}
    seen = set()
    for name, tensor in sorted(named.items()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
        place = (whole.data_ptr(), whole.shape, whole.stride(), whole.dtype)
        if whole.device.type != "meta" and place in seen:
            continue  # tied weights
        seen.add(place)
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        raw: Any = whole.reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
        digest.update(raw)
    return digest.hexdigest()


def _state(model: Any) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def _adapter_prefixes(model: Any) -> list[str]:
    """How the names of PEFT's own weights begin: its layers list the attributes that hold them."""
    found = []
    for name, module in model.named_modules():
        own = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        found += [f"{name}.{attribute}" if name else attribute for attribute in own]
    return found


def _bare(name: str) -> str:
    """A weight's name in the model that PEFT has wrapped."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def check_writable(path: Path) -> None:
    """Fails before the work, not after it.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: the folder does not exist.
    """
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("references in a file need safetensors: pip install safetensors") from error
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path {path}: its folder does not exist")


def read(path: Path, identity: dict[str, str], n_sequences: int) -> Tensor:
    """The log-probs in the file, [S].

    Raises:
        ValueError: no file of references, or it is of something else; the message says which parts differ.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            logps: Tensor | None = file.get_tensor(_KEY) if _KEY in file.keys() else None  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path {path}: this is no safetensors file ({error})") from None
    if logps is None:
        raise ValueError(f"path {path}: there is no tensor {_KEY} in this file")
    others = [text for part, text in _PARTS.items() if metadata.get(_PREFIX + part) != identity[part]]
    if others or logps.shape != (n_sequences,):
        raise ValueError(
            f"path {path}: these references are of another {', another '.join(others or ['number of sequences'])}; "
            "give another path, or remove the file to compute them again"
        )
    return logps


def write(path: Path, logps: Tensor, identity: dict[str, str]) -> None:
    """Puts the file in place whole: one that is there was written to its end."""
    from safetensors.torch import save

    data = save({_KEY: logps.contiguous()}, metadata={_PREFIX + part: text for part, text in identity.items()})
    replace_file(path, data)


def replace_file(path: Path, data: bytes) -> None:
    """Writes beside the file, to the disk, then takes its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
