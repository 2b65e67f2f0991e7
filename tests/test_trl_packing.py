"""`trl_trainer.DPOTrainer(packing=True)` beside TRL's own trainer: losses, metrics, gradients, trained parameters."""

from __future__ import annotations

import importlib.util
import os
import socket

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


RUN = 1e-5  # of a run: both round the reference's log-probs (of -30, say) to float32


def assert_same_run(found, expected, tolerance=RUN):
    """Histories and trained parameters of two trainers."""
    histories = numbers(found.state.log_history), numbers(expected.state.log_history)
    assert len(histories[0]) == len(histories[1]) >= 2
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    parameters = dict(found.model.named_parameters())
    start = max(p.abs().max().item() for p in parameters.values())
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=10 * tolerance * start, msg=name)


def train_both(
    tmp_path, policy, reference=lambda: None, tolerance=RUN, change=lambda trainer: None, equal=False, **options
):
    trainers = []
    for way in WAYS:
        trainer = make(way, tmp_path / way, policy(), reference(), **options)
        change(trainer)
        trainer.train()
        trainers.append(trainer)
    expected, found = trainers
    if equal:  # TRL's sums differ in the last bits, and half of its pairs may come out as accurate
        assert found.state.log_history[0]["rewards/accuracies"] == 0
        expected.state.log_history[0]["rewards/accuracies"] = 0.0
    assert_same_run(found, expected, tolerance)
    done = found.shared_prompts
    assert done.packed_calls >= 3
    assert done.plain_calls == 0 or options.get("truncation_mode") == "keep_end"  # which cuts prompts differently
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
        way: make(
            way, tmp_path_factory.mktemp(way), model(seed=1), model(), pairs=data([(2, 2, 3)]), use_weighting=True
        )
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


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_models(tmp_path, name):
    """Sliding windows, softcaps, tied embeddings, learned positions, a router's loss over the padded batch's tokens."""
    # Gemma2's eager attention, in float64, gives NaN at padding, which TRL's backward spreads
    dtype, tolerance = (torch.float32, 1e-4) if name == "gemma2" else (torch.float64, RUN)
    train_both(tmp_path, lambda: model(name, 1, dtype), lambda: model(name, 0, dtype), tolerance)


RUNS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed_in_batches": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5},
    "precomputed_ld": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "keep_start": {"max_length": 8},
    "keep_end": {"max_length": 10, "truncation_mode": "keep_end"},
    "padded_to_a_multiple": {"pad_to_multiple_of": 16},
    "ipo": {"loss_type": ["ipo"]},
    "rpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "aot": {"loss_type": ["aot"]},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "streaming": {},
    "workers": {"dataloader_num_workers": 1},
    "one_pair_a_step": {"per_device_train_batch_size": 1},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
}


@pytest.mark.parametrize("name", RUNS)
def test_options(tmp_path, name):
    options = dict(RUNS[name])
    if name.startswith("keep"):
        options["change"] = lengths_are_cut
    if name == "streaming":
        options["pairs"] = data().to_iterable_dataset()
    train_both(tmp_path, lambda: model(seed=1), model, **options)


def lengths_are_cut(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    assert (batch["attention_mask"].sum(-1) == trainer.args.max_length).sum() >= 4


def without_tokens(trainer):
    """Empties completions: of one side, of both, of a whole microbatch."""
    chosen, rejected = {0, 2, 3, 8}, {1, 2, 3, 8}

    def emptied(row, i):
        sides = {"chosen_ids": chosen, "rejected_ids": rejected}
        return {key: [] if i in which else row[key] for key, which in sides.items()}

    prepared = trainer.train_dataset
    trainer.train_dataset = trainer.eval_dataset = prepared.map(emptied, with_indices=True, features=prepared.features)


def test_uneven_batches_and_empty_completions(tmp_path, monkeypatch):
    sampler = torch.utils.data.SequentialSampler
    monkeypatch.setattr(trl.DPOTrainer, "_get_train_sampler", lambda self, data: sampler(data))
    found, expected = train_both(
        tmp_path, lambda: model(seed=1), model, change=without_tokens, max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=2, eval_dataset=data(), eval_strategy="epoch",
    )  # fmt: skip
    assert len(found.state.log_history) == 6 + 2 + 1  # steps, evaluations, the summary
    evaluations = [numbers([trainer.evaluate()])[0] for trainer in (found, expected)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=RUN, abs=RUN)


def test_evaluation_and_prediction(tmp_path):
    """Losses packed; logits and labels in the padded batch's form, its padding's included."""
    results = []
    for way in WAYS:
        trainer = make(way, tmp_path / way, model(seed=1), model(), eval_dataset={"a": data(), "b": data(seed=1)})
        metrics = numbers([trainer.evaluate(), trainer.evaluate(data(seed=2))])
        before = trainer.shared_prompts.packed_calls if way == "packed" else 0
        found = trainer.predict(trainer.eval_dataset["a"])
        if way == "packed":
            assert trainer.shared_prompts.packed_calls == before + 2 * 3  # policy and reference, three batches
        results.append((metrics, found.predictions, found.label_ids, numbers([found.metrics])[0]))
    (metrics, logits, labels, predicted), expected = results[1], results[0]
    for a, b in zip([*metrics, predicted], [*expected[0], expected[3]], strict=True):
        assert a == pytest.approx(b, rel=RUN, abs=RUN)
    assert (labels == expected[2]).all()
    torch.testing.assert_close(torch.from_numpy(logits), torch.from_numpy(expected[1]))


def lora(**fields):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **fields)


