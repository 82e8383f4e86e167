"""`plan doctor`: versions, devices, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import Any

import click

from planner.commands.shared.options import json_option
from planner.commands.shared.text import pairs, print_json, table

PROBE_TIMEOUT_S = 120.0
TORCH_OLDEST, TORCH_BEYOND = (2, 11), (2, 15)
PLANNING = ("click", "pydantic", "pulp", "highspy", "rich", "jinja2")
RUNNING = ("torch", "tokenizers", "safetensors", "numpy")
GET_RUNTIME = "pip install 'shardwise[runtime]'"
GET_PLANNING = "pip install shardwise"

_PROBE = """
import json, torch, torch.distributed as d
print(json.dumps({
    "available": d.is_available(),
    "gloo": d.is_available() and d.is_gloo_available(),
    "nccl": d.is_available() and d.is_nccl_available(),
    "cuda": torch.cuda.is_available(),
    "cuda_devices": torch.cuda.device_count(),
    "cuda_version": torch.version.cuda,
}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `ok`, `note` (works without it) or `missing`."""

    what: str
    state: str
    detail: str
    fix: str = ""


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Report versions, devices, and what is missing and how to get it.

    Planning needs no torch; without it only profile, train and demo cannot run.
    """
    machine = _machine()
    torch = _torch_facts()
    findings = [*_packages(PLANNING, "missing", GET_PLANNING), *_packages(RUNNING, "note", GET_RUNTIME)]
    findings += _solver() + _torch_findings(torch) + _machine_findings(machine)
    findings += [_own_profile(), _measured_tables(), _live_catalogs(), _own_prices()]
    if as_json:
        print_json(
            {
                "ok": all(finding.state != "missing" for finding in findings),
                "can_plan": not any(f.state == "missing" for f in findings),
                "can_train": bool(torch and torch.get("gloo")),
                "machine": machine,
                "torch": torch,
                "findings": [asdict(finding) for finding in findings],
            }
        )
        return
    click.echo(pairs((key, _text(value)) for key, value in machine.items()))
    click.echo()
    click.echo(table(("what", "state", "detail"), [(f.what, f.state, f.detail) for f in findings]))
    for finding in findings:
        if finding.fix:
            click.echo(f"{finding.what}: {finding.fix}")


def _machine() -> dict[str, Any]:
    from planner.hardware.local_machine import accelerators, cpu_title, physical_memory_bytes, usable_cores

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_title(),
        "usable_cores": usable_cores(),
        "memory_bytes": physical_memory_bytes(),
        "accelerators": [f"{name} ({memory} MiB)" for name, memory in accelerators()],
        "file_limit": _file_limit(),
    }


def _file_limit() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _packages(names: tuple[str, ...], absent: str, fix: str) -> list[Finding]:
    findings = []
    for name in names:
        try:
            findings.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, absent, "not installed", fix))
    return findings


def _solver() -> list[Finding]:
    """Whether HiGHS loads; imported here only, since it takes a moment, and not started: it would talk."""
    try:
        import_module("highspy")
    except ImportError as error:
        return [Finding("HiGHS", "missing", str(error), GET_PLANNING)]
    return [Finding("HiGHS", "ok", "the solver loads")]


