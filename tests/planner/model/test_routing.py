"""How tokens choose their experts, as the configs of each family say it; it changes no cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.model.feed_forward import Experts, Routing, Score
from planner.model.huggingface import read_config
from planner.model.spec import Block, ModelSpec

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 128,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
}
DEEPSEEK = Routing(
    score=Score.SIGMOID,
    scale=2.5,
    groups=8,
    chosen_groups=4,
    group_experts=2,
    corrected=True,
    bias_speed=0.001,
)


def read(model_type: str, **keys: Any) -> ModelSpec:
    return read_config({"model_type": model_type, **CONFIG, **keys}, source="c", name="x")


def routing(model_type: str, **keys: Any) -> Routing:
    (experts,) = read(model_type, **keys).experts
    return experts.routing


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("mixtral", {}, Routing(aux_loss=0.001)),
        ("mixtral", {"router_aux_loss_coef": 0.02}, Routing(aux_loss=0.02)),
        ("mixtral", {"capacity_factor": 1.25}, Routing(aux_loss=0.001, capacity=1.25)),
        ("olmoe", {"router_z_loss_coef": 0.1}, Routing(normalised=False, aux_loss=0.01, z_loss=0.1)),
        ("qwen3_moe", {"norm_topk_prob": True}, Routing(aux_loss=0.001)),
        ("qwen2_moe", {}, Routing(normalised=False, aux_loss=0.001)),
        ("deepseek_v3", {}, DEEPSEEK),
        (
            "deepseek_v3",
            {"aux_loss_alpha": 0.001, "router_bias_update_rate": 0.01, "n_group": 1},
            replace(DEEPSEEK, groups=1, chosen_groups=1, group_experts=1, aux_loss=0.001, bias_speed=0.01),
        ),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            Routing(normalised=False, groups=8, chosen_groups=3, aux_loss=0.001),
        ),
        ("deepseek_v2", {"n_group": 8, "topk_group": 3}, Routing(normalised=False, aux_loss=0.001)),
        (
            "glm4_moe",
            {},
            Routing(score=Score.SIGMOID, corrected=True, bias_speed=0.001),
        ),
    ],
)
def test_routing_is_as_the_config_says(model_type: str, keys: dict[str, Any], expected: Routing) -> None:
    assert routing(model_type, **keys) == expected


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="group_limited_greedy"):
        read("deepseek_v3", topk_method="best")


def test_routing_changes_no_cost() -> None:
    """Blocks that route in different ways share one entry of every profile."""
    one, other = read("mixtral"), read("mixtral", router_aux_loss_coef=0.5)
    first, second = one.block(0), other.block(0)
    assert isinstance(first, Block) and isinstance(second, Block)
    assert first != second
    assert first.shape_key == second.shape_key


def test_experts_of_an_older_plan_have_the_usual_routing() -> None:
    (experts,) = read("mixtral").experts
    told = encode(experts)
    del told["routing"]
    assert decode(Experts, told, source="plan.json").routing == Routing()
