"""The benchmark suite's own arithmetic, its report, and the quick benchmark on tiny logits. Nothing here is a timing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.common import formulas, harness, memory, peers, report, shapes, targets
from benchmarks.common.formulas import FORWARD, STEP
from dpo_fast import bench, cli
from dpo_fast.bench import Case

TINY = Case("tiny", "float32", 4, 8, 0.5, vocab=34)
FILES = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))


# --- inputs and formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.9])
def test_share_of_ignored_tokens(ignored):
    case = replace(TINY, length=100, ignored=ignored)
    inputs = bench.make_inputs(case)
    kept = inputs.targets != bench.IGNORE_INDEX
    assert kept.sum() == case.kept == round(400 * (1 - ignored))
    assert inputs.logits.shape == (4, 100, 34)
    assert 2.5 < inputs.logits.std() < 3.5
    if ignored:  # prompt in front, padding behind
        assert not kept[:, 0].any()
        assert not kept[:, -1].any()


def test_bytes_and_flops():
    case = Case("Llama-3", "bfloat16", 4, 128, 0.5)
    assert (case.rows, case.kept, case.V, case.itemsize) == (512, 256, 128256, 2)
    assert formulas.read_bytes(case).amount == 512 * 128256 * 2
    assert formulas.copy_bytes(case).amount == 2 * 512 * 128256 * 2
    assert formulas.logits_bytes(case, FORWARD) == (256 * 128256 * 2, "K·V·b")
    # kept rows are read in both passes; zeros are written for the ignored ones
    assert formulas.logits_bytes(case, STEP) == ((2 * 256 + 512) * 128256 * 2, "(2·K + R)·V·b")
    full = replace(case, ignored=0.0)
    assert formulas.logits_bytes(full, STEP).amount == 3 * formulas.read_bytes(full).amount
    linear = replace(case, hidden=64)
    assert formulas.products_flops(linear).amount == 3 * 2 * 256 * 64 * 128256
    assert formulas.gradient_bytes(linear).amount == (512 + 128256) * 64 * 2


def test_relative_difference():
    x = torch.randn(7, 5)
    assert bench.relative_difference(x, x) == 0
    assert bench.relative_difference(1.01 * x, x) == pytest.approx(0.01, rel=1e-3)
    assert math.isnan(bench.relative_difference(torch.full_like(x, math.nan), x))


def test_pool_gives_copies_in_turn_and_refills_them():
    original = torch.randn(10)
    pool = bench.Pool(original, 3 * original.nbytes)
    seen = set()
    for _ in range(6):
        x = pool.take()
        assert torch.equal(x, original)
        seen.add(x.data_ptr())
        x.zero_()
    assert len(seen) == 3
    assert original.data_ptr() not in seen


def test_interleave_takes_turns():
    order = []
    candidates = [bench.Candidate(name, lambda _, name=name: order.append(name)) for name in "abc"]
    samples = bench.interleave(candidates, bench.Pool(torch.zeros(1)), bench.Clock("cpu"), rounds=20)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(each) == list("abc") for each in rounds)  # every candidate once a round,
    assert len(set(rounds)) > 3  # and none always after the same one
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 20)


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [FORWARD, STEP])
@pytest.mark.parametrize(
    ("level", "names"),
    [
        (peers.TOKENS, (peers.FAST, peers.INPLACE, peers.EXTRAS, peers.TRL)),
        (peers.SEQUENCES, (peers.FAST, peers.INPLACE, peers.PACKED)),
        (peers.DPO, (peers.FAST, peers.INPLACE, peers.TRL)),
        (peers.PREFERENCE, (peers.FAST,)),
        (peers.LINEAR, (peers.FAST, peers.CROSS_ENTROPY, peers.CHUNKED_CROSS_ENTROPY, peers.TRL_CHUNKED)),
    ],
)
def test_candidates_agree(level, names, work):
    """What is timed computes the same: every candidate without a compiler, against naive torch."""
    case = replace(TINY, hidden=16) if level == peers.LINEAR else TINY
    inputs = peers.make_level_inputs(level, case)
    value, grads = peers.build(level, peers.NAIVE, inputs, work)(inputs.x.clone())
    for name in names:
        try:
            found, found_grads = peers.build(level, name, inputs, work)(inputs.x.clone())
        except peers.AbsentError:
            continue
        assert bench.relative_difference(found, value) < 1e-5, name
        for a, b in zip(found_grads, grads, strict=True):
            assert bench.relative_difference(a, b) < 1e-4, name


def test_a_peer_that_fails_is_named_and_a_wrong_one_not_timed(monkeypatch):
    def broken(level, name, inputs, work):
        if name == peers.TRL:
            raise peers.AbsentError("trl is not installed")
        if name == peers.COMPILE:
            raise RuntimeError("no compiler\nwith a long story")
        call = build(level, name, inputs, work)
        return (lambda x: (2 * call(x)[0], call(x)[1])) if name == peers.FAST else call

    build = peers.build
    monkeypatch.setattr(peers, "build", broken)
    recorder = harness.Recorder(quick=True)
    names = [peers.INPLACE, peers.FAST, peers.NAIVE, peers.COMPILE, peers.TRL, peers.TRL_TRITON, peers.READ]
    harness.compare(FakeBenchmark(), recorder, peers.DPO, TINY, STEP, names)
    found = {record["candidate"]: record for record in recorder.finish()}
    assert found[peers.TRL]["problem"] == "trl is not installed"
    assert found[peers.COMPILE]["problem"] == "failed (RuntimeError: no compiler)"
    assert found[peers.TRL_TRITON]["problem"] == "needs a CUDA device"
    assert "differs from naive torch" in found[peers.FAST]["problem"]
    for name in (peers.INPLACE, peers.NAIVE, peers.READ):
        assert found[name]["median_s"] > 0
        assert len(found[name]["samples"]) >= 3


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_pairs_and_weights_reach_every_candidate(work):
    inputs = peers.make_level_inputs(peers.VARYING, TINY)
    values = {
        name: peers.build(peers.VARYING, name, inputs, work)(inputs.x.clone())
        for name in (peers.FAST, peers.NAIVE, peers.FAST + peers.WEIGHTED, peers.NAIVE + peers.WEIGHTED)
    }
    for more in ("", peers.WEIGHTED):
        value, grads = values[peers.NAIVE + more]
        found, found_grads = values[peers.FAST + more]
        assert bench.relative_difference(found, value) < 1e-5
        assert all(bench.relative_difference(a, b) < 1e-4 for a, b in zip(found_grads, grads, strict=True))
    assert bench.relative_difference(values[peers.FAST][0], values[peers.FAST + peers.WEIGHTED][0]) > 0.01


VARYING = replace(TINY, n_seqs=2, length=40, ignored=0.0)
VARYING_NAMES = [name + more for more in ("", peers.WEIGHTED) for name in (peers.FAST, peers.NAIVE)]


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_calls_of_varying_shapes(monkeypatch, work):
    """Every length is called once a pass and after others; all candidates see the same ones."""
    seen = {name: [] for name in VARYING_NAMES}
    build = peers.build

    def watched(level, name, inputs, work):
        call = build(level, name, inputs, work)
        return lambda x: (seen[name].append(tuple(x.shape)), call(x))[1]

    monkeypatch.setattr(peers, "build", watched)
    recorder = harness.Recorder(quick=True)
    fake = FakeBenchmark()
    threads = torch.get_num_threads()
    harness.compare_varying(fake, recorder, VARYING, work, VARYING_NAMES, passes=2)
    assert torch.get_num_threads() == threads
    lengths, warm_up = (each[::20] for each in shapes.varying_lengths(VARYING))
    assert set(lengths).isdisjoint(warm_up)
    for shapes_seen in seen.values():
        assert [shape[1] for shape in shapes_seen[: len(warm_up)]] == warm_up
        timed = shapes_seen[len(warm_up) :]
        assert sorted(timed) == sorted(2 * [(2, length, 34) for length in lengths])
        assert timed == seen[peers.FAST][len(warm_up) :]
    for record in recorder.finish():
        assert len(record["samples"]) == 2 * len(lengths)
        assert record["median_s"] > 0
        assert record["difference"] < 1e-5
        assert record["bytes"] is None  # no one number of bytes
    assert set(fake.extra_info["median_ms"]) == set(VARYING_NAMES)


def test_a_wrong_result_on_varying_shapes_is_not_timed(monkeypatch):
    build = peers.build

    def broken(level, name, inputs, work):
        call = build(level, name, inputs, work)
        return (lambda x: (2 * call(x)[0], call(x)[1])) if name == peers.FAST + peers.WEIGHTED else call

    monkeypatch.setattr(peers, "build", broken)
    with pytest.raises(AssertionError, match="dpo_fast, pairs and weights differs from naive torch"):
        harness.compare_varying(FakeBenchmark(), harness.Recorder(quick=True), VARYING, FORWARD, VARYING_NAMES)


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as is used."""

    def __init__(self):
        self.extra_info = {}
        self.group = ""

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="reads the peak resident memory as Linux reports it")
def test_memory_in_a_fresh_process():
    case = Case("tiny", "float32", 2, 512, vocab=16000)
    records = [harness._record(peers.DPO, case, STEP, name) for name in (peers.INPLACE, peers.FAST, peers.NAIVE)]
    memory.memory_of_candidates(records)
    logits = case.rows * case.V * 4
    inplace, allocated, naive = (record.peak_extra_bytes for record in records)
    assert inplace < 0.05 * logits
    assert 0.95 * logits < allocated < 1.1 * logits
    assert naive > 1.9 * logits


