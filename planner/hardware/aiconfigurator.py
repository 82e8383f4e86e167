"""Measured tables of the optional package aiconfigurator-core (NVIDIA, Apache-2.0), read where installed.

The package is never imported, since that loads its compiled solver, and never shipped: only its data files
are read, with the pyarrow that it requires. As version 0.12.0 has them, below the package's folder:

    systems/data/SYSTEM/comm/nccl/VERSION/nccl_perf.parquet
        nccl_dtype, num_gpus, message_size (elements), op_name, latency (ms); older files lack the rest
    systems/data/SYSTEM/gemm/FRAMEWORK/VERSION/gemm_perf.parquet
        gemm_dtype, m, n, k, latency (ms)

They become the rows of `planner.hardware.measured_tables`: all message sizes, of which the shipped tables
have every
other, and the same m and buckets as the shipped products. Of several versions the newest is read, of
several engines vLLM's first, and of several measurements of one point the median is taken. Checked against
the wheel of 0.12.0, whose files give the shipped rows to their last digit; another version may be laid out
otherwise, which is answered with an InputError, not with other numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.measured_rows import CollectiveRow, ProductRow

TABLES_VARIABLE = "SHARDWISE_AICONFIGURATOR"
"""Environment variable: empty, the package is left unread though it is installed."""

DISTRIBUTION = "aiconfigurator-core"
MODULE = "aiconfigurator_core"
GET = "pip install aiconfigurator-core"
MAX_ROWS = 5_000_000
MIN_M = 256
"""Smaller products are those of decoding, not of training; above, the powers of two are taken."""

MAX_SIZE = 2**40
MAX_LATENCY_MS = 1e9
HALF_BYTES = 2
OPS: Mapping[str, str] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
PRECISIONS: Mapping[str, str] = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block"}
ENGINES = ("vllm", "trtllm", "sglang")
BUCKETS: tuple[tuple[int, int | None], ...] = (
    (1, 512),
    (513, 1024),
    (1025, 2048),
    (2049, 4096),
    (4097, 8192),
    (8193, 16384),
    (16385, None),
)
"""Buckets of min(n, k), as those of the shipped gemm.csv."""

Columns = Mapping[str, Sequence[Any]]
Reader = Callable[[Path, Sequence[str]], Columns]


@frozen
class MeasuredPackage:
    """The installed package: its version, its folder of systems, and the systems that it has tables of."""

    version: str
    folder: str
    systems: tuple[str, ...]


def find_package() -> MeasuredPackage | None:
    """The installed package, found without importing it, or None."""
    try:
        spec = importlib.util.find_spec(MODULE)
    except (ImportError, ValueError):  # a module of that name that is no proper package
        return None
    places = () if spec is None else spec.submodule_search_locations or ()
    for place in places:
        folder = Path(place) / "systems"
        data = folder / "data"
        systems = [
            name
            for name in _folders(data)
            if (data / name / "gemm").is_dir() or (data / name / "comm").is_dir()
        ]
        if systems:
            return MeasuredPackage(version=_version(), folder=str(folder), systems=tuple(systems))
    return None


def installed_collectives(table: str) -> tuple[CollectiveRow, ...]:
    """The collectives of a table in the installed package; none where it is not installed or lacks them."""
    folder = _installed(table)
    return () if folder is None else read_collectives(folder, table)


def installed_products(table: str) -> tuple[ProductRow, ...]:
    """The products of a table in the installed package; none where it is not installed or lacks them."""
    folder = _installed(table)
    return () if folder is None else read_products(folder, table)


def _installed(table: str) -> Path | None:
    """The package's folder of systems if it has `table` and can be read."""
    package = find_package() if is_wanted() else None
    if package is None or table not in package.systems or not can_read():
        return None
    return Path(package.folder)


def is_wanted() -> bool:
    """Whether the package is to be read where it is installed: unless the user says no."""
    return os.environ.get(TABLES_VARIABLE) != ""


def can_read() -> bool:
    """Whether there is what reads its files: pyarrow."""
    return importlib.util.find_spec("pyarrow") is not None


def parquet_columns(path: Path, columns: Sequence[str]) -> Columns:
    """The named columns of a parquet file. Raises InputError where it has none of that kind."""
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        if file.metadata.num_rows > MAX_ROWS:
            raise _fault(path, f"has {file.metadata.num_rows} rows, at most {MAX_ROWS} are read.")
        lacking = [column for column in columns if column not in file.schema_arrow.names]
        if lacking:
            raise _fault(path, f"lacks the columns {', '.join(lacking)}.")
        table = file.read(columns=list(columns))
        found = {column: table.column(column).to_numpy() for column in columns}
    except InputError:
        raise
    except Exception as error:  # pyarrow's errors share no base below Exception
        raise _fault(path, f"is not parquet: {str(error).splitlines()[0][:100]}.") from None
    return found


