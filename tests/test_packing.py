"""Packed batches through transformers' models: the same losses and parameter gradients as padded ones.

Models are tiny, random and in float64; what their modeling code computes in float32 by name (norms, rotary embeddings,
softmax) is computed in float64 too (`in_double`), so that a difference beyond float64's rounding is a wrong mask.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from types import ModuleType

import numpy as np
import pytest
import torch

import dpo_fast

transformers = pytest.importorskip("transformers")

from dpo_fast import packing
from dpo_fast._packing import layout as layouts
from dpo_fast._packing import masks, models

# prompts of which one begins as another does, completions longer than the windows, one example with two rejected ones
EXAMPLES = [
    {"prompt_ids": [1, 2, 3, 4, 9, 3], "chosen_ids": [4, 5, 7, 8, 11, 12, 6], "rejected_ids": [4, 5, 3]},
    {"prompt_ids": [1, 2, 3, 8], "chosen_ids": [9, 1, 2, 3, 4], "rejected_ids": [[10, 11], [12, 13, 14, 9, 1, 1]]},
]
VOCAB, WINDOW = 40, 4


def config(name, **fields):
    given = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return getattr(transformers, f"{name}Config")(**given | fields)


CONFIGS = {
    "llama": lambda: config("Llama"),
    "qwen2": lambda: config("Qwen2"),
    "qwen2_sliding": lambda: config("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: config("Qwen3"),
    "gemma2": lambda: config("Gemma2", sliding_window=WINDOW, final_logit_softcapping=3.0),
    "gemma3": lambda: config("Gemma3Text", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "mistral": lambda: config("Mistral", sliding_window=WINDOW),
    "mixtral": lambda: config("Mixtral", num_local_experts=4, sliding_window=None),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def build(name, attention="sdpa", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    made = CONFIGS[name]()
    made._experts_implementation = "eager"  # the grouped product has no float64
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention).to(dtype)
    with torch.no_grad():  # attention that depends on what is seen, and gradients that are not tiny
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


class InDouble(ModuleType):
    """torch, but for the name float32."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture
def in_double(monkeypatch):
    for name in {made().model_type for made in CONFIGS.values()}:
        family = name.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(module, "torch", InDouble("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def close(found, expected, rtol=1e-9):
    """Relative to the whole tensor: single entries may cancel."""
    scale = expected.abs().max().clamp_min(1e-300)
    assert float((found - expected).abs().max() / scale) <= rtol


def gradients(model):
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def same_gradients(found, expected, rtol=1e-9):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            close(a, b, rtol)


def plain_loss(model, **inputs):
    """DPO as people write it: logits of a padded batch, log-softmax, gather, halves."""
    batch = dpo_fast.padded_batch(EXAMPLES, 0)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} | inputs
    logits = model(**given).logits
    targets = batch["targets"]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    sums = (logps * (targets >= 0)).sum(-1)
    pairs = batch["pairs"]
    return -torch.nn.functional.logsigmoid(0.5 * (sums[pairs[:, 0]] - sums[pairs[:, 1]])).mean()


def packed_loss(model, share, mask):
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=share, mask="none")
    hidden = dpo_fast.packed_hidden(model, batch, mask=mask)
    return dpo_fast.linear_dpo_loss(
        hidden, targets=batch["targets"], pairs=batch["pairs"], cu_seqlens=batch["cu_seqlens"], beta=0.5,
        **dpo_fast.head_options(model),
    ).loss  # fmt: skip


ATTENTIONS = [
    (name, attention)
    for name in CONFIGS
    for attention in ("eager", "sdpa")
    if (name, attention) != ("gemma2", "sdpa")  # transformers refuses it: the attention's softcap
]


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_same_losses_and_gradients(name, attention, in_double):
    model = build(name, attention)
    expected = plain_loss(model)
    expected.backward()
    grads = gradients(model)
    assert expected.item() > 0.01
    assert sum(float(g.abs().max()) > 1e-4 for g in grads if g is not None) >= len(grads) - 2
    for mask in ("dense", "blocks") if attention == "sdpa" else ("auto",):
        for share in (False, True):
            loss = packed_loss(model, share, mask)
            loss.backward()
            close(loss, expected)
            same_gradients(gradients(model), grads)
        with dpo_fast.shared_prompts(model, mask=mask) as done:
            loss = plain_loss(model)
            loss.backward()
        assert (done.packed_calls, done.plain_calls) == (1, 0)
        assert done.rows_run < done.rows_given
        close(loss, expected)
        same_gradients(gradients(model), grads)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_gradient_checkpointing(name, in_double):
    model = build(name)
    expected = plain_loss(model)
    expected.backward()
    grads = gradients(model)
    model.gradient_checkpointing_enable()
    for mask in ("dense", "blocks"):
        loss = packed_loss(model, True, mask)
        loss.backward()
        same_gradients(gradients(model), grads)
        with dpo_fast.shared_prompts(model, mask=mask):
            plain_loss(model).backward()
        same_gradients(gradients(model), grads)