# --- targets ----------------------------------------------------------------------------------------------------------


def synthetic(
    read=8.0, forward=10.0, step=20.0, naive=300.0, compiled=80.0, one_thread=38.0, read_one_thread=16.0, varying=0.9
):
    """Records of every CPU target; times in ms, alike on all cases."""
    records = []

    def add(level, work, case, candidate, ms, extra=None):
        record = harness._record(level, case, work, candidate)
        record.median_s, record.samples, record.peak_extra_bytes = ms / 1e3, [ms / 1e3], extra
        records.append(asdict(record))

    for case in shapes.target_cases("cpu"):
        size = case.rows * case.V * case.itemsize
        for work, own, ms in ((FORWARD, peers.FAST, forward), (STEP, peers.INPLACE, step)):
            extra = 1000 if own == peers.INPLACE else None
            add(peers.DPO, work, case, own, ms, extra)
            add(peers.DPO, work, case, own + peers.HALF, 0.5 * ms)
            for threads in ("", peers.ONE_THREAD):
                add(peers.THREADS, work, case, own + threads, one_thread * ms / 20 if threads else ms)
                add(peers.THREADS, work, case, peers.READ + threads, read_one_thread if threads else read)
            add(peers.DPO, work, case, peers.ROW_KERNELS, 0.98 * ms)
            add(peers.DPO, work, case, peers.READ, read)
            add(peers.DPO, work, case, peers.COPY, 2 * read)
            add(peers.DPO, work, case, peers.NAIVE, naive, 2 * size)
            add(peers.DPO, work, case, peers.COMPILE, compiled, size)
        add(peers.DPO, STEP, case, peers.FAST, 2 * step, size)
    for case in shapes.small_cases("cpu"):
        for work in (FORWARD, STEP):
            add(peers.DPO, work, case, peers.FAST, 0.05)
            add(peers.DPO, work, case, peers.NAIVE, 0.1)
    for case in shapes.varying_cases("cpu"):
        for work in (FORWARD, STEP):
            for more in ("", peers.WEIGHTED):
                add(peers.VARYING, work, case, peers.FAST + more, varying)
                add(peers.VARYING, work, case, peers.NAIVE + more, 1.0)
    for case in shapes.linear_cases("cpu"):
        add(peers.LINEAR, STEP, case, peers.FAST, 105.0, 200 << 20)
        add(peers.LINEAR, STEP, case, peers.PRODUCTS, 100.0)
        add(peers.LINEAR, STEP, case, peers.LIGER, 400.0)
    for case in shapes.tolerance_cases("cpu"):
        add(peers.TOLERANCE, peers.REAL_PRODUCTS, case, peers.TWO_PRODUCTS, 100.0)
        for work in (peers.REAL_PRODUCTS, peers.REAL_BACKWARD, peers.FLAT_BACKWARD):
            if work != peers.REAL_PRODUCTS:
                add(peers.TOLERANCE, work, case, peers.EXACT, 10.0)
            for name in peers.TOLERANCES:
                add(peers.TOLERANCE, work, case, name, 10.0)
    return records


