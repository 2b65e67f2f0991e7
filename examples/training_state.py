"""What survives the end of a training process: checkpoints, whole or absent, and a log that agrees with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from preference_data import DemoError

CHECKPOINT = "checkpoint.pt"


def write_whole(path: Path, write: Any) -> None:
    """Calls write(file) on a file beside path, brings it to the disk, then gives it the name: never half a file."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    if hasattr(os, "O_DIRECTORY"):  # the name too
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint."""
    write_whole(folder / CHECKPOINT, lambda file: torch.save(state, file))


def load_checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The folder's checkpoint, of a run with these settings.

    Raises:
        DemoError: it is of a run with other settings.
    """
    state: dict[str, Any] = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    found = state["settings"]
    others = [f"{k} {found.get(k)!r} (now {settings.get(k)!r})" for k in settings if found.get(k) != settings[k]]
    if others:
        raise DemoError(f"--resume: the run in {folder} has another {', another '.join(others)}")
    return state


class Log:
    """One JSON object a line; each has the step it belongs to.

    Args:
        path: continued up to `step`, the checkpoint's: what a killed process logged after it will be logged again.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        if step and path.exists():
            lines = path.read_text().split("\n")[:-1]  # a line that was cut off has no end
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_whole(path, lambda file: file.write(text.encode()))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Adds a line, at once."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def of(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one quantity."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]
