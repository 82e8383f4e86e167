"""Shipped measurements: read strictly, whole, consistent with each other and with the catalog."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.hardware import catalog, measured_rows
from planner.hardware import measured_tables as measured
from planner.hardware.measured_rows import MAX_PROBLEMS, CollectiveRow, LinkFigure, MeasuredTable, ProductRow
from planner.hardware.measured_tables import wire_factor
from planner.profile.profile import Op

FOLDER = measured.folder()
LOADERS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "collectives.csv": measured_rows.load_collectives,
    "internode.csv": measured_rows.load_internode,
    "gemm.csv": measured_rows.load_products,
    "links.csv": measured_rows.load_links,
}


@pytest.mark.parametrize(
    ("name", "count"),
    [("collectives.csv", 1100), ("internode.csv", 77), ("gemm.csv", 1324), ("links.csv", 175)],
)
def test_a_table_has_its_rows_and_comes_back_from_plain_data(name: str, count: int) -> None:
    rows = LOADERS[name](FOLDER / name)
    assert len(rows) == count
    kind = type(rows[0])
    for row in rows:
        assert decode(kind, encode(row), source=name) == row


def _written(value: object) -> str | float:
    """A cell as it is compared: numbers by value, so that 150 and 150.0 are the same."""
    text = "" if value is None else str(value)
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("name", LOADERS)
def test_a_table_written_again_has_the_same_cells(name: str) -> None:
    """Nothing is lost or changed between the file and what was read from it."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    rows = LOADERS[name](FOLDER / name)
    for line, row in zip(lines, rows, strict=True):
        values = encode(row)
        assert list(values) == header
        assert [_written(value) for value in values.values()] == [_written(cell) for cell in line]


def test_tables_speak_for_devices_of_the_catalog_each_once() -> None:
    tables = measured.tables()
    assert decode(dict[str, MeasuredTable], {k: encode(v) for k, v in tables.items()}, source="x") == tables
    known = set(catalog.device_names())
    for use in ("collectives", "products"):
        named = [device for table in tables.values() for device in getattr(table, use)]
        assert set(named) <= known and len(named) == len(set(named))
    borrowing = [device for table in tables.values() for device in (*table.shares, *table.products)]
    assert set(borrowing) <= known and len(borrowing) == len(set(borrowing))
    assert all(table.host and table.why and table.products for table in tables.values())


def test_each_table_is_in_the_files_and_only_those() -> None:
    tables = set(measured.tables())
    assert {row.table for row in measured_rows.load_collectives(FOLDER / "collectives.csv")} == tables
    assert {row.table for row in measured_rows.load_products(FOLDER / "gemm.csv")} == tables
    assert {name for name in tables if measured.collectives(name)} == tables - {"l40s"}
    assert all(row.table == name for name in tables for row in measured.products(name))
    assert sum(len(measured.products(name)) for name in tables) == 1324


def test_the_broken_host_is_kept_with_its_reason_and_never_used() -> None:
    assert "degraded" in measured.tables()["l40s"].rejected
    rows = [r for r in measured_rows.load_collectives(FOLDER / "collectives.csv") if r.table == "l40s"]
    assert len(rows) == 132 and max(r.busbw_gb_per_s for r in rows if r.ranks == 8) < 6
    figures = measured_rows.load_links(FOLDER / "links.csv")
    assert Counter(bool(f.rejected) for f in figures if f.system.startswith("L40S")) == {True: 8, False: 4}


def test_bus_bandwidth_follows_from_time_and_bytes() -> None:
    """The definition in profiles/README.md, on every row whose rounding lets it be seen."""
    rows: list[Any] = [*measured_rows.load_collectives(FOLDER / "collectives.csv"), *measured.internode()]
    seen = [row for row in rows if row.busbw_gb_per_s >= 1]
    assert len(seen) > 700
    for row in seen:
        busbw = wire_factor(Op(row.op), row.ranks) * row.bytes / row.latency_us / 1e3
        assert busbw == pytest.approx(row.busbw_gb_per_s, rel=0.02)


def test_each_group_was_measured_at_the_same_eleven_sizes() -> None:
    sizes: dict[tuple[str, str, int], list[int]] = {}
    for row in measured_rows.load_collectives(FOLDER / "collectives.csv"):
        sizes.setdefault((row.table, row.op, row.ranks), []).append(row.bytes)
    assert len(sizes) == 100
    assert all(found == [512 * 4**k for k in range(11)] for found in sizes.values())


def test_summaries_of_links_agree_with_the_curves() -> None:
    """The 100 rows of AIC in links.csv say again what collectives.csv holds at 512 MiB."""
    systems = {
        "A100-SXM4-80GB": "a100_sxm", "H100 SXM": "h100_sxm", "H200 SXM": "h200_sxm", "B200 SXM": "b200_sxm",
        "B300 SXM": "b300_sxm", "GB200 (4-GPU tray)": "gb200", "GB300 (4-GPU tray)": "gb300",
        "L40S 8-GPU server": "l40s", "RTX PRO 6000 Server 8-GPU": "rtx_pro_6000_server",
    }  # fmt: skip
    at = {
        (r.table, r.op, r.ranks): r.busbw_gb_per_s
        for r in measured_rows.load_collectives(FOLDER / "collectives.csv")
        if r.bytes == 512 * 1024**2
    }
    rows = [f for f in measured_rows.load_links(FOLDER / "links.csv") if f.source.startswith("AIC")]
    assert len(rows) == 100
    for row in rows:
        busbw = at[(systems[row.system], row.op, row.ranks or 0)]
        assert row.busbw_gb_per_s == pytest.approx(busbw, rel=0.01, abs=0.06)