def verdicts(records, device="cpu"):
    return {(target.what, target.bound): target.verdict for target in targets.targets_of(records, device)}


def test_every_target_reached_or_not():
    good = synthetic(naive=420.0)
    assert set(verdicts(good).values()) == {targets.REACHED}
    # each miss turns its own targets and no others
    for change, words in (
        ({"forward": 12.0}, "float32 forward"),
        ({"naive": 239.0}, "naive torch"),
        ({"compiled": 59.0}, "torch.compile"),
        ({"one_thread": 33.0}, "all threads over one"),
        ({"varying": 1.1}, "calls of varying shapes"),
    ):
        found = verdicts(synthetic(**({"naive": 420.0} | change)))
        missed = [key for key, verdict in found.items() if verdict == targets.MISSED]
        assert missed, change
        assert all(words in " ".join(key) for key in missed), (change, missed)


def test_bounds_differ_by_type():
    found = verdicts(synthetic(naive=300.0))  # 15x
    key = "forward + in-place backward"
    assert found["float32 " + key, "≥ 12x naive torch"] == targets.REACHED
    assert found["bfloat16 " + key, "≥ 20x naive torch"] == targets.MISSED


def test_scaling_is_not_asked_where_the_read_does_not_scale():
    found = verdicts(synthetic(naive=420.0, one_thread=26.0, read_one_thread=10.0))
    scaling = [verdict for (what, _), verdict in found.items() if "threads" in what]
    assert set(scaling) == {targets.EXCUSED}


