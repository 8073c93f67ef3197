"""Four real servers: one is killed, one hangs, one answers garbage and one is slow, all in the same step."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fleet import PROMPTS, Fleet, Proxy, at_work, kill, served, stopped, wait_until
from server_support import API_KEY, model_config, server_config

from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.supervisor import Supervisor

TIMEOUT = 120.0
DELAY = 300.0
"""Seconds by which the slow server holds back each answer: more than a request may take."""
PROBE_TIMEOUT = 20.0
"""Four servers share two cores with whatever else runs there: a healthy one may be silent for a while."""


@dataclass
class Storm:
    """The fleet and what goes wrong in it: the servers 0 to 3 are killed, stopped, confused and slowed down."""

    fleet: Fleet
    garbage: Proxy
    slow: Proxy
    events: list[str]


@pytest.fixture(scope="module")
def storm(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    config = server_config(count=4, max_total_tokens=4096, restarts=3, restart_delay=0.1, hang_timeout=45.0)
    folder, events = tmp_path_factory.mktemp("storm"), list[str]()
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(ServerGroup(config, model_config(model_path), folder, API_KEY))
        garbage, slow = Proxy(group.urls[2]), Proxy(group.urls[3])
        urls = [*group.urls[:2], *(stack.enter_context(served(proxy.app)) for proxy in (garbage, slow))]
        supervisor = stack.enter_context(Supervisor(group, events.append))
        yield Storm(Fleet(group, supervisor, model_path, folder, urls, TIMEOUT, PROBE_TIMEOUT), garbage, slow, events)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_is_complete_and_the_same_when_all_goes_wrong_at_once(storm: Storm) -> None:
    fleet, servers = storm.fleet, storm.fleet.group.servers
    _, hung, garbage, slow = fleet.urls
    with fleet.trainer() as pool, stopped(servers[1]) as stop:
        calm = fleet.sample()
        pool.metrics()
        storm.garbage.garbage, storm.slow.delay = True, 2.0
        with at_work({servers[0].url: lambda: kill(servers[0]), servers[1].url: stop}):
            batch = fleet.sample()

        # every prompt has its responses, the same as without a fault, of the weights that the trainer has
        assert batch.tokens.tolist() == calm.tokens.tolist()
        assert batch.group_ids.bincount().tolist() == [4] * len(PROMPTS)
        assert batch.weight_versions.unique().tolist() == [fleet.version]
        assert fleet.serving() == {slow}, fleet.lines
        # on a busy machine the supervisor may have ended the hung one before the trainer's patience was over
        assert re.search(r"no answer within 20 s|\w+Error", pool[hung].reason)
        assert "2 failures in a row" in pool[garbage].reason
        counted = pool.metrics()
        assert (counted["servers/serving"], counted["servers/taken_out"]) == (1, 3)
        assert storm.garbage.wrong >= 2
        assert counted["rollout/retries"] >= 4, "two of nonsense, one of the killed server, one of the hung one"

        # the killed and the hung one are started again with old weights: none of them samples before it has the new
        wait_until(lambda: servers[0].ready() and any("hang_timeout" in line for line in storm.events))
        wait_until(servers[1].ready)
        assert fleet.sample().weight_versions.unique().tolist() == [fleet.version]
        assert fleet.serving() == {slow}
        storm.garbage.garbage = False
        fleet.update()
        assert fleet.sample().weight_versions.unique().tolist() == [fleet.version]
        assert pool.metrics()["servers/restarts"] == 2
        fleet.assert_serve_the_new_weights(set(fleet.urls))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slow_server_holds_up_one_step_at_most(storm: Storm) -> None:
    """Its answers come after the time that a request has: a step that waited for it would fail."""
    fleet, slow = storm.fleet, storm.fleet.urls[3]
    storm.garbage.garbage, storm.slow.delay = False, 0.0
    with fleet.trainer() as pool:
        calm = fleet.sample()
        storm.slow.delay = DELAY
        batch = fleet.sample()
        assert batch.tokens.tolist() == calm.tokens.tolist()
        assert batch.weight_versions.unique().tolist() == [fleet.version]
        counted = pool.metrics()
        # All requests are sent at once, so each server gets its share of 3; on a busy machine others may be late, too.
        assert counted["rollout/copies"] >= 3
        assert (counted["rollout/retries"], counted["servers/taken_out"]) == (0, 0)
        assert counted["servers/slowest"] > pool.speeds.ratio
        assert [line for line in fleet.lines if f"{slow} is slow" in line]

        # known to be slow, it has less than its share: one prompt at a time
        asked = storm.slow.asked
        assert fleet.sample().tokens.tolist() == calm.tokens.tolist()
        assert 1 <= storm.slow.asked - asked < 3
        assert pool.metrics()["rollout/copies"] >= 1

        # as fast as others again, it gets as much
        storm.slow.delay = 0.0
        wait_until(lambda: fleet.sample() and slow not in pool.name_slow())
        assert [line for line in fleet.lines if f"{slow} is not slow any more" in line]

        def gets_its_share() -> bool:  # in the end: any server may seem slow for a moment on a busy machine
            asked = storm.slow.asked
            fleet.sample()
            return storm.slow.asked - asked >= 4

        wait_until(gets_its_share)
