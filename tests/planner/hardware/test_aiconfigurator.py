"""The optional package aiconfigurator-core: found without importing it, read where it is, else not used.

Its layout is built here with made-up times; the files are JSON, read by a reader of the tests. The reader of
parquet is tested where pyarrow is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.commands.running import doctor
from planner.foundation.errors import InputError
from planner.hardware import aiconfigurator
from planner.hardware import measured_tables as measured
from planner.hardware.aiconfigurator import (
    MODULE,
    TABLES_VARIABLE,
    can_read,
    find_package,
    installed_collectives,
    parquet_columns,
    read_collectives,
    read_products,
)
from planner.hardware.measured_tables import CollectiveCurves
from planner.profile.profile import Op

NCCL = ("nccl_dtype", "num_gpus", "message_size", "op_name", "latency")
GEMM = ("gemm_dtype", "m", "n", "k", "latency")


def columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


def put(folder: Path, path: str, table: dict[str, list[Any]]) -> Path:
    file = folder / "data" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table))
    return file


def read_json(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = json.loads(path.read_text())
    return {name: table[name] for name in names}


def collective_rows(scale: float = 1.0) -> list[tuple[Any, ...]]:
    return [
        ("half", ranks, 2**power, op, scale * (0.01 + 2**power / 1e8))
        for op in ("all_reduce", "all_gather", "reduce_scatter", "alltoall")
        for ranks in (2, 4, 8)
        for power in range(8, 29)
    ]


def test_collectives_are_in_bytes_and_microseconds(tmp_path: Path) -> None:
    rows = [
        ("half", 8, 1024, "all_reduce", 0.02),
        ("half", 8, 1024, "alltoall", 0.01),
        ("int8", 8, 1024, "all_reduce", 99.0),
        ("half", 8, 1024, "broadcast", 99.0),
    ]
    put(tmp_path, "x/comm/nccl/2.29.2/nccl_perf.parquet", columns(NCCL, rows))
    reduce, exchange = read_collectives(tmp_path, "x", read_json)
    assert (reduce.table, reduce.nccl, reduce.op, reduce.ranks, reduce.bytes) == (
        "x",
        "2.29.2",
        "all_reduce",
        8,
        2048,
    )
    assert reduce.latency_us == pytest.approx(20.0)
    assert reduce.busbw_gb_per_s == pytest.approx(2 * 7 / 8 * 2048 / 20e-6 / 1e9)
    assert exchange.op == "all_to_all"
    assert exchange.busbw_gb_per_s == pytest.approx(7 / 8 * 2048 / 10e-6 / 1e9)


def test_they_make_curves(tmp_path: Path) -> None:
    put(tmp_path, "x/comm/nccl/2.29.2/nccl_perf.parquet", columns(NCCL, collective_rows()))
    rows = read_collectives(tmp_path, "x", read_json)
    assert len(rows) == 4 * 3 * 21
    seconds, origin = CollectiveCurves(rows).seconds(Op.ALL_REDUCE, 8, 2 * 2**20)
    assert (origin, seconds) == ("interpolated", pytest.approx(1e-5 + 2**20 / 1e11))


def test_the_newest_version_and_the_median_of_a_point(tmp_path: Path) -> None:
    point = ("half", 8, 1024, "all_reduce")
    put(tmp_path, "x/comm/nccl/2.3/nccl_perf.parquet", columns(NCCL, [(*point, 9.0)]))
    put(tmp_path, "x/comm/nccl/2.29.2/nccl_perf.parquet", columns(NCCL, [(*point, t) for t in (3.0, 1, 2)]))
    (tmp_path / "data" / "x" / "comm" / "nccl" / "9.9").mkdir()
    (row,) = read_collectives(tmp_path, "x", read_json)
    assert (row.nccl, row.latency_us) == ("2.29.2", 2000.0)


def test_products_by_m_and_bucket(tmp_path: Path) -> None:
    rows = [
        ("bfloat16", 4096, 512, 9000, 1.0),
        ("bfloat16", 4096, 9000, 512, 2.0),
        ("bfloat16", 4096, 513, 600, 1.0),
        ("bfloat16", 4096, 20000, 20000, 1.0),
        ("fp8", 256, 8193, 16384, 4.0),
        ("bfloat16", 128, 512, 512, 1.0),
        ("bfloat16", 4097, 512, 512, 1.0),
        ("int4_wo", 4096, 512, 512, 1.0),
    ]
    put(tmp_path, "x/gemm/sglang/9.0/gemm_perf.parquet", columns(GEMM, rows))
    put(tmp_path, "x/gemm/vllm/0.24.0/gemm_perf.parquet", columns(GEMM, rows))
    found = {
        (p.precision, p.m, p.min_nk_from, p.min_nk_to): p for p in read_products(tmp_path, "x", read_json)
    }
    assert set(found) == {
        ("bf16", 4096, 1, 512),
        ("bf16", 4096, 513, 1024),
        ("bf16", 4096, 16385, None),
        ("fp8", 256, 8193, 16384),
    }
    narrow = found["bf16", 4096, 1, 512]
    assert (narrow.framework, narrow.version, narrow.samples) == ("vllm", "0.24.0", 2)
    best = 2 * 4096 * 512 * 9000 / 1e-3 / 1e12
    assert narrow.max_tflops == pytest.approx(best)
    assert narrow.median_tflops == pytest.approx(0.75 * best)


def test_a_system_without_tables_has_none(tmp_path: Path) -> None:
    assert read_collectives(tmp_path, "x", read_json) == ()
    assert read_products(tmp_path, "x", read_json) == ()
    put(tmp_path, "x/comm/nccl/1.0/nccl_perf.parquet", columns(NCCL, []) | {name: [] for name in NCCL})
    put(tmp_path, "x/gemm/vllm/1.0/gemm_perf.parquet", {name: [] for name in GEMM})
    assert read_collectives(tmp_path, "x", read_json) == ()
    assert read_products(tmp_path, "x", read_json) == ()


@pytest.mark.parametrize(
    "row",
    [
        ("half", 1, 1024, "all_reduce", 1.0),
        ("half", "8", 1024, "all_reduce", 1.0),
        ("half", None, 1024, "all_reduce", 1.0),
        ("half", 8, 0, "all_reduce", 1.0),
        ("half", 8, -5, "all_reduce", 1.0),
        ("half", 8, 2**50, "all_reduce", 1.0),
        ("half", 8, 2.5, "all_reduce", 1.0),
        ("half", 8, 1024, "all_reduce", 0.0),
        ("half", 8, 1024, "all_reduce", -1.0),
        ("half", 8, 1024, "all_reduce", float("nan")),
        ("half", 8, 1024, "all_reduce", float("inf")),
        ("half", 8, 1024, "all_reduce", None),
        ("half", 8, 1024, "all_reduce", "fast"),
    ],
)
def test_hostile_collectives_are_refused_with_the_cure(tmp_path: Path, row: tuple[Any, ...]) -> None:
    put(tmp_path, "x/comm/nccl/1.0/nccl_perf.parquet", columns(NCCL, [row]))
    with pytest.raises(InputError, match=r"nccl_perf.parquet: holds .* Fix: .*aiconfigurator-core"):
        read_collectives(tmp_path, "x", read_json)


@pytest.mark.parametrize(
    "row",
    [
        ("bfloat16", 0, 512, 512, 1.0),
        ("bfloat16", 256, -1, 512, 1.0),
        ("bfloat16", 256, 512, 2**50, 1.0),
        ("bfloat16", 256.5, 512, 512, 1.0),
        ("bfloat16", "256", 512, 512, 1.0),
        ("bfloat16", None, 512, 512, 1.0),
        ("bfloat16", 256, 512, 512, 0.0),
        ("bfloat16", 256, 512, 512, float("nan")),
        ("bfloat16", 256, 512, 512, float("inf")),
        ("bfloat16", 256, 512, 512, "fast"),
    ],
)
def test_hostile_products_are_refused_with_the_cure(tmp_path: Path, row: tuple[Any, ...]) -> None:
    put(tmp_path, "x/gemm/vllm/1.0/gemm_perf.parquet", columns(GEMM, [row]))
    with pytest.raises(InputError, match=r"gemm_perf.parquet: holds .* Fix: .*aiconfigurator-core"):
        read_products(tmp_path, "x", read_json)


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name on the path, which must not be imported."""
    monkeypatch.delenv(TABLES_VARIABLE)
    home = folder / MODULE
    (home / "systems" / "data" / "h100_sxm" / "comm").mkdir(parents=True)
    (home / "systems" / "data" / "notes").mkdir()
    (home / "__init__.py").write_text("raise SystemExit('was imported')\n")
    info = folder / "aiconfigurator_core-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aiconfigurator-core\nVersion: 0.99.0\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return home / "systems"


