"""Joining a process group: what is wrong with the environment is said, not traced."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from planner.errors import InputError
from runtime.launch import init_from_env, started_as_rank

ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def test_a_process_without_a_launcher_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert not started_as_rank()
    with pytest.raises(InputError, match=r"RANK, WORLD_SIZE.*torchrun"):
        init_from_env()


def test_a_taken_port_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in {**ENVIRONMENT, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        assert started_as_rank()
        with pytest.raises(InputError, match=rf"127.0.0.1:{port}.*free --master-port"):
            init_from_env(timeout_s=5)


def test_one_rank_joins_and_gets_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    for name, value in {**ENVIRONMENT, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    device = init_from_env(timeout_s=10)
    try:
        assert dist.get_world_size() == 1
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    finally:
        dist.destroy_process_group()
