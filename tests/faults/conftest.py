"""The workspace of all fault runs, and the undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import UNDISTURBED, Outcome, make_workspace, run_case


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``fault_runs.make_workspace``."""
    return make_workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def straight(workspace: Path) -> Outcome:
    """A run whose fault never comes."""
    outcome = run_case(UNDISTURBED, workspace)
    assert outcome.code == 0, outcome.log[-4000:]
    return outcome