def test_it_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(MODULE) is None:
        assert find_package() is None
        assert installed_collectives("h100_sxm") == ()
    folder = fake_package(tmp_path, monkeypatch)
    found = find_package()
    assert found is not None
    assert (found.version, found.folder, found.systems) == ("0.99.0", str(folder), ("h100_sxm",))
    assert MODULE not in sys.modules


def test_doctor_says_whether_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> dict[str, str]:
        answer = CliRunner().invoke(cli, ["doctor", "--json"], prog_name="plan")
        found = {item["what"]: item for item in json.loads(answer.stdout)["findings"]}
        return dict(found["aiconfigurator-core"])

    monkeypatch.setattr(doctor, "_torch_facts", lambda: None)
    monkeypatch.setattr(aiconfigurator, "find_package", lambda: None)
    assert finding()["state"] == "note" and "not installed" in finding()["detail"]
    monkeypatch.setattr(aiconfigurator, "find_package", find_package)
    fake_package(tmp_path, monkeypatch)
    monkeypatch.setattr(aiconfigurator, "can_read", lambda: False)
    assert "0.99.0 is not read without pyarrow" in finding()["detail"]
    monkeypatch.setenv(TABLES_VARIABLE, "")
    assert "left unread" in finding()["detail"]
    monkeypatch.delenv(TABLES_VARIABLE)
    monkeypatch.setattr(aiconfigurator, "can_read", lambda: True)
    assert finding()["state"] == "ok" and "0.99.0: tables of 1 systems" in finding()["detail"]


