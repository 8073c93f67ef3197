"""One JSON object a line, appended, readable at any moment, and cut back to a checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_mapo.errors import DataError

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """All complete rows of a file; none if it does not exist.

    A torn last line (the writer was killed inside it) is left out.

    Raises:
        DataError: a line before the last is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    # After a split at line ends the last part is empty if the file ends with one, else it is torn.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file in one step: a reader sees the old rows or the new ones."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(to_line(row) for row in rows), encoding="utf-8")
    os.replace(temporary, path)


class JsonlWriter:
    """Appends rows to a file; each is flushed at once.

    Args:
        path: the file. Its folder exists.
        finished: steps that are finished. Rows of later steps belong to work that was lost and is done again:
            they are cut. At 0 a run begins anew and every row is cut.

    Raises:
        DataError: the file has a malformed line before its last.
    """

    def __init__(self, path: Path, finished: int) -> None:
        kept = [row for row in read_rows(path) if finished and row.get("step", 0) <= finished]
        replace_rows(path, kept)
        self._file = path.open("a", encoding="utf-8")
        self.kept = kept

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(to_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def to_line(row: Mapping[str, Any]) -> str:
    """A row as its line in the file. Numbers that JSON does not have (NaN, infinity) become null."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
