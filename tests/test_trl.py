"""TRL's own trainers with and without dpo_fast: the same losses and metrics, step by step."""

from __future__ import annotations

import inspect

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

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


def model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=63,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def train(tmp_path, tokenizer, pairs, fast, peft=False, **options):
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
        bf16=False,
        seed=0,
        **options,
    )
    extra = {"ref_model": model()}
    if peft:  # the reference is the model without its adapter
        extra = {}
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trl.DPOTrainer(model=model(), args=arguments, train_dataset=pairs, processing_class=tokenizer, **extra)
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


def assert_same_history(a, b):
    assert len(a) == len(b) >= 3
    compared = 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key, value in x.items():
            if isinstance(value, float) and not any(word in key for word in ("runtime", "per_second", "flos")):
                assert y[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
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
