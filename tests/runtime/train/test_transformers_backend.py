"""Hugging Face Transformers' own models under plans: equal to their own forward, loss and update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.foundation.errors import InputError
from planner.model.huggingface import read_config_file
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Offload, Schedule, Zero, even_stages, offloaded
from runtime.train.executor import Executor
from runtime.train.transformers_backend import check_backend, load_config, transformers_backend
from tests.plans import batch8, make_plan, split
from tests.runtime.matrix import TOLERANCE
from tests.runtime.ranks import OPTIONS, SEED, batch_of, on_ranks, train

transformers = pytest.importorskip("transformers")
STEPS = 3
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 6},
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": SIZES,
    "gemma2": {**SIZES, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "phi3": SIZES,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "vocab_size": 64,
        "n_positions": 64,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


LAYOUTS: dict[str, tuple[Degrees, Any]] = {
    "one rank": (batch8(micro_batch=4), None),
    "tp2": (batch8(tp=2, micro_batch=4), None),
    "tp2-dp2-zero3": (batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3)), None),
    "dp2-zero2": (batch8(dp_shard=2, micro_batch=2, zero=Zero(2)), split(4, recompute=Recompute.SELECTIVE)),
    "pp2-dp2-zero3": (
        batch8(pp=2, dp_shard=2, micro_batch=1, zero=Zero(3)),
        split(3, 1, recompute=Recompute.FULL),
    ),
    "pp2-zbv": (batch8(pp=2, chunks=2, schedule=Schedule.ZBV, micro_batch=2), None),
    "pp2-dp2-zero0": (batch8(pp=2, dp_replicate=2, micro_batch=2), None),
}
CASES = (
    ("llama", "tp2-dp2-zero3"),
    ("llama", "pp2-zbv"),
    ("qwen3", "tp2"),
    ("qwen2", "pp2-dp2-zero0"),
    ("mistral", "pp2-dp2-zero3"),
    ("gemma2", "pp2-dp2-zero0"),
    ("phi3", "dp2-zero2"),
    ("mixtral", "pp2-dp2-zero3"),
    ("gpt2", "pp2-dp2-zero3"),
)


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with a tiny config.json of a family."""
    names = {"gpt2": "GPT2", "llama": "Llama"}
    kind = names.get(family, family.capitalize())
    facts = {"model_type": family, "architectures": [f"{kind}ForCausalLM"], **CONFIGS[family], **changes}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder / "config.json"


def plan_of(path: Path, layout: str) -> Plan:
    degrees, stages = LAYOUTS[layout]
    return make_plan(read_config_file(path), degrees, stages)


def make(plan: Plan, path: Path) -> Executor:
    backend = transformers_backend(load_config(path))
    return Executor(plan, device="cpu", seed=SEED, optimizer_options=OPTIONS, backend=backend)


def their_trajectory(path: Path, plan: Plan, weights: dict[str, torch.Tensor]) -> list[float]:
    """Losses and gradient norms of their whole model, by their own loss, torch's clipping and AdamW."""
    config = load_config(path)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    unknown = model.load_state_dict(weights, strict=False)
    assert not unknown.unexpected_keys and set(unknown.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    model.train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-3,
        foreach=False,
    )
    seen = []
    for step, rate in enumerate((0.005, 0.01, 0.01)[:STEPS]):
        tokens = batch_of(plan, step)
        targets = tokens[:, 1:].contiguous()
        loss = model(tokens[:, :-1], labels=tokens[:, :-1], shift_labels=targets, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        seen += [loss.item(), norm.item()]
    return seen


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_training_is_that_of_their_own_model(family: str, layout: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, family)
    plan, alone = plan_of(path, layout), plan_of(path, "one rank")

    def first(rank: int) -> dict[str, Any]:
        return {name: tensor.tolist() for name, tensor in make(alone, path).weight_tensors()}

    def body(rank: int) -> dict[str, Any]:
        executor = make(plan, path)
        seen = train(executor, 0, STEPS)
        return {"seen": seen, "faults": executor.executed().differences(plan)}

    (stored,) = on_ranks(first, 1)
    weights = {name: torch.tensor(values) for name, values in stored.items()}
    expected = their_trajectory(path, plan, weights)
    for answer in on_ranks(body, plan.strategy.degrees.world):
        assert [value for pair in answer["seen"] for value in pair] == pytest.approx(expected, rel=TOLERANCE)
        assert answer["faults"] == []


@pytest.mark.parametrize("what", [Offload.OPTIMIZER, Offload.ACTIVATIONS])
def test_offload_changes_nothing_but_the_place(what: Offload, tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama")
    degrees = batch8(dp_shard=2, micro_batch=2, zero=Zero(2))
    spec = read_config_file(path)
    here, away = make_plan(spec, degrees), make_plan(spec, degrees, offloaded(even_stages(4, 1), what))

    def body(rank: int) -> Any:
        executors = make(here, path), make(away, path)
        seen = [train(executor, 0, STEPS) for executor in executors]
        return seen, executors[1].executed().differences(away)

    for (expected, found), faults in on_ranks(body, 2):
        assert found == expected
        assert faults == []


def test_muon_is_for_the_matrices_of_blocks(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama")
    plan = make_plan(read_config_file(path), batch8(micro_batch=4), optimizer=Optimizer.MUON)

    def body(rank: int) -> list[str]:
        executor = make(plan, path)
        return [w.name for w in executor.weights if "momentum_buffer" in executor.optimizer.state_of(w.shard)]

    (names,) = on_ranks(body, 1)
    assert len(names) == 4 * 7, "queries, keys, values, output; gate, up, down"
    assert all(name.startswith("model.layers.") and "proj" in name for name in names)


@pytest.mark.parametrize(
    ("family", "degrees", "words"),
    [
        ("llama", Degrees(cp=2, zero=Zero(1)), "cp ranks"),
        ("llama", Degrees(tp=2, sequence_parallel=True), "sequence_parallel"),
        ("llama", Degrees(tp=4), "copies of key-value heads"),
        ("mixtral", Degrees(tp=2), "packed_colwise"),
        ("gpt2", Degrees(tp=2), "names no projections"),
    ],
)
def test_what_their_models_cannot_do_is_refused(
    family: str, degrees: Degrees, words: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path, family)
    with pytest.raises(InputError, match=words):
        check_backend(make_plan(read_config_file(path), degrees), path)


def test_another_model_than_the_plans_is_refused_with_all_differences(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama")
    plan = plan_of(path, "tp2")
    check_backend(plan, path)
    write_config(tmp_path, "llama", vocab_size=128, intermediate_size=96)
    with pytest.raises(InputError) as caught:
        check_backend(plan, path)
    assert {problem.where.rpartition(": ")[2] for problem in caught.value.problems} >= {"vocab"}
    assert len(caught.value.problems) == 2


def test_a_family_that_was_never_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", **CONFIGS["gpt2"]}))
    with pytest.raises(InputError, match="is a bloom"):
        load_config(tmp_path)
