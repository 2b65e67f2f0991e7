"""TRL's own trainers with and without dpo_fast: the same losses and metrics, step by step."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl_models import arguments_of, llama, random_text, word_tokenizer

import dpo_fast
from dpo_fast.integrations import trl_trainer
from dpo_fast.integrations.trl import ChunkedLogProbs, check_trl, use_dpo_fast

LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def pairs():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (12, 3), generator=g).tolist()
    return datasets.Dataset.from_list(
        [
            {"prompt": random_text(a, g), "chosen": " " + random_text(b, g), "rejected": " " + random_text(c, g)}
            for a, b, c in lengths
        ]
    )


def train(tmp_path, tokenizer, pairs, fast, peft=False, kind=trl.DPOTrainer, **options):
    arguments = arguments_of(trl.DPOConfig, tmp_path, **options)
    extra = {"ref_model": llama()}
    if peft:  # the reference is the model without its adapter
        extra = {}
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = kind(model=llama(), args=arguments, train_dataset=pairs, processing_class=tokenizer, **extra)
    if kind is not trl.DPOTrainer:
        trainer.train()
        return trainer.state.log_history
    return history(trainer, fast)


def history(trainer, fast):
    """Trains and returns TRL's log; with `fast`, makes sure that it went through dpo_fast."""
    if not fast:
        trainer.train()
        return trainer.state.log_history
    calls = []
    real = ChunkedLogProbs.apply
    with pytest.MonkeyPatch.context() as patch, use_dpo_fast(trainer):
        patch.setattr(ChunkedLogProbs, "apply", lambda self, *args: (calls.append(1), real(self, *args))[1])
        trainer.train()
    assert len(calls) >= 3
    return trainer.state.log_history


