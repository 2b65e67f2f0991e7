"""From examples to batches: targets, padding, packing, shared prompts, in-batch negatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dpo_fast

EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [[10, 11], [12, 13, 14]]},
]


def test_padded_batch():
    batch = dpo_fast.padded_batch(EXAMPLES, pad_token_id=0, pad_to_multiple_of=4)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 0, 0, 0],
        [7, 8, 9, 0, 0, 0, 0, 0],
        [1, 2, 3, 6, 0, 0, 0, 0],
        [7, 8, 10, 11, 0, 0, 0, 0],
        [7, 8, 12, 13, 14, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [5, 3, 4, 4, 5]
    assert batch["completion_mask"].sum(-1).tolist() == [2, 1, 1, 2, 3]
    assert batch["pairs"].tolist() == [[0, 2], [1, 3], [1, 4]]
    targets = dpo_fast.completion_targets(batch["input_ids"], batch["completion_mask"])
    assert torch.equal(batch["targets"], targets)


def test_as_trls_collator():
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    examples = [EXAMPLES[0], {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]}]
    for options in ({}, {"max_length": 4}, {"max_length": 3, "truncation": "keep_end"}):
        theirs = module.DataCollatorForPreference(
            0, options.get("max_length"), options.get("truncation", "keep_start")
        )(examples)
        ours = dpo_fast.padded_batch(examples, 0, **options)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_truncation_that_leaves_nothing_raises():
    with pytest.raises(ValueError, match="chosen_ids of example 0 has no completion token within max_length 3"):
        dpo_fast.padded_batch(EXAMPLES, 0, max_length=3)
    with pytest.raises(ValueError, match="chosen_ids of example 0 has no prompt token within max_length 2"):
        dpo_fast.padded_batch(EXAMPLES, 0, max_length=2, truncation="keep_end")
    with pytest.raises(ValueError, match="truncation must be"):
        dpo_fast.padded_batch(EXAMPLES, 0, truncation="middle")
    with pytest.raises(ValueError, match="in different ways"):
        dpo_fast.packed_batch(EXAMPLES, max_length=4, truncation="keep_end", share_prompts=True)
    with pytest.raises(ValueError, match="no pairs"):
        dpo_fast.padded_batch([], 0)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, found 0"):
        dpo_fast.padded_batch(EXAMPLES, 0, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="prompt_ids of example 0 is empty"):
        dpo_fast.padded_batch([{**EXAMPLES[0], "prompt_ids": []}], 0)
    with pytest.raises(TypeError, match="chosen_ids of example 0 must be token ids, found \\[1.7"):
        dpo_fast.padded_batch([{**EXAMPLES[0], "chosen_ids": [1.7]}], 0)
    with pytest.raises(ValueError, match="example 0 has no rejected_ids, only prompt_ids, chosen_ids"):
        dpo_fast.padded_batch([{"prompt_ids": [1], "chosen_ids": [2]}], 0)


def test_ids_may_be_tensors_and_arrays():
    expected = dpo_fast.padded_batch(EXAMPLES[:1], 0)
    for kind in (torch.tensor, np.array):
        found = dpo_fast.padded_batch([{k: kind(v) for k, v in EXAMPLES[0].items()}], 0)
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_packed_batch():
    batch = dpo_fast.packed_batch(EXAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 1, 2, 3, 6, 7, 8, 10, 11, 7, 8, 12, 13, 14]]
    assert batch["cu_seqlens"].tolist() == [0, 5, 8, 12, 16, 21]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4]]
    ignored = -100
    expected = [ignored, ignored, 4, 5, ignored, ignored, 9, ignored, ignored, ignored, 6, ignored]
    assert batch["targets"][0, :12].tolist() == expected


def test_shared_prompts():
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 6, 7, 8, 9, 8, 10, 11, 8, 12, 13, 14]]
    assert batch["cu_seqlens"].tolist() == [0, 5, 7, 10, 13, 17]
    assert batch["pairs"].tolist() == [[0, 1], [2, 3], [2, 4]]
    mask = batch["attention_mask"][0, 0]
    assert mask[6].nonzero().flatten().tolist() == [0, 1, 5, 6]  # the second completion sees the prompt and itself
    assert mask[12].nonzero().flatten().tolist() == [7, 10, 11, 12]


@pytest.mark.parametrize("share", [False, True])
def test_spans_say_what_the_mask_says(share):
    batch = dpo_fast.packed_batch(EXAMPLES, share_prompts=share)
    bare = dpo_fast.packed_batch(EXAMPLES, share_prompts=share, mask="none")
    assert "attention_mask" not in bare
    assert all(torch.equal(batch[key], value) for key, value in bare.items())
    spans, stops, ids = batch["spans"], batch["cu_seqlens"][1:], batch["input_ids"][0]
    expected = [[0, 2, 2], [0, 2, 5], [7, 8, 8], [7, 8, 10], [7, 8, 13]]
    assert not share or spans.tolist() == expected
    mask = batch["attention_mask"][0, 0] if share else torch.ones(len(ids), len(ids)).bool()
    found = []
    for (start, end, own), stop in zip(spans.tolist(), stops.tolist(), strict=True):
        found.append(ids[[*range(start, end), *range(own, stop)]].tolist())
        assert not share or mask[stop - 1].nonzero().flatten().tolist() == [*range(start, end), *range(own, stop)]
    padded = dpo_fast.padded_batch(EXAMPLES, 0)
    rows = [row[kept.bool()].tolist() for row, kept in zip(padded["input_ids"], padded["attention_mask"], strict=True)]
    assert found == ([rows[s] for s in (0, 2, 1, 3, 4)] if share else rows)
    with pytest.raises(ValueError, match="mask must be 'dense' or 'none', found 'blocks'"):
        dpo_fast.packed_batch(EXAMPLES, mask="blocks")


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def test_all_batches_give_a_model_the_same_loss(model):
    """Padded, packed and with shared prompts: the same losses and the same gradients of the parameters."""
    found = []
    ref = torch.tensor([-3.0, -4.0, -5.0, -6.0, -7.0], dtype=torch.float64)
    padded = dpo_fast.padded_batch(EXAMPLES, 0)
    packed = dpo_fast.packed_batch(EXAMPLES)
    shared = dpo_fast.packed_batch(EXAMPLES, share_prompts=True)
    for batch, order in ((padded, [0, 1, 2, 3, 4]), (packed, [0, 1, 2, 3, 4]), (shared, [0, 2, 1, 3, 4])):
        model.zero_grad()
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        logits = model(**inputs, use_cache=False).logits
        out = dpo_fast.dpo_loss(
            logits, batch["targets"], ref[order], pairs=batch["pairs"], cu_seqlens=batch.get("cu_seqlens")
        )
        out.loss.backward()
        found.append((out.losses.detach(), [p.grad.clone() for p in model.parameters()]))
    for losses, grads in found[1:]:
        torch.testing.assert_close(losses, found[0][0])
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_in_batch_pairs():
    prompts = torch.tensor([5, 5, 9, 9, 5])
    assert dpo_fast.in_batch_pairs(prompts).tolist() == [[0, 1], [0, 4], [2, 3]]
    own = torch.tensor([1, 0, 0, 1, 1])
    assert dpo_fast.in_batch_pairs(prompts, own).tolist() == [[0, 1], [3, 2], [4, 1]]
    with pytest.raises(ValueError, match="no pairs"):
        dpo_fast.in_batch_pairs(torch.arange(3))
    with pytest.raises(ValueError, match="must have shape"):
        dpo_fast.in_batch_pairs(prompts, own[:2])


def test_in_batch_negatives():
    examples = [{"prompt_ids": [p], "chosen_ids": [p, c]} for p, c in ((1, 2), (1, 3), (4, 5), (6, 7))]
    examples.append({"prompt_ids": [8], "chosen_ids": [1, 2]})  # the same answer as the first one's
    found = dpo_fast.in_batch_negatives(examples, 2, torch.Generator().manual_seed(0))
    for example, given in zip(found, examples, strict=True):
        assert len(example["rejected_ids"]) == 2
        assert given["chosen_ids"] not in example["rejected_ids"]
        assert example["rejected_ids"][0] != example["rejected_ids"][1]
    assert all(ids in ([4, 5], [6, 7]) for ids in found[0]["rejected_ids"])
    batch = dpo_fast.padded_batch(found, 0)
    assert batch["pairs"].shape == (10, 2)
    owners = torch.tensor([*range(5), *(i for i in range(5) for _ in range(2))])
    assert torch.equal(dpo_fast.in_batch_pairs(owners), batch["pairs"])
    known = [{"prompt_ids": [1], "chosen_ids": [c]} for c in (10, 20)]
    known += [{"prompt_ids": [p], "chosen_ids": [20 * p - 20]} for p in (2, 3, 4)]
    for example in dpo_fast.in_batch_negatives(known, 2)[:2]:
        assert sorted(example["rejected_ids"]) == [[40], [60]]  # 20 is an answer to this prompt too
    with pytest.raises(ValueError, match="n_negatives must be at least 1, found 0"):
        dpo_fast.in_batch_negatives(examples, 0)
    with pytest.raises(ValueError, match="example 0 has 2 completions of other prompts, 3 are wanted"):
        dpo_fast.in_batch_negatives(examples, 3)
