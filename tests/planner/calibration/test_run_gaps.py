"""What a row of a table leaves out, and what is assumed for it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from planner.calibration.run_setup import Setups
from planner.calibration.runs import READERS, Run, RunRecompute, Status, read_runs
from planner.calibration.validate import validate
from planner.cost.evaluate import CostModel
from planner.model.feed_forward import Experts
from planner.model.spec import Block
from planner.strategy.estimate import Rejected, Verdict
from planner.strategy.strategy import Schedule, Zero
from tests.run_samples import GPT, LLAMA, reason, setup

DATA = Path(__file__).parents[3] / "bench" / "data"


def test_degrees_that_are_left_out_follow_from_the_devices() -> None:
    alone = setup(dataclasses.replace(GPT, tp=None, pp=None, dp=8))
    assert (alone.strategy.degrees.tp, alone.strategy.degrees.pp) == (1, 1)
    filled = setup(dataclasses.replace(GPT, tp=None))
    assert filled.strategy.degrees.tp == 2


def test_a_share_that_does_not_divide_becomes_equal_micro_batches() -> None:
    degrees = setup(dataclasses.replace(GPT, micro_batch=5)).strategy.degrees
    assert (degrees.micro_batch, degrees.num_micro_batches) == (4, 4)
    assert degrees.batch == 32


def test_memory_alone_needs_no_global_batch() -> None:
    run = dataclasses.replace(GPT, global_batch=None, step_time_s=None, peak_memory_gib=10.0)
    assert setup(run).strategy.degrees.num_micro_batches == 1


def test_a_vocabulary_that_does_not_split_is_padded_as_megatron_pads() -> None:
    made = setup(dataclasses.replace(GPT, vocab=50257))
    assert made.problem.model.vocab == 50432, "the next multiple of 128 x tp 2"
    assert setup(dataclasses.replace(LLAMA, vocab=50304)).problem.model.vocab == 50304


def test_a_name_of_the_catalog_gives_what_the_row_leaves_open() -> None:
    bare = dataclasses.replace(
        LLAMA,
        model="LLAMA3.1_8B",
        **dict.fromkeys(("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")),  # type: ignore[arg-type]
    )
    assert setup(bare).problem.model.params_total == 8_030_261_248
    fewer = setup(dataclasses.replace(bare, model="Llama 3.1 8B truncated to 4 layers", layers=4))
    assert fewer.problem.model.layers == 4
    experts = setup(dataclasses.replace(bare, model="Mixtral 8x7B", experts=8, topk=2, tp=1, dp=8))
    block = experts.problem.model.segments[0].block
    assert isinstance(block, Block) and isinstance(block.mlp, Experts)


@pytest.mark.parametrize(
    ("size", "pp", "layers"), [("200B", 10, 80), ("205B", 9, 81), ("195B", 11, 77), ("183B", 12, 72)]
)
def test_a_models_size_tells_its_layers(size: str, pp: int, layers: int) -> None:
    """BLOOM's team tried GPTs of width 14,400 whose layers it made divide by the stages, and lists sizes."""
    large = {"layers": None, "hidden": 14400, "ffn": 57600, "heads": 100, "kv_heads": 100, "vocab": 250000}
    nodes = {"tp": 8, "pp": pp, "dp": 4, "nodes": 4 * pp, "global_batch": 2048}
    made = setup(dataclasses.replace(GPT, model=f"GPT {size}", **large, **nodes))  # type: ignore[arg-type]
    assert made.problem.model.layers == layers
    assert f"layers {layers}, of {size} parameters" in made.assumed
    assert reason(GPT, **large, model="GPT").rule == "model_known"