def test_a_target_without_its_measurement_is_not_reached():
    assert set(verdicts([]).values()) <= {targets.INCOMPLETE}
    assert set(verdicts([], "cuda").values()) == {targets.INCOMPLETE}
    some = [record for record in synthetic(naive=420.0) if record["case"]["model"] != "Llama-3"]
    assert verdicts(some)["float32 forward", "≥ 70% of a plain read's bandwidth"] == targets.INCOMPLETE


def test_ratios_are_taken_round_by_round():
    """A machine that slows down between rounds changes no ratio."""
    case = shapes.target_cases("cpu")[0]
    records = []
    for name, samples in ((peers.NAIVE, [3.0, 6.0, 30.0]), (peers.FAST, [1.0, 2.0, 10.0])):
        record = harness._record(peers.DPO, case, FORWARD, name)
        record.samples, record.median_s = samples, samples[1]
        records.append(asdict(record))
    assert targets.Book(records).ratio(peers.DPO, FORWARD, case, peers.NAIVE, peers.FAST) == pytest.approx(3)
    assert targets.Book(records).ratio(peers.DPO, FORWARD, case, peers.COMPILE, peers.FAST) is None


def test_judge():
    assert targets.judge([1.0, 2.0], lambda value: value >= 1) == targets.REACHED
    assert targets.judge([None, 0.5], lambda value: value >= 1) == targets.MISSED
    assert targets.judge([None, 2.0], lambda value: value >= 1) == targets.INCOMPLETE
    assert targets.judge([math.nan], lambda value: value >= 1) == targets.MISSED


def test_cuda_targets():
    """Half of the rows kept: forward counts the kept rows' bytes, backward the zeros written for the others as well."""
    model, n_seqs, length = shapes.TARGET_SHAPES["cuda"][0]
    case = Case(model, "bfloat16", n_seqs, length, 0.5, device="cuda")
    assert targets.share_of_limit(case, FORWARD, 0.5, 1.0) == pytest.approx(1.0)
    assert targets.share_of_limit(case, STEP, 1.0, 1.0) == pytest.approx(1.0)
    assert targets.share_of_limit(replace(case, ignored=0.0), STEP, 1.5, 1.0) == pytest.approx(1.0)
    assert targets.share_of_limit(case, STEP, None, 1.0) is None
    whats = {target.what for target in targets.targets_of([], "cuda")}
    assert {"bfloat16 forward", "bfloat16 forward + backward", "bfloat16 forward, 50% ignored"} <= whats


# --- report -----------------------------------------------------------------------------------------------------------


def results_of(records):
    return {
        "device": "cpu",
        "quick": False,
        "date": "2000-01-01 00:00 UTC",
        "commit": "abc",
        "machine": {"processor": "A processor"},
        "versions": {"torch": "2"},
        "failed_files": ["benchmarks/bench_x.py"],
        "records": records,
        "step": {
            "settings": "Two pairs.",
            "problems": ["trl (ImportError: no)"],
            "demo": {name: {"step_ms": 100.0, "loss_ms": 10.0, "peak_mb": 5.0} for name in ("naive", "dpo_fast")},
        },
    }


def test_report(tmp_path):
    records = synthetic()
    records[0] |= {"problem": "is not installed", "median_s": None, "candidate": "some peer"}
    text = report.write_report(json.loads(json.dumps(results_of(records))), tmp_path, [("speed.png", "Speed.")])
    assert (tmp_path / "report.md").read_text() == text
    for expected in (
        "# Benchmarks on A processor",
        "| bfloat16 forward + in-place backward | ≥ 20x naive torch | Llama-2 2048 x 32000: 15.0x;",
        "| NOT reached |",
        "| some peer | is not installed |",
        "benchmarks/bench_x.py",
        "![Speed.](speed.png)",
        "Not measured: trl (ImportError: no)",
        "(2·K + R)·V·b = 786.4 MB",
        "3·2·K·H·V",
    ):
        assert expected in text, expected
    assert text.index("## Targets") < text.index("## Not timed") < text.index("### ")
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for block in tables:  # as many cells in every line as in the heading
        assert len({line.count(" | ") for line in block.replace("\\|", "").splitlines() if "---" not in line}) == 1, (
            block
        )


