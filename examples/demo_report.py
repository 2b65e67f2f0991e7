"""The report of demo.py: two tables, a picture, and every number as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

Report = dict[str, Any]

COLORS = ("#d98c3f", "#e3b98a", "#7da7cf", "#1f5f99")
TOKEN_COLOR = "#b5443a"
# Few small steps cannot move a weight by the tolerance, so what they changed is compared too, in norm. AdamW divides by
# the gradient's size: it turns float32's rounding in weights of tiny gradients into differences near 1e-3.
UPDATE_TOLERANCE = 1e-2


def make_report(
    settings: dict[str, Any],
    columns: dict[str, dict[str, list[float]]],
    weights: dict[str, dict[str, float]],
    token_counts: dict[str, int],
    tolerance: float,
) -> Report:
    """Adds medians, totals, ratios and the comparison with the naive way to what was measured."""
    naive = columns["naive"]
    summary = {}
    for way, found in columns.items():
        summary[way] = {
            "step_s": median(found["step_s"]),
            "total_s": sum(found["step_s"]),
            "tokens": sum(found["tokens"]),
            "peak_mb": max(found["peak_mb"]),
            "times_naive_total": sum(naive["step_s"]) / sum(found["step_s"]),
            # both steps of a ratio were taken one after the other, whatever else the machine did then
            "times_naive_median": median(a / b for a, b in zip(naive["step_s"], found["step_s"], strict=True)),
        }
        if way in weights:
            gaps = [abs(a - b) for a, b in zip(found["loss"], naive["loss"], strict=True)]
            summary[way] |= {"loss_difference": max_or_nan(gaps), "weights": weights[way]}
    compared = [summary[way] for way in weights]
    agree = all(
        max_or_nan([row["loss_difference"], row["weights"]["largest"]]) <= tolerance
        and row["weights"]["relative_to_update"] <= UPDATE_TOLERANCE
        for row in compared
    )
    return {
        "settings": settings,
        "summary": summary,
        "token_counts": token_counts,
        "tolerance": tolerance,
        "agree": agree,
        "columns": columns,
    }


def max_or_nan(values: list[float]) -> float:
    """Returns the largest value, or NaN if there is one: max() would lose it."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def print_tables(report: Report) -> None:
    """Prints what the ways cost, whether they agree, and how many tokens the data needs in each layout."""
    summary, settings = report["summary"], report["settings"]
    ways = list(summary)

    def row(label: str, form: str, key: str) -> tuple[str, ...]:
        return (label, *(form.format(summary[way][key]) if key in summary[way] else "" for way in ways))

    rows = [
        (f"{settings['steps']} steps of {settings['batch_size']} pairs", *ways),
        row("whole step, median", "{:.2f} s", "step_s"),
        row("all steps", "{:.1f} s", "total_s"),
        row("naive / this, all steps", "{:.2f}x", "times_naive_total"),
        row("naive / this, median of steps", "{:.2f}x", "times_naive_median"),
        row("tokens through the model", "{:,}", "tokens"),
        row("peak extra memory of a step", "{:,.0f} MB", "peak_mb"),
        row("loss, largest difference", "{:.1e}", "loss_difference"),
        ("weights, largest difference", *(number(summary[way], "largest") for way in ways)),
        ("weights, relative to update", *(number(summary[way], "relative_to_update") for way in ways)),
    ]
    print()
    print_rows(rows)
    counts = report["token_counts"]
    print()
    print_rows(
        [
            (f"tokens of all {settings['pairs']} pairs", *counts),
            ("number", *(f"{n:,}" for n in counts.values())),
            ("padded / this", *(f"{counts['padded'] / n:.2f}x" for n in counts.values())),
        ]
    )
    if settings["dtype"] == "float32":
        verdict = "agree" if report["agree"] else "DO NOT AGREE"
        allowed = f"{report['tolerance']:g} is allowed, and {UPDATE_TOLERANCE:g} of the update"
        print(f"\nlosses and weights {verdict} ({allowed})\n")
    else:
        print(f"\n{settings['dtype']} rounds differently in each way, so no agreement is required\n")


def number(summary: dict[str, Any], key: str) -> str:
    """One of the differences of the weights, where they are compared."""
    return f"{summary['weights'][key]:.1e}" if "weights" in summary else ""


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """Prints a table with its first row as the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, (label, *cells) in enumerate(rows):
        aligned = [cell.rjust(max(width, 10)) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([label.ljust(max(widths[0], 30)), *aligned]))
        if number == 0:
            print("-" * (sum(max(width, 10) + 2 for width in widths[1:]) + max(widths[0], 30)))


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json and report.png."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, folder / "report.png")


def draw(report: Report, path: Path) -> None:
    """Draws the loss curves, the time of a step and the tokens of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (loss_axes, time_axes, token_axes) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    settings, summary, columns = report["settings"], report["summary"], report["columns"]
    figure.suptitle(
        f"DPO on {settings['model']}, {settings['dtype']}, {settings['hardware']}\n"
        f"{settings['batch_size']} pairs of {settings['data']} a step, up to {settings['max_length']} tokens",
        fontsize=12,
    )
    loss_axes.axhline(math.log(2), color="#888888", linewidth=0.8, linestyle=":", label="ln 2: no preference learned")
    # broad lines under thin ones: all show where they coincide
    for way, color, width in zip(columns, COLORS, (7, 1.2, 4, 1.5), strict=False):
        numbers = range(1, settings["steps"] + 1)
        style = "--" if "loss_difference" not in summary[way] and way != "naive" else "-"
        loss_axes.plot(numbers, columns[way]["loss"], style, color=color, linewidth=width, label=way)
    loss_axes.set(xlabel="step", ylabel="DPO loss [nats]", title="The same losses")
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    loss_axes.grid(alpha=0.25)
    loss_axes.legend(frameon=False)

    times = [summary[way]["step_s"] for way in columns]
    labels = [f"{summary[way]['step_s']:.2f} s\n{summary[way]['times_naive_total']:.2f}x" for way in columns]
    bars = time_axes.bar(list(columns), times, width=0.6, color=COLORS[: len(columns)])
    time_axes.bar_label(bars, labels=labels, padding=4)
    time_axes.set(ylabel="whole step, median [s]", title="Time (and how many times faster, all steps)")
    time_axes.set_ylim(0, 1.3 * max(times))
    time_axes.tick_params(axis="x", rotation=15)

    counts = report["token_counts"]
    bars = token_axes.bar(list(counts), list(counts.values()), width=0.6, color=TOKEN_COLOR, alpha=0.8)
    token_axes.bar_label(bars, labels=[f"{n:,}" for n in counts.values()], padding=4)
    token_axes.set(ylabel="tokens", title=f"Tokens of all {settings['pairs']} pairs")
    token_axes.set_ylim(0, 1.15 * max(counts.values()))
    token_axes.tick_params(axis="x", rotation=15)
    figure.savefig(path, dpi=120)
    plt.close(figure)
