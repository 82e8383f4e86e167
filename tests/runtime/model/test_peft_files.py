"""PEFT's files: what is written is read again, fused modules too, and what is not ours is refused.

`bench.peft_check` compares with peft itself.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from planner.foundation.errors import InputError
from planner.model.feed_forward import Mlp
from planner.model.huggingface import read_config_file
from planner.model.spec import Block, ModelSpec, Segment
from planner.model.workload import Adapters
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Zero
from runtime.checkpoint import huggingface as adapter_files
from runtime.checkpoint.huggingface import MISREAD_BY_PEFT, AdapterFolder, write_adapters
from runtime.model.huggingface.files import local_box
from runtime.model.lora import adapted_modules, peft_modules
from runtime.model.transformer import build_transformer
from tests.plans import make_plan, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_mla
from tests.runtime.hf_models import make_model
from tests.runtime.ranks import make_executor, on_ranks

RANK, ALPHA = 2, 6.0
KEY = "base_model.model.{}.lora_{}.weight"
GPT2, LLAMA = tiny_gpt2(layers=2), tiny_llama(layers=2)
PHI3 = dataclasses.replace(LLAMA, model_type="phi3")
NEOX = dataclasses.replace(GPT2, model_type="gpt_neox")
C_ATTN = "transformer.h.1.attn.c_attn"


def dense_then_experts() -> ModelSpec:
    """A layer with an MLP, then one with experts, of which one is shared."""
    dense, experts = tiny_mla(layers=1).block(0), tiny_mixtral(layers=1).block(0)
    assert isinstance(dense, Block) and isinstance(experts, Block)
    shared = dataclasses.replace(experts.mlp, shared=dense.mlp) if isinstance(dense.mlp, Mlp) else None
    second = dataclasses.replace(dense, mlp=shared)
    segments = (Segment(block=dense, count=1), Segment(block=second, count=1))
    return dataclasses.replace(tiny_mla(layers=1), segments=segments)


def plan_of(model: ModelSpec, modules: str, rank: int = RANK, **degrees: Any) -> Plan:
    return make_plan(
        model, Degrees(**{"micro_batch": 2, **degrees}), adapters=Adapters(rank=rank, modules=modules)
    )


def halves_of(plan: Plan) -> dict[str, Tensor]:
    """Random halves of all adapters of a plan, by our names."""
    adapters, model = plan.workload.adapters, plan.model
    assert adapters is not None
    generator, halves = torch.Generator().manual_seed(4), {}
    layers = build_transformer(model, 0, model.layers, True, True, seq=1).layers
    for name, block in layers.named_children():
        for path in adapted_modules(block, adapters.modules):
            outputs, inputs = block.get_submodule(path).weight.shape
            for half, shape in (("a", (adapters.rank, inputs)), ("b", (outputs, adapters.rank))):
                halves[f"layers.{name}.{path}.lora_{half}"] = torch.randn(shape, generator=generator)
    return halves


def written(plan: Plan, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Random halves, the tensors that they are in files, and the config beside them."""
    halves, adapters = halves_of(plan), plan.workload.adapters
    assert adapters is not None
    write_adapters(halves, plan.model, adapters, folder, alpha=ALPHA)
    config = json.loads((folder / "adapter_config.json").read_text())
    return halves, load_file(folder / "adapter_model.safetensors"), config


def read_back(plan: Plan, folder: Path) -> dict[str, Tensor]:
    found = {name: torch.full_like(half, torch.nan) for name, half in halves_of(plan).items()}
    AdapterFolder(folder, plan, alpha=ALPHA).fill(found.items())
    return found


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> None:
    """Changes the files of a folder."""
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


@pytest.mark.parametrize("modules", ["all", "qv", "k_proj,o_proj,up_proj"])
@pytest.mark.parametrize("model", [LLAMA, GPT2, PHI3, NEOX], ids=lambda model: model.model_type)
def test_what_is_written_is_read_again(model: ModelSpec, modules: str, tmp_path: Path) -> None:
    plan = plan_of(model, modules)
    halves, *_ = written(plan, tmp_path)
    found = read_back(plan, tmp_path)
    assert all(torch.equal(found[name], half) for name, half in halves.items())


