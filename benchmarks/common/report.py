"""report.md from the records of a run: the targets, what could not run, and every figure with its formula."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import peers
from benchmarks.common.formulas import FORWARD, LEGEND, copy_rate, read_rate
from benchmarks.common.targets import Book, Target, milliseconds, targets_of
from dpo_fast.bench import Case

TITLES = {
    peers.DPO: "`dpo_loss`, from logits",
    peers.THREADS: "`dpo_loss` with all threads and with one",
    peers.VARYING: "`dpo_loss` on a batch of another length every time, one thread",
    peers.SEQUENCES: "`sequence_logps`, from logits",
    peers.TOKENS: "`token_logps`, from logits",
    peers.LINEAR: "`linear_dpo_loss`, from hidden states and the LM head",
    peers.TOLERANCE: "`grad_tolerance`, the head's backward pass; `vs dpo_fast`: over the exact way",
    peers.HUGE_PAGES: "`dpo_loss`, where torch asks for huge pages (THP_MEM_ALLOC_ENABLE=1)",
    peers.PREFERENCE: "`preference_loss`, from log-probs",
}


def write_report(results: dict[str, Any], folder: Path, pictures: Sequence[tuple[str, str]]) -> str:
    """Writes report.md and returns its text. `pictures`: file names in the folder and what they show."""
    book = Book(results["records"])
    targets = targets_of(results["records"], results["device"])
    sections = [
        heading(results),
        targets_section(targets),
        problems_section(results),
        "\n\n".join(f"![{caption}]({name})\n\n{caption}" for name, caption in pictures),
        step_section(results.get("step")),
        conventions(),
        *(level_section(book, level) for level in TITLES),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (folder / "report.md").write_text(text)
    return text


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its heading."""
    head, *rest = lines
    marks = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rest))


def heading(results: dict[str, Any]) -> str:
    """What was measured, where and when."""
    facts = {"date": results["date"], "commit": results["commit"]} | results["machine"] | results["versions"]
    name = results["machine"].get("GPU", results["machine"]["processor"])
    quick = "\n\nA quick run: few cases, few rounds. Its figures are not to be quoted." if results["quick"] else ""
    return f"# Benchmarks on {name}{quick}\n\n" + table([("", ""), *((k, str(v)) for k, v in facts.items())])


def targets_section(targets: Sequence[Target]) -> str:
    """One line per target."""
    lines = [("target", "bound", "found", "", "beside (medians)")]
    lines += [(t.what, t.bound, t.figure, t.verdict, t.beside) for t in targets]
    counts = ", ".join(
        f"{sum(t.verdict == verdict for t in targets)} {verdict}"
        for verdict in dict.fromkeys(t.verdict for t in targets)
    )
    return f"## Targets\n\n{counts}.\n\n{table(lines)}"


def problems_section(results: dict[str, Any]) -> str:
    """Candidates that were not timed, with the reason, and files that failed."""
    cases: dict[tuple[str, str], list[str]] = {}
    for record in results["records"]:
        if record["problem"]:
            cases.setdefault((record["candidate"], record["problem"]), []).append(
                f"{record['level']} {record['case_name']} {record['work']}"
            )
    lines = [("not timed", "reason", "where")]
    for (candidate, problem), where in cases.items():
        shown = where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"
        lines.append((candidate, problem.replace("|", "\\|"), shown))
    lines += [(name, "the file did not run to its end", "") for name in results.get("failed_files", [])]
    if len(lines) == 1:
        return "## Not timed\n\nEvery candidate ran and agreed with naive torch on every case."
    return f"## Not timed\n\n{table(lines)}"


def conventions() -> str:
    """How to read the tables below."""
    return f"""## How to read the figures

{LEGEND}. Times are medians of calls taken in turn, one call of each candidate a round, on copies of the same tensors
(several, used in turn and refilled before the next call). Ratios of targets are medians over the rounds of both times'
ratio in a round. `middle half` is between the quartiles, in ms. `GB/s` is the bytes of the formula over the time, the
same formula for every candidate of a row group: what has to be moved, not what a candidate moves. `of the limit` is
that rate over the plain read's (forward), the copy's (forward + backward), or the operations over those of the three
bare products. `vs dpo_fast` is a candidate's time over that of the first line. `difference` is the relative difference
(Euclidean norms; the largest of value and gradients) from naive torch, compared before anything was timed. `peak
extra` is the growth of a fresh process's resident memory during one call (CPU) or the allocator's (CUDA)."""


