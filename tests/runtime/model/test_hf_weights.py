"""Weights of Hugging Face's files are ours, exactly: the same logits, and the same bytes on the way back."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from planner.foundation.errors import InputError
from planner.model.arithmetic import PLAIN
from planner.model.huggingface import read_config_file
from planner.model.spec import ModelSpec
from planner.strategy.engines.native import EXECUTED_TYPES, not_executed
from planner.strategy.strategy import Degrees, Zero
from runtime.model.huggingface.files import INDEX, WeightFolder, write_weights
from runtime.model.huggingface.names import FAMILY_NAMES
from runtime.model.transformer import Transformer, build_transformer, materialize
from tests.plans import make_plan
from tests.runtime.hf_models import CONFIGS, make_model
from tests.runtime.ranks import make_executor, on_ranks, slice_of

SEQ = 24
TOKENS = torch.randint(96, (2, SEQ), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """transformers' progress bars stay out of the tests' output."""
    yield
    capfd.readouterr()


def saved(name: str, folder: Path) -> Any:
    model = make_model(name)
    model.save_pretrained(folder)
    return model


def whole(spec: ModelSpec) -> Transformer:
    model = build_transformer(spec, 0, spec.layers, True, True, seq=SEQ)
    materialize(model, spec, prefix="", seed=0, device="cpu")
    model.tie()
    return model


def loaded(folder: Path) -> tuple[ModelSpec, Transformer]:
    spec = read_config_file(folder)
    model = whole(spec)
    load_weights(weights_of(model), spec, folder)
    return spec, model


def load_weights(state: dict[str, Tensor], spec: ModelSpec, folder: Path) -> None:
    """Fills the weights in `state` (our names, sharded or whole) from a folder."""
    source = WeightFolder(folder, spec)
    for name, tensor in state.items():
        source.fill(name, tensor)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters, and the biases of routers, which are buffers."""
    kept = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".correction")}
    return {**{name: p.detach() for name, p in model.named_parameters()}, **kept}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def write(model: Transformer, spec: ModelSpec, source: Path, folder: Path, **options: Any) -> None:
    ours = weights_of(model)
    config = json.loads((source / "config.json").read_text())
    write_weights(ours.__getitem__, spec, folder, config=config, **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_and_weights_come_back_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    theirs = saved(name, tmp_path)
    spec, model = loaded(tmp_path)
    assert not_executed(spec) == []
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    write(model, spec, tmp_path, tmp_path / "back", shard_bytes=20_000)
    before, after = tensors(tmp_path), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_executed_family_is_among_the_compared() -> None:
    compared = {name.split("-")[0] for name in CONFIGS}
    assert compared | {"kimi_k2"} == set(EXECUTED_TYPES) == set(FAMILY_NAMES)


def test_what_transformers_reads_from_our_folder_gives_our_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    saved("gpt_neox", tmp_path / "from")
    spec, model = loaded(tmp_path / "from")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    write(model, spec, tmp_path / "from", tmp_path / "to", shard_bytes=20_000)
    assert len(list((tmp_path / "to").glob("model-*-of-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-4)


def test_half_precision_weights_survive_the_way_through_fp32(tmp_path: Path) -> None:
    theirs = make_model("phi3").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "from")
    spec, model = loaded(tmp_path / "from")
    write(model, spec, tmp_path / "from", tmp_path / "to", dtype=torch.bfloat16)
    before, after = tensors(tmp_path / "from"), tensors(tmp_path / "to")
    assert all(torch.equal(before[key], after[key]) for key in before)


PLANS = {
    "tp2-sp": Degrees(tp=2, sequence_parallel=True, micro_batch=4, num_micro_batches=2),
    "tp2-zero3": Degrees(tp=2, dp_shard=2, zero=Zero(3), micro_batch=2, num_micro_batches=2),
    "pp3-zero2": Degrees(pp=3, dp_shard=2, zero=Zero(2), micro_batch=1, num_micro_batches=4),
}


CUT = [
    (layout, name) for layout in PLANS for name in ("phi3", "gpt2") if (layout, name) != ("pp3-zero2", "gpt2")
]
"""Layouts and families; the tiny gpt2 has two layers. falcon has one key-value head."""


@pytest.mark.parametrize(("layout", "name"), [*CUT, ("tp2-zero3", "falcon")])
def test_every_rank_reads_its_own_slices(layout: str, name: str, tmp_path: Path) -> None:
    """Fused and transposed tensors cut by every layout: the first loss is that of the whole model."""
    saved(name, tmp_path)
    spec, model = loaded(tmp_path)
    plan = make_plan(spec, PLANS[layout])
    batch = torch.randint(96, (8, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(batch[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()

    def first_loss(rank: int) -> float:
        executor = make_executor(plan)
        state = executor.state_dict()
        weights = {key.removeprefix("model."): t for key, t in state.items() if key.startswith("model.")}
        load_weights(weights, spec, tmp_path)
        return executor.step(slice_of(executor, batch)).loss

    for loss in on_ranks(first_loss, plan.strategy.degrees.world):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_base_models_and_buffers_of_older_files_are_read(tmp_path: Path) -> None:
    """gpt2's published files leave out the first part of every name, and hold the causal mask."""
    saved("gpt2", tmp_path)
    held = {key.removeprefix("transformer."): t for key, t in tensors(tmp_path).items()}
    held["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(held, tmp_path / "model.safetensors")
    _, model = loaded(tmp_path)
    assert torch.equal(model.layers["0"].mlp.up.weight, held["h.0.mlp.c_fc.weight"].T)


def change(folder: Path, **changes: Tensor | None) -> None:
    held = tensors(folder)
    for key, value in changes.items():
        key = key.replace("__", ".")
        held.pop(key, None)
        if value is not None:
            held[key] = value
    save_file(held, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        loaded(folder)
    return str(caught.value)


def test_wrong_keys_are_listed(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    change(tmp_path, model__norm__weight=None, lm_head__extra=torch.zeros(1))
    text = refusal(tmp_path)
    assert "model.norm.weight: is missing" in text
    assert "lm_head.extra: is in the files and not in the model" in text


def test_a_wrong_shape_names_both(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    change(tmp_path, model__norm__weight=torch.zeros(31))
    assert "model.norm.weight: is of shape [31], the model has [32]" in refusal(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no *.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    assert "save_pretrained" in refusal(tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was opened",)


def test_broken_files_are_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    keys = list(tensors(tmp_path))
    index = {"weight_map": dict.fromkeys([*keys, "model.more"], "model.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "lacks model.more, which the index promises" in refusal(tmp_path)
    index["weight_map"] = dict.fromkeys(keys, "model-00001-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "is named in the index and missing" in refusal(tmp_path)
    index["weight_map"] = dict.fromkeys(keys, "../model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "no weight_map of keys to files of this folder" in refusal(tmp_path)
    (tmp_path / INDEX).unlink()
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read as safetensors" in refusal(tmp_path)


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    spec, model = loaded(tmp_path)
    with pytest.raises(InputError, match="exists already"):
        write(model, spec, tmp_path, tmp_path)


def test_arithmetic_that_is_not_described_is_refused_in_words(tmp_path: Path) -> None:
    saved("olmo", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"clip_qkv": 8.0}))
    assert not_executed(read_config_file(tmp_path)) == ["queries, keys and values are clipped"]
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": dynamic}))
    assert not_executed(read_config_file(tmp_path)) == ["rotary frequencies are stretched by 'dynamic'"]


def test_llama_is_plain(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    assert read_config_file(tmp_path).arithmetic == PLAIN
