"""A real Slurm of several nodes on this machine: munged, slurmctld and one slurmd a node, with faults to inject.

Each node, and the controller, is one set of PID, mount and UTS namespaces: a hostname, an /etc/hosts, a /proc and a
/dev/shm of its own. All else of the file system is shared, as a cluster's home directories are. The nodes share the
loopback; each has a 127.x address. Ending a node's first process ends everything that runs in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "setpriv")
CONTROLLER = "ctl"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# bash, as it reaps what is orphaned inside.
HOLDER = """
mount -t proc proc /proc && hostname "$1" && mount --bind "$2" /etc/hosts || exit 1
mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 1
touch "$3"
trap : HUP INT TERM
while :; do sleep 86400 & wait $!; done
"""

# Tight times, so that a dead node is noticed within a minute, and one that is only busy is not taken for dead.
# NoInAddrAny hangs srun: the nodes share the loopback.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=ctl({subnet}.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=30
TCPTimeout=2
MessageTimeout=5
InactiveLimit=0
GresTypes=gpu
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return lacking if os.geteuid() == 0 else [*lacking, "root"]


def wait_for(holds: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    """Wait until ``holds()`` is true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns/pid")
    except OSError:  # it has ended
        return ""


def words(process: Path, name: str = "cmdline") -> list[str]:
    """``cmdline`` or ``environ`` of a process; nothing if it has ended."""
    try:
        return (process / name).read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


