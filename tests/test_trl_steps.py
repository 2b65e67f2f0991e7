"""Steps of TRL's DPO trainer alone, with `use_dpo_fast`, and of our `DPOTrainer`: sizes of zero, equal models."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl_models import VOCAB, arguments_of, llama, random_text, word_tokenizer

from dpo_fast.integrations import trl_trainer
from dpo_fast.integrations.trl import use_dpo_fast

WAYS = ("trl", "use_dpo_fast", "whole_loss")
PROMPT = 3


def dataset(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [
        {"prompt": random_text(PROMPT, g), "chosen": f" {random_text(c, g)}", "rejected": f" {random_text(r, g)}"}
        for c, r in lengths
    ]
    return datasets.Dataset.from_list(rows)


def in_effect(way, memory_budget=None):
    return use_dpo_fast(memory_budget=memory_budget) if way == "use_dpo_fast" else contextlib.nullcontext()


def make_trainer(way, folder, data, policy, memory_budget=None, **options):
    kind = trl_trainer.DPOTrainer if way == "whole_loss" else trl.DPOTrainer
    extra = {name: options.pop(name) for name in ("ref_model", "eval_dataset", "peft_config") if name in options}
    if way == "whole_loss":
        extra["memory_budget"] = memory_budget
    arguments = arguments_of(trl.DPOConfig, folder, **options)
    return kind(model=policy, args=arguments, train_dataset=data, processing_class=word_tokenizer(), **extra)


def another_llama():
    """A policy that differs from `llama()`, its reference."""
    policy = llama()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    return policy


# --- sizes of zero ----------------------------------------------------------------------------------------------------

# completion tokens of the chosen and of the rejected sequences
SIZES = {
    "no tokens": ([0, 0], [0, 0]),
    "none chosen": ([0, 0], [3, 2]),
    "none rejected": ([1, 4], [0, 0]),
    "a pair without tokens": ([0, 2, 3], [0, 4, 1]),
    "one side of each pair": ([0, 2], [4, 0]),
    "single pair": ([3], [5]),
    "single pair, no tokens": ([0], [0]),
    "single pair, none chosen": ([0], [2]),
    "single pair, none rejected": ([2], [0]),
}
LOSSES = [
    *(([name], {}) for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero")),
    *(([name], {}) for name in ("apo_down", "discopop", "sigmoid_norm", "sft")),
    *(([name], {"label_smoothing": 0.1}) for name in ("exo_pair", "robust")),
    (["sigmoid"], {"use_weighting": True}),
    (["sigmoid"], {"ld_alpha": 0.5}),
    (["sigmoid"], {"f_divergence_type": "js_divergence"}),
    (["sigmoid", "ipo"], {}),
]


def batch_of(chosen, rejected, width=9):
    lengths = torch.tensor([*chosen, *rejected]).unsqueeze(1)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    position = torch.arange(width)
    attention_mask = (position < PROMPT + lengths).long()
    completion_mask = attention_mask * (position >= PROMPT)
    return {"input_ids": ids * attention_mask, "attention_mask": attention_mask, "completion_mask": completion_mask}


def step(way, trainer, batch):
    """Loss, gradients and metrics of one microbatch."""
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer.model.zero_grad()
    with in_effect(way):
        loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}, metrics


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    data = dataset([(2, 3)])
    return {
        way: make_trainer(
            way, tmp_path_factory.mktemp(way), data, another_llama(), ref_model=llama(), beta=0.5, use_weighting=True
        )
        for way in WAYS
    }


def assert_same_step(found, expected, what):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5), what
    assert found[2].keys() == expected[2].keys()
    assert found[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-5), what
    largest = max(grad.abs().max().item() for grad in expected[1].values())
    for name, grad in expected[1].items():
        # in a microbatch without tokens the gradients are zeros and not None: DDP waits for each of them
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4 * largest, msg=f"{what}: {name}")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_zero(trainers, size):
    """Every loss: the loss, gradients and metrics of TRL alone (one test a size: the trainers are shared)."""
    batch = batch_of(*SIZES[size])
    for types, options in LOSSES:
        results = {}
        for way, trainer in trainers.items():
            trainer.loss_types, trainer.loss_weights = types, [1.0] * len(types)
            settings = {"label_smoothing": 0.0, "use_weighting": False, "ld_alpha": None} | options
            settings.setdefault("f_divergence_type", "reverse_kl")
            for name, value in settings.items():
                setattr(trainer, name, value)
            results[way] = step(way, trainer, batch)
        what = f"{types} {options}"
        if types == ["sft"] and not any(SIZES[size][0]):
            # TRL: the mean over no tokens; dpo_fast: nothing to learn from
            assert math.isnan(results["trl"][0])
            assert math.isnan(results["use_dpo_fast"][0])
            assert results["whole_loss"][0] == 0
            assert all((grad == 0).all() for grad in results["whole_loss"][1].values())
            assert results["whole_loss"][2] == pytest.approx(results["trl"][2], rel=1e-4, abs=1e-5)
            continue
        for way in WAYS[1:]:
            assert_same_step(results[way], results["trl"], f"{way} {what}")
    if not any(map(any, SIZES[size])):
        trainer = trainers["whole_loss"]
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
        assert step("whole_loss", trainer, batch)[0] == pytest.approx(math.log(2))


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_one_column(trainers, way):
    """A sequence of one token: no row of the logits predicts anything."""
    trainer = trainers[way]
    trainer.loss_types, trainer.loss_weights, trainer.ld_alpha, trainer.use_weighting = ["sigmoid"], [1.0], None, False
    trainer.f_divergence_type = "reverse_kl"
    batch = batch_of([0, 0], [0, 0], width=1)
    loss, grads, metrics = step(way, trainer, batch)
    assert loss == pytest.approx(math.log(2))
    assert all((grad == 0).all() for grad in grads.values())
    assert set(metrics.values()) == {0.0}


def without_tokens(data, chosen, rejected):
    """The tokenised dataset with some completions empty."""

    def emptied(row, i):
        return {
            "chosen_ids": [] if i in chosen else row["chosen_ids"],
            "rejected_ids": [] if i in rejected else row["rejected_ids"],
        }

    return data.map(emptied, with_indices=True, features=data.features)


@pytest.mark.parametrize("options", [{}, {"loss_type": ["ipo"]}, {"bf16": True}], ids=["sigmoid", "ipo", "bf16"])
def test_training_over_uneven_microbatches(tmp_path, options, monkeypatch):
    """Microbatches of 2, 2 | 2, 2 | 1 pairs: one without tokens, sides without tokens, and an empty one at the end."""
    monkeypatch.setattr(
        trl.DPOTrainer, "_get_train_sampler", lambda self, data: torch.utils.data.SequentialSampler(data)
    )
    lengths = [(3, 2), (1, 5), (4, 4), (2, 6), (3, 1), (5, 2), (2, 2), (1, 3), (4, 2)]
    found = {}
    for way in WAYS:
        data = dataset(lengths)
        trainer = make_trainer(
            way, tmp_path / way, data, another_llama(), ref_model=llama(), eval_dataset=data, beta=0.5,
            per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2, max_steps=-1,
            num_train_epochs=2, **options,
        )  # fmt: skip
        trainer.train_dataset = without_tokens(trainer.train_dataset, chosen={2, 3, 4, 8}, rejected={2, 3, 5, 8})
        trainer.eval_dataset = trainer.train_dataset
        sizes = [batch["completion_mask"].sum().item() for batch in trainer.get_train_dataloader()]
        assert len(sizes) == 5
        assert [size == 0 for size in sizes] == [False, True, False, False, True]
        with in_effect(way):
            trainer.train()
            evaluation = trainer.evaluate()
        history = [
            {name: value for name, value in entry.items() if not any(w in name for w in ("time", "second", "flos"))}
            for entry in [*trainer.state.log_history, evaluation]
        ]
        found[way] = history, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert len(found["trl"][0]) == 6 + 3  # steps; their summary; an evaluation, logged and returned
    tolerance = 0.02 if options.get("bf16") else 1e-4
    for way in WAYS[1:]:
        for entry, expected in zip(found[way][0], found["trl"][0], strict=True):
            assert entry == pytest.approx(expected, rel=tolerance, abs=tolerance), way
        for name, parameter in found["trl"][1].items():
            # Adam divides by the gradient's size: where that is 0 or nearly, a rounding is a step
            close = torch.isclose(found[way][1][name], parameter, rtol=10 * tolerance, atol=10 * tolerance)
            assert close.float().mean() > 0.98, (way, name)


# --- equal models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_budget", [None, 1], ids=["one_tile", "tiles"])
@pytest.mark.parametrize("reference", ["model", "precomputed", "adapter_off"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("way", WAYS)
def test_equal_models_have_rewards_of_exactly_0(tmp_path, way, precision, reference, memory_budget):
    """TRL asks for statistics of the policy's tokens and for none of the reference's: the log-probs are the same."""
    if way == "trl" and memory_budget:
        pytest.skip("TRL has no memory_budget")

    def wide():  # logits of some size: with small ones every order of the sums gives the same bits
        found = llama(torch.bfloat16 if precision == "bfloat16" else torch.float32, vocab_size=1000)
        with torch.no_grad():
            found.lm_head.weight.mul_(12)
        return found

    options = {"ref_model": wide()}
    if reference == "adapter_off":
        peft = pytest.importorskip("peft")
        options = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    # sequences of one length: every batch has the same shape, whether it is for the reference or for a step
    with in_effect(way, memory_budget):
        trainer = make_trainer(
            way, tmp_path, dataset([(6, 6)] * 8), wide(), memory_budget, max_steps=1, per_device_train_batch_size=8,
            bf16=precision == "autocast", precompute_ref_log_probs=reference == "precomputed", **options,
        )  # fmt: skip
        trainer.train()
    log = trainer.state.log_history[0]
    assert log["entropy"] > 0
    assert log["logps/chosen"] < -1
    names = ("chosen", "rejected", "margins", "accuracies")
    assert {name: log[f"rewards/{name}"] for name in names} == dict.fromkeys(names, 0.0)


def test_precomputed_references_are_cached_apart_from_trls(tmp_path, monkeypatch):
    """TRL caches them beside a dataset on disk; its own log-probs are not equal to ours to the last bit."""
    dataset([(2, 3), (4, 1)]).save_to_disk(str(tmp_path / "data"))
    calls = []
    real = trl_trainer._DoubleLogProbs.apply
    monkeypatch.setattr(
        trl_trainer._DoubleLogProbs, "apply", lambda self, *args: (calls.append(1), real(self, *args))[1]
    )
    counts = []
    for way in ("trl", "whole_loss", "whole_loss"):
        data = datasets.load_from_disk(str(tmp_path / "data"))
        make_trainer(way, tmp_path, data, llama(), ref_model=llama(), precompute_ref_log_probs=True)
        counts.append(len(calls))
    assert counts == [0, 1, 1]  # computed by TRL; by dpo_fast; read from its cache
