"""The frozen reference model of the KL term, and where its weights wait while it is not used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from megatron_mapo.megatron.model import PolicyModel


class Reference(Protocol):
    """A model that can be scored with."""

    def in_place(self) -> AbstractContextManager[list[PolicyModel]]:
        """Inside the block the returned chunks compute with the reference's weights."""


class DeviceReference:
    """A second model on the device: fastest, and it takes the memory of all its weights there."""

    def __init__(self, chunks: list[PolicyModel]) -> None:
        self.chunks = [chunk.eval().requires_grad_(False) for chunk in chunks]

    @contextmanager
    def in_place(self) -> Iterator[list[PolicyModel]]:
        """The second model, always ready."""
        yield self.chunks


class HostReference:
    """Weights in host memory that change places with the actor's while the reference is scored.

    The device holds one model; each of the two ways moves one model's bytes in both directions.

    Args:
        chunks: the actor, holding the reference's weights at this moment.
    """

    def __init__(self, chunks: list[PolicyModel]) -> None:
        self.chunks = chunks
        self.waiting = [_host_copy(parameter) for parameter in self._parameters()]

    def _parameters(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    @contextmanager
    def in_place(self) -> Iterator[list[PolicyModel]]:
        """The actor's modules with the reference's weights; the actor's come back at the end, bit for bit."""
        self._swap()
        try:
            yield self.chunks
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, waiting in zip(self._parameters(), self.waiting, strict=True):
            leaving = parameter.detach().clone()
            # Both copies are ordered on the device's stream; nothing on the host reads `waiting`.
            parameter.copy_(waiting, non_blocking=True)
            waiting.copy_(leaving, non_blocking=True)


def _host_copy(parameter: Tensor) -> Tensor:
    host = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())
