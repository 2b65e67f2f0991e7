"""TRL's DPOTrainer on dpo_fast's kernels: the two lines that differ are marked.

python examples/train_trl.py --steps 4          SmolLM2-135M-Instruct on the CPU, a few minutes
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import load_dataset
from language_model import find_model, load_model
from preference_data import DemoError
from trl import DPOConfig, DPOTrainer

from dpo_fast.integrations.trl import use_dpo_fast  # <- dpo_fast


def main() -> int:
    """Trains a few steps and prints TRL's own metrics."""
    parser = argparse.ArgumentParser(description="TRL's DPOTrainer with dpo_fast.")
    parser.add_argument("--data", default=str(Path(__file__).resolve().parent / "data" / "preferences.jsonl"))
    parser.add_argument("--model", type=Path, default=None, help="folder or GGUF file (default: the packaged SmolLM2)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plain", action="store_true", help="without dpo_fast, to compare")
    args = parser.parse_args()
    try:
        model, tokenizer = load_model(*find_model(args.model), torch.device("cpu"))
        ref_model, _ = load_model(*find_model(args.model), torch.device("cpu"))
    except DemoError as error:
        print(f"train_trl.py: {error}", file=sys.stderr)
        return 2
    trainer = DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(
            output_dir="demo/trl",
            max_steps=args.steps,
            per_device_train_batch_size=2,
            max_length=256,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
    )
    if not args.plain:
        use_dpo_fast(trainer)  # <- dpo_fast
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
