"""The real trainer, which stops at a place for the one that disturbs its servers.

    python tests/faults/served_trainer.py CONFIG PLACE STEP MARKER [section.key=value ...]

It writes MARKER in step STEP and goes on when there is a file MARKER.done. Both are left for the next start, which is
not disturbed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("faults", "distributed", ".", "..")]

from faulty_trainer import mark  # noqa: E402

from megatron_mapo.config import load_config  # noqa: E402
from megatron_mapo.errors import MapoError  # noqa: E402
from megatron_mapo.megatron import runtime  # noqa: E402
from megatron_mapo.rollout import weight_sync  # noqa: E402
from megatron_mapo.rollout.client import RolloutClient  # noqa: E402
from megatron_mapo.rollout.session import RolloutSession  # noqa: E402
from megatron_mapo.rollout.weight_transport import _Group  # noqa: E402
from megatron_mapo.train import Trainer  # noqa: E402

CALLS = 3
"""Requests of the step, and weights of the update, that go out before the fault."""


def _in_rollout(stop: Callable[[], bool]) -> None:
    """Between two requests."""
    original, calls = RolloutClient._generate_on, [0]

    async def generate(self: RolloutClient, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] >= CALLS:
            stop()
        return await original(self, *args)

    RolloutClient._generate_on = generate  # type: ignore[method-assign]


def _in_update(stop: Callable[[], bool]) -> None:
    """Between two buckets of a weight update."""
    weight_sync.MIB = 20_000
    original = RolloutSession.update_weights

    def update(self: RolloutSession, weights: Iterator[tuple[str, Any]], version: int) -> None:
        def disturbed() -> Iterator[tuple[str, Any]]:
            for index, item in enumerate(weights):
                if index >= CALLS:
                    stop()
                yield item

        original(self, disturbed(), version)

    RolloutSession.update_weights = update  # type: ignore[method-assign]


def _in_connect(stop: Callable[[], bool]) -> None:
    """Before an update whose process group cannot form: of a kind that servers on a CPU do not have."""
    original, join = RolloutSession.update_weights, _Group.join
    broken: list[bool] = []

    async def group(self: _Group) -> None:
        self._backend = "nccl" if broken else self._backend
        await join(self)

    def update(self: RolloutSession, weights: Iterator[tuple[str, Any]], version: int) -> None:
        if stop():
            broken.append(True)
            self.weight_sync._runner.run(self.weight_sync._transport.leave())
        original(self, weights, version)

    _Group.join = group  # type: ignore[method-assign]
    RolloutSession.update_weights = update  # type: ignore[method-assign]


PLACES = {"rollout": _in_rollout, "weight update": _in_update, "group": _in_connect}


def main() -> int:
    """The run."""
    config, place, step, name, *overrides = sys.argv[1:]
    marker = Path(name)
    done = Path(f"{name}.done")
    try:
        settings = load_config(config, overrides)
        trainer = Trainer(settings, runtime.initialize(settings))

        def stop() -> bool:
            """Whether it was this call that stopped."""
            if trainer.step + (place == "rollout") < int(step) or marker.exists():
                return False
            mark(marker, trainer)
            while not done.exists():
                time.sleep(0.005)
            return True

        PLACES[place](stop)
        trainer.open_and_run()
    except MapoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