def test_shares_of_links_are_sane() -> None:
    """Reached over nominal; between nodes the port's rate is busbw (k - 1) / (n - 1)."""
    rows = measured_rows.load_links(FOLDER / "links.csv")
    for row in rows:
        assert 0.05 < row.nominal_gb_per_s <= 1800
        if row.share_of_nominal is not None:
            assert 0.03 < row.share_of_nominal < 1.1
            reached = row.nic_gb_per_s or row.busbw_gb_per_s
            assert reached is not None
            assert row.share_of_nominal == pytest.approx(reached / row.nominal_gb_per_s, abs=0.006)
        if row.nic_gb_per_s is not None and row.ranks and row.nodes:
            implied = (row.busbw_gb_per_s or math.nan) * (row.nodes - 1) / (row.ranks - 1)
            assert row.nic_gb_per_s == pytest.approx(implied, rel=0.01)


def test_rows_between_nodes_name_devices_and_networks_of_the_catalog() -> None:
    rows = measured_rows.load_internode(FOLDER / "internode.csv")
    assert len(measured.internode()) == 73
    for row in rows:
        assert row.device in catalog.device_names()
        assert catalog.load_network(row.network).kind.share
        assert row.ranks % row.nodes == 0 and row.nodes > 1


def test_networks_find_their_figures() -> None:
    """Every beginning in `links` is that of some figure, and every figure between nodes has one network."""
    figures = measured_rows.load_links(FOLDER / "links.csv")
    kinds = catalog.networks().kinds
    beginnings = [text for kind in kinds.values() for text in kind.links]
    for text in beginnings:
        assert any(figure.link.startswith(text) for figure in figures), text
    for figure in figures:
        if figure.where == "between":
            assert sum(figure.link.startswith(text) for text in beginnings) == 1, figure.link


def test_products_stay_under_the_peak_of_their_device() -> None:
    for name in measured.tables():
        facts = catalog.load_device(measured.tables()[name].products[0])
        for row in measured.products(name):
            peak = facts.peak_tflops.bf16 if row.precision == "bf16" else facts.peak_tflops.fp8
            assert peak is not None
            assert row.median_tflops <= row.max_tflops <= peak


A100 = "a100_sxm,2.27.3,all_gather,2,"
GEMM = "a100_sxm,vllm,0.14.0,"
CHANGES = [
    ("collectives.csv", f"{A100}512,8.98,0.03", f"{A100}512,-1,0.03", r"line 2: latency_us"),
    ("collectives.csv", f"{A100}2048", "a100_sxm,2.27.3,gather,2,2048", r"line 3: op"),
    ("collectives.csv", f"{A100}8192", "a100_sxm,2.27.3,all_gather,2.5,8192", r"line 4: ranks"),
    ("collectives.csv", f"{A100}32768,11.97,1.37", f"{A100}32768,nan,inf",
     r"line 5: latency_us[\s\S]*line 5: busbw_gb_per_s"),
    ("collectives.csv", f"{A100}131072,12.37,5.3", "a100_sxm,2.27.3", r"line 6: has 2 cells"),
    ("collectives.csv", "table,nccl", "name,nccl", r"line 1: has other columns"),
    ("gemm.csv", f"{GEMM}bf16,256,1,512,185", f"{GEMM}bf17,256,1,512,0",
     r"line 2: precision[\s\S]*line 2: samples"),
    ("gemm.csv", f"{GEMM}bf16,256,1,512,185,29.6", ",vllm,0.14.0,bf16,256,,512,185,1e99",
     r"line 2: table[\s\S]*line 2: min_nk_from[\s\S]*line 2: median_tflops"),
    ("links.csv", "NVLink1 (P100),inside,nominal,,80", "NVLink1 (P100),outside,typical,,0",
     r"line 2: where[\s\S]*line 2: kind[\s\S]*line 2: nominal_gb_per_s"),
    ("internode.csv", "b200-sxm,efa3200,4,32,all_reduce,32768", "b200-sxm,efa3200,4,32,all_reduce,\u0663",
     r"line 2: bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "fault"), CHANGES)
def test_a_wrong_table_names_line_and_column(
    tmp_path: Path, name: str, old: str, new: str, fault: str
) -> None:
    text = (FOLDER / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=fault):
        LOADERS[name](tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'table,"nccl\n1', b"\x00", b"a,b\n" * 10])
def test_what_is_no_table_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "links.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"links\.csv"):
        measured_rows.load_links(tmp_path / "links.csv")


def test_a_table_that_is_wrong_throughout_lists_its_first_faults(tmp_path: Path) -> None:
    lines = (FOLDER / "collectives.csv").read_text().splitlines()
    wrong = [lines[0], *(line.replace("all_", "none_") for line in lines[1:])]
    (tmp_path / "collectives.csv").write_text("\n".join(wrong))
    with pytest.raises(InputError) as caught:
        measured_rows.load_collectives(tmp_path / "collectives.csv")
    assert len(caught.value.problems) == MAX_PROBLEMS


def test_each_kind_of_row_is_its_own() -> None:
    kinds = {name: type(load(FOLDER / name)[0]) for name, load in LOADERS.items()}
    assert kinds["collectives.csv"] is CollectiveRow and kinds["gemm.csv"] is ProductRow
    assert kinds["links.csv"] is LinkFigure
