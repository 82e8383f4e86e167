"""Parameter counts against models that transformers builds, for random small configs of each family."""

from __future__ import annotations

import json
import random
import warnings
from typing import Any

import pytest

from planner.hf import FAMILIES, read_config
from planner.hf.keys import KEYS
from tests.model_configs import MAKERS

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CONFIGS_EACH = 6
NEEDED = {name for key in KEYS.values() if key.needed for name in key.names}


def built(model_type: str, values: dict[str, Any]) -> Any:
    """The model on the meta device, of the class that the counts are defined by."""
    config = transformers.CONFIG_MAPPING[model_type](**values)
    of_class = {
        "bert": transformers.BertModel,
        "roberta": transformers.RobertaModel,
        "t5": transformers.T5ForConditionalGeneration,
    }
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model_type in of_class:
            return of_class[model_type](config)
        return transformers.AutoModelForCausalLM.from_config(config)


def counts(model: Any, share: float) -> tuple[int, int]:
    """Unique parameters; and those that a token meets, where `share` of the routed experts' are."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - routed + round(routed * share)


def ways_to_write(model_type: str, values: dict[str, Any], model: Any) -> dict[str, dict[str, Any]]:
    """The same config as its class serialises it, as its author typed it, and without what is default."""
    full = json.loads(model.config.to_json_string(use_diff=False))
    default = transformers.CONFIG_MAPPING[model_type]().to_dict()
    family = FAMILIES[model_type]
    needed = NEEDED | {name for fact, key in KEYS.items() if key.needed for name in family.names_of(fact)}
    shorter = {
        key: value
        for key, value in full.items()
        if key in needed or key == "model_type" or key not in default or value != default[key]
    }
    return {"serialised": full, "typed": {"model_type": model_type, **values}, "shortened": shorter}


def share_of(model: Any) -> float:
    spec = model.config.to_dict()
    ffn = spec.get("ffn_config") or {}
    topk = spec.get("num_experts_per_tok") or ffn.get("moe_top_k") or 1
    count = (
        spec.get("num_local_experts")
        or spec.get("num_experts")
        or spec.get("n_routed_experts")
        or ffn.get("moe_num_experts")
        or 1
    )
    return topk / count


def differences(model_type: str, seed: int) -> list[str]:
    """For one random config: every way to write it whose counts differ from the built model's."""
    values = MAKERS[model_type](random.Random(seed))
    model = built(model_type, values)
    expected = counts(model, share_of(model))
    found = []
    for way, config in ways_to_write(model_type, values, model).items():
        spec = read_config(json.loads(json.dumps(config)), source="config.json", name="x")
        if (spec.params_total, spec.params_active) != expected:
            found.append(f"{seed} {way}: {spec.params_total, spec.params_active} not {expected}: {values}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", MAKERS)
def test_counts_equal_those_of_the_built_models(model_type: str) -> None:
    assert [text for seed in range(CONFIGS_EACH) for text in differences(model_type, seed)] == []
