"""Joining a process group: what is wrong with the environment is said, not traced."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from planner.foundation.errors import InputError
from runtime.launch.process_group import enter_group, started_as_rank

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
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert started_as_rank()
    with pytest.raises(InputError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set.*torchrun"):
        enter_group("cpu", timeout_s=5)


def test_a_taken_port_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in {**ENVIRONMENT, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=rf"127.0.0.1:{port}.*choose a free port"):
            enter_group("cpu", timeout_s=5)


@pytest.mark.parametrize("local_rank", ["2", "-1", "first"])
def test_a_rank_without_an_accelerator_is_told_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, local_rank: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {**ENVIRONMENT, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"LOCAL_RANK: is {local_rank}, but .* 2 accelerators.* 0 to 1"):
        enter_group("cuda", timeout_s=5)


def test_one_rank_joins_and_gets_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    for name, value in {**ENVIRONMENT, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    device = enter_group("cpu", timeout_s=10)
    try:
        assert dist.get_world_size() == 1
        assert device == torch.device("cpu")
        assert torch.get_num_threads() == 1, "as plan profile measured"
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