# --- layouts and masks ------------------------------------------------------------------------------------------------


def random_sequences(seed, n=16, longest=200):
    """Sequences with nested common prefixes, some of them a prefix of another, one twice."""
    rng = np.random.default_rng(seed)
    found = [rng.integers(0, 3, rng.integers(1, longest))]
    while len(found) < n - 1:
        whole = found[rng.integers(len(found))]
        found.append(np.concatenate([whole[: rng.integers(len(whole) + 1)], rng.integers(0, 3, rng.integers(1, 40))]))
    found.append(found[0])
    return [np.stack([ids, np.arange(len(ids)), np.arange(len(ids))], -1) for ids in found]


def seen_by_definition(packed, window):
    """[N, N]: a row sees what stands before it in its own sequence, at most window tokens back."""
    N = packed.layout.n_rows
    seen = np.zeros((N, N), bool)
    for rows in packed.rows:
        for t, row in enumerate(rows):
            seen[row, rows[: t + 1] if window is None else rows[max(0, t + 1 - window) : t + 1]] = True
    return seen


def seen_in_runs(mask):
    """[N, N]: what the calls of `run_attention` see together."""
    N = mask.shape[-1]
    pieces = torch.arange(N).split(mask.sizes)
    seen = torch.zeros(N, N, dtype=torch.bool)
    for (own, columns), allowed in zip(mask.parts, mask.masks, strict=True):
        rows, cols = (torch.cat([pieces[i] for i in which]) for which in (own, columns))
        causal = torch.ones(len(rows), len(cols), dtype=torch.bool).tril()
        assert allowed is not None or len(rows) == len(cols)
        seen[rows[:, None], cols] = causal if allowed is None else allowed[0, 0]
    return seen


@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize("seed", range(3))
def test_masks_are_their_definition(seed, window):
    """Dense, in blocks and in runs; more than one block of 128 rows, and a last one that is not whole."""
    sequences = random_sequences(seed)
    packed = layouts.find_prefixes(sequences)
    layout, device = packed.layout, torch.device("cpu")
    for keys, rows in zip(sequences, packed.rows, strict=True):
        assert np.array_equal(packed.keys[rows], keys)
    assert layout.n_rows == len({keys[: t + 1].tobytes() for keys in sequences for t in range(len(keys))})
    expected = torch.from_numpy(seen_by_definition(packed, window))
    N = layout.n_rows
    assert N > 256
    assert N % 128
    assert torch.equal(masks.dense_mask(layout, window, device)[0, 0], expected)
    additive = masks.additive_mask(layout, window, device, torch.float32)[0, 0]
    assert torch.equal(additive == 0, expected)
    assert torch.equal(additive[~expected], torch.full((int((~expected).sum()),), torch.finfo(torch.float32).min))
    assert torch.equal(seen_in_runs(masks.RunMask(layout, window, device)), expected)
    blocks = masks.block_mask(layout, window, device)
    rows = torch.arange(N)
    within = blocks.mask_mod(None, None, rows[:, None], rows)
    assert torch.equal(within, expected)
    padded = torch.nn.functional.pad(expected, (0, -N % 128, 0, -N % 128))
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    some, every = tiles.any(3).any(1), tiles.all(3).all(1)
    listed = blocks.to_dense()[0, 0].bool()  # partly or wholly seen
    assert not (some & ~listed).any()
    full = torch.zeros_like(some)
    for i, n in enumerate(blocks.full_kv_num_blocks[0, 0]):
        full[i, blocks.full_kv_indices[0, 0, i, :n].long()] = True
    assert not (full & ~every).any()
    if window is None:
        assert torch.equal(listed, some)