def _torch_facts() -> dict[str, Any] | None:
    """What torch says of itself, asked in a process of its own; None where there is no torch."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    facts: dict[str, Any] = {"version": version}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        facts |= json.loads(answer.stdout) if answer.returncode == 0 else {"error": _last_line(answer.stderr)}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    return facts


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def _torch_findings(torch: dict[str, Any] | None) -> list[Finding]:
    if torch is None:
        return [Finding("train, profile, demo", "note", "need torch", GET_RUNTIME)]
    if "error" in torch:
        return [Finding("torch import", "missing", str(torch["error"]), f"reinstall: {GET_RUNTIME}")]
    findings = []
    numbers = tuple(int(part) for part in torch["version"].split("+")[0].split(".")[:2])
    if not TORCH_OLDEST <= numbers < TORCH_BEYOND:
        findings.append(Finding("torch version", "note", f"{torch['version']} is not tested", GET_RUNTIME))
    gloo = Finding("gloo", "ok", "CPU ranks can talk")
    if not torch["gloo"]:
        gloo = Finding("gloo", "note", "torch was built without it", GET_RUNTIME)
    findings.append(gloo)
    if torch["cuda"]:
        state = "ok" if torch["nccl"] else "missing"
        findings.append(
            Finding("nccl", state, f"CUDA {torch['cuda_version']}, {torch['cuda_devices']} devices")
        )
    return findings


def _machine_findings(machine: dict[str, Any]) -> list[Finding]:
    from planner.foundation.units import GIB

    findings = []
    if machine["memory_bytes"] < 4 * GIB:
        findings.append(Finding("memory", "note", "under 4 GiB: the demo may not fit"))
    if machine["file_limit"] is not None and machine["file_limit"] < 1024:
        fix = "ulimit -n 4096"
        findings.append(Finding("open files", "note", f"at most {machine['file_limit']}", fix))
    return findings


MEASURE = "plan profile --cluster local -o profile.json measures it; then --profile profile.json"


def _own_profile() -> Finding:
    """Whether a shipped profile speaks for this machine's device, and how to take one."""
    from planner.foundation.errors import InputError
    from planner.hardware.cluster_text import parse_cluster
    from planner.profile.choose import shipped_profile, use_of

    try:
        cluster = parse_cluster("local")
    except InputError as error:
        return Finding("profile", "note", str(error.problems[0]), MEASURE)
    device = cluster.groups[0].device
    found = shipped_profile(device.name)
    if found is None:
        detail = f"none is shipped for {device.title}: its times are taken from datasheets, if at all"
        return Finding("profile", "note", detail, MEASURE)
    use = use_of(found, device, cluster=cluster)
    return Finding(
        "profile",
        "ok" if use.measured and not use.remarks else "note",
        f"{use.name}, {use.text()}",
        "" if use.measured and not use.remarks else MEASURE,
    )


def _measured_tables() -> Finding:
    """Whether the optional package of measured tables stands in for the shipped ones."""
    from planner.hardware.aiconfigurator import (
        DISTRIBUTION,
        GET,
        TABLES_VARIABLE,
        can_read,
        find_package,
        is_wanted,
    )

    package = find_package()
    if package is None:
        return Finding(DISTRIBUTION, "note", "not installed: the shipped tables of its 0.12.0 are used", GET)
    if not is_wanted():
        return Finding(DISTRIBUTION, "note", f"{package.version} is left unread: {TABLES_VARIABLE} is empty")
    if not can_read():
        fix = "pip install pyarrow"
        return Finding(DISTRIBUTION, "note", f"{package.version} is not read without pyarrow", fix)
    detail = f"{package.version}: tables of {len(package.systems)} systems are read in place of the shipped"
    return Finding(DISTRIBUTION, "ok", detail)


def _live_catalogs() -> Finding:
    """Which catalogs of SkyPilot's are there, and how old the oldest is."""
    import datetime

    from planner.hardware.prices import SKYPILOT_VARIABLE, skypilot_folder
    from planner.hardware.skypilot import catalog_files

    folder = skypilot_folder()
    files = {} if folder is None else catalog_files(folder)
    if not files:
        fix = f"`sky show-gpus` fetches them; {SKYPILOT_VARIABLE} names another folder"
        return Finding("SkyPilot's catalogs", "note", "none: shipped prices only", fix)
    oldest = datetime.date.fromtimestamp(min(file.stat().st_mtime for file in files.values()))
    detail = f"{', '.join(files)} in {folder}, the oldest of {oldest.isoformat()}"
    return Finding("SkyPilot's catalogs", "ok", detail)


def _own_prices() -> Finding:
    """Whether the environment names a prices file, and whether it can be read."""
    from planner.foundation.errors import InputError
    from planner.hardware.prices import PRICES_VARIABLE, read_market

    name = os.environ.get(PRICES_VARIABLE)
    if not name:
        return Finding("prices of your own", "note", f"none: --prices FILE or {PRICES_VARIABLE} names them")
    try:
        read_market(live=True)
    except InputError as error:
        return Finding("prices of your own", "missing", str(error.problems[0]), "correct the file")
    return Finding("prices of your own", "ok", f"{name}, by {PRICES_VARIABLE}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)