@needs_peft
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_lora(tmp_path, options):
    """The reference is the model with its adapters off."""
    train_both(tmp_path, lambda: model(seed=1), peft_config=lora(), learning_rate=0.02, **options)


@needs_peft
def test_lora_trained_on(tmp_path):
    """A model that comes with an adapter: its reference is a copy of it, under the name "ref"."""
    from peft import get_peft_model

    def policy():
        return get_peft_model(model(seed=1, dtype=torch.float32), lora())

    found, _ = train_both(tmp_path, policy, tolerance=1e-3, learning_rate=0.02, equal=True)
    assert "ref" in found.model.peft_config


def test_the_reference_is_loaded_from_disk(tmp_path):
    model(seed=1, dtype=torch.float32).save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    train_both(tmp_path, lambda: load(tmp_path / "model"), tolerance=1e-3, equal=True)


def test_autocast(tmp_path):
    runs = [
        make(way, tmp_path / way, llama(), llama(), bf16=True, learning_rate=1e-3, optim="adamw_torch") for way in WAYS
    ]
    for trainer in runs:
        trainer.train()
    assert_same_run(runs[1], runs[0], 0.02)


@pytest.mark.parametrize("reference", ["model", "precomputed", "adapter_off"])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_equal_models_have_rewards_of_exactly_0(tmp_path, precision, reference):
    options = {"reference": model(dtype=torch.float32)}
    if reference == "adapter_off":
        peft = pytest.importorskip("peft")
        options = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    trainer = make(
        "packed", tmp_path, model(dtype=torch.float32), **options, bf16=precision == "autocast", max_steps=1,
        pairs=data([(20, 30, 40)] * 2), precompute_ref_log_probs=reference == "precomputed",
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["logps/chosen"] < -1
    names = ("chosen", "rejected", "margins", "accuracies")
    assert {name: log[f"rewards/{name}"] for name in names} == dict.fromkeys(names, 0.0)


# --- two processes ----------------------------------------------------------------------------------------------------


def trained_on_two_ranks(rank, port, folder):
    """DDP: every rank's own pairs, an uneven end, gradients averaged by TRL's trainer."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in given.items()}
    torch.set_num_threads(1)
    trainers = []
    for way in WAYS:
        trainer = make(
            way, f"{folder}/{way}", model(seed=1), model(), per_device_train_batch_size=1, max_steps=-1,
            num_train_epochs=1, eval_dataset=data(seed=1), per_device_eval_batch_size=1, ddp_backend="gloo",
        )  # fmt: skip
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        trainer.evaluate()
        trainers.append(trainer)
    assert trainers[1].shared_prompts.packed_calls > 10
    assert len(trainers[0].state.log_history) == 5 + 2  # steps, the summary, an evaluation
    assert_same_run(trainers[1], trainers[0])
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(trained_on_two_ranks, (port, str(tmp_path)), nprocs=2)


# --- collators and caches ---------------------------------------------------------------------------------------------


class FlushRight(DataCollatorForPreference):
    """A user's collator: padding on the left."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        shifts = (batch["attention_mask"] == 0).sum(-1).tolist()
        for key in ("input_ids", "attention_mask", "completion_mask"):
            batch[key] = torch.stack([row.roll(n) for row, n in zip(batch[key], shifts, strict=True)])
        return batch


def test_a_collator_of_the_users(tmp_path):
    found, _ = train_both(tmp_path, lambda: model(seed=1), model, data_collator=FlushRight(pad_token_id=0))
    batch = found.data_collator([found.train_dataset[i] for i in range(3)])
    assert trl_packing.ROWS not in batch


def test_batches_are_packed_where_they_are_collated(tmp_path, monkeypatch):
    """On a GPU nothing waits for token ids to be read back."""
    trainer = make("packed", tmp_path, model(seed=1), model())
    monkeypatch.setattr("dpo_fast._packing.shared._read", lambda *_: pytest.fail("read in forward"))
    trainer.train()
    assert trainer.shared_prompts.packed_calls == 6


def test_precomputed_references_have_their_own_cache(tmp_path, monkeypatch):
    calls = []
    real = trl_trainer._DoubleLogProbs.apply
    monkeypatch.setattr(
        trl_trainer._DoubleLogProbs, "apply", lambda self, *args: (calls.append(1), real(self, *args))[1]
    )
    data([(2, 3, 4), (4, 1, 2)]).save_to_disk(str(tmp_path / "data"))
    counts = []
    for packing in (False, True, True):
        trl_trainer.DPOTrainer(
            model=llama(), ref_model=llama(), train_dataset=datasets.load_from_disk(str(tmp_path / "data")),
            args=arguments_of(trl.DPOConfig, tmp_path, precompute_ref_log_probs=True),
            processing_class=word_tokenizer(), packing=packing,
        )  # fmt: skip
        counts.append(len(calls))
    assert counts == [1, 2, 2]


def test_without_packing_nothing_changes(tmp_path):
    trainer = trl_trainer.DPOTrainer(
        model=llama(), ref_model=llama(), args=arguments_of(trl.DPOConfig, tmp_path, **OPTIONS), train_dataset=data(),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    assert type(trainer.data_collator) is DataCollatorForPreference
    assert trainer.shared_prompts is None
    trainer.train()


# --- what cannot run packed -------------------------------------------------------------------------------------------


def recurrent():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, pad_token_id=0)
    return transformers.MambaForCausalLM(config)


def deaf():
    """A model that does not hand its masks on."""
    found = llama()
    real = found.model.forward
    found.model.forward = lambda input_ids=None, attention_mask=None, position_ids=None, **kwargs: real(
        input_ids, **kwargs
    )
    return found


def more_tensors(examples):
    return DataCollatorForPreference(pad_token_id=0)(examples) | {"token_type_ids": torch.zeros(2, 3)}


REFUSED = {
    "padding_free": ({"padding_free": True}, ValueError, "padding_free=True .* set padding_free=False"),
    "liger": ({"use_liger_kernel": True}, ValueError, "use_liger_kernel=True .* set use_liger_kernel=False"),
    "compile": ({"torch_compile": True}, ValueError, "torch_compile=True .* set torch_compile=False"),
    "dispatch": ({"accelerator_config": {"dispatch_batches": True}}, ValueError, "dispatch_batches=False"),
    "collator": ({"data_collator": more_tensors}, ValueError, "more_tensors.* gives token_type_ids"),
    "recurrent": ({"model": recurrent}, TypeError, "packing=True: Mamba.*train with packing=False"),
    "deaf": ({"model": deaf}, ValueError, "does not honour packing.*train with packing=False"),
    "deaf_reference": ({"ref_model": deaf}, ValueError, "does not honour packing.*train with packing=False"),
    "deaf_precomputed": ({"model": deaf, "precompute_ref_log_probs": True}, ValueError, "does not honour packing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(tmp_path, name):
    options, error, message = REFUSED[name]
    options = dict(options)
    policy, reference = options.pop("model", llama)(), options.pop("ref_model", llama)()
    with pytest.raises(error, match=message):
        make("packed", tmp_path, policy, reference, **options)


@needs_peft
def test_virtual_tokens_are_refused(tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(TypeError, match=r"packing=True: prompt learning.*packing=False"):
        make("packed", tmp_path, llama(), peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_processors_are_refused(tmp_path):
    class Processor(transformers.ProcessorMixin):
        def __init__(self):
            self.tokenizer = word_tokenizer()

    assert not isinstance(word_tokenizer(), transformers.ProcessorMixin)
    assert isinstance(word_tokenizer(), PreTrainedTokenizerFast)
    with pytest.raises(ValueError, match=r"packing=True: vision-language models .* packing=False"):
        trl_trainer.DPOTrainer(
            llama(), None, arguments_of(trl.DPOConfig, tmp_path), None, data(), None, Processor(), packing=True
        )


def test_packing_is_a_truth_value(tmp_path):
    with pytest.raises(TypeError, match="packing must be True or False, found 'yes'"):
        trl_trainer.DPOTrainer(llama(), packing="yes")