def test_case_table_rates():
    case = Case("Llama-3", "float32", 4, 128)
    records = []
    for name, seconds in ((peers.FAST, 0.010), (peers.READ, 0.008)):
        record = harness._record(peers.DPO, case, FORWARD, name)
        record.median_s, record.samples = seconds, [0.9 * seconds, seconds, 1.1 * seconds]
        records.append(asdict(record))
    first, second = report.case_table(records, FORWARD).splitlines()[2:]
    assert first.startswith("| dpo_fast | 10.0 | 9.5 to 10.5 | 26.3 | 80% | 1.00x |")  # 262.7 MB in 10 ms
    assert second.startswith("| plain read | 8 | 7.6 to 8.4 | 32.8 |  | 0.80x |")


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.common.pictures import draw_all

    records = synthetic()
    for case in [*shapes.growth_by_vocab("cpu"), *shapes.growth_by_length("cpu")]:
        record = harness._record(peers.DPO, case, STEP, peers.INPLACE)
        record.median_s, record.peak_extra_bytes = 1e-3, 1000
        records.append(asdict(record))
    drawn = draw_all(results_of(records), tmp_path)
    assert [name for name, _ in drawn] == ["speed.png", "limit.png", "growth.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name, _ in drawn)
    assert draw_all(results_of([]), tmp_path) == []


# --- the suite and the quick benchmark --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_file_collects(device):
    pytest.importorskip("pytest_benchmark")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", f"--device={device}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for name in FILES:
        assert f"benchmarks/{name}::" in run.stdout
    assert f"{device}" in run.stdout


def test_the_runner_knows_every_file():
    from benchmarks.__main__ import FILES as RUN

    assert sorted(RUN) == FILES


def test_folder_name():
    from benchmarks.__main__ import folder_name

    assert folder_name({"processor": "Intel(R) Xeon(R) Processor", "threads": "2"}) == "intel-xeon-processor-2-threads"
    assert folder_name({"processor": "x", "threads": "2", "GPU": "NVIDIA H200"}) == "nvidia-h200"


def test_quick_bench():
    cases = [replace(TINY, dtype=dtype, ignored=0.0) for dtype in ("float32", "bfloat16")]
    rows, remarks = bench.quick(cases, compile_=False, rounds=2)
    assert not remarks
    assert [(row.logits, row.work) for row in rows] == [
        (f"{dtype} 32 x 34", work) for dtype in ("float32", "bfloat16") for work in bench.WORKS
    ]
    assert all(row.read_ms > 0 and row.naive_ms > 0 and row.dpo_fast_ms > 0 and row.compile_ms is None for row in rows)
    lines = bench.quick_table(rows).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[-2:] == ["of", "read"]


def test_quick_bench_leaves_out_what_fails(monkeypatch):
    def no_compiler(_):
        raise_ = RuntimeError("no compiler here")

        def call(*_):
            raise raise_

        return call

    monkeypatch.setattr(bench, "compiled", no_compiler)
    rows, remarks = bench.quick([replace(TINY, ignored=0.0)], rounds=1)
    assert len(rows) == 2
    assert all("torch.compile failed (no compiler here)" in remark for remark in remarks)
    assert len(remarks) == 2
    monkeypatch.setattr(bench, "preference_of", lambda logps, _: logps.sum())
    with pytest.raises(RuntimeError, match="dpo_fast differs from naive torch"):
        bench.quick([replace(TINY, ignored=0.0)], compile_=False, rounds=1)


def test_quick_bench_out_of_time():
    _, remarks = bench.quick([replace(TINY, ignored=0.0)], rounds=1, compile_before_s=-1)
    assert len(remarks) == 2
    assert "left out" in remarks[0]


def test_bench_command(monkeypatch, capsys):
    monkeypatch.setattr(bench, "quick_cases", lambda device: [replace(TINY, ignored=0.0, device=device)])
    assert cli.main(["bench", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "float32 32 x 34" in out
    assert "processor" in out
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 1
        assert "finds no CUDA device" in capsys.readouterr().err