def test_a_micro_batch_that_is_left_out_is_the_fastest_that_fits() -> None:
    open_run = dataclasses.replace(GPT, micro_batch=None)
    made = setup(open_run)
    stated = [setup(dataclasses.replace(GPT, micro_batch=size)) for size in (1, 2, 4, 8, 16)]
    done = {each.strategy: CostModel(each.problem).evaluate(each.strategy).estimate for each in stated}
    fitting = [each for each, estimate in done.items() if estimate.verdict is Verdict.SAFE]
    assert made.strategy == min(fitting, key=lambda each: done[each].step_time_s)
    size = made.strategy.degrees.micro_batch
    assert made.assumed[0] == f"micro_batch {size}, the fastest that fits"
    long = setup(dataclasses.replace(open_run, seq_len=16384, recompute=RunRecompute.NONE))
    assert long.strategy.degrees.micro_batch < size, "longer sequences leave memory for fewer of them"
    for status in (Status.OK, Status.OOM):
        one = dataclasses.replace(open_run, global_batch=2, status=status)
        assert setup(one).assumed[0] == "micro_batch 1"
    assert reason(open_run, status=Status.OOM).detail == "micro_batch unknown, and the run did not fit."


def test_torchtitan_splits_a_share_into_as_many_micro_batches_as_stages() -> None:
    """And keeps weights gathered in a pipeline; of schedules with several stages a rank it has two."""
    piped = dataclasses.replace(LLAMA, pp=4, dp=1, tp=2, micro_batch=None, global_batch=32)
    degrees = setup(piped).strategy.degrees
    assert (degrees.micro_batch, degrees.num_micro_batches, degrees.chunks) == (8, 4, 1)
    wide = dataclasses.replace(piped, nodes=2, dp=2, notes="Interleaved 1F1B")
    degrees = setup(wide).strategy.degrees
    assert (degrees.micro_batch, degrees.num_micro_batches, degrees.chunks) == (4, 4, 2)
    assert degrees.schedule is Schedule.INTERLEAVED and degrees.zero is Zero.GRADIENTS


def test_a_micro_batch_that_no_rate_can_choose_is_refused_where_it_is_evaluated() -> None:
    """A100 has no fp8: such a row has a setup, and the reason when it is predicted."""
    open_run = dataclasses.replace(GPT, micro_batch=None, precision="fp8")
    assert not any("micro_batch" in text for text in setup(open_run).assumed)
    (row,) = validate([open_run], lambda device: None).rows
    assert row.predicted_step_time_s is None and "peak is unknown" in row.reason


def test_a_micro_batch_is_chosen_though_none_fits() -> None:
    large = dataclasses.replace(GPT, micro_batch=None, hidden=16384, ffn=65536, heads=128, kv_heads=128)
    assert "none fits" in setup(large).assumed[0]


def test_megatrons_weak_scaling_is_predicted_though_it_states_no_micro_batch() -> None:
    """arXiv 2104.04473, table 1: 3.6 to 530 billion parameters on 64 to 2,520 A100, from priors alone."""
    runs = [run for run in read_runs([DATA / "tables.csv"]).runs if run.id.startswith("mlm21")]
    runs = [run for run in runs if run.micro_batch is None]
    errors = [row.error for row in validate(runs, lambda device: None).rows]
    assert len(errors) == 6 and all(error is not None and abs(error) < 0.1 for error in errors)


def test_every_row_gives_a_setup_or_a_reason_whatever_it_leaves_out() -> None:
    """Published rows with random cells emptied: never an exception, and a setup keeps its batch."""
    runs = read_runs([DATA / "tables.csv", DATA / "layout_sweeps.csv", DATA / "h100_reference.csv"]).runs
    rng = random.Random(7)
    setups, made = Setups(lambda device: None), 0
    for run in rng.sample(runs, 400):
        emptied = {name: Run.__dataclass_fields__[name].default for name in READERS if rng.random() < 0.05}
        emptied.pop("id", None)
        changed = dataclasses.replace(run, **emptied)
        result = setups.setup(changed)
        if isinstance(result, Rejected):
            assert result.detail
            continue
        made += 1
        degrees = result.strategy.degrees
        assert degrees.world == changed.devices
        assert changed.global_batch in (None, degrees.batch)
    assert made > 50
