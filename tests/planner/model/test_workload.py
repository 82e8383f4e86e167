"""What is trained: formats, optimizers, adapters; what is planned and refused by `plan train`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.hardware.catalog import load_model
from planner.model.lora import adapted, adapter_params, layer_adapter_params
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision, Workload
from planner.strategy.engines.native import (
    check_executed_workload,
    not_executed_workload,
    products_not_executed,
)
from planner.strategy.plan import load_plan
from planner.strategy.strategy import Degrees

ASK = ["--model", "llama-3-8b", "--cluster", "1x8:h100-sxm-80gb", "--seq", "4096", "--batch", "16"]
FIXED = ["--fix", "dp=8", "--fix", "zero=3", "--fix", "recompute=full"]


def estimate(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["estimate", *ASK, *FIXED, *options])
    return result.exit_code, result.output


def test_bytes_of_formats() -> None:
    """fp8 is of operands only: activations and gathered weights stay two bytes wide."""
    sizes = {p: (p.compute_bytes, p.operand_bytes) for p in Precision}
    assert sizes == {
        Precision.FP32: (4, 4),
        Precision.BF16: (2, 2),
        Precision.FP16: (2, 2),
        Precision.FP8: (2, 1),
    }


def test_state_of_a_matrix() -> None:
    """Two moments, a momentum, rows and columns, or a momentum whose ends are AdamW's."""
    each = {o: o.matrix_state_bytes(100, 50) for o in Optimizer}
    assert each == {
        Optimizer.ADAMW: 40_000,
        Optimizer.SGD: 20_000,
        Optimizer.ADAFACTOR: 600,
        Optimizer.MUON: 20_000,
    }
    assert Optimizer.MUON.matrix_state_bytes(100, 50, ends=True) == 40_000


def test_a_workload_with_adapters_round_trips() -> None:
    adapters = Adapters(rank=8, modules=AdapterModules.QV)
    workload = Workload(seq=1, batch=1, method=Method.LORA, adapters=adapters)
    assert decode(Workload, encode(workload), source="x") == workload
    assert decode(Workload, {"seq": 1, "batch": 2}, source="x").adapters is None


def test_adapters_of_a_rank_are_shards_of_the_whole() -> None:
    """The half beside the split dimension is shared out, the other whole on every rank."""
    model = load_model("llama-3-8b")
    block, adapters = model.segments[0].block, Adapters(rank=16, modules=AdapterModules.ALL)
    whole = layer_adapter_params(adapters, block)
    assert whole * model.layers == adapter_params(adapters, model)
    assert whole / 8 < layer_adapter_params(adapters, block, 8) < whole


def test_adapters_stand_beside_more_and_more_weights() -> None:
    block = load_model("llama-3-8b").segments[0].block
    assert [len(adapted(block, modules)) for modules in AdapterModules] == [2, 3, 4, 7]


def test_modules_of_latents_are_named_as_deepseek_names_them() -> None:
    """r (in + out) of each module's nn.Linear in deepseek-v3's 61 layers, by rank 1."""
    model = load_model("deepseek-v3")
    per_layer = {
        "q_a_proj": 7168 + 1536,
        "q_b_proj": 1536 + 128 * 192,
        "kv_a_proj_with_mqa": 7168 + 576,
        "kv_b_proj": 512 + 128 * 256,
        "o_proj": 128 * 128 + 7168,
    }

    def params(modules: str) -> int:
        return adapter_params(Adapters(rank=1, modules=modules), model)

    assert {name: params(name) for name in per_layer} == {n: 61 * each for n, each in per_layer.items()}
    made_of_latents = 61 * (sum(per_layer.values()) - per_layer["o_proj"])
    assert params("qv") == params("qkv") == made_of_latents
    assert params("attention") == 61 * sum(per_layer.values())
    assert params("o_proj,gate_proj") == 61 * per_layer["o_proj"] + 3 * (7168 + 18432)
    assert params("all") == params("attention") + 3 * 3 * (7168 + 18432), "the MLPs of three dense layers"


def test_named_modules_are_kept_once_and_cost_what_they_are() -> None:
    options = ("--method", "lora", "--json", "--lora-modules")
    named, group, few = (
        json.loads(estimate(*options, m)[1]) for m in ("v_proj, q_proj,v_proj", "qv", "k_proj")
    )
    assert named["workload"]["adapters"]["modules"] == "v_proj,q_proj"
    assert named["estimate"] == group["estimate"]
    peaks, times = (
        [found["estimate"][key] for found in (named, few)] for key in ("peak_memory_bytes", "step_time_s")
    )
    assert peaks[0] > peaks[1] and times[0] > times[1]


