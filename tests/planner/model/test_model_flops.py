"""Forward FLOPs against those that torch counts while transformers runs random small models."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pytest

from planner.model.attention import Attention, AttentionSpan, LatentAttention, Reach
from planner.model.huggingface import read_config
from planner.model.mixers import Mixer
from planner.model.spec import Block, ModelSpec
from tests.model_configs import MAKERS

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SEQ = 24
CONFIGS_EACH = 2
SEEDS = range(12)
"""Random configs to try: some, such as more groups of experts chosen than there are, do not run."""
WITHOUT_HEAD = {"bert": "BertModel", "roberta": "RobertaModel"}
PROJECTIONS = ("mm", "addmm")
BATCHED = ("bmm", "baddbmm")
RUNS_OTHERWISE = {
    "llama4_text": "sends every token through every expert",
    "dbrx": "clamps in place, which the counter cannot follow",
}


def measured(model_type: str, values: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """FLOPs by operator of one forward pass of one sequence, and the config as its class writes it."""
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.CONFIG_MAPPING[model_type](**values)
    torch.manual_seed(0)
    if model_type == "t5":
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    elif model_type in WITHOUT_HEAD:
        of_class = getattr(transformers, WITHOUT_HEAD[model_type])
        model = of_class._from_config(config, attn_implementation="eager", add_pooling_layer=False)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    tokens = torch.arange(SEQ)[None] % 90 + 3
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model_type == "t5" else {})
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(**inputs, use_cache=False)
    counts = {op._overloadpacket.__name__ if hasattr(op, "_overloadpacket") else op.__name__: float(flops)
              for op, flops in counter.get_flop_counts()["Global"].items()}  # fmt: skip
    return counts, json.loads(model.config.to_json_string(use_diff=False))


def projections(spec: ModelSpec, head: bool) -> float:
    """Our FLOPs of every weight that tokens are multiplied with."""
    blocks = sum(s.count * s.block.matmul_flops_forward(SEQ) for s in spec.segments)
    return blocks + spec.embedding_flops_forward(SEQ) + (spec.head_flops_forward(SEQ) if head else 0.0)


def is_attention(mixer: Mixer) -> bool:
    """Whether all that a mixer does between tokens is products of scores and values."""
    return isinstance(mixer, Attention) or (isinstance(mixer, LatentAttention) and not mixer.indexer)


def whole_square(mixers: Iterable[Mixer]) -> float:
    """Our FLOPs of attention if nothing were masked, which is what an eager kernel computes."""
    everything = AttentionSpan(reach=Reach.ALL)
    return SEQ * sum(
        dataclasses.replace(mixer, span=everything).core_flops(SEQ)
        for mixer in mixers
        if isinstance(mixer, (Attention, LatentAttention))
    )


def running(model_type: str) -> Iterator[tuple[dict[str, float], ModelSpec]]:
    """What was counted and what is read, for the first random configs that run."""
    for seed in SEEDS:
        values = MAKERS[model_type](random.Random(seed))
        if model_type == "phimoe":
            values["num_experts_per_tok"] = 2  # its sparse mixer always picks two
        try:
            counts, config = measured(model_type, values)
        except (RuntimeError, AssertionError):
            continue
        yield counts, read_config(config, source="config.json", name="x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in MAKERS if name not in RUNS_OTHERWISE])
def test_flops_are_those_of_the_running_model(model_type: str) -> None:
    checked = 0
    for counts, spec in islice(running(model_type), CONFIGS_EACH):
        done = sum(counts.get(op, 0.0) for op in PROJECTIONS)
        assert projections(spec, model_type not in WITHOUT_HEAD) == pytest.approx(done, rel=1e-9), counts
        mixers = [m for layer in spec.blocks() if isinstance(layer, Block) for m in layer.mixers]
        if all(is_attention(m) for m in mixers):
            between = sum(counts.get(op, 0.0) for op in BATCHED)
            assert whole_square(mixers) == pytest.approx(between, rel=1e-9), counts
        checked += 1
    assert checked == CONFIGS_EACH