class Cluster:
    """A running cluster with nodes ``n1``, ``n2``, ...; a context manager.

    Jobs of the partition ``urgent`` drive those of ``main``, the default, from their nodes. ``serve`` has but the last
    two nodes.

    Args:
        folder: for configuration, state and logs. Unix sockets live in it: its path must be short.
        nodes: number of nodes.
        gpus: number of GPUs that each node claims to have. They are copies of /dev/null.
        cpus: number of CPUs that each node claims to have.
    """

    def __init__(self, folder: Path, nodes: int, gpus: int = 8, cpus: int = 8) -> None:
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self._holders: dict[str, tuple[subprocess.Popen, str]] = {}
        self._write_files(gpus, cpus)

    def _write_files(self, gpus: int, cpus: int) -> None:
        number = int.from_bytes(os.urandom(2), "big")
        # Another subnet and other ports for each cluster; the ports are below the ephemeral ones.
        subnet, port = f"127.{64 + number % 128}.{number // 128 % 250}", 10000 + number % 200 * 100
        for name in ("state", "spool", "gpu"):
            (self.folder / name).mkdir(parents=True)
        for i in range(gpus):
            os.mknod(self.folder / f"gpu/gpu{i}", 0o20666, os.makedev(1, 3))
        hosts, lines = f"127.0.0.1 localhost\n{subnet}.1 {CONTROLLER}\n", ""
        for i, node in enumerate(self.nodes):
            hosts += f"{subnet}.{10 + i} {node}\n"
            lines += (
                f"NodeName={node} NodeAddr={subnet}.{10 + i} Port={port + 1 + i} CPUs={cpus} RealMemory=16000 "
                f"Gres=gpu:{gpus} State=UNKNOWN\n"
            )
        settings = CONFIGURATION.format(folder=self.folder, subnet=subnet, port=port)
        limits = "Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP"
        partitions = (
            f"PartitionName=main Default=YES PriorityTier=1 GraceTime=60 {limits}\n"
            f"PartitionName=urgent PriorityTier=2 {limits}\n"
            f"PartitionName=serve PriorityTier=1 {limits.replace('ALL', ','.join(self.nodes[-2:]))}\n"
        )
        (self.folder / "hosts").write_text(hosts)
        (self.folder / "slurm.conf").write_text(settings + lines + partitions)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu/gpu[0-{gpus - 1}]\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    # ------------------------------------------------------------------------------------------ up, down, faults

    def __enter__(self) -> Cluster:
        try:
            self._hold(CONTROLLER)
            files = {name: f"{self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")}
            options = [f"--{name}-file={path}" for name, path in files.items()]
            self._inside(CONTROLLER, "munged", f"--socket={self.folder}/munge.sock", *options)
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self.idle() == len(self.nodes), "all nodes idle", 60)
        except BaseException as error:
            self.down()
            error.add_note(self.last_words())
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def last_words(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def down(self) -> None:
        """End everything."""
        for node in list(self._holders):
            self.kill_node(node)

    def _hold(self, node: str) -> None:
        up = self.folder / f"{node}.up"
        up.unlink(missing_ok=True)
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL"]
        script = ["bash", "-c", HOLDER, "holder", node, str(self.folder / "hosts"), str(up)]
        # The nodes also end when the tests are killed.
        process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *namespaces, *script], start_new_session=True)
        wait_for(lambda: up.exists() or process.poll() is not None, f"namespaces of {node}", 10)
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        self._holders[node] = (process, first)

    def _inside(self, node: str, *command: str) -> None:
        """Run a command in a node, with a clean environment."""
        clean = ["env", "-i", f"PATH={SYSTEM_PATH}", "HOME=/root", "LANG=C.UTF-8"]
        enter = ["nsenter", "-t", self._holders[node][1], "-m", "-u", "-p"]
        with open(self.folder / "start.log", "a") as log:
            subprocess.run([*enter, *clean, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)

    def start_node(self, node: str) -> None:
        """Power on."""
        self._hold(node)
        (self.folder / f"spool/{node}").mkdir(exist_ok=True)
        self._inside(node, "slurmd", "-f", f"{self.folder}/slurm.conf", "-N", node)

    def kill_node(self, node: str) -> None:
        """The node loses power: all that runs there is gone at once."""
        process, _ = self._holders.pop(node)
        process.kill()
        process.wait()

    def revive(self, node: str) -> None:
        """Power on a node that is off."""
        if node not in self._holders:
            self.start_node(node)

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._inside(CONTROLLER, "slurmctld", "-f", f"{self.folder}/slurm.conf")

    def stop_controller(self) -> None:
        """End slurmctld; it saves its state first."""
        pid = (self.folder / "slurmctld.pid").read_text().strip()
        self._inside(CONTROLLER, "kill", "-TERM", pid)
        wait_for(lambda: not self._runs(pid), "the controller ends", 20)

    def _runs(self, pid: str) -> bool:
        try:
            self._inside(CONTROLLER, "kill", "-0", pid)
        except subprocess.CalledProcessError:
            return False
        return True

    def processes(self, node: str) -> list[Path]:
        """``/proc`` folders of all processes of a node."""
        namespace = os.readlink(f"/proc/{self._holders[node][1]}/ns/pid")
        return [path for path in Path("/proc").glob("[0-9]*") if _namespace(path) == namespace]

    # ---------------------------------------------------------------------------------------------------- clients

    def client(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a client command such as ``squeue``; what it prints."""
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "MAPO_"))}
        env = {**keep, "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}", "SLURM_CONF": f"{self.folder}/slurm.conf"}
        env |= environment
        done = subprocess.run(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def idle(self) -> int:
        """Number of idle nodes; 0 while the controller does not answer."""
        try:
            return self.client("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").count("\n")
        except AssertionError:
            return 0

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.client("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text.split("\n\n")[0]))

    def state(self, number: str) -> str:
        """``JobState`` of a job."""
        return self.job(number)["JobState"]

    def wait_job(self, number: str, seconds: float = 400.0) -> str:
        """Wait until a job has ended for good; its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.state(number) in ended, f"the end of job {number}", seconds)
        return self.state(number)


@contextmanager
def slurm_cluster(nodes: int = 4) -> Iterator[Cluster]:
    """A cluster in a folder of its own: pytest's temporary folders have paths too long for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:
        Path(name).chmod(0o755)  # munged insists
        with Cluster(Path(name), nodes) as running:
            yield running
