"""What a run asks of a Ray cluster, and what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from megatron_mapo.config import Config, load_config
from megatron_mapo.errors import ConfigError
from megatron_mapo.launch import ray
from megatron_mapo.launch.ray import RayJob
from megatron_mapo.launch.ray_cluster import Resources

NODE = {"CPU": 16.0, "GPU": 8.0}


def config(folder: Path, *overrides: str) -> Config:
    model = folder / "model"
    if not model.exists():
        make_tiny_model(model)
    base = [f"model.path={model}", "data.train=reasoning_gym:leg_counting", f"run.output_dir={folder / 'runs'}"]
    return load_config(None, [*base, *overrides])


def test_ranks_of_a_node_share_a_bundle_and_servers_have_their_own(tmp_path: Path) -> None:
    job = RayJob(processes=8, trainer_nodes=2, cpus_per_server=2.0)
    settings = config(tmp_path, "rollout.server.count=3", "rollout.server.tensor=2")
    trainers, servers = job.bundles(settings, gpus=True)
    assert trainers == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert servers == [{"CPU": 2.0, "GPU": 2.0}] * 3
    assert job.bundles(settings, gpus=False) == ([{"CPU": 4.0}] * 2, [{"CPU": 2.0}] * 3)
    assert job.bundles(config(tmp_path, "rollout.urls=[http://gpu:30000]"), gpus=True)[1] == []


@pytest.mark.parametrize(
    ("job", "nodes", "fits"),
    [
        (RayJob(4), [NODE], True),
        (RayJob(8), [NODE], False),  # no GPU is left for the server
        (RayJob(8), [NODE, NODE], True),
        (RayJob(10), [NODE, NODE], False),  # the ranks of a bundle are on one node
        (RayJob(10, trainer_nodes=2), [NODE, NODE], True),
        (RayJob(8, placement="STRICT_PACK"), [NODE, NODE], False),
        (RayJob(7, placement="STRICT_PACK"), [NODE, NODE], True),
        (RayJob(4, trainer_nodes=2, placement="STRICT_SPREAD"), [NODE, NODE], False),
        (RayJob(4, placement="STRICT_SPREAD"), [NODE, NODE], True),
        (RayJob(2), [{"CPU": 2.0}], False),
        (RayJob(2, cpus_per_trainer=0.5), [{"CPU": 2.0}], True),
        (RayJob(2), [{"memory": 1e9}, {"CPU": 4.0}], True),
    ],
)
def test_a_run_that_no_idle_cluster_could_hold_is_refused(
    job: RayJob, nodes: list[Resources], fits: bool, tmp_path: Path
) -> None:
    settings = config(tmp_path)
    if fits:
        ray.check_room(job, settings, nodes)
        return
    with pytest.raises(ConfigError, match=r"--nproc, --trainer-nodes.*rollout\.server\.count, rollout\.server\.tensor"):
        ray.check_room(job, settings, nodes)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (RayJob(3, trainer_nodes=2), "--trainer-nodes 2 does not divide --nproc 3"),
        (RayJob(3), "does not divide the 3 ranks"),
        (RayJob(2, variables=("NO_SUCH_VARIABLE",)), "--env NO_SUCH_VARIABLE"),
    ],
)
def test_a_job_that_contradicts_itself_is_refused(job: RayJob, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        job.check(config(tmp_path, "actor.parallel.tensor=2"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "must be HOST:PORT"),
        ("head", "must be HOST:PORT"),
        ("127.0.0.1:9", "no Ray cluster answers there"),
    ],
)
def test_an_address_without_a_cluster_is_an_error_at_once(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ray.launch(RayJob(1, address=address), None, [], config(tmp_path))


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-mapo\[ray\]'"):
        ray.launch(RayJob(1), None, [], config(tmp_path))


def test_the_plan_of_a_new_cluster_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(ray, "this_machine", lambda: [NODE])
    rows = dict(row for row in ray.plan_rows(RayJob(4), config(tmp_path)) if row[0])
    assert rows["Ray cluster"] == "one that is started on this machine: 1 node(s) with CPU 16, GPU 8"
    assert rows["bundles"] == "1 x CPU 4, GPU 4: 4 trainer rank(s) each"
