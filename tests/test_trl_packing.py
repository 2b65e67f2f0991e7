"""`trl_trainer.DPOTrainer(packing=True)` beside TRL's own trainer: losses, metrics, gradients, trained parameters."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_models import VOCAB, arguments_of, llama, random_text, word_tokenizer

from dpo_fast.integrations import trl_packing, trl_trainer

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama_tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, sliding_window=4, final_logit_softcapping=3.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
}


def model(name="llama", seed=0, dtype=torch.float64, scale=4.0):
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config._experts_implementation = "eager"  # the grouped product has no float64
    attention = "eager" if name == "gemma2" else "sdpa"
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():  # attention that depends on what is seen, gradients that are not tiny
        for parameter in found.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1.0)
    return found


# prompt, chosen and rejected tokens: one side or both empty after `emptied`, lengths beyond the windows
LENGTHS = [(3, 4, 9), (12, 1, 5), (1, 7, 2), (5, 6, 6), (2, 3, 1), (9, 2, 8), (4, 5, 5), (6, 1, 3), (3, 8, 4)]


def data(lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    texts = [[random_text(n, g) for n in each] for each in lengths]
    return datasets.Dataset.from_list([{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in texts])


OPTIONS = {
    "learning_rate": 0.5, "optim": "sgd", "beta": 0.5, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4,
    "gradient_checkpointing": False, "disable_dropout": True,
}  # fmt: skip
WAYS = {"trl": trl.DPOTrainer, "packed": trl_trainer.DPOTrainer}


def make(way, folder, policy, reference=None, pairs=None, **options):
    extra = {k: options.pop(k) for k in ("eval_dataset", "peft_config", "data_collator") if k in options}
    if way == "packed":
        extra["packing"] = True
    trainer = WAYS[way](
        model=policy, ref_model=reference, args=arguments_of(trl.DPOConfig, folder, **OPTIONS | options),
        train_dataset=data() if pairs is None else pairs, processing_class=word_tokenizer(), **extra,
    )  # fmt: skip
    return trainer


def numbers(history):
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in ("time", "second", "flos"))}
        for entry in history
    ]


def assert_same_run(found, expected, tolerance=1e-6):
    """Histories and trained parameters of two trainers."""
    histories = numbers(found.state.log_history), numbers(expected.state.log_history)
    assert len(histories[0]) == len(histories[1]) >= 2
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    parameters = dict(found.model.named_parameters())
    start = max(p.abs().max().item() for p in parameters.values())
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=10 * tolerance * start, msg=name)


def train_both(tmp_path, policy, reference=lambda: None, tolerance=1e-6, change=lambda trainer: None, **options):
    trainers = []
    for way in WAYS:
        trainer = make(way, tmp_path / way, policy(), reference(), **options)
        change(trainer)
        trainer.train()
        trainers.append(trainer)
    expected, found = trainers
    assert_same_run(found, expected, tolerance)
    done = found.shared_prompts
    assert done.packed_calls >= 3
    assert done.plain_calls == 0
    assert done.rows_run < 0.9 * done.rows_given
    return found, expected


# --- every loss -------------------------------------------------------------------------------------------------------

LOSSES = [
    *(([name], {}) for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")),
    *(([name], {}) for name in ("apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft")),
    *(([name], {"label_smoothing": 0.1}) for name in ("exo_pair", "robust")),
    (["sigmoid"], {"use_weighting": True}),
    (["ipo"], {"use_weighting": True}),
    (["sigmoid"], {"ld_alpha": 0.5}),
    (["sigmoid", "sft"], {"ld_alpha": 0.5}),
    (["sigmoid"], {"f_divergence_type": "js_divergence"}),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.2]}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    (["sigmoid", "robust"], {"label_smoothing": 0.1}),
]

# prompts in common, also of two pairs; completions that begin alike, are equal, or empty; prompts of one token
EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11, 1], "rejected_ids": [9, 10, 12]},
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [20, 21], "rejected_ids": [9, 10, 11, 1, 30, 31, 32]},
    {"prompt_ids": [5], "chosen_ids": [13], "rejected_ids": [13]},
    {"prompt_ids": [40, 41, 42, 43, 44, 45, 46, 47], "chosen_ids": [], "rejected_ids": [14, 1]},
    {"prompt_ids": [40, 41], "chosen_ids": [15, 16, 17], "rejected_ids": []},
    {"prompt_ids": [50, 51, 52], "chosen_ids": [], "rejected_ids": []},
]


@pytest.fixture(scope="module")
def pair_of_trainers(tmp_path_factory):
    return {
        way: make(way, tmp_path_factory.mktemp(way), model(seed=1), model(), pairs=data([(2, 2, 3)]), use_weighting=True)
        for way in WAYS
    }


def step(trainer, examples):
    """Loss, gradients and metrics of one microbatch."""
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}, metrics


def assert_same_step(found, expected, what, tolerance=1e-6):
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance), what
    assert found[2].keys() == expected[2].keys()
    assert found[2] == pytest.approx(expected[2], rel=tolerance, abs=tolerance), what
    largest = max(grad.abs().max().item() for grad in expected[1].values())
    assert largest > 0
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=10 * tolerance * largest, msg=f"{what}: {name}")


@pytest.mark.parametrize(("types", "options"), LOSSES, ids=lambda value: "-".join(value))
def test_losses(pair_of_trainers, types, options):
    results = {}
    for way, trainer in pair_of_trainers.items():
        settings = {"label_smoothing": 0.0, "use_weighting": False, "ld_alpha": None, "f_divergence_type": "reverse_kl"}
        settings |= {"loss_types": types, "loss_weights": [1.0] * len(types)} | options
        for name, value in settings.items():
            setattr(trainer, name, value)
        results[way] = step(trainer, EXAMPLES)
    assert_same_step(results["packed"], results["trl"], f"{types} {options}")
