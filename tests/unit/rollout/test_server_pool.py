"""The states of servers, and the file that names them."""

from __future__ import annotations

import pytest

from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout import pool as pool_module
from megatron_mapo.rollout.pool import ServerPool, State, read_urls_file

A, B, C = "http://a:1", "http://b:1", "http://c:1"


def test_requests_go_to_the_server_with_the_least_to_do_that_did_not_fail_them() -> None:
    pool = ServerPool([A, B, C])
    pool[A].load, pool[B].load, pool[C].load = 8, 4, 16
    assert pool.pick() == B
    assert pool.pick([B]) == A
    assert pool.pick([A, B]) == C
    assert pool.pick([A, A, B, C]) == B


def test_a_suspect_gets_no_requests_until_it_is_cleared() -> None:
    pool = ServerPool([A, B])
    assert pool.failed(A, "reset")
    assert not pool.failed(A, "reset again"), "one caller asks it, not all"
    assert (pool[A].state, pool.pick([B])) == (State.suspect, B)
    pool.clear(A)
    assert pool.pick([B]) == A


def test_failures_in_a_row_take_a_server_out_and_good_answers_between_do_not() -> None:
    pool = ServerPool([A], max_failures=2)
    for _ in range(3):
        pool.failed(A, "x")
        pool.clear(A)
        pool.succeeded(A)
    assert pool[A].state is State.serving
    pool.failed(A, "x")
    pool.failed(A, "y")
    assert (pool[A].state, pool.pick()) == (State.out, None)
    pool.clear(A)
    assert pool[A].state is State.out, "only an update brings it back"
    pool.admit(A, 7)
    assert (pool.pick(), pool.version) == (A, 7)


def test_versions_that_may_sample() -> None:
    pool = ServerPool([A], max_staleness=1)
    assert pool.expects(-1)
    assert pool.expects(50)
    pool.admit(A, 7)
    assert [v for v in range(-1, 10) if pool.expects(v)] == [6, 7]


def test_one_that_fails_again_and_again_is_left_alone_for_longer_and_longer(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now)
    pool = ServerPool([A, B])
    waits = []
    for _ in range(9):
        pool.take_out(A, "no answer")
        start = now
        while A not in pool.candidates():
            now += 1.0
        waits.append(now - start)
        pool.admit(A, 1)
    assert waits == [0, 5, 10, 20, 40, 80, 160, 300, 300]
    pool.succeeded(A)
    pool.take_out(A, "no answer")
    assert pool.candidates() == [A, B]


def test_one_that_keeps_updates_waiting_is_left_alone_and_one_that_refuses_at_once_is_not(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now)
    pool = ServerPool([A, B, C])
    for url, waited in ((A, 30.0), (B, 0.01)):
        pool.take_out(url, "no answer", waited)
        assert url in pool.candidates(), "it may have been started again"
        pool.take_out(url, "still none", waited)
    assert pool.candidates() == [B, C]
    now += 5.0
    assert pool.candidates() == [A, B, C]
    pool.take_out(A, "still none", 30.0)
    now += 5.0
    assert pool.candidates() == [B, C]
    assert pool.metrics()["servers/taken_out"] == 2


def test_members_join_without_weights_and_leave() -> None:
    lines: list[str] = []
    pool = ServerPool([A, B], log=lines.append)
    pool.set_members([f"{B}/", C])
    assert pool.urls == [B, C]
    assert pool.in_state(State.serving) == [B]
    assert pool.candidates() == [B, C]
    assert lines == [f"server {A} leaves", f"server {C} joins; it gets the weights before it serves"]
    # what is still under way there does no harm
    pool.succeeded(A)
    pool.take_out(A, "gone")
    assert not pool.failed(A, "gone")


def test_every_change_is_told_once_and_counted() -> None:
    lines: list[str] = []
    pool = ServerPool([A, B], log=lines.append)
    pool.failed(A, "reset")
    pool.take_out(A, "no answer")
    pool.take_out(A, "still none")
    pool.restarted(A)
    pool.admit(A, 1)
    assert [line.split(f"server {A} ")[1].split(";")[0] for line in lines] == [
        *("is suspect: reset", "is out: no answer", "was restarted", "is serving")
    ]
    pool.copied()
    now = {"servers/total": 2, "servers/serving": 2, "servers/slowest": 1}
    counts = {"servers/taken_out": 1, "servers/restarts": 1, "rollout/retries": 1, "rollout/copies": 1}
    assert pool.metrics() == now | counts
    assert pool.metrics() == now | dict.fromkeys(counts, 0)


def test_a_file_of_servers(tmp_path) -> None:
    file = tmp_path / "servers"
    file.write_text(f"# our machines\n{A}\n\n  {B}  # the new one\n")
    assert read_urls_file(file) == [A, B]
    file.write_text("here:30000\n")
    with pytest.raises(RolloutError, match=r"rollout\.urls_file=.*'here:30000'"):
        read_urls_file(file)
    file.write_text("http://me:hunter2@a:1\n")
    with pytest.raises(RolloutError, match=r"rollout\.urls_file=.*user or password") as refused:
        read_urls_file(file)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(RolloutError, match=r"rollout\.urls_file=.*No such file"):
        read_urls_file(tmp_path / "nowhere")
