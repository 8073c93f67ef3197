"""Runs that their servers end keep all finished steps, and the same command goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import STEPS, rows
from server_faults import SERVER_CASES, ServerCase, Servers, run_server_case, two_servers

from megatron_mapo.errors import RolloutError, WeightSyncError

ENDS = {
    "all are gone for longer than the run waits": RolloutError,
    "all answer garbage, more often than a request is sent again": RolloutError,
    "the process group cannot form": WeightSyncError,
}


@pytest.fixture(scope="module")
def servers(workspace: Path) -> Iterator[Servers]:
    with two_servers(workspace) as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SERVER_CASES if case.name in ENDS], ids=lambda case: case.name)
def test_nothing_is_done_again(case: ServerCase, servers: Servers, workspace: Path) -> None:
    outcome = run_server_case(case, servers, workspace)
    assert re.search(case.says, outcome.log)
    assert outcome.codes == [ENDS[case.name].exit_code, 0], outcome.log
    assert outcome.resumed_from is not None
    assert outcome.resumed_from >= outcome.struck_at
    assert [row["step"] for row in rows(outcome.folder)] == list(range(1, STEPS + 1))
