"""A real Slurm of several hosts on this one machine, for the tests.

A host is a process that holds its own network, UTS and mount namespace; a bridge joins the hosts
to this machine, which runs slurmctld and a private munged. The machine's own files stay untouched:
each host sees an /etc/hosts of its own, and every interface carries the tag of its cluster.
"""

import atexit
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"})
MARKER = "TRAINSTACK_TEST_CLUSTER"
FREEZER = Path("/sys/fs/cgroup/freezer")
COMMANDS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter", "setpriv")
DAEMON_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

# cred_expire: with the default of 120 s a requeued job waits 121 s, and 5 s is too short to start.
# CR_Core: memory is checked but not consumed, so that a job without --mem does not fill its host.
SLURM_CONF = """\
ClusterName=trainstack
SlurmctldHost={machine}({address})
SlurmUser=root
SlurmctldPort={port}
AuthInfo=socket={runtime}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={runtime}/%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
MpiDefault=none
TaskPlugin={task_plugin}
ProctrackType=proctrack/{proctrack}
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=86400
SlurmdTimeout=10
SlurmdParameters=config_overrides
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=short Nodes=ALL MaxTime=60 MaxNodes=2
{more}
"""
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
"""


def missing_requirements(proctrack: str = "linuxproc") -> list[str]:
    """What this machine lacks to run a `SlurmCluster`, one readable reason each; [] if nothing."""
    missing = [f"command not found: {name}" for name in COMMANDS if not shutil.which(name)]
    if os.geteuid() != 0:
        missing.append("not root")
    if proctrack == "cgroup" and not (FREEZER / "release_agent").exists():
        missing.append(f"no cgroup v1 freezer at {FREEZER}")
    if not missing:
        probe = "mount -n --bind /etc/hosts /etc/hosts && ip link add probe type bridge"
        probe += " && ip link add probe0 type veth peer name probe1"
        argv = ["unshare", "--net", "--uts", "--mount", "sh", "-c", probe]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode != 0:
            missing.append(f"namespaces are not permitted: {done.stderr.strip()}")
    return missing


class SlurmCluster:
    """Slurm with fake GPUs, a partition `main` and a preemptable one `low`, up inside `with`.

    Jobs run as root on this machine's files and cannot reach the Internet; `address` is this
    machine as the hosts see it. Configuration and logs stay in `folder` after the end. Under
    "cgroup" no two clusters may have a host name in common at the same time.
    """

    def __init__(
        self,
        folder: Path,
        hosts: tuple[str, ...] = ("node1", "node2", "node3"),
        gpus_per_host: int = 2,
        cpus_per_host: int = 8,
        proctrack: Literal["linuxproc", "cgroup"] = "linuxproc",
        task_plugin: str = "task/none",
        more: str = "",
    ) -> None:
        self.folder = Path(folder).resolve()
        self.hosts = tuple(hosts)
        self.gpus_per_host = gpus_per_host
        self.cpus_per_host = cpus_per_host
        self.proctrack = proctrack
        self.task_plugin = task_plugin
        self.more = more  # lines for slurm.conf
        # An interface name has at most 15 characters, and h1 to h99 comes after this.
        self.tag = f"ts{os.getpid():06x}{secrets.token_hex(2)}"
        self.address = ""
        self._conf = self.folder / "slurm.conf"
        self._runtime = Path()
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> "SlurmCluster":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring everything up and return when all hosts are idle.

        Raises TimeoutError with the ends of the logs; nothing is left running then.
        """
        self._remove_cgroups()
        self._undo.callback(self._remove_cgroups)
        atexit.register(self.stop)
        try:
            self._make_folders()
            self._make_bridge()
            self._write_configuration()
            self._start_munged()
            self._controller = self._launch("slurmctld", "slurmctld", "-cDf", str(self._conf))
            for number, host in enumerate(self.hosts, start=1):
                self._make_host(host, number)
                self.start_slurmd(host)
            self._until(self._is_idle, 30, "not all hosts became idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill and remove everything that `start` made, except `folder`; may be called twice."""
        atexit.unregister(self.stop)
        self._undo.close()

    def env(self) -> dict[str, str]:
        """The environment additions with which Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self._conf)}

    def run(
        self,
        *argv: str | Path,
        env: dict[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command on this machine; `env` is added to the caller's environment.

        Raises RuntimeError with the command's output if `check` and it failed.
        """
        done = subprocess.run(
            [str(word) for word in argv],
            env={**os.environ, **self.env(), **(env or {})},
            timeout=timeout,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            command = " ".join(done.args)
            raise RuntimeError(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def job(self, job_id: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`, also after the job's end; not for job arrays."""
        fields: dict[str, str] = {}
        for line in self.run("scontrol", "show", "job", str(job_id)).stdout.splitlines():
            # These hold what the user likes, and have a line for themselves.
            if free := re.match(r" +(Command|WorkDir|Std(?:Err|In|Out)|Comment)=(.*)", line):
                fields[free[1]] = free[2]
            else:
                fields.update(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", line))
        return fields

    def job_state(self, job_id: int | str) -> str:
        """The job's state, such as PENDING, RUNNING, COMPLETING, COMPLETED or FAILED."""
        return self.job(job_id)["JobState"]

    def wait(
        self, job_id: int | str, states: Collection[str] = FINAL_STATES, timeout: float = 120
    ) -> str:
        """Wait until the job is in one of `states` and return which.

        Raises TimeoutError with the ends of the logs.
        """
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline:
                is_now = f"job {job_id} is {job['JobState']}, Reason={job['Reason']}"
                wanted = " or ".join(sorted(states))
                raise TimeoutError(f"{is_now}, not {wanted} in {timeout} s\n{self.log_tails()}")
            time.sleep(0.1)
        return job["JobState"]

    def enter(self, host: str) -> list[str]:
        """The command prefix that runs a command inside a host, outside of any job."""
        target = str(self._holders[host].pid)
        return ["nsenter", "--target", target, "--net", "--uts", "--mount"]

    def start_slurmd(self, host: str) -> None:
        """Start a host's slurmd; after `crash` this brings the host back."""
        slurmd = ["slurmd", "-D", "-N", host, "-f", str(self._conf)]
        self._launch(f"slurmd.{host}", *self.enter(host), *slurmd)

    def crash(self, host: str) -> None:
        """Kill all that runs on a host, as a power cut does; Slurm notices some 30 s later."""
        for state in FREEZER.glob(f"slurm_{host}/**/freezer.state"):
            state.write_text("THAWED")  # a frozen process does not die
        deadline = time.monotonic() + 20
        while pids := self._inhabitants(host):  # again, for the killed may have forked before
            assert time.monotonic() < deadline, f"alive on {host} 20 s after SIGKILL: {pids}"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self, host: str, seconds: float) -> None:
        """Take a host off the network for a while."""
        veth = f"{self.tag}h{self.hosts.index(host) + 1}"
        self.run("ip", "link", "set", veth, "down")
        time.sleep(seconds)
        self.run("ip", "link", "set", veth, "up")

    @contextmanager
    def names_on(self, host: str, change: Callable[[str], str]) -> Iterator[None]:
        """Let a host see another /etc/hosts for a while: ``change`` of the one that all see."""
        path = self.folder / f"hosts.{host}"
        path.write_text(change((self.folder / "hosts").read_text()))
        self.run(*self.enter(host), "mount", "-n", "--bind", path, "/etc/hosts")
        try:
            yield
        finally:
            self.run(*self.enter(host), "umount", "-n", "/etc/hosts")

    def restart_controller(self) -> None:
        """Kill slurmctld and start it again on the state that it saved."""
        os.kill(self._controller.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self._controller.pid, os.WEXITED | os.WNOWAIT)  # `stop` reaps it
        self._controller = self._launch("slurmctld", "slurmctld", "-Df", str(self._conf))
        answers = ["scontrol", "ping"]
        self._until(lambda: "UP" in self.run(*answers, check=False).stdout, 30, "no slurmctld")

    def log_tails(self, lines: int = 25) -> str:
        """The last lines of every daemon's log, each under its file's name."""
        # Slurm repeats its log on its output; munged has no other log.
        paths = [*sorted(self.folder.glob("*.out")), *sorted(self.folder.glob("*.log"))]
        texts = {path.stem: path.read_text(errors="replace").splitlines() for path in paths}
        return "\n".join("\n".join([f"--- {n}", *text[-lines:]]) for n, text in texts.items())

    def _make_folders(self) -> None:
        # Slurm and munge keep sockets here. The path of a socket must be shorter than 108 bytes,
        # and paths in pytest's folders may be longer. munged insists that others can enter.
        self._runtime = Path(tempfile.mkdtemp(prefix=f"{self.tag}-", dir="/run"))
        self._undo.callback(shutil.rmtree, self._runtime)
        self._runtime.chmod(0o711)
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        for number in range(self.gpus_per_host):
            device = self.folder / f"nvidia{number}"
            device.unlink(missing_ok=True)
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # another /dev/null

    def _make_bridge(self) -> None:
        """Make the bridge, on the first of 10.77.0.0/24, 10.77.1.0/24, ... that is not in use."""
        bridge = f"{self.tag}br"
        lock = os.open("/run", os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs must not choose the same network
            routes = self.run("ip", "-4", "route", "show", "table", "all").stdout
            number = next(n for n in range(256) if f"10.77.{n}." not in routes)
            self.address = f"10.77.{number}.1"
            self.run("ip", "link", "add", bridge, "type", "bridge")
            self._undo.callback(self.run, "ip", "link", "delete", bridge)
            self.run("ip", "address", "add", f"{self.address}/24", "dev", bridge)
            self.run("ip", "link", "set", bridge, "up")
        finally:
            os.close(lock)

    def _write_configuration(self) -> None:
        machine = socket.gethostname()
        addresses = {host: f"{self.address}{n}" for n, host in enumerate(self.hosts, start=1)}
        size = f"CPUs={self.cpus_per_host} RealMemory=64000"
        gpus = f"Gres=gpu:{self.gpus_per_host}" if self.gpus_per_host else ""
        gres_types = ["GresTypes=gpu"] if self.gpus_per_host else []
        nodes = [f"NodeName={h} NodeAddr={a} {size} {gpus}" for h, a in addresses.items()]
        devices = [f"Name=gpu File={self.folder}/nvidia{n}" for n in range(self.gpus_per_host)]
        names = {"localhost": "127.0.0.1", machine: self.address, **addresses}
        slurm_conf = SLURM_CONF.format(
            machine=machine,
            address=self.address,
            # slurmctld listens on all addresses, so that two clusters need two ports.
            port=16817 + int(self.address.split(".")[2]),
            folder=self.folder,
            runtime=self._runtime,
            proctrack=self.proctrack,
            task_plugin=self.task_plugin,
            more=self.more,
            nodes="\n".join([*gres_types, *nodes]),
        )
        self._conf.write_text(slurm_conf)
        (self.folder / "gres.conf").write_text("\n".join(devices))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        (self.folder / "hosts").write_text("".join(f"{a} {name}\n" for name, a in names.items()))

    def _start_munged(self) -> None:
        key = self._runtime / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        socket_path = self._runtime / "munge.socket"
        options = [f"--{kind}-file={self._runtime}/munge.{kind}" for kind in ("key", "pid", "seed")]
        self._launch("munged", "munged", "--foreground", f"--socket={socket_path}", *options)
        self._until(socket_path.exists, 10, "munged did not start")

    def _make_host(self, host: str, number: int) -> None:
        """Start the process that is the host and give it an `eth0` on the bridge."""
        namespaces = ["--net", "--uts", "--mount", "--propagation", "slave"]
        script = f"mount -n --bind {self.folder}/hosts /etc/hosts && hostname {host} && echo up"
        script += " && exec sleep infinity"
        holder = self._launch(host, "unshare", *namespaces, "sh", "-c", script)
        self._holders[host] = holder
        self._undo.callback(self.crash, host)
        output = self.folder / f"{host}.out"
        self._until(lambda: output.read_text() == "up\n", 10, f"{host} got no namespaces")
        veth = f"{self.tag}h{number}"
        peer = ["peer", "name", "eth0", "netns", str(holder.pid)]
        self.run("ip", "link", "add", veth, "type", "veth", *peer)
        # The kernel would remove it with the namespace, but only some time later.
        self._undo.callback(self.run, "ip", "link", "delete", veth, check=False)
        self.run("ip", "link", "set", veth, "master", f"{self.tag}br", "up")
        ip = f"ip address add {self.address}{number}/24 dev eth0 && ip link set eth0 up"
        self.run(*self.enter(host), "sh", "-c", f"{ip} && ip link set lo up")

    def _launch(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        """Start a daemon that knows nothing of this process's environment."""
        with open(self.folder / f"{name}.out", "wb") as output:
            daemon = subprocess.Popen(
                # If pytest is killed outright, nothing calls `stop`.
                ["setpriv", "--pdeathsig", "KILL", *argv],
                cwd=self.folder,
                env={**DAEMON_ENVIRONMENT, MARKER: self.tag},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest alone
            )
        self._undo.callback(daemon.wait)
        # Until that wait its number is its own; its children are in its group.
        self._undo.callback(os.killpg, daemon.pid, signal.SIGKILL)
        return daemon

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout
        return set(states.split()) == {"idle"}

    def _until(self, is_so: Callable[[], bool], seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{complaint} in {seconds} s\n{self.log_tails()}")
            time.sleep(0.1)

    def _inhabitants(self, host: str) -> list[int]:
        """Whatever runs on a host, also if it cleared its environment or lost its parents."""
        holder = self._holders[host].pid
        network = _network_of(holder)
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")] if network else []
        return [pid for pid in pids if pid != holder and _network_of(pid) == network]

    def _remove_cgroups(self) -> None:
        """Remove what slurmd leaves in the freezer; raises OSError if another slurmd uses it."""
        if self.proctrack == "cgroup":
            for host in self.hosts:
                folders = {state.parent for state in FREEZER.glob(f"slurm_{host}/**/freezer.state")}
                for folder in sorted(folders, reverse=True):  # the inner ones first
                    folder.rmdir()


def _network_of(pid: int) -> str | None:
    """The identity of a process's network namespace; None if it ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None
