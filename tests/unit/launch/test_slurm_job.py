"""The functions of ``slurm_job.sh``, with stand-ins for Slurm and for what the job starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_mapo.errors import HangError, Preempted, RolloutError
from megatron_mapo.launch.slurm import FUNCTIONS

# A job of one trainer and one server. What the trainers do is in TRAINERS; a test replaces further functions.
FAKES = r"""
source "$FUNCTIONS"
MAPO_TRAIN_PYTHON=python3 MAPO_SERVE_PYTHON=python3 MAPO_TRAINERS_PER_NODE=1 MAPO_LAYOUT=disaggregated
: "${MAPO_START_TIMEOUT:=60}"
UP='0: servers of n2\n0: rollout.urls=[http://n2:%s]\n'
mapo_settings() { :; }
mapo_nodes() { TRAINER_NODES=n1 SERVER_NODES=n2 TRAINER_GROUP=() SERVER_GROUP=(); }
mapo_check() { MAPO_LOGS=$PWD; }
mapo_start_servers() { sleep 60 & MAPO_SERVERS_PID=$!; }
mapo_wait_for_servers() { MAPO_URLS=http://n2:1; }
mapo_step() { exec bash -c "$TRAINERS"; }
mapo_answers() { true; }
mapo_nap() { sleep 0.1 & wait $!; }
mapo_give_up() { echo "back to the queue"; exit 75; }
"""


def bash(folder: Path, script: str, **environment: str) -> tuple[int, str]:
    """Run a script in a folder; its exit code, and what it and all that it has started print."""
    base = {"PATH": os.environ["PATH"], "FUNCTIONS": str(FUNCTIONS), "SLURM_JOB_ID": "7", "MAPO_RESTARTS": "0"}
    done = subprocess.run(
        ["bash", "-c", script],
        env=base | environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("code", "again"),
    [
        *((code, True) for code in (1, RolloutError.exit_code, 6, HangError.exit_code, 134, 137, 143)),
        *((code, False) for code in (2, 3, 4, 7, 8, 9, 13)),
    ],
)
def test_trainers_that_crash_hang_or_lose_a_server_are_started_again(code: int, again: bool, tmp_path: Path) -> None:
    ended, said = bash(tmp_path, FAKES + "mapo_run", TRAINERS=f"echo started; exit {code}", MAPO_RESTARTS="1")
    assert ended == code
    assert said.count("started\n") == 1 + again


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_signal_while_the_nodes_are_asked_is_not_lost(restarts: str, tmp_path: Path) -> None:
    script = FAKES + "mapo_answers() { kill -USR1 $$; }; mapo_run"
    code, said = bash(tmp_path, script, TRAINERS="echo started; exit 1", MAPO_RESTARTS=restarts)
    assert (code, said.count("started\n")) == (Preempted.exit_code, 1)
    assert "back to the queue" in said


def test_a_signal_when_the_servers_answer_starts_no_trainers(tmp_path: Path) -> None:
    code, said = bash(tmp_path, FAKES + "mapo_wait_for_servers() { kill -USR1 $$; }; mapo_run", TRAINERS="echo started")
    assert code == Preempted.exit_code
    assert "started\n" not in said
    script = FAKES.replace("mapo_wait_for_servers", "unused") + (
        'mapo_start_servers() { printf "$UP" 1 >servers.log; sleep 60 & MAPO_SERVERS_PID=$!\nkill -USR1 $$; }; mapo_run'
    )
    code, said = bash(tmp_path, script, TRAINERS="echo started")
    assert code == Preempted.exit_code
    assert "started\n" not in said


def test_a_signal_while_the_trainers_are_being_started_reaches_them(tmp_path: Path) -> None:
    say = 'mapo_say() { echo "$*"; case "$*" in "starting 1 trainer"*) kill -USR1 $$ ;; esac; }\n'
    trainers = "trap 'exit 75' USR1; for i in {1..600}; do sleep 0.1; done; echo undisturbed"
    code, said = bash(tmp_path, FAKES + say + "mapo_run", TRAINERS=trainers)
    assert code == Preempted.exit_code
    assert "SIGUSR1: asking" in said
    assert "undisturbed" not in said


def test_a_signal_while_the_configuration_is_read_is_not_its_error(tmp_path: Path) -> None:
    script = FAKES.replace("mapo_check", "unused").replace('exec bash -c "$TRAINERS"', "kill -TERM $$; exit 143")
    code, said = bash(tmp_path, script + "mapo_run", TRAINERS="")
    assert code == Preempted.exit_code
    assert "back to the queue" in said


REFUSES = r"""
source "$FUNCTIONS"
sleep() { command sleep 0.01; }
scontrol() {
  if [ "$1" = show ]; then echo "   JobState=RUNNING Reason=None"; return; fi
  echo requeue
  [ "$(wc -l <tries)" -ge "$REFUSALS" ] || { echo >>tries; return 1; }
}
: >tries
MAPO_BEGUN=1
mapo_give_up
"""


@pytest.mark.parametrize(("refusals", "outcome"), [(2, "requeued: the job goes on"), (99, "submit it again")])
def test_a_requeue_that_is_refused_for_good_ends_the_job(refusals: int, outcome: str, tmp_path: Path) -> None:
    code, said = bash(tmp_path, REFUSES, REFUSALS=str(refusals))
    assert code == Preempted.exit_code
    assert outcome in said
    assert said.count("requeue\n") == min(refusals + 1, 5)


SERVERS = FAKES.replace("mapo_start_servers", "unused").replace("mapo_wait_for_servers", "unused_too")

SLURM = r"""
mapo_check() { MAPO_LOGS=$PWD/logs/slurm-$MAPO_JOB.$SLURM_RESTART_COUNT; mkdir -p "$MAPO_LOGS"; }
scontrol() { if [ "$1" = show ]; then echo "   JobState=RUNNING Reason=None"; else echo "put back: $2"; fi; }
sleep() { command sleep 0.01; }
"""
BACK_IN_THE_QUEUE = FAKES.replace("mapo_give_up", "unused") + SLURM


def test_a_task_of_an_array_goes_back_alone(tmp_path: Path) -> None:
    """One task's SLURM_JOB_ID is that of the array, and names all of its tasks."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "0"}
    code, said = bash(tmp_path, BACK_IN_THE_QUEUE + "mapo_run", TRAINERS="exit 75", **array)
    assert code == Preempted.exit_code
    assert "put back: 7_2\n" in said


def starts(folder: Path, script: str, *counts: int, **environment: str) -> list[tuple[int, bool]]:
    """Exit codes of starts of one job, and whether each has put it back into the queue."""
    found = []
    for count in counts:
        code, said = bash(folder, BACK_IN_THE_QUEUE + script, SLURM_RESTART_COUNT=str(count), **environment)
        found.append((code, "put back: 7\n" in said))
    return found


def test_nodes_that_never_answer_end_the_job_unless_there_is_a_new_checkpoint(tmp_path: Path) -> None:
    latest = tmp_path / "checkpoints/latest"
    latest.parent.mkdir()
    script, trainers = (
        "mapo_answers() { false; }; mapo_nap() { :; }; mapo_run",
        'echo "$STEP" >checkpoints/latest; exit 137',
    )
    again, failed = (Preempted.exit_code, True), (137, False)
    assert starts(tmp_path, script, 0, TRAINERS=trainers, STEP="step_1") == [again]
    assert starts(tmp_path, script, 1, TRAINERS=trainers, STEP="step_2") == [again]
    assert starts(tmp_path, script, 2, TRAINERS=trainers, STEP="step_2") == [failed]


def test_nodes_are_asked_outside_the_container(tmp_path: Path) -> None:
    """Its image may take longer than the answer of a node."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "$*" >>calls\n')
    (tmp_path / "srun").chmod(0o755)
    script = 'source "$FUNCTIONS"; mapo_answers "n1 n2" --het-group=0 && echo "$MAPO_CONTAINER"'
    environment = {"MAPO_CONTAINER": "pyxis:mapo", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert bash(tmp_path, script, **environment) == (0, "pyxis:mapo\n")
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith(" true")
    assert "--nodelist=n1,n2" in call
    assert "mapo" not in call


CHECK = BACK_IN_THE_QUEUE.replace("mapo_check", "unused")


def test_a_signal_ends_a_configuration_that_is_not_read(tmp_path: Path) -> None:
    step = "mapo_step() { kill -USR1 $$; exec sleep 600; }\nmapo_run"
    first = bash(tmp_path, CHECK + step, SLURM_RESTART_COUNT="0")
    assert first[0] == Preempted.exit_code
    assert "put back: 7\n" in first[1]
    code, said = bash(tmp_path, CHECK + step, SLURM_RESTART_COUNT="1")
    assert code == 1
    assert "--time must be longer" in said


def test_a_node_that_hangs_before_it_reads_the_configuration_is_named(tmp_path: Path) -> None:
    step = "mapo_step() { exec sleep 600; }\nmapo_run"
    for count, code in ((0, Preempted.exit_code), (1, 1)):
        environment = {"SLURM_RESTART_COUNT": str(count), "MAPO_START_TIMEOUT": "1"}
        ended, said = bash(tmp_path, CHECK + step, **environment)
        assert ended == code
        assert "n1 has not read the configuration within MAPO_START_TIMEOUT=1 s" in said
        assert ("put back" in said) == (count == 0)


def test_a_node_whose_servers_never_answer_is_named(tmp_path: Path) -> None:
    """The job goes back to the queue once. The tasks of the step are in no special order."""
    step = r"""
mapo_nodes() { TRAINER_NODES=n1 SERVER_NODES="n2 n3 n4" TRAINER_GROUP=() SERVER_GROUP=(); }
mapo_step() {
  printf '2: servers of n2\n1: servers of n3\n2: rollout.urls=[http://n2:1]\n1: rollout.urls=[http'
  exec sleep 600
}
mapo_run
"""
    script = SERVERS.replace("mapo_give_up", "unused_as_well") + SLURM + step
    for count, code in ((0, Preempted.exit_code), (1, RolloutError.exit_code)):
        environment = {"SLURM_RESTART_COUNT": str(count), "MAPO_START_TIMEOUT": "1"}
        ended, said = bash(tmp_path, script, **environment)
        assert ended == code, said
        assert "the servers of n3 n4 did not answer within MAPO_START_TIMEOUT=1 s" in said
        assert ("put back" in said) == (count == 0)


@pytest.mark.parametrize("key", ["of-the-user", ""])
def test_a_key_that_is_given_is_kept(key: str, tmp_path: Path) -> None:
    """Servers of others ask for theirs; the job's own get a new one."""
    code, said = bash(tmp_path, 'source "$FUNCTIONS"; mapo_settings; env', MAPO_API_KEY=key, MAPO_REPO=str(tmp_path))
    (found,) = [line.partition("=")[2] for line in said.splitlines() if line.startswith("MAPO_API_KEY=")]
    assert code == 0
    assert found == key or (not key and len(found) == 48)


def test_a_job_of_one_command_hides_secrets(tmp_path: Path) -> None:
    fakes = "mapo_settings() { MAPO_TRAIN_PYTHON=python3; }\nmapo_nodes() { MAPO_NODES=n1; }\nmapo_step() { :; }\n"
    script = f'source "$FUNCTIONS"\n{fakes}mapo_command eval --model m reward.options.api_key=hunter2'
    code, said = bash(tmp_path, script)
    assert code == 0
    assert said.endswith("job 7 on n1: megatron-mapo eval --model m reward.options.api_key=***\n")


SETTINGS = 'source "$FUNCTIONS"; mapo_settings; echo "$MAPO_TRAIN_PYTHON $MAPO_SERVE_PYTHON"'


def test_a_container_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    """The checkout's is used where the nodes themselves run the job."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    assert bash(tmp_path, SETTINGS, MAPO_REPO=str(tmp_path)) == (0, f"{python} {python}\n")
    for container in ("apptainer:/images/mapo.sif", "pyxis:mapo"):
        inside = {"MAPO_REPO": str(tmp_path), "MAPO_CONTAINER": container}
        assert bash(tmp_path, SETTINGS, **inside) == (0, "python3 python3\n")
        assert bash(tmp_path, SETTINGS, **inside, MAPO_TRAIN_PYTHON="/opt/py") == (0, "/opt/py /opt/py\n")


def test_servers_that_are_started_again_go_on_in_the_same_log(tmp_path: Path) -> None:
    """And their addresses are those of the second start."""
    step = r"""
mapo_step() {
  case "$*" in
    *" serve "*)
      [ -e again ] && port=2 || port=1
      printf "$UP" "$port"
      until [ -e trained ]; do sleep 0.1; done
      [ -e again ] && exec sleep 60
      touch gone; exit 5
      ;;
    *)
      echo "trainers of ${*: -1}"
      [ -e again ] && exit 0
      touch trained
      until [ -e gone ]; do sleep 0.1; done
      sleep 1; touch again; exit 5
      ;;
  esac
}
mapo_run
"""
    code, said = bash(tmp_path, SERVERS + step, MAPO_RESTARTS="1")
    assert code == 0, said
    urls = ["rollout.urls=[http://n2:1]", "rollout.urls=[http://n2:2]"]
    assert (tmp_path / "servers.log").read_text().splitlines()[1::2] == [f"0: {url}" for url in urls]
    assert [line.removeprefix("trainers of ") for line in said.splitlines() if line.startswith("trainers of")] == urls


def test_a_node_whose_servers_do_not_come_up_ends_the_start(tmp_path: Path) -> None:
    """Of two; once all are up, one goes on without the other."""
    step = r"""