def test_spans_and_prefixes_give_the_same_layout():
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=True)
    layout = packing._layout(batch)
    assert torch.equal(masks.dense_mask(layout, None, torch.device("cpu")), batch["attention_mask"])
    assert [run.past for run in layout.runs] == [(), ((0, 5),), (), ((17, 20),), ((17, 20),)]
    alone = packing._layout(dpo_fast.packed_batch(EXAMPLES))
    assert not alone.shares
    assert [run.start for run in alone.runs] == dpo_fast.packed_batch(EXAMPLES)["cu_seqlens"].tolist()[:-1]


def test_a_batch_keeps_its_layout_until_it_is_changed():
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=True)
    layout = packing._layout(batch)
    assert packing._layout(dict(batch)) is layout
    batch["position_ids"] += 1
    assert packing._layout(batch) is not layout


@pytest.mark.parametrize("mask", ["dense", "blocks"])
def test_a_batch_may_be_scored_in_inference_mode_first(mask):
    model, batch = build("llama"), dpo_fast.packed_batch(EXAMPLES, share_prompts=True)
    with torch.inference_mode():
        expected = dpo_fast.packed_hidden(model, batch, mask=mask)
    found = dpo_fast.packed_hidden(model, batch, mask=mask)
    found.sum().backward()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": None}, "batch has no spans: make it with dpo_fast.packed_batch"),
        ({"position_ids": torch.zeros(1, 3)}, "must have shape \\[1, N\\]"),
        ({"spans": torch.zeros(2, 2, dtype=torch.int64)}, "spans must have shape \\[S, 3\\]"),
        ({"cu_seqlens": torch.tensor([0, 13, 17, 26, 29, 35])}, "spans\\[2\\] = .* does not follow a sequence that ends at 17"),
        ({"cu_seqlens": torch.tensor([0, 13, 17, 26, 29, 36])}, "does not follow"),
    ],
)  # fmt: skip
def test_spans_that_do_not_fit(change, message):
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=True) | change
    if "cu_seqlens" in change:
        batch["spans"] = batch["spans"].clone()
        batch["spans"][2] += 1
    with pytest.raises(ValueError, match=message):
        dpo_fast.packed_hidden(build("llama"), batch)
    with pytest.raises(TypeError, match="input_ids must be a tensor, found list"):
        dpo_fast.packed_hidden(build("llama"), dpo_fast.packed_batch(EXAMPLES) | {"input_ids": [[1]]})


# --- the check on first use -------------------------------------------------------------------------------------------


def replaced(model, **changes):
    """The model, its decoder with some arguments replaced before they are read: an implementation that ignores them."""
    plain = model.base_model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return plain(*args, **(kwargs | changes))

    model.base_model.forward = forward
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_packing_raises(name, attention, ignored):
    model = replaced(build(name, attention, dtype=torch.float32), **{ignored: None})
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=True, mask="none")
    for _ in range(2):  # it is not remembered as good
        with pytest.raises(ValueError, match=f"with attention {attention} does not honour packing: .* differ by"):
            dpo_fast.packed_hidden(model, batch)
    with pytest.raises(ValueError, match="does not honour packing"), dpo_fast.shared_prompts(model):
        plain_loss(model)


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1, None])
def test_a_window_of_another_size_raises(window):
    """A model whose sliding layers see more or fewer tokens than its config says."""
    model = build("mistral", "eager", dtype=torch.float32)
    plain, batch = model.base_model.forward, dpo_fast.packed_batch(EXAMPLES, share_prompts=True)

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        before = model.config.sliding_window
        model.config.sliding_window = window if window is None else before + window - WINDOW
        try:
            return plain(*args, **kwargs)
        finally:
            model.config.sliding_window = before

    model.base_model.forward = forward
    with pytest.raises(ValueError, match="does not honour packing: .* differ by"):
        dpo_fast.packed_hidden(model, batch)


def test_a_model_that_fails_raises_with_its_error():
    model = build("llama")
    plain = model.model.forward

    @functools.wraps(plain)
    def forward(*args, attention_mask=None, **kwargs):
        assert attention_mask is None, "only whole rows"
        return plain(*args, **kwargs)

    model.model.forward = forward
    with pytest.raises(ValueError, match="does not honour packing: it fails with AssertionError: only whole rows"):
        dpo_fast.packed_hidden(model, dpo_fast.packed_batch(EXAMPLES))


