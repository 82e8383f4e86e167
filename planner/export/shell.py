"""Pieces of shell scripts that exports share: who this node is, and quoting."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from planner.strategy.plan import Plan

PORT = 29500
"""torchrun's own default of --master-port."""


def head(title: str) -> str:
    return f"#!/bin/bash\n{title}set -euo pipefail\n"


def node_variables(plan: Plan) -> str:
    """Nodes, this node's place among them, and where all meet, as the launcher or the user sets them.

    PET_* are what Kubeflow's trainer sets, NODE_RANK and MASTER_* what the other exports do.
    """
    nodes = sum(group.nodes for group in plan.cluster.groups)
    lines = [
        f"NNODES={nodes}",
        f"GPUS_PER_NODE={plan.cluster.devices_per_node}",
        'NODE_RANK="${NODE_RANK:-${PET_NODE_RANK:-0}}"',
        'MASTER_ADDR="${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}"',
        f'MASTER_PORT="${{MASTER_PORT:-${{PET_MASTER_PORT:-{PORT}}}}}"',
    ]
    if nodes > 1:
        lines.insert(
            0, "# On several nodes: run this on each, with NODE_RANK=0..N-1 and MASTER_ADDR of node 0."
        )
    return "\n".join(lines) + "\n"


def torchrun() -> str:
    """torchrun with this node's variables; its arguments follow."""
    return (
        'torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK" \\\n'
        '  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"'
    )


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Each flag with its value as shell words; True is the flag alone."""
    return [name if value is True else f"{name} {shlex.quote(str(value))}" for name, value in flags.items()]


def array(name: str, flags: Mapping[str, Any]) -> str:
    """Flags as a bash array, a line each."""
    lines = "".join(f"  {words}\n" for words in flag_words(flags))
    return f"{name}=(\n{lines})\n"
