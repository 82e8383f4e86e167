"""The reader of runs.csv."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner.calibration.runs import MemoryKind, RunRecompute, Status, read_runs
from planner.foundation.errors import InputError
from planner.model.sublayer import AttentionKernel
from tests.run_samples import GPT

DATA = Path(__file__).parents[3] / "bench" / "data"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_cells_are_typed_and_empty_ones_unknown(tmp_path: Path) -> None:
    file = write(
        tmp_path / "runs.csv",
        "id,layers,gated_mlp,compile,network,attention,recompute,status,step_time_s,memory_kind,quality,device",
        "a,40.0,True,,none,flash,mlp,oom,,reserved,A,h100-sxm-80gb",
        "b,nan,0,yes,,FUSED,,ok,1.5e-1,,B,",
        "",
    )
    first, second = read_runs([file]).runs
    assert (first.layers, first.gated_mlp, first.compile, first.network) == (40, True, None, "none")
    assert (first.attention, first.recompute) == (AttentionKernel.FLASH, RunRecompute.MLP)
    assert (first.status, first.step_time_s, first.memory_kind) == (Status.OOM, None, MemoryKind.RESERVED)
    assert (second.layers, second.gated_mlp, second.compile, second.step_time_s) == (None, False, True, 0.15)
    assert second.where == f"{file}: line 3"


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("layers", "many", ("'many' is not a number",)),
        ("layers", "1.5", ("is 1.5", "whole number from 1 to 10000")),
        ("layers", "1e300", ("1e300",)),
        ("tp", "0", ("is 0", "from 1")),
        ("tp", "inf", ("is inf",)),
        ("zero", "4", ("from 0 to 3",)),
        ("step_time_s", "-1", ("is -1", "above 0")),
        ("step_time_s", "1,5", ("is not a number",)),
        ("gated_mlp", "perhaps", ("neither true nor false",)),
        ("attention", "sdpa", ("flash, fused, eager",)),
        ("status", "killed", ("ok, oom, error",)),
        ("recompute", "some", ("none, selective, full, mlp",)),
    ],
)
def test_a_bad_cell_is_named_with_line_and_column(
    tmp_path: Path, column: str, cell: str, words: tuple[str, ...]
) -> None:
    file = write(tmp_path / "runs.csv", f"id,device,{column}", "a,t4,", f'b,t4,"{cell}"')
    with pytest.raises(InputError) as caught:
        read_runs([file])
    (problem,) = caught.value.problems
    assert problem.where == f"{file}: line 3, column {column}"
    for word in words:
        assert word in str(problem)


def test_all_faults_of_all_files_are_listed(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", "device,tp,pp", "t4,x,y")
    second = write(tmp_path / "b.csv", "device,tp", "t4,1,2,3")
    with pytest.raises(InputError) as caught:
        read_runs([first, second, tmp_path / "c.csv"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for words in ("column tp", "column pp", "has 4 cells, the header has 2", "no such file"):
        assert words in text


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("",), "is not the header"),
        (("name,value", "a,1"), "is not the header of a table of runs: it begins with name, value"),
        (("device,tp,tp", "t4,1,2"), "column 'tp' twice"),
        (("device,tp",), "holds no run"),
        (('device,tp\n"t4,1',), "is not a CSV file"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_refused(
    tmp_path: Path, lines: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_runs([write(tmp_path / "runs.csv", *lines)])


def test_a_misspelt_column_is_warned_of_and_others_are_not(tmp_path: Path) -> None:
    table = read_runs([write(tmp_path / "runs.csv", "device,microbatch,quality,loss", "t4,1,A,2.5")])
    (warning,) = table.warnings
    assert "'microbatch' is not read; did you mean 'micro_batch'" in warning


def test_a_group_that_is_not_stated_is_made_of_what_makes_runs_comparable() -> None:
    assert dataclasses.replace(GPT, group="g").group_name == "g"
    assert dataclasses.replace(GPT, tp=8, dp=1, pp=1, micro_batch=1).group_name == GPT.group_name
    for changes in ({"hidden": 4096}, {"seq_len": 2048}, {"nodes": 2}, {"fused_kernels": "fused"}):
        assert dataclasses.replace(GPT, **changes).group_name != GPT.group_name