def test_without_data_or_with_another_module_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{MODULE}.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert find_package() is None


def test_installed_tables_stand_in_for_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_package(tmp_path, monkeypatch)
    for system in ("h100_sxm", "l40s"):
        path = f"{system}/comm/nccl/9.9/nccl_perf.parquet"
        put(folder, path, columns(NCCL, collective_rows()))
    rows = [("bfloat16", 2**power, n, n, 1.0) for power in range(8, 16) for n in (512, 1024, 2048)]
    put(folder, "h100_sxm/gemm/vllm/9.9/gemm_perf.parquet", columns(GEMM, rows))
    monkeypatch.setattr(aiconfigurator, "can_read", lambda: True)
    for read in (read_collectives, read_products):
        monkeypatch.setattr(read, "__defaults__", (read_json,))
    collectives, products = measured.collectives.__wrapped__, measured.products.__wrapped__
    assert {row.nccl for row in collectives("h100_sxm")} == {"9.9"}
    assert {row.nccl for row in collectives("h200_sxm")} == {"2.29.2"}
    monkeypatch.setenv(TABLES_VARIABLE, "")
    assert {row.nccl for row in collectives("h100_sxm")} == {"2.29.2"}, "unless the user says no"
    monkeypatch.delenv(TABLES_VARIABLE)
    assert collectives("l40s") == (), "rejected, whoever measured it"
    versions = {(row.precision, row.version) for row in products("h100_sxm")}
    assert versions == {("bf16", "9.9"), ("fp8", "0.24.0"), ("fp8_block", "0.24.0")}


def test_without_pyarrow_it_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_package(tmp_path, monkeypatch)
    put(folder, "h100_sxm/comm/nccl/9.9/nccl_perf.parquet", {})
    monkeypatch.setattr(aiconfigurator, "can_read", lambda: False)
    assert installed_collectives("h100_sxm") == ()


@pytest.mark.skipif(
    not can_read(), reason="pyarrow, which aiconfigurator-core brings along, is not installed"
)
def test_parquet_files_are_read_and_others_refused(tmp_path: Path) -> None:
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    path = tmp_path / "data" / "x" / "comm" / "nccl" / "1.0" / "nccl_perf.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(arrow.table(columns(NCCL, collective_rows())), path)
    assert len(read_collectives(tmp_path, "x")) == 4 * 3 * 21
    rows = [("bfloat16", 256, 512, 512, 1.0), ("fp8", 512, 512, 512, 1.0)]
    product = tmp_path / "data" / "x" / "gemm" / "vllm" / "1.0" / "gemm_perf.parquet"
    product.parent.mkdir(parents=True)
    parquet.write_table(arrow.table(columns(GEMM, rows)), product)
    assert [row.precision for row in read_products(tmp_path, "x")] == ["bf16", "fp8"]
    with pytest.raises(InputError, match="lacks the columns other"):
        parquet_columns(path, ("other",))
    for content in (b"", b"PAR1", b"\x00\xff" * 1000):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not parquet"):
            read_collectives(tmp_path, "x")
