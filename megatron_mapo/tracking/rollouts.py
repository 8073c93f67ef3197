"""All sequences of every step, as ``rollouts/step_NNNNNN.parquet``: what was asked, answered, rewarded and learned.

A file is written by a thread, while the next step samples, and appears only when it is complete. ``flush`` before a
checkpoint makes sure that every step of the checkpoint has its file; a run that goes on from it removes later ones and
writes them again. So a run that was killed and resumed has each step exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mapo.errors import DataError

if TYPE_CHECKING:
    import pyarrow

COLUMNS = {
    "step": "int32",
    "group": "int64",
    "prompt_id": "int64",
    "prompt": "string",
    "answer": "string",
    "response": "string",
    "reward": "float32",
    "advantage": "float32",
    "p": "float32",
    "lambda": "float32",
    "weight_version_min": "int32",
    "weight_version_max": "int32",
    "truncated": "bool",
    "prompt_length": "int32",
    "length": "int32",
    "logprob_diff_mean": "float32",
    "logprob_diff_abs_mean": "float32",
}
"""Columns of a file and their Arrow types; a row is a sequence, in the order of groups, then of samples. ``p`` and
``lambda`` are of the row's group. ``logprob_diff_*``: server − trainer, mean over the response's tokens (nat); null
where the trainer did not score the response, because its group was left out of the update."""

Columns = Mapping[str, Sequence[Any]]


class RolloutWriter:
    """Writes a file a step in the background.

    Args:
        folder: made when the first file is written.
        finished: finished steps; files of later ones are removed. At 0 all are.
    """

    def __init__(self, folder: Path, finished: int) -> None:
        self._folder = folder
        for file in rollout_files(folder):
            if not finished or step_of(file) > finished:
                file.unlink()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-writer")
        self._pending: Future[None] | None = None

    def write(self, step: int, columns: Callable[[], Columns]) -> None:
        """Write a step's file soon; first wait for that of the step before.

        Args:
            step: the finished step.
            columns: called in the writer's thread; gives the values of ``COLUMNS`` but ``step``.

        Raises:
            Whatever went wrong with the file of the step before.
        """
        self.flush()
        self._pending = self._thread.submit(self._write, step, columns)

    def flush(self) -> None:
        """Wait until all files are written.

        Raises:
            Whatever went wrong with the last one.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """``flush``, and end the thread."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, columns: Callable[[], Columns]) -> None:
        import pyarrow
        import pyarrow.parquet

        values = columns()
        rows = len(values["group"])
        schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])
        table = pyarrow.table({"step": [step] * rows, **values}, schema=schema)
        self._folder.mkdir(exist_ok=True)
        target = self._folder / f"step_{step:06d}.parquet"
        temporary = target.with_name(f".{target.name}.tmp")
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
        os.replace(temporary, target)


def rollout_files(folder: Path) -> list[Path]:
    """The files of a run's ``rollouts`` folder, first step first; none if it does not exist."""
    return sorted(folder.glob("step_*.parquet"), key=step_of)


def step_of(file: Path) -> int:
    """The step in the name of ``step_NNNNNN.*``."""
    return int(file.stem.removeprefix("step_"))


def read_rollouts(file: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """One step's sequences.

    Args:
        file: of ``rollout_files``.
        columns: names of ``COLUMNS``; None: all.

    Raises:
        DataError: the file is damaged, or has other columns.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, columns=None if columns is None else list(columns), partitioning=None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
