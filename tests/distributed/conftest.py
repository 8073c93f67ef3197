"""The launcher of ranks, and the folder of what they train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from frozen_batch import build_frozen
from harness import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts ranks, for all tests of this folder."""
    found = Launcher()
    yield found
    found.close()


@pytest.fixture(scope="session")
def frozen(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``build_frozen``."""
    return build_frozen(launcher, tmp_path_factory.mktemp("frozen"))
