"""Messages between the stages of a pipeline: between ranks by send and receive, within a rank by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.launch.fake_answers import alone
from runtime.parallel.pipeline.program import Message


class Mailbox:
    """What is under way to and from this rank, all of one shape and number format.

    A received tensor is handed out once; a sent one is kept until it is released or the step ends.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self._shape, self._dtype, self._device, self._group = shape, dtype, device, group
        self._coming: dict[Message, tuple[Tensor, dist.Work]] = {}
        self._arrived: dict[Message, Tensor] = {}
        self._leaving: dict[Message, tuple[Tensor, dist.Work]] = {}

    def receive(self, message: Message, peer: int) -> None:
        """Opens a buffer for a message of pipeline rank `peer`."""
        buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if alone(self._group):
            buffer.normal_()
        work = dist.irecv(buffer, group=self._group, group_src=peer)
        assert work is not None
        self._coming[message] = buffer, work

    def wait(self, message: Message) -> None:
        """Waits until a message is there."""
        buffer, work = self._coming.pop(message)
        work.wait()
        self._arrived[message] = buffer

    def put(self, message: Message, tensor: Tensor) -> None:
        """Leaves what another stage of this rank will take, or `send` will send."""
        self._arrived[message] = tensor

    def take(self, message: Message) -> Tensor:
        """Hands a message out."""
        return self._arrived.pop(message)

    def send(self, message: Message, peer: int) -> None:
        """Starts sending what was put here to pipeline rank `peer`."""
        tensor = self._arrived.pop(message).contiguous()
        work = dist.isend(tensor, group=self._group, group_dst=peer)
        assert work is not None
        self._leaving[message] = tensor, work

    def release(self, message: Message) -> None:
        """Lets go of a sent tensor. It has arrived, so this does not wait."""
        self._leaving.pop(message)[1].wait()

    def finish(self) -> None:
        """Waits for what is still being sent at a step's end."""
        for message in list(self._leaving):
            self.release(message)
        assert not self._coming and not self._arrived, (self._coming.keys(), self._arrived.keys())

    @property
    def held(self) -> tuple[int, int]:
        """How many buffers of messages to this rank it holds, and how many sent tensors."""
        return len(self._coming) + len(self._arrived), len(self._leaving)
