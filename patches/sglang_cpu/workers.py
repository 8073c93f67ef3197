"""Workers that are forked instead of spawned.

sglang spawns its scheduler and its detokenizer, and each imports torch, transformers and sglang again:
half of the start-up time on a machine with few cores. Spawning is there for CUDA, which does not survive
a fork; on CPU a fork is safe as long as the parent has started no compute threads, and it has not: it
only parses arguments.

sglang on CPU collects garbage whenever it empties a cache: after every weight update, and before it sleeps. That walks
all that was imported, 0.4 s each time; frozen, it is left out.
"""

from __future__ import annotations

import gc
import multiprocessing


def apply() -> None:
    """Fork workers, after importing here what they need, and leave that to no garbage collection."""
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401

    gc.collect()
    gc.freeze()
    upstream = multiprocessing.set_start_method

    def set_start_method(method: str | None, force: bool = False) -> None:
        upstream("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = set_start_method
