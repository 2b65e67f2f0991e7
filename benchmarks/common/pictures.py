"""The report's pictures: speed against the peers, share of the limit, time and memory as V and T grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP
from benchmarks.common.targets import Book, share_of_limit
from dpo_fast.bench import Case

COLORS = {
    peers.INPLACE: "#1f77b4",
    peers.FAST: "#6baed6",
    peers.NAIVE: "#7f7f7f",
    peers.COMPILE: "#ff7f0e",
    peers.TRL: "#2ca02c",
    peers.TRL_TRITON: "#98df8a",
    peers.TRL_CHUNKED: "#2ca02c",
    peers.CROSS_ENTROPY: "#9467bd",
    peers.LIGER: "#d62728",
}


def draw_all(results: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draws what the records hold; returns file names and captions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    book, device = Book(results["records"]), results["device"]
    found = []
    for name, draw in (("speed.png", draw_speed), ("limit.png", draw_limit), ("growth.png", draw_growth)):
        figure, caption = draw(plt, book, device)
        if figure is None:
            continue
        figure.suptitle(results["machine"].get("GPU", results["machine"]["processor"]), fontsize=10, color="#666666")
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
        found.append((name, caption))
    return found


def label(case: Case) -> str:
    """A case on an axis."""
    ignored = f"\n{case.ignored:.0%} ignored" if case.ignored else ""
    return f"{case.model}\n{case.rows} x {case.V}\n{case.dtype}{ignored}"


def draw_speed(plt: Any, book: Book, device: str) -> tuple[Any, str]:
    """How many times the peers' time dpo_fast goes into: bars by case, for logits and for the linear head."""
    panels: list[tuple[str, str, str, Sequence[str], list[Case]]] = [
        ("from logits", peers.DPO, peers.INPLACE, peers.LOGITS_PEERS, shapes.target_cases(device)),
        ("from hidden states", peers.LINEAR, peers.FAST, peers.LINEAR_PEERS, shapes.linear_cases(device)),
    ]
    panels = [
        (*panel[:4], cases)
        for panel in panels
        if (cases := [c for c in panel[4] if book.seconds(panel[1], STEP, c, panel[2]) is not None])
    ]
    if not panels:
        return None, ""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.8), layout="constrained", squeeze=False)
    for axes, (title, level, own, others, cases) in zip(all_axes[0], panels, strict=True):
        shown = [peer for peer in others if any(book.seconds(level, STEP, case, peer) is not None for case in cases)]
        for i, peer in enumerate(shown):
            ratios = [book.ratio(level, STEP, case, peer, own) or 0.0 for case in cases]
            places = [j + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for j in range(len(cases))]
            bars = axes.bar(places, ratios, 0.8 / len(shown), color=COLORS[peer], label=peer)
            axes.bar_label(bars, [f"{r:.1f}" if r else "" for r in ratios], fontsize=7, padding=1)
        axes.axhline(1, color="#444444", linewidth=0.8)
        axes.set_xticks(range(len(cases)), [label(case) for case in cases], fontsize=7)
        axes.set_ylabel("time over dpo_fast's")
        axes.set_title(f"DPO loss {title}, forward + backward", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    return figure, "Time of the peers over dpo_fast's, DPO loss forward + backward (logits: gradient in place)."


def draw_limit(plt: Any, book: Book, device: str) -> tuple[Any, str]:
    """Bandwidth over the limit's for logits; the bare products' time over dpo_fast's for the linear head."""
    bars: list[tuple[str, float, str]] = []
    for work, own, limit, color in (
        (FORWARD, peers.FAST, peers.READ, "#6baed6"),
        (STEP, peers.INPLACE, peers.COPY, "#1f77b4"),
    ):
        for case in [*shapes.target_cases(device), *shapes.ignored_cases(device)]:
            seconds = book.seconds(peers.DPO, work, case, own)
            share = share_of_limit(case, work, seconds, book.seconds(peers.DPO, work, case, limit))
            if share is not None:
                bars.append((f"{work}: {label(case)}".replace("\n", ", "), share, color))
    for case in shapes.linear_cases(device):
        share = book.ratio(peers.LINEAR, STEP, case, peers.PRODUCTS, peers.FAST)
        if share is not None:
            bars.append((f"linear head: {label(case)}".replace("\n", ", "), share, "#9467bd"))
    if not bars:
        return None, ""
    bars.reverse()
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(bars)), layout="constrained")
    drawn = axes.barh([name for name, _, _ in bars], [v for _, v, _ in bars], color=[color for _, _, color in bars])
    axes.bar_label(drawn, [f"{value:.0%}" for _, value, _ in bars], fontsize=7, padding=2)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("share of the limit")
    return figure, (
        "Share of the limit: a plain read's bandwidth (forward), a copy's (forward + in-place backward), the three "
        "bare matrix products (linear head)."
    )


def draw_growth(plt: Any, book: Book, device: str) -> tuple[Any, str]:
    """Time and peak extra memory over V and over T, on log axes."""
    columns = (
        ("vocabulary V", shapes.growth_by_vocab(device), lambda case: case.V),
        ("tokens of a sequence T", shapes.growth_by_length(device), lambda case: case.length),
    )
    names = (peers.INPLACE, peers.FAST, *peers.LOGITS_PEERS)
    figure, all_axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    points = 0
    for column, (what, cases, size) in enumerate(columns):
        for row, (quantity, value) in enumerate(
            (
                ("forward + backward [ms]", lambda case, name: scaled(book.seconds(peers.DPO, STEP, case, name), 1e3)),
                ("peak extra memory [MB]", lambda case, name: scaled(book.memory(peers.DPO, STEP, case, name), 1e-6)),
            )
        ):
            axes = all_axes[row][column]
            for name in names:
                found = [(size(case), value(case, name)) for case in cases]
                found = [(x, y) for x, y in found if y]
                points += len(found)
                if found:
                    axes.plot(*zip(*found, strict=True), marker="o", ms=4, color=COLORS[name], label=name)
            axes.set(xlabel=what, ylabel=quantity, xscale="log", yscale="log")
            axes.grid(alpha=0.25, which="both")
            fixed = f"{cases[0].rows} tokens" if column == 0 else f"{cases[0].model}, V = {cases[0].V}"
            axes.set_title(f"{fixed}, {cases[0].dtype}", fontsize=9)
    if not points:
        plt.close(figure)
        return None, ""
    all_axes[0][0].legend(frameon=False, fontsize=8)
    return figure, "DPO loss from logits, forward + backward: time and peak extra memory as V and T grow."


def scaled(value: float | None, factor: float) -> float | None:
    """A value in another unit."""
    return None if value is None else value * factor
