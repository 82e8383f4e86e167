"""Parameter counts against models that transformers builds, for random small configs of each family."""

from __future__ import annotations

import json
import random
import warnings
from typing import Any

import pytest

from planner.model.attention import Reach
from planner.model.huggingface import FAMILIES, read_config
from planner.model.huggingface.family import KEYS
from planner.model.spec import ModelSpec
from tests.model_configs import MAKERS, TWINS

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CONFIGS_EACH = 6
EVERY = {**MAKERS, **TWINS}
NEEDED = {name for key in KEYS.values() if key.needed for name in key.names}


def built(model_type: str, values: dict[str, Any]) -> Any:
    """The model on the meta device, of the class that the counts are defined by."""
    config = transformers.CONFIG_MAPPING[model_type](**values)
    of_class = {
        "bert": transformers.BertModel,
        "roberta": transformers.RobertaModel,
        "xlm-roberta": transformers.XLMRobertaModel,
        "t5": transformers.T5ForConditionalGeneration,
        "mt5": transformers.MT5ForConditionalGeneration,
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
    values = EVERY[model_type](random.Random(seed))
    model = built(model_type, values)
    expected = counts(model, share_of(model))
    found = []
    for way, config in ways_to_write(model_type, values, model).items():
        spec = read_config(json.loads(json.dumps(config)), source="config.json", name="x")
        if (spec.params_total, spec.params_active) != expected:
            found.append(f"{seed} {way}: {spec.params_total, spec.params_active} not {expected}: {values}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", EVERY)
def test_counts_equal_those_of_the_built_models(model_type: str) -> None:
    assert [text for seed in range(CONFIGS_EACH) for text in differences(model_type, seed)] == []


def layer_types(spec: ModelSpec) -> list[str]:
    """The kind of every layer, in the library's words."""
    names = {
        Reach.CAUSAL: "full_attention",
        Reach.WINDOW: "sliding_attention",
        Reach.CHUNK: "chunked_attention",
        Reach.CHOSEN: "indexed_attention",
    }
    kinds = []
    for block in spec.blocks():
        if block.mixer is None:
            kinds.append("mlp" if block.mlp.key[0] in "gu" else "moe")
        else:
            kinds.append(
                names[block.mixer.span.reach] if hasattr(block.mixer, "span") else "linear_attention"
            )
    return kinds


LISTING = [
    name
    for name in MAKERS
    if "layer_types" in FAMILIES[name].defaults and name not in ("qwen2_moe", "minimax", "ministral")
]
"""Architectures whose class lists the kind of every layer. In the excluded ones a list says nothing of the
window: it is null where layers are called sliding, or all other layers have one too."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", LISTING)
def test_each_layer_is_of_the_kind_that_the_library_lists(model_type: str) -> None:
    for seed in range(2 * CONFIGS_EACH):
        values = MAKERS[model_type](random.Random(seed))
        config = transformers.CONFIG_MAPPING[model_type](**values)
        spec = read_config({"model_type": model_type, **values}, source="c", name="x")
        assert layer_types(spec) == list(config.layer_types), values


UNBUILDABLE = {"ministral": {"head_dim": 128}, "nemotron": {"num_key_value_heads": 48}}
"""Classes whose own defaults make no model, with what they lack."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in EVERY if name not in ("glm4_moe", "dbrx")])
def test_class_defaults_are_those_of_the_library(model_type: str) -> None:
    """An empty config, as the text part of a wrapper, is the class's default model."""
    lacking = {"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}
    lacking |= UNBUILDABLE.get(model_type, {})
    model = built(model_type, {"pad_token_id": 0, **lacking})
    text = {"model_type": model_type, **lacking}
    nested = read_config({"model_type": "wrapper", "text_config": text}, source="c", name="x")
    serialised = json.loads(model.config.to_json_string(use_diff=False))
    spelt = read_config(serialised, source="c", name="x")
    assert (nested.params_total, nested.params_active) == counts(model, share_of(model))
    assert nested.segments == spelt.segments
    for fact in ("max_positions", "norm_eps", "rope_theta", "initializer_range", "tied_embeddings"):
        assert getattr(nested, fact) == getattr(spelt, fact)


WRAPPED = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Multimodal architectures, and whose keys their text model has."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_text_model_of_a_wrapper_is_counted_alone(wrapper: str) -> None:
    """Nested as its author typed it, and as its class serialises it with the vision tower beside."""
    for seed in range(CONFIGS_EACH):
        values = MAKERS[WRAPPED[wrapper]](random.Random(seed))
        if wrapper == "qwen3_vl":  # has no windows, and one that is set would be refused
            values = {key: value for key, value in values.items() if "window" not in key}
        config = transformers.CONFIG_MAPPING[wrapper](text_config=values)
        with torch.device("meta"):
            text = transformers.AutoModel.from_config(config.get_text_config())
        total = sum(p.numel() for p in text.parameters())
        typed = {"model_type": wrapper, "text_config": values}
        for written in (typed, json.loads(config.to_json_string(use_diff=False))):
            spec = read_config(written, source="c", name="x")
            head = 0 if spec.tied_embeddings else spec.vocab * spec.hidden
            assert spec.params_total == total + head, (seed, values)