def test_a_module_of_several_projections_adds_what_each_of_them_does(tmp_path: Path) -> None:
    """c_attn's rows are those of queries, keys and values; its adapter counts as theirs do."""
    halves, tensors, config = written(plan_of(GPT2, "qv"), tmp_path)
    a, b = (tensors[KEY.format(C_ATTN, half)] for half in "AB")
    assert (a.shape, b.shape) == ((2 * RANK, 32), (96, 2 * RANK))
    own = {
        name: halves[f"layers.1.attention.{name}.lora_b"] @ halves[f"layers.1.attention.{name}.lora_a"]
        for name in ("wq", "wv")
    }
    torch.testing.assert_close(b @ a, torch.cat((own["wq"], torch.zeros(32, 32), own["wv"])))
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"c_attn": 4}, {"c_attn": 2 * ALPHA})
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (RANK, ALPHA, True)


def test_every_rank_reads_its_slices_of_a_module_of_several_projections(tmp_path: Path) -> None:
    plan = plan_of(GPT2, "all", tp=2, dp_shard=2, zero=Zero(3))
    halves, *_ = written(plan, tmp_path)

    def body(rank: int) -> list[str]:
        executor, wrong = make_executor(plan), []
        AdapterFolder(tmp_path, plan, alpha=ALPHA).fill(executor.weight_tensors())
        for name, tensor in executor.weight_tensors():
            if "lora_" in name:
                local, box = local_box(tensor)
                own = halves[name][tuple(slice(begin, end) for begin, end in box)]
                wrong += [] if torch.equal(local, own) else [name]
        return wrong

    assert on_ranks(body, 4) == [[]] * 4


def test_an_adapter_of_peft_for_several_projections_is_taken_for_each(tmp_path: Path) -> None:
    """One A for all: each begins with a copy of it, and with its rows of B."""
    plan = plan_of(GPT2, "q_proj,k_proj,v_proj")
    _, tensors, _ = written(plan, tmp_path)
    generator = torch.Generator().manual_seed(1)
    shapes = {"A": (RANK, 32), "B": (96, RANK)}
    for layer in range(2):
        for half, shape in shapes.items():
            key = KEY.format(f"transformer.h.{layer}.attn.c_attn", half)
            tensors[key] = torch.randn(shape, generator=generator)
    rewrite(tmp_path, tensors, rank_pattern={}, alpha_pattern={})
    found = read_back(plan, tmp_path)
    for place, name in enumerate(("wq", "wk", "wv")):
        a, b = (found[f"layers.1.attention.{name}.lora_{half}"] for half in "ab")
        assert torch.equal(a, tensors[KEY.format(C_ATTN, "A")])
        assert torch.equal(b, tensors[KEY.format(C_ATTN, "B")][32 * place : 32 * (place + 1)])
    few = plan_of(GPT2, "qv")
    with pytest.raises(InputError, match="--lora-rank 2 --lora-modules q_proj,k_proj,v_proj"):
        AdapterFolder(tmp_path, few, alpha=ALPHA)


@pytest.mark.parametrize(
    ("model", "modules", "targets"),
    [
        (LLAMA, "qv", ["q_proj", "v_proj"]),
        (GPT2, "o_proj", ["attn.c_proj"]),
        (GPT2, "o_proj,down_proj", ["c_proj"]),
        (dense_then_experts(), "o_proj,down_proj", ["mlp.down_proj", "o_proj"]),
    ],
)
def test_targets_are_the_modules_that_are_meant_and_no_other(
    model: ModelSpec, modules: str, targets: list[str], tmp_path: Path
) -> None:
    """GPT-2 calls two modules c_proj; shared experts have modules of an MLP's names."""
    assert written(plan_of(model, modules), tmp_path)[2]["target_modules"] == targets


