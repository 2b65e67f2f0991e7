"""TRL's own trainers with and without dpo_fast: the same losses and metrics, step by step."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from dpo_fast.integrations import trl_trainer  # noqa: E402
from dpo_fast.integrations.trl import ChunkedLogProbs, check_trl, use_dpo_fast  # noqa: E402

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
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(60)]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def pairs():
    g = torch.Generator().manual_seed(0)

    def text(n):
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 60, (n,), generator=g))

    lengths = torch.randint(1, 9, (12, 3), generator=g).tolist()
    return datasets.Dataset.from_list(
        [{"prompt": text(a), "chosen": " " + text(b), "rejected": " " + text(c)} for a, b, c in lengths]
    )


def model(dtype=torch.float32, vocab_size=63):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def train(tmp_path, tokenizer, pairs, fast, peft=False, kind=trl.DPOTrainer, **options):
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **({"bf16": False} | options),
    )
    extra = {"ref_model": model()}
    if peft:  # the reference is the model without its adapter
        extra = {}
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    size = len(tokenizer)
    if "ref_model" in extra:
        extra["ref_model"] = model(vocab_size=size)
    trainer = kind(
        model=model(vocab_size=size), args=arguments, train_dataset=pairs, processing_class=tokenizer, **extra
    )
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
            model=model(), ref_model=model(), args=arguments, train_dataset=pairs, eval_dataset=pairs,
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
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            seed=0,
        )
        trainer = trl.SFTTrainer(model=model(), args=arguments, train_dataset=data, processing_class=tokenizer)
        histories.append(history(trainer, fast))
    assert_same_history(*histories)


def arguments_of(kind, tmp_path, **options):
    return kind(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, seed=0, learning_rate=1e-2, **options,
    )  # fmt: skip


def test_kto_trainer(tmp_path, tokenizer, pairs):
    rows = []
    for pair in pairs:
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        rows.append({"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})
    histories = []
    for fast in (False, True):
        trainer = trl.KTOTrainer(
            model=model(), ref_model=model(), args=arguments_of(trl.KTOConfig, tmp_path),
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
            model=model(), args=arguments, train_dataset=pairs.select_columns("prompt"), reward_funcs=reward,
            processing_class=tokenizer,
        )  # fmt: skip
        histories.append(history(trainer, fast))
    assert_same_history(*histories)


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")])
@pytest.mark.parametrize("bias", [False, True])
def test_function_against_trl(outputs, bias):
    """The nine arguments and five outputs, values and gradients, against TRL's own function."""
    from trl.kernels import ChunkedLogProbFunction

    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, 16, generator=g), torch.randn(63, 16, generator=g), torch.randn(63, generator=g)]
    targets = torch.randint(0, 63, (7,), generator=g)
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
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_is_undone_cleanly_and_not_nested():
    utils = check_trl()
    before = (utils._ChunkedLogProbFunction, utils._use_triton)
    handle = use_dpo_fast()
    assert isinstance(utils._ChunkedLogProbFunction, ChunkedLogProbs)
    with pytest.raises(RuntimeError, match="already in effect"):
        use_dpo_fast()
    handle.restore()
    handle.restore()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
    with pytest.raises(ZeroDivisionError), use_dpo_fast():
        raise ZeroDivisionError
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_other_versions_and_signatures_are_refused(monkeypatch):
    import trl.trainer.utils as utils

    before = utils._ChunkedLogProbFunction
    with pytest.raises(TypeError, match="takes a trainer of TRL, found int"):
        use_dpo_fast(3)
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"tested with TRL 1\.16\.0, found 1\.17\.0: nothing was changed"):
        use_dpo_fast()
    monkeypatch.setattr(trl, "__version__", "1.16.0")

    class Moved:
        @staticmethod
        def forward(ctx, hidden, weight):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Moved)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        use_dpo_fast()
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
        import train_dpo
    finally:
        sys.path.remove(str(examples))
    try:
        found = train_dpo.find_model(None)
    except train_dpo.DemoError as error:
        pytest.skip(str(error))
    policy, tokenizer = train_dpo.load_model(*found, torch.device("cpu"))
    ref_model, _ = train_dpo.load_model(*found, torch.device("cpu"))
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
