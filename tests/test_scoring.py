"""reference_logps: the padded model's log-probs, in padded order, kept in a file that is of this data and this model."""

from __future__ import annotations

import copy
import random
import sys

import pytest
import torch

import dpo_fast

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

VOCAB = 41


def tiny_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, attention_dropout=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def dataset_of(n: int = 9, rejected: int = 1) -> list[dict]:
    rng = random.Random(n)

    def ids(low: int = 1, high: int = 11) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    several = [[ids() for _ in range(1 + i % rejected)] for i in range(n)]
    return [
        {"prompt_ids": ids(2, 9), "chosen_ids": ids(), "rejected_ids": several[i] if rejected > 1 else several[i][0]}
        for i in range(n)
    ]


@torch.no_grad()
def padded_logps(model: torch.nn.Module, dataset: list[dict], **options) -> torch.Tensor:
    batch = dpo_fast.padded_batch(dataset, 0, **options)
    modes = model.training
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(modes)
    return dpo_fast.sequence_logps(logits, batch["targets"])


def score(model, dataset, **options) -> torch.Tensor:
    return dpo_fast.reference_logps(model, dataset, progress=False, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("rejected", [1, 3])
@pytest.mark.parametrize("budget", [1, 40, 8192])  # alone, some batches, one batch
def test_equals_the_padded_batch_of_the_whole_data_set(model, rejected, budget):
    dataset = dataset_of(rejected=rejected)
    found = score(model, dataset, token_budget=budget)
    torch.testing.assert_close(found, padded_logps(model, dataset), rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("options", [{"max_length": 12}, {"max_length": 14, "truncation": "keep_end"}])
def test_cut_as_the_batches_are(model, options):
    dataset = dataset_of()
    whole = padded_logps(model, dataset)
    expected = padded_logps(model, dataset, **options)
    assert not torch.allclose(whole, expected)
    torch.testing.assert_close(score(model, dataset, **options), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rejected", [1, 3])
def test_sequence_numbers_give_every_batch_its_references(model, rejected):
    dataset = dataset_of(rejected=rejected)
    refs = score(model, dataset)
    where = dpo_fast.SequenceNumbers(dataset)
    for numbers in ([4], [7, 0, 5], list(range(9))):
        examples = [dataset[i] for i in numbers]
        expected = padded_logps(model, examples)
        torch.testing.assert_close(refs[where(numbers)], expected, rtol=1e-6, atol=1e-6)
        packed = dpo_fast.packed_batch(examples, share_prompts=True)
        hidden = dpo_fast.packed_hidden(copy.deepcopy(model).eval(), packed)
        logps = dpo_fast.linear_sequence_logps(
            hidden, model.lm_head.weight, packed["targets"], cu_seqlens=packed["cu_seqlens"]
        )
        torch.testing.assert_close(refs[where(numbers, share_prompts=True)], logps.detach(), rtol=1e-6, atol=1e-6)
    if rejected == 1:  # all chosen, then all rejected: the default of the losses
        assert torch.equal(refs.view(2, -1)[:, [7, 0]].flatten(), refs[where([7, 0])])


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first = score(model, dataset_of())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(first, score(model, dataset_of()))  # no dropout
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        score(model, [{"prompt_ids": [1], "chosen_ids": [VOCAB + 5], "rejected_ids": [2]}])
    assert [module.training for module in model.modules()] == modes


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_read_instead_of_the_model(tmp_path, monkeypatch):
    model, dataset, path = tiny_model(), dataset_of(), tmp_path / "refs.safetensors"
    first = score(model, dataset, path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["refs.safetensors"]
    before = path.read_bytes()
    monkeypatch.setattr("dpo_fast.scoring.packed_hidden", None)  # a second run of the model would fail
    assert torch.equal(score(model, dataset, path=str(path)), first)
    assert torch.equal(score(model, dataset, path=path, token_budget=10), first)
    as_tensors = [{k: torch.tensor(v) for k, v in example.items()} for example in dataset]
    assert torch.equal(score(model, as_tensors, path=path), first)
    again = tiny_model()
    again.config._name_or_path = "moved"
    assert torch.equal(score(again, dataset, path=path), first)
    assert path.read_bytes() == before


def changed_weight(model, dataset):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(-1)[7] += 1e-9
    return model, dataset, {}


def changed_config(model, dataset):
    model.config.rms_norm_eps *= 2
    return model, dataset, {}


def changed_id(model, dataset):
    other = copy.deepcopy(dataset)
    other[3]["chosen_ids"][-1] = (other[3]["chosen_ids"][-1] + 1) % VOCAB
    return model, other, {}


def moved_boundary(model, dataset):
    other = copy.deepcopy(dataset)
    other[3]["chosen_ids"] = [other[3]["prompt_ids"].pop(), *other[3]["chosen_ids"]]
    return model, other, {}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (changed_weight, "model"),
        (changed_config, "model"),
        (changed_id, "data"),
        (moved_boundary, "data"),
        (lambda m, d: (m, d[::-1], {}), "data"),
        (lambda m, d: (m, d[:-1], {}), "data"),
        (lambda m, d: (m, d, {"max_length": 12}), "data"),
        (lambda m, d: (m.float(), d, {}), "model"),
    ],
)
def test_other_data_or_another_model_is_refused(tmp_path, change, part):
    path = tmp_path / "refs.safetensors"
    score(tiny_model(), dataset_of(), path=path)
    model, dataset, options = change(tiny_model(), dataset_of())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"references are of another {part}") as error:
        score(model, dataset, path=path, **options)
    assert str(error.value).split("references")[-1].count("another") == 2  # this part, and "give another path"
    assert path.read_bytes() == before


def test_autocast_is_part_of_the_reference(tmp_path):
    model, path = tiny_model().float(), tmp_path / "refs.safetensors"
    score(model, dataset_of(), path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="another arithmetic"):
        score(model, dataset_of(), path=path)


def test_files_that_are_none(tmp_path, model):
    path = tmp_path / "refs.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no safetensors file"):
        score(model, dataset_of(), path=path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no tensor ref_logps"):
        score(model, dataset_of(), path=path)
    save_file({"ref_logps": torch.zeros(18)}, path)
    with pytest.raises(ValueError, match="another version of this file format, another data"):
        score(model, dataset_of(), path=path)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        score(model, dataset_of(), path=tmp_path / "none" / "refs.safetensors")


def test_an_interrupted_write_leaves_nothing(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    path = tmp_path / "refs.safetensors"
    monkeypatch.setattr("dpo_fast._reference_file.os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        score(model, dataset_of(), path=path)
    assert list(tmp_path.iterdir()) == []


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return found


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["down_proj"]}])
def test_the_reference_of_a_lora_model_is_its_base(tmp_path, options):
    dataset, path = dataset_of(), tmp_path / "refs.safetensors"
    base = score(tiny_model(), dataset, path=path)
    model = with_lora(tiny_model(), **options)
    for off in ("auto", True):
        torch.testing.assert_close(score(model, dataset, adapter_off=off), base, rtol=1e-9, atol=1e-9)
    as_it_is = score(model, dataset, adapter_off=False)
    assert (as_it_is - base).abs().max() > 1e-3
    torch.testing.assert_close(as_it_is, padded_logps(model, dataset), rtol=1e-6, atol=1e-6)
    # the base model's file serves, before the first step and after it; not for the adapters' own log-probs
    assert torch.equal(score(model, dataset, path=path), base)
    with pytest.raises(ValueError, match="another model .*another state of the adapters"):
        score(model, dataset, path=path, adapter_off=False)


