"""What goes with a plan for Hugging Face's Trainer: adapters beside the modules that the plan names."""

from __future__ import annotations

import json

import pytest

from planner.export.trainer import ADAPTERS_FILE, trainer_files
from planner.model.spec import ModelSpec
from planner.model.workload import Adapters
from planner.strategy.strategy import Degrees
from tests.plans import make_plan, tiny_llama, tiny_mixtral, tiny_mla


@pytest.mark.parametrize(
    ("model", "modules", "targets"),
    [
        (tiny_llama(), "all", "all-linear"),
        (tiny_llama(), "qv", ["q_proj", "v_proj"]),
        (tiny_llama(), "o_proj,gate_proj", ["o_proj", "gate_proj"]),
        (tiny_mixtral(), "all", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (tiny_mla(), "kv_b_proj", ["kv_b_proj"]),
    ],
)
def test_adapters_stand_where_the_plan_has_them(
    model: ModelSpec, modules: str, targets: list[str] | str
) -> None:
    plan = make_plan(model, Degrees(), adapters=Adapters(rank=4, modules=modules))
    (config,) = (json.loads(file.text) for file in trainer_files(plan) if file.name == ADAPTERS_FILE)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, targets)


def test_a_plan_without_adapters_has_no_file_of_them() -> None:
    assert [file.name for file in trainer_files(make_plan(tiny_llama(), Degrees()))] == ["training_args.json"]