def level_section(book: Book, level: str) -> str:
    """A table for each case of a level."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in book.records:
        if record["level"] == level and record["median_s"] is not None:
            groups.setdefault((record["case_name"], record["work"]), []).append(record)
    if not groups:
        return ""
    parts = [f"## {TITLES[level]}"]
    for (case_name, work), records in groups.items():
        parts.append(f"### {case_name}, {work}\n\n{case_table(records, work)}")
    return "\n\n".join(parts)


def case_table(records: Sequence[dict[str, Any]], work: str) -> str:
    """All candidates of one case."""
    first = records[0]["median_s"]
    limit = limit_rate(records, work)
    flops = any(record["flops"] for record in records)
    heads = (
        "",
        "median ms",
        "middle half",
        "GFLOP/s" if flops else "GB/s",
        "of the limit",
        "vs dpo_fast",
        "difference",
        "peak extra",
    )
    lines = [(*heads, "flops" if flops else "bytes")]
    for record in records:
        amount, formula = (
            (record["flops"], record["flops_formula"]) if flops else (record["bytes"], record["bytes_formula"])
        )
        rate = None if not amount else amount / record["median_s"]
        own_limit = record["candidate"].startswith(peers.LIMITS) or peers.ONE_THREAD in record["candidate"]
        unit = "GFLOP" if flops else "MB"
        lines.append(
            (
                record["candidate"],
                milliseconds(record["median_s"]),
                middle_half(record["samples"]),
                "" if rate is None else f"{rate / 1e9:.1f}",
                "" if rate is None or limit is None or own_limit else f"{rate / limit:.0%}",
                f"{record['median_s'] / first:.2f}x",
                "" if record["difference"] is None else f"{record['difference']:.0e}",
                "" if record["peak_extra_bytes"] is None else f"{record['peak_extra_bytes'] / 1e6:.1f} MB",
                f"{formula} = {amount / (1e9 if flops else 1e6):.4g} {unit}" if amount else "",
            )
        )
    return table(lines)


def middle_half(samples: Sequence[float]) -> str:
    """The quartiles, in ms."""
    if len(samples) < 2:
        return ""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return f"{milliseconds(low)} to {milliseconds(high)}"


def limit_rate(records: Sequence[dict[str, Any]], work: str) -> float | None:
    """Bytes (or operations) a second of the limit that a case's candidates are held against."""
    by_name = {record["candidate"]: record for record in records}
    if peers.PRODUCTS in by_name:
        return float(by_name[peers.PRODUCTS]["flops"] / by_name[peers.PRODUCTS]["median_s"])
    limit = by_name.get(peers.READ if work == FORWARD else peers.COPY)
    if limit is None:
        return None
    return (read_rate if work == FORWARD else copy_rate)(Case(**limit["case"]), limit["median_s"])


def step_section(step: dict[str, Any] | None) -> str:
    """Whole training steps, as benchmarks/step.py measured them."""
    if step is None:
        return ""
    parts = ["## Share of a whole training step", step["settings"]]
    if step.get("demo"):
        lines = [("loss", "step ms", "loss ms", "share of the loss", "step, vs naive", "peak extra of a step", "steps")]
        naive = step["demo"]["naive"]
        for name, found in step["demo"].items():
            lines.append(
                (
                    name,
                    f"{found['step_ms']:.0f}",
                    f"{found['loss_ms']:.0f}",
                    f"{found['loss_ms'] / found['step_ms']:.0%}",
                    f"{naive['step_ms'] / found['step_ms']:.2f}x",
                    f"{found['peak_mb']:.0f} MB",
                    str(found.get("steps", "")),
                )
            )
        parts.append(table(lines))
    if step.get("trl"):
        trl_lines = [("TRL's DPOTrainer", "step ms", "speed-up", "peak extra of a step", "steps")]
        plain = step["trl"]["plain"]
        for name, found in step["trl"].items():
            ratio = f"{plain['step_ms'] / found['step_ms']:.2f}x"
            trl_lines.append(
                (name, f"{found['step_ms']:.0f}", ratio, f"{found['peak_mb']:.0f} MB", str(found.get("steps", "")))
            )
        parts.append(table(trl_lines))
    parts += [f"Not measured: {problem}." for problem in step.get("problems", [])]
    return "\n\n".join(parts)