@pytest.mark.parametrize(
    ("model", "modules", "unread"),
    [
        (dense_then_experts(), "all", True),
        (dense_then_experts(), "attention", False),
        (LLAMA, "all", False),
        (tiny_mixtral(layers=1), "all", False),
    ],
)
def test_what_peft_does_not_find_is_said(
    model: ModelSpec, modules: str, unread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(model, modules)
    monkeypatch.setattr(adapter_files, "read_adapters", lambda _checkpoint: halves_of(plan))
    told = adapter_files.export_adapters(tmp_path, plan, tmp_path / "adapter", alpha=ALPHA)
    assert told == f"adapters for PEFT are in {tmp_path / 'adapter'}" + f"; {MISREAD_BY_PEFT}" * unread


def test_rank_stabilised_adapters_count_by_the_root_of_their_rank(tmp_path: Path) -> None:
    """alpha / sqrt(r) (rsLoRA, arXiv 2312.03732): 6 / 2 as theirs is 3 times, as ours is of alpha 12."""
    plan = plan_of(LLAMA, "qv", rank=4)
    written(plan, tmp_path)
    rewrite(tmp_path, use_rslora=True)
    with pytest.raises(
        InputError, match=r"by 3, the run scales its adapters by 1\.5\. Fix: give --lora-alpha 12"
    ):
        AdapterFolder(tmp_path, plan, alpha=ALPHA)
    AdapterFolder(tmp_path, plan, alpha=12.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type: is 'IA3'"),
        ({"use_dora": True}, "use_dora: is True"),
        ({"bias": "all"}, "bias: is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "unchanged weights of the model"),
        ({"lora_alpha": "6"}, "lora_alpha: is '6'"),
        ({"lora_alpha": 10**400}, "lora_alpha: is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha: is nan"),
        ({"lora_alpha": 3}, "give --lora-alpha 3"),
        ({"alpha_pattern": {"q_proj": 2}}, "adapters that share one scale"),
        ({"alpha_pattern": {"(a+)+": 2}}, "for the end of a module's name"),
        ({"alpha_pattern": [2]}, "names and numbers"),
    ],
)
def test_adapters_that_compute_otherwise_are_refused(changed: Any, words: str, tmp_path: Path) -> None:
    plan = plan_of(LLAMA, "qv")
    written(plan, tmp_path)
    rewrite(tmp_path, **changed)
    with pytest.raises(InputError) as error:
        AdapterFolder(tmp_path, plan, alpha=ALPHA)
    assert words in str(error.value)


def test_other_modules_are_refused_with_the_flags_that_have_them(tmp_path: Path) -> None:
    written(plan_of(tiny_mla(layers=2), "q_a_proj,kv_b_proj", rank=4), tmp_path)
    with pytest.raises(InputError, match="solve with --lora-rank 4 --lora-modules q_a_proj,kv_b_proj"):
        AdapterFolder(tmp_path, plan_of(tiny_mla(layers=2), "qv", rank=4), alpha=ALPHA)


@pytest.mark.parametrize(
    ("family", "modules"), [("gpt2", "all"), ("phi3", "qv"), ("deepseek_v3-groups", "qv")]
)
def test_peft_adds_what_our_adapters_add(family: str, modules: str, tmp_path: Path) -> None:
    """Its merged weights are those of the model and s B A of each projection, in its rows."""
    peft = pytest.importorskip("peft")
    model = make_model(family)
    model.save_pretrained(tmp_path)
    plan = plan_of(read_config_file(tmp_path), modules)
    halves, *_ = written(plan, tmp_path / "adapter")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers; others stay errors
        after = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    assert plan.workload.adapters is not None
    for module in peft_modules(plan.model, plan.workload.adapters):
        for path, pieces in module.members:
            added = ALPHA / RANK * halves[f"{path}.lora_b"] @ halves[f"{path}.lora_a"]
            change = after[f"{module.name}.weight"] - before[f"{module.name}.weight"]
            change = change.T if family == "gpt2" else change
            for piece in pieces:
                rows = change[piece.begin : piece.begin + piece.rows]
                torch.testing.assert_close(
                    rows, added[piece.first : piece.first + piece.rows], rtol=1e-4, atol=1e-5
                )
