"""The picture of a training run: loss, margins, accuracy and speed by step."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

from training_state import Log

TRAIN_COLOR, HELD_OUT_COLOR = "#1f5f99", "#d98c3f"
WINDOW = 10  # steps
PANELS = (
    ("loss", "DPO loss [nats]", math.log(2), "ln 2: no preference learned"),
    ("margin", "reward margin [nats]", 0.0, "0: policy = reference"),
    ("accuracy", "share of pairs with the larger chosen reward", 0.5, "chance"),
    ("tokens_per_second", "tokens per second", None, ""),
)


def running_mean(values: list[float]) -> list[float]:
    """Of each value and those before it, WINDOW at most."""
    return [mean(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]


def draw(log: Log, title: str, path: Path) -> None:
    """Draws what the log holds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, all_axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (key, label, level, level_name) in zip(all_axes.flat, PANELS, strict=True):
        if level is not None:
            axes.axhline(level, color="#888888", linewidth=0.8, linestyle=":", label=level_name)
        steps, values = log.of(key)
        axes.plot(steps, values, color=TRAIN_COLOR, linewidth=0.8, alpha=0.4, label="training batch")
        axes.plot(steps, running_mean(values), color=TRAIN_COLOR, linewidth=2, label=f"mean of the last {WINDOW}")
        steps, values = log.of(f"held_out_{key}")
        if steps:
            axes.plot(steps, values, color=HELD_OUT_COLOR, marker="o", linewidth=2, label="held out")
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
