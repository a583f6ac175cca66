"""The machine at hand: its cores, its name, the versions of what computes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convscale.errors import UserError

BUSY = "this machine is busy"
"""How a line begins that says so."""
_LIBRARIES = ("torch", "torchvision", "timm", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the software a time was taken on."""

    device_name: str
    """The processor's or the GPU's name as its driver gives it."""
    cores: int
    """Cores this process may run on."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the installed libraries that compute."""

    @classmethod
    def here(cls, device: str = "cpu") -> Environment:
        """The environment of this process, for ``cpu``, ``cuda`` or ``cuda:N``."""
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        found = {"python": platform.python_version()}
        for name in _LIBRARIES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        name = processor_name()
        if device.startswith("cuda"):
            import torch

            name = torch.cuda.get_device_name(device)
            found["cuda"] = str(torch.version.cuda)
        return cls(device_name=name, cores=available_cores(), versions=found)


def check_own(device: str, refused: str = "is none of this machine's") -> str:
    """The name of a device of this machine, which need not be there.

    Raises:
        UserError: another than ``cpu``, ``cuda`` and ``cuda:N``.
    """
    if not isinstance(device, str) or not re.fullmatch("cpu|cuda(:[0-9]{1,9})?", device):
        raise UserError(f"device {device!r} {refused}; cpu, cuda or cuda:N would be right")
    return device


def need_cuda(device: str, instead: str = "use device cpu") -> None:
    """
    Args:
        device: a GPU of this machine.
        instead: what else would do, for the message.

    Raises:
        UserError: it is not named so, or not there.
    """
    check_own(device)
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch sees no CUDA GPU; {instead}")
    if int(device.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device {device!r} is not there: there are {count} CUDA devices, counted from 0; {instead}")


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def code_commit(start: Path | None = None) -> str | None:
    """The commit that a folder's Git repository stands at, read from its files; None where there is none.

    Args:
        start: a folder in it; None: where this process runs.
    """
    here = Path.cwd() if start is None else start.absolute()
    place = next((each / ".git" for each in (here, *here.parents) if (each / ".git").exists()), None)
    try:
        if place is not None and place.is_file():  # a worktree's
            place = (place.parent / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        if place is None:
            return None
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        shared = place / "commondir"
        common = (place / shared.read_text(encoding="utf-8").strip()).resolve() if shared.is_file() else place
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        for folder in (place, common):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8").strip()
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except (OSError, ValueError, IndexError):
        return None


def processor_name() -> str:
    """The processor's name, as the kernel gives it where it does."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def import_path() -> str:
    """A ``PYTHONPATH`` by which another process imports this very package."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_python(module: str, **environment: str) -> subprocess.Popen[str]:
    """A process that runs a module of this package, and reads and writes text through pipes.

    It is a command of its own: forking a process that runs torch's threads can hang, and multiprocessing's other way
    runs the caller's script again.

    Args:
        module: its whole name.
        environment: variables beside those of this process.

    Raises:
        OSError: no process can be started.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": import_path(), **environment},
    )


def busy() -> str:
    """A line that says so where other work keeps the cores busy; empty where they are free, or the system can not tell.

    By the load average of the last minute: above half of the cores, timings here come out too slow.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return ""
    cores = available_cores()
    if load <= 0.5 * cores:
        return ""
    return f"{BUSY} (load {load:.1f} on {cores} core{'s' * (cores > 1)}): speeds measured now may be too low"


def busy_now(seconds: float = 0.5) -> str:
    """As ``busy``, of the next moment alone and of other processes alone: for after this one kept the cores busy
    itself, which the load average of the last minute is full of.
    """
    cores = available_cores()
    before, mine, start = _core_seconds(), sum(os.times()[:4]), time.monotonic()
    time.sleep(seconds)
    after, spent = _core_seconds(), sum(os.times()[:4]) - mine
    if before is None or after is None:
        return ""
    others = (after - before - spent) / (time.monotonic() - start)
    if others <= 0.5 * cores:
        return ""
    return (
        f"{BUSY} (others keep {others:.1f} of {cores} core{'s' * (cores > 1)} at work): speeds measured "
        "now may be too low"
    )


def _core_seconds() -> float | None:
    """Seconds that the cores that this process may run on worked since they were started; None: nobody says so."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        ticks = [[int(text) for text in fields] for name, *fields in lines if name in mine]
    except (OSError, ValueError):
        return None
    # in order: user, nice, system, idle, waiting for a disk, interrupts, soft ones, taken by another machine's guest
    return sum(sum(of[:3]) + sum(of[5:8]) for of in ticks) / os.sysconf("SC_CLK_TCK")