def test_the_check_leaves_no_trace_and_is_done_once():
    model = build("gemma3")
    model.model.layers[0].eval()
    modes, calls = [m.training for m in model.modules()], []
    model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batch = dpo_fast.packed_batch(EXAMPLES)
    dpo_fast.packed_hidden(model, batch)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert model.config.sliding_window == WINDOW
    assert calls == [False] * 2 + [True]
    dpo_fast.packed_hidden(model, batch)
    assert len(calls) == 4
    dpo_fast.packed_hidden(model, batch, mask="blocks")  # another way through the model
    assert len(calls) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_check_passes_in_every_type(dtype):
    for name in ("llama", "mistral", "gpt2"):
        model = build(name, dtype=dtype)
        hidden = dpo_fast.packed_hidden(model, dpo_fast.packed_batch(EXAMPLES, share_prompts=True))
        assert hidden.dtype == dtype


# --- other attention --------------------------------------------------------------------------------------------------


@pytest.fixture
def varlen_attention():
    """Attention with the interface of flash attention's varlen functions, by sdpa on each sequence."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
        assert attention_mask is None
        bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        parts = [
            ALL_ATTENTION_FUNCTIONS["sdpa"](module, *(x[:, :, a:b] for x in (query, key, value)), None, **kwargs)[0]
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(parts, 1), None

    name = "flash_attention_in_tests"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, flash_attention_mask)
    yield name
    del ALL_ATTENTION_FUNCTIONS._global_mapping[name], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def test_varlen_attention_packs_and_shares_nothing(varlen_attention, in_double):
    model = build("llama")
    expected = plain_loss(model)
    expected.backward()
    grads = gradients(model)
    model.config._attn_implementation = varlen_attention
    loss = packed_loss(model, False, None)
    loss.backward()
    close(loss, expected)
    same_gradients(gradients(model), grads)
    with pytest.raises(ValueError, match="flash attention takes no mask, so it cannot share prompts"):
        packed_loss(model, True, None)
    with dpo_fast.shared_prompts(model) as done:
        loss = plain_loss(model)
    close(loss, expected)
    assert done.rows_run == sum(map(len, (e["prompt_ids"] + e["chosen_ids"] for e in EXAMPLES))) + 9 + 6 + 10
    assert packing.describe(model, dpo_fast.packed_batch(EXAMPLES)).form == "varlen"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_flex_attention(name, monkeypatch):
    """Forward, by torch's uncompiled form: on a CPU flex attention has no backward, and its compiled form fails to compile at times."""
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations import flex_attention as theirs

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        theirs, "compile_friendly_flex_attention", lambda *a, training, **k: flex.flex_attention(*a, **k)
    )
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", lambda *a, _compile, **k: flex.create_block_mask(*a, **k))  # fmt: skip
    model = build(name, "eager", dtype=torch.float32)
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=True)
    with torch.no_grad():
        expected = dpo_fast.packed_hidden(model, batch)
        model.config._attn_implementation = "flex_attention"
        found = dpo_fast.packed_hidden(model, batch)
        close(found, expected, 1e-5)
        with dpo_fast.shared_prompts(model):
            loss = plain_loss(model)
    model.config._attn_implementation = "eager"
    close(loss, plain_loss(model).detach(), 1e-5)
    assert packing.describe(model, batch, mask="dense").form == "additive"