def test_transformers_own_adapters():
    peft = pytest.importorskip("peft")
    model, dataset = tiny_model(), dataset_of()
    base = score(model, dataset)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert (score(model, dataset, adapter_off=False) - base).abs().max() > 1e-3
    torch.testing.assert_close(score(model, dataset), base, rtol=1e-9, atol=1e-9)
    assert (score(model, dataset, adapter_off=False) - base).abs().max() > 1e-3  # they are on again


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="has no adapters"):
        score(model, dataset_of(), adapter_off=True)
    for wrong in ("on", None, 1):
        with pytest.raises(ValueError, match="adapter_off must be"):
            score(model, dataset_of(), adapter_off=wrong)
    with pytest.raises(ValueError, match="token_budget must be at least 1"):
        score(model, dataset_of(), token_budget=0)
    with pytest.raises(ValueError, match="no pairs"):
        score(model, [])
    with pytest.raises(ValueError, match="example 0 has no rejected_ids"):
        score(model, [{"prompt_ids": [1], "chosen_ids": [2]}])


@pytest.mark.parametrize("installed", [True, False])
def test_progress(model, capsys, monkeypatch, installed):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    dpo_fast.reference_logps(model, dataset_of(), token_budget=30)
    shown = capsys.readouterr().err
    assert "Reference" in shown
    total = sum(dpo_fast.packed_lengths(dataset_of()))
    assert ("100%" if installed else f"Reference: {total} of {total} tokens") in shown


def test_the_loop_of_the_docs(tmp_path, monkeypatch):
    """docs/training.md's first block runs as it stands, and trains."""
    from pathlib import Path

    text = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    code = block.split("\n\n", 1)[1]  # without the first statement, which shows the form of the examples
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = {"dpo_fast": dpo_fast, "model": model, "examples": dataset_of(), "optimizer": optimizer}
    names |= {"rank": 0, "world": 1, "epochs": 12}
    code = code.replace("out.loss.backward()", "out.loss.backward(); losses.append(out.loss.item())")
    names["losses"] = []
    exec(code, names)
    assert (tmp_path / "references.safetensors").exists()
    assert names["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert names["losses"][-1] < 0.6