def test_adapters_need_less_memory_and_adafactor_less_state() -> None:
    """The smaller the state, the smaller the predicted peak of the same strategy."""
    peaks = []
    for options in (("--optimizer", "adamw"), ("--optimizer", "muon"), ("--optimizer", "adafactor")):
        code, text = estimate(*options, "--json")
        assert code == 0, text
        peaks.append(json.loads(text)["stages"][0]["memory"]["optimizer_bytes"])
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < peaks[0] / 100
    full, lora = (json.loads(estimate("--method", m, "--json")[1]) for m in ("finetune", "lora"))
    assert lora["workload"]["adapters"] == {"rank": 16, "modules": "all"}
    assert lora["stages"][0]["memory"]["grads_bytes"] < full["stages"][0]["memory"]["grads_bytes"] / 50
    assert lora["estimate"]["peak_memory_bytes"] < full["estimate"]["peak_memory_bytes"]


def test_the_estimate_says_what_each_observer_sees() -> None:
    code, text = estimate()
    assert code == 0 and all(
        word in text for word in ("allocated", "reserved", "on the device", "host memory")
    )
    assert "worst moment" in text and "checkpoint save" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora-rank", "8"), "--lora-rank"),
        (("--lora-modules", "qv"), "add --method lora"),
        (("--method", "lora", "--lora-rank", "0"), "--lora-rank"),
        (("--method", "lora", "--lora-modules", "q_a_proj"), "no module 'q_a_proj'"),
        (("--method", "lora", "--lora-modules", "q_a_proj"), "did you mean q_proj"),
        (("--method", "lora", "--lora-modules", "all,q_proj"), "'all' is a group of modules"),
        (("--method", "lora", "--lora-modules", ","), "names no module"),
        (("--cluster", "1x8:a100-sxm-80gb", "--precision", "fp8"), "no fp8 peak"),
    ],
)
def test_flags_that_do_not_fit_are_refused(options: tuple[str, ...], words: str) -> None:
    code, text = estimate(*options)
    assert code == 2 and words in text


EXPERTS, LATENT = "mixtral-8x7b-v0.1", "deepseek-v2-236b"
LORA = {"method": Method.LORA, "adapters": Adapters(rank=16, modules=AdapterModules.ALL)}


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        (EXPERTS, {"precision": Precision.FP8}, "experts do not multiply in fp8"),
        (LATENT, LORA, ""),
        ("llama-3-8b", {"precision": Precision.FP8}, ""),
        ("llama-3-8b", {"precision": Precision.FP16, "optimizer": Optimizer.MUON, **LORA}, ""),
    ],
)
def test_what_the_runtime_cannot_train_is_named(model: str, change: dict[str, object], words: str) -> None:
    workload = dataclasses.replace(Workload(seq=1, batch=1), **change)  # type: ignore[arg-type]
    spec = load_model(model)
    assert len(not_executed_workload(spec, workload)) == bool(words)
    if words:
        with pytest.raises(InputError, match=words):
            check_executed_workload(spec, workload, Degrees(micro_batch=16))
    else:
        check_executed_workload(spec, workload, Degrees(micro_batch=16))


def test_products_in_fp8_have_the_sizes_of_kernels() -> None:
    workload = Workload(seq=1000, batch=1, precision=Precision.FP8)
    llama = load_model("llama-3-8b")
    assert products_not_executed(llama, workload, Degrees(micro_batch=2)) == []
    assert products_not_executed(llama, workload, Degrees(micro_batch=1)) == [
        "tokens of a micro-batch are no multiple of 16, as products in fp8 must be"
    ]
    bf16 = dataclasses.replace(workload, precision=Precision.BF16)
    assert products_not_executed(llama, bf16, Degrees()) == []


def test_train_refuses_a_plan_of_such_a_workload(tmp_path: Path) -> None:
    """It is planned and written, and `plan train` says why it will not run it."""
    path = tmp_path / "plan.json"
    code, text = estimate("--optimizer", "muon", "--seq", "1000", "--precision", "fp8", "-o", str(path))
    assert code == 0, text
    assert load_plan(path).workload.optimizer is Optimizer.MUON
    result = CliRunner().invoke(cli, ["train", str(path), "--steps", "1"])
    assert result.exit_code == 2 and "multiple of 16" in result.output
