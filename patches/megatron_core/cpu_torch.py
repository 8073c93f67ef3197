"""What ``megatron.core`` modules see as ``torch`` on a machine without CUDA.

Each of those modules gets its global name ``torch`` replaced by a thin proxy. Nothing in the real
``torch`` namespace changes, except ``torch.Tensor.cuda`` (identity; it could only raise on a CPU
build).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")


class _Stream:
    """Stand-in for ``torch.cuda.Stream``: everything is in order on a CPU."""

    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    """Stand-in for ``torch.cuda.Event``."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def wait(self, _: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class Proxy(ModuleType):
    """A module whose unknown names fall through to the real one."""

    def __init__(self, real: ModuleType, **replaced: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``factory`` with ``device='cuda'`` read as the CPU, and without pinned memory."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _contiguous(collective: Callable[..., Any]) -> Callable[..., Any]:
    """An in-place collective that sends a contiguous copy: gloo 2.13 sends wrong bytes otherwise."""

    @functools.wraps(collective)
    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_contiguous():
            return collective(tensor, *args, **kwargs)
        buffer = tensor.contiguous()
        kwargs["async_op"] = False
        collective(buffer, *args, **kwargs)
        tensor.copy_(buffer)
        return None

    return wrapped


def _scatter(tensor: torch.Tensor, scatter_list: list[torch.Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
    if scatter_list is not None:
        scatter_list = [t.contiguous() for t in scatter_list]
    return torch.distributed.scatter(tensor, scatter_list, *args, **kwargs)


@contextlib.contextmanager
def _no_stream(_: Any = None) -> Iterator[None]:
    yield


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def build() -> ModuleType:
    """The proxy of ``torch`` for a machine without CUDA."""
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    stream = _Stream()
    cuda = Proxy(
        torch.cuda,
        current_device=lambda: CPU,
        set_device=lambda *_: None,
        device_count=lambda: 1,
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        Stream=_Stream,
        Event=_Event,
        stream=_no_stream,
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        manual_seed=_seed,
    )
    dist = torch.distributed
    distributed = Proxy(
        dist, scatter=_scatter, broadcast=_contiguous(dist.broadcast), all_reduce=_contiguous(dist.all_reduce)
    )
    factories = ["tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"]
    factories += ["zeros_like", "ones_like", "empty_like", "full_like"]
    return Proxy(
        torch, cuda=cuda, distributed=distributed, **{name: _on_cpu(getattr(torch, name)) for name in factories}
    )
