"""The report of train_dpo.py: a table, a picture, and every number as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

Report = dict[str, Any]

RUNS = ("naive", "dpo_fast")
COLORS = {"naive": "#d98c3f", "dpo_fast": "#1f5f99"}
LOSS_COLOR, REST_COLOR = "#b5443a", "#c9ced4"
LOSS_FROM = {"logits": "the logits", "fused": "the hidden states"}
# The kernel counts resident pages in batches, so a growth below this cannot be told from none.
SMALLEST_MB = 1.0
# The model's and the optimizer's work is the same in both runs: a larger ratio of their times comes from elsewhere.
QUIET_RATIO = 1.1


def make_report(
    settings: dict[str, Any],
    steps: dict[str, dict[str, list[float]]],
    rewards: dict[str, Any],
    loss_tolerance: float,
) -> Report:
    """Adds medians, ratios and the comparison of the loss curves to what was measured."""
    summary = {
        run: {
            "step_ms": median(steps[run]["step_ms"]),
            "loss_ms": median(steps[run]["loss_ms"]),
            "rest_ms": median(map(float.__sub__, steps[run]["step_ms"], steps[run]["loss_ms"])),
            "loss_peak_mb": max(steps[run]["loss_peak_mb"]),
        }
        for run in RUNS
    }
    naive, fast = (summary[run] for run in RUNS)
    differences = {
        key: max_or_nan([abs(a - b) for a, b in zip(*(steps[run][key] for run in RUNS), strict=True)])
        for key in ("loss", "margin")
    }
    return {
        "settings": settings,
        "summary": summary,
        "ratios": {
            "step_ms": naive["step_ms"] / fast["step_ms"],
            "loss_ms": naive["loss_ms"] / fast["loss_ms"],
            "rest_ms": naive["rest_ms"] / fast["rest_ms"],
            "loss_peak_mb": naive["loss_peak_mb"] / max(fast["loss_peak_mb"], SMALLEST_MB),
        },
        "largest_loss_difference": differences["loss"],
        "largest_margin_difference": differences["margin"],
        "loss_tolerance": loss_tolerance,
        "losses_agree": differences["loss"] <= loss_tolerance,
        "rewards": rewards,
        "steps": steps,
    }


def max_or_nan(values: list[float]) -> float:
    """Returns the largest value, or NaN if there is one: max() would lose it."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def print_table(report: Report) -> None:
    """Prints what the two runs cost and what they reached."""
    summary, ratios, rewards = report["summary"], report["ratios"], report["rewards"]
    few = summary["dpo_fast"]["loss_peak_mb"] < SMALLEST_MB
    rows = [
        ("per step", *RUNS, "ratio"),
        ("whole step, median", *milliseconds(summary, "step_ms"), f"{ratios['step_ms']:.2f}x"),
        ("loss forward + backward, median", *milliseconds(summary, "loss_ms"), f"{ratios['loss_ms']:.1f}x"),
        ("model and optimizer, median", *milliseconds(summary, "rest_ms"), f"{ratios['rest_ms']:.2f}x"),
        (
            "peak extra memory of the loss",
            *(f"{summary[run]['loss_peak_mb']:.1f} MB" for run in RUNS),
            f"{'>' if few else ''}{ratios['loss_peak_mb']:.0f}x",
        ),
    ]
    print()
    print_rows(rows)
    if not 1 / QUIET_RATIO <= ratios["rest_ms"] <= QUIET_RATIO:
        print(
            "model and optimizer did the same work in both runs, but not in the same time: probably the machine was\n"
            "busy with something else. Compare the rows of the loss; the whole step says little here."
        )
    n_pairs = report["settings"]["pairs"]
    before, after = rewards["before"], rewards["after"]
    print()
    print_rows(
        [
            (f"rewards over {n_pairs} training pairs", "before", "naive, after", "dpo_fast, after"),
            ("reward accuracy", *(f"{r['accuracy']:.1%}" for r in (before, *(after[run] for run in RUNS)))),
            ("mean margin", *(f"{r['margin']:+.4f}" for r in (before, *(after[run] for run in RUNS)))),
        ]
    )
    print("before training the policy is the reference: every reward is 0, so no chosen one is the larger\n")
    if report["settings"]["dtype"] == "float32":
        verdict = "agree" if report["losses_agree"] else "DO NOT AGREE"
        verdict = f"{verdict}: {report['loss_tolerance']:g} is allowed"
    else:
        verdict = f"{report['settings']['dtype']} rounds differently in the two, so nothing is required"
    print(f"largest difference of the two loss curves: {report['largest_loss_difference']:.1e} ({verdict})\n")


