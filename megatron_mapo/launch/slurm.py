"""``megatron-mapo launch slurm``: write the batch script of a run, and submit it.

The script is one like those in ``scripts/slurm``: options of sbatch, settings, and a call into ``slurm_job.sh``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mapo.config import Config, data_parallel_size
from megatron_mapo.errors import ConfigError
from megatron_mapo.launch.local import make_log_folder
from megatron_mapo.launch.slurm_task import fit_node

FUNCTIONS = Path(__file__).with_name("slurm_job.sh")


@dataclass(frozen=True)
class SlurmJob:
    """What a run asks of Slurm.

    Attributes:
        nodes: all nodes of the job.
        server_nodes: how many of them only serve; 0: every node trains and serves.
        gpus_per_node: GPUs of a node; 0: none are asked for.
        trainers_per_node: trainer ranks of a node that trains; 0: one a GPU that servers leave.
        time: limit, as sbatch takes it.
        grace: seconds before the limit at which the run saves and goes back to the queue.
        restarts: how often crashed trainers are started again within the job.
        container: empty, ``pyxis:IMAGE`` or ``apptainer:IMAGE``.
        sbatch: further options of sbatch, such as ``--partition=gpu``.
    """

    nodes: int
    server_nodes: int
    gpus_per_node: int
    trainers_per_node: int
    time: str = "24:00:00"
    grace: int = 900
    restarts: int = 2
    container: str = ""
    sbatch: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """As ``MAPO_LAYOUT``."""
        return "disaggregated" if self.server_nodes else "colocated"

    def check(self, config: Config) -> None:
        """Refuse a job that cannot hold the run.

        Raises:
            ConfigError: names the option or key to change.
        """
        if self.server_nodes >= self.nodes:
            raise ConfigError(
                f"--server-nodes {self.server_nodes} of --nodes {self.nodes} leaves none for trainers "
                "(--server-nodes 0: every node trains and serves)"
            )
        trainers = fit_node(config, self.gpus_per_node, self.layout, self.trainers_per_node)
        data_parallel_size(config, (self.nodes - self.server_nodes) * trainers)

    def options(self, config: Config) -> list[str]:
        """Options of sbatch."""
        gpus = [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        folder = str(config.run_dir.absolute()).replace("%", "%%")  # of its patterns, only %j is meant
        return [
            f"--job-name={config.run.name}",
            f"--nodes={self.nodes}",
            *gpus,
            "--ntasks-per-node=1",
            "--exclusive",
            f"--time={self.time}",
            f"--signal=B:USR1@{self.grace}",
            "--requeue",
            "--open-mode=append",
            f"--output={folder}/logs/slurm-%j.out",
            *self.sbatch,
        ]


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a script: not as a shell would, backslashes count inside all quotes."""
    name, equals, value = option.partition("=")
    if not equals or not re.search(r"""[\s"'#\\]""", value):
        return option
    return f"{name}=" + '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def render(job: SlurmJob, config_path: str | None, overrides: Sequence[str], config: Config) -> str:
    """The batch script of a run.

    Args:
        job: what to ask for.
        config_path: YAML file of the run.
        overrides: ``section.key=value``.
        config: what those two say.
    """
    settings = {
        "MAPO_WORKDIR": str(Path.cwd()),
        "MAPO_CONFIG": str(Path(config_path).absolute()) if config_path else "",
        "MAPO_LAYOUT": job.layout,
        "MAPO_SERVER_NODES": str(job.server_nodes),
        "MAPO_TRAINERS_PER_NODE": str(job.trainers_per_node or ""),
        "MAPO_RESTARTS": str(job.restarts),
        "MAPO_CONTAINER": job.container,
        # What is in a container has paths of its own.
        "MAPO_TRAIN_PYTHON": "python3" if job.container else sys.executable,
    }
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Written by `megatron-mapo launch slurm`. It goes on from the last checkpoint of {config.run_dir}.",
            *(f"#SBATCH {_quoted(option)}" for option in job.options(config)),
            "",
            *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
            "",
            f"source {shlex.quote(str(FUNCTIONS))} || exit 2",
            shlex.join(["mapo_run", *overrides]),
            "",
        ]
    )


def submit(script: str, config: Config) -> str:
    """Keep the script in the run folder, for its owner alone since it holds all overrides, and hand it to sbatch.

    Returns:
        the job's number.

    Raises:
        ConfigError: there is no sbatch, or it refused the script.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch on this machine; --dry-run shows the script")
    path = make_log_folder(config) / "slurm_job.sh"
    path.touch(0o600)
    path.chmod(0o600)
    path.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