mapo_step() {
  echo "$*" >arguments
  printf "$UP" 1
  echo "srun: error: n3: task 1: Exited with exit code 5"
  exec sleep 60
}
mapo_nodes() { TRAINER_NODES=n1 SERVER_NODES="n2 n3" TRAINER_GROUP=() SERVER_GROUP=(); }
mapo_run
"""
    code, said = bash(tmp_path, SERVERS + step)
    assert code == RolloutError.exit_code
    assert "the servers did not come up" in said
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set((tmp_path / "arguments").read_text().split())


def test_trainers_without_servers_end_by_themselves(tmp_path: Path) -> None:
    """They save first; then both are started again."""
    fakes = r"""
mapo_say() { echo "$*"; echo "$*" >>said; }
mapo_start_servers() { echo "servers start"; sleep 0.5 & MAPO_SERVERS_PID=$!; }
mapo_run
"""
    trainers = (
        "trap 'echo ended; exit 9' TERM; until grep -q 'servers ended' said; do sleep 0.1; done; sleep 1; echo saved; "
        "[ -e again ] && exit 0; touch again; exit 5"
    )
    (tmp_path / "servers.log").touch()
    code, said = bash(tmp_path, FAKES + fakes, TRAINERS=trainers, MAPO_RESTARTS="1")
    assert code == 0, said
    assert "waiting for the trainers to save and end" in said
    assert [said.count(word) for word in ("servers start", "saved\n", "ended\n")] == [2, 2, 0]


def test_the_last_words_are_in_the_log_when_the_script_ends(tmp_path: Path) -> None:
    """Slurm ends what a script leaves behind; this tee writes all at the end."""
    stub = tmp_path / "tee"
    stub.write_text('#!/bin/bash\nall=$(cat); sleep 1; echo "$all" >>"$2"\n')
    stub.chmod(0o755)
    check = 'mapo_step() { case "$*" in *check*) echo "1 $PWD" ;; *) exit 0 ;; esac; }\nmapo_run'
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FUNCTIONS": str(FUNCTIONS), "SLURM_JOB_ID": "7"}
    script = ["bash", "-c", FAKES.replace("mapo_check", "unused") + check]
    with (tmp_path / "out").open("w") as out:
        code = subprocess.run(script, env=environment, cwd=tmp_path, stdout=out, stderr=out, timeout=120).returncode
    said = (tmp_path / "logs/slurm-7.0/job.log").read_text()
    assert code == 0
    assert said.splitlines()[-1].endswith(" done")