def milliseconds(summary: dict[str, dict[str, float]], key: str) -> list[str]:
    """Formats one time of each run."""
    return [f"{summary[run][key]:,.1f} ms" for run in RUNS]


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """Prints a table with its first row as the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, (label, *cells) in enumerate(rows):
        aligned = [cell.rjust(max(width, 12)) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([label.ljust(max(widths[0], 32)), *aligned]))
        if number == 0:
            print("-" * (sum(max(width, 12) + 2 for width in widths[1:]) + max(widths[0], 32)))


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json and report.png."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, folder / "report.png")


def draw(report: Report, path: Path) -> None:
    """Draws the loss curves, the margin curves and where a step's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (loss_axes, margin_axes, time_axes) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    settings, summary, steps = report["settings"], report["summary"], report["steps"]
    figure.suptitle(
        f"DPO on {settings['model']}, {settings['dtype']}, {settings['hardware']}\n"
        f"{settings['batch_size']} pairs a step, up to {settings['max_length']} tokens, "
        f"vocabulary {settings['vocabulary']:,}, loss from {LOSS_FROM[settings['head']]}",
        fontsize=12,
    )
    numbers = range(1, settings["steps"] + 1)
    curves = (
        (loss_axes, "loss", "DPO loss [nats]", math.log(2), "ln 2: no preference learned"),
        (margin_axes, "margin", "reward margin of the batch [nats]", 0.0, "0: policy = reference"),
    )
    for axes, key, label, level, level_name in curves:
        axes.axhline(level, color="#888888", linewidth=0.8, linestyle=":", label=level_name)
        # a broad line under a thin one: both show where they coincide
        axes.plot(numbers, steps["naive"][key], color=COLORS["naive"], linewidth=5, alpha=0.55, label="naive")
        axes.plot(
            numbers, steps["dpo_fast"][key], color=COLORS["dpo_fast"], linewidth=1.5, marker="o", ms=3, label="dpo_fast"
        )
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    loss_axes.set_title(f"Loss (largest difference {report['largest_loss_difference']:.0e})", fontsize=11)
    margin_axes.set_title("Chosen minus rejected reward", fontsize=11)

    loss_ms = [summary[run]["loss_ms"] for run in RUNS]
    rest_ms = [summary[run]["rest_ms"] for run in RUNS]
    time_axes.bar(RUNS, rest_ms, width=0.55, color=REST_COLOR, label="model and optimizer")
    bars = time_axes.bar(RUNS, loss_ms, bottom=rest_ms, width=0.55, color=LOSS_COLOR, label="loss and its gradient")
    labels = [f"loss {summary[run]['loss_ms']:,.0f} ms\n+{summary[run]['loss_peak_mb']:,.0f} MB" for run in RUNS]
    time_axes.bar_label(bars, labels=labels, padding=4, color=LOSS_COLOR)
    for x, height in enumerate(rest_ms):
        time_axes.text(x, height / 2, f"{height:,.0f} ms", ha="center", va="center", color="#444444")
    time_axes.set_ylabel("time per step, median [ms]")
    time_axes.set_ylim(0, 1.4 * max(map(sum, zip(loss_ms, rest_ms, strict=True))))
    time_axes.legend(frameon=False, loc="upper center")
    time_axes.set_title(f"Where a step's time goes (loss {report['ratios']['loss_ms']:.1f}x faster)", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