def test_the_mask_can_be_chosen_and_is_shown(monkeypatch):
    model, batch = build("gemma3"), dpo_fast.packed_batch(EXAMPLES, share_prompts=True, mask="none")
    N = batch["input_ids"].shape[1]
    layers = {"sliding_attention": WINDOW, "full_attention": None}
    assert packing.describe(model, batch) == ("sdpa", layers, "bool", N, 2 * N * N)
    found = packing.describe(model, batch, mask="blocks")
    assert found[:4] == ("sdpa", layers, "runs", N)
    layout, device = packing._layout(batch), torch.device("cpu")
    made = [m for w in (WINDOW, None) for m in masks.make_mask("runs", layout, w, device, torch.float64).masks]
    assert found.mask_bytes == sum(m.numel() for m in made if m is not None) < 2 * N * N
    monkeypatch.setenv("DPO_FAST_PACKED_MASK", "blocks")
    assert packing.describe(model, batch).form == "runs"
    assert packing.describe(model, batch, mask="dense").form == "bool"
    monkeypatch.setenv("DPO_FAST_PACKED_MASK", "block")
    with pytest.raises(ValueError, match="mask must be one of auto, dense, blocks, found 'block'"):
        dpo_fast.packed_hidden(model, batch)
    monkeypatch.delenv("DPO_FAST_PACKED_MASK")
    long = [{**EXAMPLES[0], "prompt_ids": [3] * 300}]
    assert packing.describe(model, dpo_fast.packed_batch(long, share_prompts=True, mask="none")).form == "runs"
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="eager takes no blocks mask, only auto, dense"):
        dpo_fast.packed_hidden(model, batch, mask="blocks")
    model.config._attn_implementation = "another"
    with pytest.raises(TypeError, match="attention 'another' is not known here"):
        dpo_fast.packed_hidden(model, batch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_autocast(attention):
    model, batch = build("llama", attention, dtype=torch.float32), padded(TREE, "right")
    kept = batch["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits[kept].float()
        with dpo_fast.shared_prompts(model):
            found = model(**batch).logits[kept].float()
    assert (found - expected).norm() < 0.02 * expected.norm()


# --- heads ------------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 1, 7, 5, 20, 39]])


def same_logps(model, **options):
    """The options against the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
        hidden = models.unwrapped(model).base_model(input_ids=IDS, use_cache=False).last_hidden_state
        found = dpo_fast.linear_token_logps(hidden, targets=IDS, **(dpo_fast.head_options(model) | options)).logps
    return torch.allclose(found, logits.log_softmax(-1).gather(-1, IDS[..., None])[..., 0], rtol=1e-5, atol=1e-5)


HEADS = {
    "softcap": lambda: config("Gemma2", final_logit_softcapping=2.0),
    "bias": lambda: config("Phi", num_key_value_heads=2),
    "logit_scale": lambda: config("Cohere", logit_scale=0.3),
    "logits_scaling": lambda: config("Granite", logits_scaling=3.0),
    "none": lambda: config("Llama", tie_word_embeddings=True),
}


@pytest.mark.parametrize("kind", HEADS)
def test_head_options(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(HEADS[kind](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    options = dpo_fast.head_options(model)
    assert options["weight"] is model.get_output_embeddings().weight
    assert (options["bias"] is not None) == (kind == "bias")
    assert (options["softcap"] is not None) == (kind == "softcap")
    assert (options["logit_scale"] != 1) == kind.startswith("logit")
    assert same_logps(model)
    if kind != "none":  # what was read matters
        assert not same_logps(model, softcap=None, logit_scale=1.0, bias=None)


def test_heads_that_are_not_known():
    model = build("llama")
    model.config.logit_multiplier = 2.5
    with pytest.raises(ValueError, match="logit_multiplier = 2.5 in its config"):
        dpo_fast.head_options(model)
    del model.config.logit_multiplier
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head)
    with pytest.raises(TypeError, match="the head of LlamaForCausalLM must be a torch.nn.Linear, found Sequential"):
        dpo_fast.head_options(model)
    model.lm_head = head
    head.register_forward_hook(lambda module, inputs, out: out * 1.1)
    with pytest.raises(ValueError, match="transforms its logits in a way unknown here"):
        dpo_fast.head_options(model)
    head._forward_hooks.clear()
    dpo_fast.head_options(model)
    with pytest.raises(TypeError, match="model must be a transformers causal model, found Linear"):
        dpo_fast.head_options(head)
    with pytest.raises(TypeError, match="LlamaModel has no LM head"):
        dpo_fast.head_options(model.model)


def test_a_model_that_changes_the_hidden_states_before_its_head():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            out = self.model(input_ids, **kwargs)
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(out.last_hidden_state / 3))

    model = Scaled(CONFIGS["llama"]())
    dpo_fast.head_options(model)
    with pytest.raises(ValueError, match="differ by 2 .relative. from what the head is given"):
        dpo_fast.packed_hidden(model, dpo_fast.packed_batch(EXAMPLES))


def with_lora(model, **fields):
    peft = pytest.importorskip("peft")
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **fields))
    return found.double()


def test_lora(in_double):
    """Adapters in the decoder and on the head, active, off, and merged."""
    model = with_lora(build("llama"), target_modules=["q_proj", "lm_head"])
    for _ in range(2):
        expected = plain_loss(model)
        expected.backward()
        grads = gradients(model)
        loss = packed_loss(model, True, None)
        loss.backward()
        close(loss, expected)
        same_gradients(gradients(model), grads)
        with dpo_fast.shared_prompts(model):
            loss = plain_loss(model)
        close(loss, expected)
        with model.disable_adapter():
            expected = plain_loss(model)
            assert dpo_fast.head_options(model)["lora"] is None
            close(packed_loss(model, True, None), expected)
        model.lm_head.train(False)
    model.merge_adapter()
    assert dpo_fast.head_options(model)["lora"] is None
    close(packed_loss(model, True, None), plain_loss(model))


def test_heads_trained_whole_and_adapters_that_are_refused():
    model = with_lora(build("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    copy = model.lm_head.modules_to_save["default"]
    assert dpo_fast.head_options(model)["weight"] is copy.weight
    with model.disable_adapter():
        assert dpo_fast.head_options(model)["weight"] is model.lm_head.original_module.weight
    for fields, message in (
        ({"lora_dropout": 0.1}, "LoRA with dropout 0.1: set lora_dropout=0, or leave lm_head out"),
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "LoRA with a bias"),
    ):
        with pytest.raises(TypeError, match=message):
            dpo_fast.head_options(with_lora(build("llama"), target_modules=["lm_head"], **fields))
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(TypeError, match="virtual tokens"):
        dpo_fast.packed_hidden(peft.get_peft_model(build("llama"), prompt), dpo_fast.packed_batch(EXAMPLES))


# --- models that cannot run packed ------------------------------------------------------------------------------------

REFUSED = {
    "mamba": (lambda: config("Mamba", state_size=4), "carries a state along the rows"),
    "jamba": (lambda: config("Jamba", mamba_d_state=4, use_mamba_kernels=False, num_experts=2), "layer"),
    "lfm2": (lambda: config("Lfm2", layer_types=["conv", "full_attention"]), "layer"),
    "gpt_neo": (
        lambda: transformers.GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
        "limits attention by (attention_types|window_size)",
    ),
    "llama4": (
        lambda: config("Llama4Text", attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=16),
        "attention_chunk_size = 8|layers of kind chunked_attention",
    ),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2), "takes no position_ids"),
    "bidirectional": (lambda: config("Gemma3Text", use_bidirectional_attention=True), "bidirectional attention"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_refused(kind):
    made, message = REFUSED[kind]
    model = transformers.AutoModelForCausalLM.from_config(made())
    for function in (dpo_fast.packed_hidden, packing.describe):
        with pytest.raises(TypeError, match=message):
            function(model, dpo_fast.packed_batch(EXAMPLES))
    with pytest.raises(TypeError, match=message), dpo_fast.shared_prompts(model):
        pass


def test_models_that_are_no_decoder():
    batch = dpo_fast.packed_batch(EXAMPLES)
    with pytest.raises(TypeError, match="must be a transformers causal model, found Linear"):
        dpo_fast.packed_hidden(torch.nn.Linear(2, 2), batch)
    with pytest.raises(TypeError, match="LlamaModel has no LM head over a decoder"):
        dpo_fast.packed_hidden(build("llama").model, batch)
    t5 = transformers.T5Config(vocab_size=VOCAB, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration"):
        dpo_fast.packed_hidden(transformers.T5ForConditionalGeneration(t5), batch)


def test_attention_that_calls_sdpa_itself_is_given_a_dense_mask(monkeypatch):
    made = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    falcon = transformers.FalconConfig(**made, alibi=False)
    model = transformers.AutoModelForCausalLM.from_config(falcon, attn_implementation="sdpa")
    batch = dpo_fast.packed_batch([{**EXAMPLES[0], "prompt_ids": [3] * 200}], share_prompts=True, mask="none")
    assert packing.describe(model, batch).form == "runs"
    dpo_fast.packed_hidden(model, batch)
    assert packing.describe(model, batch).form == "bool"
    with pytest.raises(ValueError, match="does not honour packing: it fails"):
        dpo_fast.packed_hidden(model, batch, mask="blocks")
    monkeypatch.setenv("DPO_FAST_PACKED_MASK", "blocks")
    with pytest.raises(ValueError, match="does not honour packing: it fails"):
        dpo_fast.packed_hidden(model, batch)


def test_a_model_that_goes_around_its_decoder():
    class Around(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            return self.lm_head(self.model.norm(self.model.embed_tokens(input_ids)))

    model = Around(CONFIGS["llama"]())
    with pytest.raises(TypeError, match="Around does not call its decoder"), dpo_fast.shared_prompts(model):
        model(input_ids=IDS)


@pytest.mark.parametrize("name", ["OPT", "XGLM"])
def test_models_that_call_an_inner_decoder_or_ask_for_a_cache(name):
    made = {"OPT": {"ffn_dim": 24, "word_embed_proj_dim": 12}, "XGLM": {"ffn_dim": 24}}[name]
    model = transformers.AutoModelForCausalLM.from_config(config(name, **made), attn_implementation="eager").eval()
    expected = plain_loss(model)
    with dpo_fast.shared_prompts(model) as done:
        close(plain_loss(model), expected, 1e-4)
    assert done.packed_calls == 1


def test_models_in_wrappers():
    model, batch = build("llama"), dpo_fast.packed_batch(EXAMPLES)
    expected = dpo_fast.packed_hidden(model, batch)

    class Wrapper(torch.nn.Module):  # as DDP and FSDP
        def __init__(self):
            super().__init__()
            self.module = model

    assert torch.equal(dpo_fast.packed_hidden(Wrapper(), batch), expected)
    assert torch.equal(dpo_fast.packed_hidden(torch.compile(model), batch), expected)


# --- shared_prompts ---------------------------------------------------------------------------------------------------

TREE = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 7, 9, 10], [1, 2], [11, 12, 13, 14, 15, 16, 17], [1, 2, 3, 7, 8]]


def padded(sequences, side, extra=0):
    """input_ids and attention_mask of sequences padded on one side, with some columns of padding on the other."""
    longest = max(map(len, sequences)) + extra
    ids, mask = torch.zeros(len(sequences), longest, dtype=torch.int64), torch.zeros(len(sequences), longest)
    for s, sequence in enumerate(sequences):
        at = slice(0, len(sequence)) if side == "right" else slice(longest - extra - len(sequence), longest - extra)
        ids[s, at], mask[s, at] = torch.tensor(sequence), 1
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", [False, True])
def test_nested_prefixes_on_either_side(name, side, positions, in_double):
    """All rows of a tree of prefixes: logits where tokens are, and gradients of a function of these."""
    model, batch = build(name, "eager" if name == "gemma3" else "sdpa"), padded(TREE, side, extra=2)
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    kept = batch["attention_mask"].bool()
    weights = torch.rand(int(kept.sum()), VOCAB, dtype=torch.float64)
    expected = model(**batch).logits[kept]
    (expected * weights).sum().backward()
    grads = gradients(model)
    for mask in ("auto", "blocks") if name != "gemma3" else ("auto",):
        with dpo_fast.shared_prompts(model, mask=mask) as done:
            found = model(**batch).logits[kept]
            (found * weights).sum().backward()
        close(found, expected)
        same_gradients(gradients(model), grads)
        absolute = name == "gpt2" and side == "left" and not positions  # only rows of one length begin at one position
        assert done.rows_run == (sum(map(len, TREE)) - 5 - 3 if absolute else 6 + 2 + 2 + 7)
        assert done.rows_given == 6 * 9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_half_types_rows_are_shared_where_they_begin_together(name):
    """Rounding could hide that a model depends on where positions begin."""
    model, batch = build(name, dtype=torch.bfloat16), padded(TREE, "left")
    kept = batch["attention_mask"].bool()
    expected = model(**batch).logits[kept].float()
    with dpo_fast.shared_prompts(model) as done:
        found = model(**batch).logits[kept].float()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert done.rows_run == sum(map(len, TREE)) - 5 - 3


def test_holes_in_the_mask(in_double):
    """Prompts padded on the left and completions on the right: padding between them; windows count columns, as theirs."""
    ids = torch.tensor([[0, 5, 6, 0, 0, 7, 8, 9, 0], [0, 5, 6, 0, 0, 7, 8, 3, 3], [4, 5, 6, 1, 0, 7, 8, 9, 2]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    kept = batch["attention_mask"].bool()
    for name in ("llama", "mistral", "gpt2"):
        model = build(name, "eager")
        expected = model(**batch).logits[kept]
        with dpo_fast.shared_prompts(model) as done:
            close(model(**batch).logits[kept], expected)
        assert done.packed_calls == 1


def test_without_a_mask_every_token_counts(in_double):
    model, ids = build("llama"), padded(TREE, "right")["input_ids"]
    expected = model(ids).logits
    with dpo_fast.shared_prompts(model) as done:
        close(model(ids).logits, expected)
    assert done.rows_run == len({tuple(row[: t + 1]) for row in ids.tolist() for t in range(ids.shape[1])})


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_what_the_model_does_with_hidden_states_is_its_own(name, in_double):
    model, batch = build(name, "eager"), padded(TREE, "right")
    kept = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~kept, -100)
    router = {"output_router_logits": True} if name == "mixtral" else {}
    given = {**batch, "labels": labels, "output_hidden_states": True, **router}
    expected, last = model(**given), model(**batch, logits_to_keep=3).logits
    with dpo_fast.shared_prompts(model):
        found = model(**given)
        close(model(**batch, logits_to_keep=3).logits[kept[:, -3:]], last[kept[:, -3:]])
        as_tuple = model(**given, return_dict=False)
    close(found.loss, expected.loss)
    close(as_tuple[0], expected.loss)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(a[kept], b[kept])
        assert not a[~kept].any()
    if router:
        close(found.aux_loss, expected.aux_loss)
        for a, b in zip(found.router_logits, expected.router_logits, strict=True):
            close(a[kept.flatten()], b[kept.flatten()])


def test_the_model_is_restored():
    model = build("llama")
    body = model.model

    def fail():
        with dpo_fast.shared_prompts(model) as outer:
            with dpo_fast.shared_prompts(model) as inner:
                assert inner is outer
                assert "forward" in body.__dict__
            assert "forward" in body.__dict__
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in body.__dict__
    replaced(model)
    theirs = body.__dict__["forward"]
    with dpo_fast.shared_prompts(model):
        assert body.forward is not theirs
    assert body.__dict__["forward"] is theirs


def test_calls_that_run_as_they_are():
    """Generation, batches that are packed already, batches with nothing to gain: the very same numbers."""
    model = build("llama").eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    packed = dpo_fast.packed_batch(EXAMPLES)
    batch = {key: packed[key] for key in ("input_ids", "position_ids")}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    left = padded(TREE, "left")
    with torch.no_grad():
        expected = model.generate(**left, **options), model(ids).logits, model(**batch).logits
        with dpo_fast.shared_prompts(model) as done:
            found = model.generate(**left, **options), model(ids).logits, model(**batch).logits
            assert done.packed_calls == 0
            assert done.plain_calls >= 6
            assert model(**left, use_cache=True).past_key_values is not None
            hidden = dpo_fast.packed_hidden(model, packed)
        assert torch.equal(hidden, dpo_fast.packed_hidden(model, packed))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(6, 7, 16)}, "give input_ids, not inputs_embeds"),
        (
            {"attention_mask": torch.ones(6, 8)},
            "attention_mask must have the shape of input_ids \\(6, 7\\), found \\(6, 8\\)",
        ),
        ({"position_ids": torch.arange(7)}, "position_ids must have shape \\(6, 7\\)"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}, "position_ids of row 0 fall from 2 to 0"),
        ({"output_attentions": True}, "no output_attentions"),
        ({"token_type_ids": torch.zeros(6, 7)}, "is given token_type_ids \\(6, 7\\)"),
    ],
)
def test_calls_that_are_refused(change, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message), dpo_fast.shared_prompts(model):
        model(**padded(TREE, "right") | change)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole):
    """Compiled as a whole, or its decoder alone, before and after the block too."""
    model, batch = build("llama", dtype=torch.float32), padded(TREE, "right")
    kept = batch["attention_mask"].bool()
    expected = model(**batch).logits[kept]
    compiled = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model.model.compile(backend="eager")
    for _ in range(2):
        close(compiled(**batch).logits[kept], expected, 1e-5)
        for mask in ("dense", "blocks"):
            with dpo_fast.shared_prompts(compiled, mask=mask) as done:
                close(compiled(**batch).logits[kept], expected, 1e-5)
            assert done.packed_calls == 1


def test_an_empty_row_and_no_token_at_all():
    model = build("llama", dtype=torch.float32)
    batch = padded([TREE[0], [], TREE[1]], "right")
    with dpo_fast.shared_prompts(model) as done:
        logits = model(**batch).logits
        assert done.rows_run == 6 + 2
        assert not logits[1].any()
        assert model(**padded([[], []], "right", extra=3)).logits.shape == (2, 3, VOCAB)
    assert done.plain_calls == 1