def read_collectives(folder: Path, system: str, read: Reader = parquet_columns) -> tuple[CollectiveRow, ...]:
    """The collectives of `system` in half precision, by the newest NCCL. Empty where there are none.

    With n ranks, s bytes and time t: busbw = f s / t, f = 2 (n - 1) / n for all-reduce and (n - 1) / n for
    the others.
    """
    import statistics

    path = _newest(folder / "data" / system / "comm" / "nccl", "nccl_perf.parquet")
    if path is None:
        return ()
    columns = read(path, ("nccl_dtype", "num_gpus", "message_size", "op_name", "latency"))
    points: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)
    for dtype, ranks, elements, op, latency_ms in _rows(path, columns):
        if dtype == "half" and op in OPS:
            key = (OPS[op], _whole(path, ranks, 2), HALF_BYTES * _whole(path, elements, 1))
            points[key].append(_positive(path, latency_ms) * 1e3)
    rows = []
    for (op, ranks, size_bytes), found in sorted(points.items()):
        latency_us = statistics.median(found)
        factor = (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks
        rows.append(
            CollectiveRow(
                table=system,
                nccl=path.parent.name,
                op=op,
                ranks=ranks,
                bytes=size_bytes,
                latency_us=latency_us,
                busbw_gb_per_s=factor * size_bytes / latency_us / 1e3,
            )
        )
    return tuple(rows)


def read_products(folder: Path, system: str, read: Reader = parquet_columns) -> tuple[ProductRow, ...]:
    """The matrix products of `system` by m and bucket of min(n, k): median and best of 2 m n k / time."""
    import numpy as np

    path = _product_file(folder / "data" / system / "gemm")
    if path is None:
        return ()
    columns = read(path, ("gemm_dtype", "m", "n", "k", "latency"))
    m, n, k = (_wholes(path, columns[name]) for name in ("m", "n", "k"))
    tflops = 2.0 * m * n * k / _latencies(path, columns["latency"]) / 1e9
    ends = [last for _, last in BUCKETS if last is not None]
    bucket = np.searchsorted(ends, np.minimum(n, k))
    rows = []
    for dtype, precision in PRECISIONS.items():
        chosen = (
            (np.asarray(columns["gemm_dtype"], dtype=object) == dtype) & (m >= MIN_M) & (m & (m - 1) == 0)
        )
        keys = m[chosen] * len(BUCKETS) + bucket[chosen]
        order = np.argsort(keys, kind="stable")
        found, first = np.unique(keys[order], return_index=True)
        for key, rates in zip(found, np.split(tflops[chosen][order], first[1:]), strict=bool(found.size)):
            rows.append(_product(system, path, precision, int(key), rates.tolist()))
    return tuple(rows)


def _product(system: str, path: Path, precision: str, key: int, rates: list[float]) -> ProductRow:
    import statistics

    m, bucket = divmod(key, len(BUCKETS))
    return ProductRow(
        table=system,
        framework=path.parent.parent.name,
        version=path.parent.name,
        precision=precision,
        m=m,
        min_nk_from=BUCKETS[bucket][0],
        min_nk_to=BUCKETS[bucket][1],
        samples=len(rates),
        median_tflops=statistics.median(rates),
        max_tflops=max(rates),
    )


def _wholes(path: Path, column: Sequence[Any]) -> Any:
    """A column of whole numbers from 1 to 2**40, as an array."""
    import numpy as np

    values = np.asarray(column)
    if values.size and values.dtype.kind not in "iu":
        raise _fault(path, "holds something other than whole numbers for m, n or k.")
    if values.size and not 1 <= values.min() <= values.max() <= MAX_SIZE:
        raise _fault(path, f"holds {values.min()} to {values.max()} for m, n or k.")
    return values.astype(np.int64)


def _latencies(path: Path, column: Sequence[Any]) -> Any:
    """A column of milliseconds above 0, as an array."""
    import numpy as np

    values = np.asarray(column)
    if values.size and values.dtype.kind not in "fiu":
        raise _fault(path, "holds something other than numbers for the latency.")
    if values.size and not bool(np.all((values > 0) & (values < MAX_LATENCY_MS))):
        raise _fault(path, "holds a latency that is not above 0.")
    return values.astype(np.float64)


def _rows(path: Path, columns: Columns) -> zip[tuple[Any, ...]]:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise _fault(path, "has columns of several lengths.")
    return zip(*(list(column) for column in columns.values()), strict=True)


def _whole(path: Path, value: Any, least: int) -> int:
    if isinstance(value, (bool, float, str)) or value is None or not least <= value <= MAX_SIZE:
        raise _fault(path, f"holds '{str(value)[:30]}' where a whole number of {least} or more was expected.")
    return int(value)


def _positive(path: Path, value: Any) -> float:
    if isinstance(value, (bool, str)) or value is None or not 0 < value < MAX_LATENCY_MS:
        raise _fault(path, f"holds '{str(value)[:30]}' where milliseconds above 0 were expected.")
    return float(value)


def _product_file(folder: Path) -> Path | None:
    """The file of the first engine in the order of ENGINES, by its newest version."""
    for engine in (*ENGINES, *(name for name in _folders(folder) if name not in ENGINES)):
        path = _newest(folder / engine, "gemm_perf.parquet")
        if path is not None:
            return path
    return None


def _newest(folder: Path, name: str) -> Path | None:
    """The file `name` of the newest version below `folder`: `2.29.2` is newer than `2.3`."""
    versions = [version for version in _folders(folder) if (folder / version / name).is_file()]
    newest = max(
        versions, key=lambda text: [int(part) for part in re.findall(r"[0-9]{1,9}", text)], default=None
    )
    return None if newest is None else folder / newest / name


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def _fault(path: Path, fault: str) -> InputError:
    fix = f"install the version that was tried, {GET}==0.12.0, or remove it: the shipped tables are used then"
    return InputError(Problem(where=str(path), fault=fault, fix=fix))