def assert_same_history(a, b, tolerance=1e-4):
    assert len(a) == len(b) >= 3
    compared = 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key, value in x.items():
            if isinstance(value, float) and not any(word in key for word in ("time", "per_second", "flos")):
                assert y[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
                compared += 1
    assert compared > 20


@pytest.mark.parametrize("loss", LOSSES)
def test_dpo_trainer(tmp_path, tokenizer, pairs, loss):
    options = {"loss_type": [loss]}
    if loss in ("exo_pair", "robust"):
        options["label_smoothing"] = 0.1
    histories = [train(tmp_path, tokenizer, pairs, fast, **options) for fast in (False, True)]
    assert_same_history(*histories)


@pytest.mark.parametrize(
    "options",
    [
        {"f_divergence_type": "js_divergence"},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"precompute_ref_log_probs": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_dpo_trainer_options(tmp_path, tokenizer, pairs, options, monkeypatch):
    if "per_device_train_batch_size" in options:
        real = trl.DPOConfig
        size = options.pop("per_device_train_batch_size")
        monkeypatch.setattr(trl, "DPOConfig", lambda **kw: real(**{**kw, "per_device_train_batch_size": size}))
    histories = [train(tmp_path, tokenizer, pairs, fast, **options) for fast in (False, True)]
    assert_same_history(*histories)


WHOLE = [name for name in LOSSES if name not in ("aot", "aot_unpaired")]


@pytest.mark.parametrize("loss", [*WHOLE, "aot"])
def test_whole_loss_trainer(tmp_path, tokenizer, pairs, loss, monkeypatch):
    """The trainer that computes the whole loss logs what TRL's own logs, step by step."""
    options = {"loss_type": [loss]}
    if loss in ("exo_pair", "robust"):
        options["label_smoothing"] = 0.1
    calls = []
    real = trl_trainer._WholeLoss.apply
    monkeypatch.setattr(trl_trainer._WholeLoss, "apply", lambda self, *args: (calls.append(1), real(self, *args))[1])
    ours = train(tmp_path, tokenizer, pairs, False, kind=trl_trainer.DPOTrainer, **options)
    assert len(calls) == (3 if loss in WHOLE else 0)
    assert_same_history(train(tmp_path, tokenizer, pairs, False, **options), ours)


@pytest.mark.parametrize(
    "options",
    [
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"loss_type": ["sft", "sigmoid"], "ld_alpha": 0.5},
        {"precompute_ref_log_probs": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_whole_loss_trainer_options(tmp_path, tokenizer, pairs, options):
    ours = train(tmp_path, tokenizer, pairs, False, kind=trl_trainer.DPOTrainer, **options)
    tolerance = 0.02 if "bf16" in options else 1e-4
    theirs = train(tmp_path, tokenizer, pairs, False, **options)
    if "precompute_ref_log_probs" in options:
        # model and reference are equal in the first step: no reward is larger. TRL's sums over differently padded
        # batches differ in the last bits, and half of its pairs come out as accurate
        assert ours[0]["rewards/accuracies"] == 0
        theirs[0]["rewards/accuracies"] = 0.0
    assert_same_history(theirs, ours, tolerance)


def test_whole_loss_trainer_with_peft_and_evaluation(tmp_path, tokenizer, pairs):
    pytest.importorskip("peft")
    ours = train(tmp_path, tokenizer, pairs, False, peft=True, kind=trl_trainer.DPOTrainer)
    assert_same_history(train(tmp_path, tokenizer, pairs, False, peft=True), ours)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    found = []
    for kind in (trl.DPOTrainer, trl_trainer.DPOTrainer):
        trainer = kind(
            model=llama(), ref_model=llama(), args=arguments, train_dataset=pairs, eval_dataset=pairs,
            processing_class=tokenizer,
        )  # fmt: skip
        found.append({k: v for k, v in trainer.evaluate().items() if "second" not in k and "time" not in k})
        trainer.train()
        trainer.log(found[-1])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)


def test_metrics_reach_the_host_once(tmp_path, tokenizer, pairs, monkeypatch):
    transfers = []
    real = trl_trainer.DPOTrainer._log_metrics

    def counted(self, *args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__", "numpy"):
                original = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda t, *a, o=original, n=name: (transfers.append(n), o(t, *a))[1])
            real(self, *args)

    monkeypatch.setattr(trl_trainer.DPOTrainer, "_log_metrics", counted)
    train(tmp_path, tokenizer, pairs, False, kind=trl_trainer.DPOTrainer)
    assert transfers == ["tolist"] * 3


def test_dpo_trainer_with_peft(tmp_path, tokenizer, pairs):
    pytest.importorskip("peft")
    assert_same_history(*[train(tmp_path, tokenizer, pairs, fast, peft=True) for fast in (False, True)])


def test_sft_trainer(tmp_path, tokenizer, pairs):
    """The same seam serves the other trainers."""
    data = pairs.map(lambda x: {"completion": x["chosen"]}, remove_columns=["chosen", "rejected"])
    histories = []
    for fast in (False, True):
        arguments = arguments_of(trl.SFTConfig, tmp_path)
        trainer = trl.SFTTrainer(model=llama(), args=arguments, train_dataset=data, processing_class=tokenizer)
        histories.append(history(trainer, fast))
    assert_same_history(*histories)


def test_kto_trainer(tmp_path, tokenizer, pairs):
    rows = []
    for pair in pairs:
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        rows.append({"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})
    histories = []
    for fast in (False, True):
        trainer = trl.KTOTrainer(
            model=llama(), ref_model=llama(), args=arguments_of(trl.KTOConfig, tmp_path),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        histories.append(history(trainer, fast))
    assert_same_history(*histories)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_online_trainers(tmp_path, tokenizer, pairs, name):
    """They generate; the reward counts a token. Same seed, same completions, same losses."""

    def reward(completions, **_):
        return [float(text.count("w1")) for text in completions]

    histories = []
    for fast in (False, True):
        arguments = arguments_of(
            getattr(trl, f"{name}Config"), tmp_path, num_generations=2, max_completion_length=6, beta=0.0
        )
        trainer = getattr(trl, f"{name}Trainer")(
            model=llama(), args=arguments, train_dataset=pairs.select_columns("prompt"), reward_funcs=reward,
            processing_class=tokenizer,
        )  # fmt: skip
        histories.append(history(trainer, fast))
    assert_same_history(*histories)


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_rows", [7, 0])
def test_function_against_trl(outputs, bias, dtype, n_rows):
    """The nine arguments and five outputs against TRL's own function: values, gradients and their types."""
    from trl.kernels import ChunkedLogProbFunction

    g = torch.Generator().manual_seed(0)
    shapes = (n_rows, 16), (63, 16), (63,)
    tensors = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    targets = torch.randint(0, 63, (n_rows,), generator=g)
    results = []
    for function in (ChunkedLogProbFunction, ChunkedLogProbs(None)):
        hidden, weight, b = (t.clone().requires_grad_() for t in tensors)
        out = function.apply(hidden, weight, b if bias else None, targets, 0.7, 20, 5.0, 1.3, outputs)
        loss = out[0].sum() + (0.3 * out[1].sum() if out[1] is not None else 0)
        loss.backward()
        results.append((*out, hidden.grad, weight.grad, b.grad))
    for x, y in zip(*results, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            scale = x.abs().max().clamp(min=1).item() if x.numel() and x.dtype != torch.bool else 1
            torch.testing.assert_close(x, y, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("k", "masked"), [(None, False), (None, True), (3, False), (3, True)])
def test_selective_log_softmax_against_trl(dtype, k, masked, monkeypatch):
    """TRL's function of this name and its caller `selective_log_softmax_and_entropy`, on ours: types and values."""
    utils = check_trl()
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2, 5, 63, generator=g)).to(dtype)
    index = torch.randint(0, 63, (2, 5) if k is None else (2, 5, k), generator=g)
    row_mask = torch.rand(index.shape, generator=g) < 0.5 if masked else None
    caller = utils.selective_log_softmax_and_entropy if k is None else None
    results = []
    for function in (utils.selective_log_softmax, dpo_fast.selective_log_softmax):
        monkeypatch.setattr(utils, "selective_log_softmax", function)
        x = logits.clone().requires_grad_()
        logps = function(x, index, 0.7, row_mask)
        logps.float().sum().backward()
        found = [logps, x.grad]
        if caller is not None:
            found += caller(logits, index, temperature=0.7, row_mask=row_mask)
        results.append(found)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.fixture
def trl_functions():
    """TRL's module and its own two functions, which must be back after the test."""
    utils = check_trl()
    own = utils._ChunkedLogProbFunction, utils._use_triton
    assert not isinstance(own[0], ChunkedLogProbs)
    yield utils, own
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == own


def budget_in_effect(utils):
    """The memory_budget TRL computes with; None: with its own function."""
    if not isinstance(utils._ChunkedLogProbFunction, ChunkedLogProbs):
        return None
    assert utils._use_triton(torch.device("cpu"))
    return utils._ChunkedLogProbFunction.memory_budget


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_handles_are_counted(trl_functions, order):
    """In whatever order handles are restored, the newest of the others holds, and TRL's own with the last."""
    utils, own = trl_functions
    handles = [use_dpo_fast(memory_budget=100 + i) for i in range(3)]
    left = [0, 1, 2]
    for i in order:
        assert budget_in_effect(utils) == 100 + left[-1]
        left.remove(i)
        for _ in range(3):  # counts once
            handles[i].restore()
            assert budget_in_effect(utils) == (100 + left[-1] if left else None)
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == own


def test_handles_as_context_managers(trl_functions):
    utils, _ = trl_functions
    with pytest.raises(ZeroDivisionError), use_dpo_fast(memory_budget=1):
        raise ZeroDivisionError
    assert budget_in_effect(utils) is None
    with use_dpo_fast(memory_budget=1) as outer:
        with pytest.raises(ZeroDivisionError), use_dpo_fast(memory_budget=2):
            raise ZeroDivisionError
        assert budget_in_effect(utils) == 1
        with use_dpo_fast(memory_budget=3) as inner:
            outer.restore()
            assert budget_in_effect(utils) == 3
            with inner:  # a second block over the same handle ends it
                pass
            assert budget_in_effect(utils) is None
    with pytest.raises(RuntimeError, match="was restored: call use_dpo_fast again"), outer:
        pass
    assert budget_in_effect(utils) is None


def test_calls_that_raise_count_for_nothing(trl_functions, monkeypatch):
    utils, _ = trl_functions
    for active in (False, True):
        with use_dpo_fast(memory_budget=5) if active else contextlib.nullcontext():
            with pytest.raises(TypeError, match="takes a trainer of TRL, found int"):
                use_dpo_fast(3)
            with pytest.raises(ValueError, match="memory_budget"):
                use_dpo_fast(memory_budget=0)
            monkeypatch.setattr(trl, "__version__", "1.17.0")
            with pytest.raises(RuntimeError, match="nothing was changed"):
                use_dpo_fast()
            monkeypatch.undo()
            assert budget_in_effect(utils) == (5 if active else None)
        assert budget_in_effect(utils) is None


def test_a_reload_of_trls_module_between_calls():
    """It brings TRL's own function back; another call replaces the new one, and restores it."""
    utils = check_trl()
    handle = use_dpo_fast(memory_budget=1)
    importlib.reload(utils)
    own = utils._ChunkedLogProbFunction
    assert not isinstance(own, ChunkedLogProbs)
    again = use_dpo_fast(memory_budget=2)
    assert budget_in_effect(utils) == 2
    handle.restore()
    assert budget_in_effect(utils) == 2
    again.restore()
    assert utils._ChunkedLogProbFunction is own


def test_trainers_and_handles(tmp_path, tokenizer, pairs, trl_functions):
    """The same trainer twice, another trainer, and ours, which replaces the function for single forward passes."""
    utils, _ = trl_functions

    def trainer(kind):
        return kind(
            model=llama(), ref_model=llama(), args=arguments_of(trl.DPOConfig, tmp_path, max_steps=1),
            train_dataset=pairs, processing_class=tokenizer,
        )  # fmt: skip

    first, second, ours = trainer(trl.DPOTrainer), trainer(trl.DPOTrainer), trainer(trl_trainer.DPOTrainer)
    handles = [use_dpo_fast(t, memory_budget=i) for i, t in enumerate((first, first, second), 1)]
    for other in (first, second, ours):
        other.train()
        assert budget_in_effect(utils) == 3
    logged = [t.state.log_history[0]["loss"] for t in (first, second, ours)]
    assert logged == pytest.approx([logged[0]] * 3, rel=1e-5)
    ours.model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ours._compute_loss(ours.model, next(iter(ours.get_train_dataloader())), False)
    assert budget_in_effect(utils) == 3
    for handle in handles:
        handle.restore()
    assert budget_in_effect(utils) is None


def test_other_versions_and_signatures_are_refused(monkeypatch):
    import trl.trainer.utils as utils

    before = utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"tested with TRL 1\.16\.0, found 1\.17\.0: nothing was changed"):
        use_dpo_fast()
    monkeypatch.setattr(trl, "__version__", "1.16.0")

    class Moved:
        @staticmethod
        def forward(ctx, hidden, weight):
            return hidden

    for other in (Moved, object(), None):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
        with pytest.raises(RuntimeError, match="nothing was changed"):
            use_dpo_fast()
        assert utils._ChunkedLogProbFunction is other
    monkeypatch.undo()
    assert utils._ChunkedLogProbFunction is before


def test_contract_with_trl():
    """Fails when TRL moves the seam: the function, its arguments, and where it is looked up."""
    utils = check_trl()
    source = inspect.getsource(utils.add_fused_lm_head)
    assert "_ChunkedLogProbFunction.apply(" in source
    assert "compact = _use_triton(" in source


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """TRL's trainer over SmolLM2-135M on real preference pairs, and one of its batches."""
    import sys
    from pathlib import Path

    examples = Path(__file__).resolve().parent.parent / "examples"
    sys.path.insert(0, str(examples))
    try:
        import language_model
        import preference_data
    finally:
        sys.path.remove(str(examples))
    try:
        found = language_model.find_model(None)
    except preference_data.DemoError as error:
        pytest.skip(str(error))
    policy, tokenizer = language_model.load_model(*found, torch.device("cpu"))
    ref_model, _ = language_model.load_model(*found, torch.device("cpu"))
    with torch.no_grad():  # a policy that is not its reference
        policy.model.layers[-1].mlp.down_proj.weight.mul_(1.05)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=ref_model,
        args=arguments_of(
            trl.DPOConfig, tmp_path_factory.mktemp("smollm2"), max_length=64, gradient_checkpointing=False
        ),
        train_dataset=datasets.load_dataset(
            "json", data_files=str(examples / "data" / "preferences.jsonl"), split="train"
        ),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, {k: v[[0, 1, 4, 5]] for k, v in batch.items()}


def test_smollm2_on_real_pairs(smollm2):
    """Loss, metrics and gradients of a step for every loss type, with and without dpo_fast (one test: one model)."""
    trainer, batch = smollm2
    last = trainer.model.model.layers[-1].mlp.down_proj.weight
    for loss in LOSSES:
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
        trainer.label_smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
        found = []
        for fast in (False, True):
            trainer._metrics["train"].clear()
            with use_dpo_fast(trainer) if fast else contextlib.nullcontext():
                value = trainer._compute_loss(trainer.model, batch, False)
                (grad,) = torch.autograd.grad(value, last)
            metrics = {k: v[-1] for k, v in trainer._metrics["train"].items() if k != "num_tokens"}
            found.append((value.item(), metrics, grad))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=1e-4), loss
        assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-4), loss
        largest = found[0][2].abs().max().item()
        torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-3, atol=1e-4 * largest)
