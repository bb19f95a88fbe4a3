"""What the machine this runs on is: processor, cores that may be used, memory and limits, as the system tells it.

Reads /proc, /sys and control groups (versions 1 and 2) on Linux, sysctl on macOS, and what Python knows elsewhere. Out:
a `Machine` in cores and MiB. It times nothing (unet_parts.py and devices_measure.py do) and names no host or user.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentrelay.runtime.errors import LatentRelayError

_MIB = 1 << 20
_UNLIMITED = 1 << 60  # version 1 control groups write "no limit" as a number near 2^63
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "avxvnni", "amx_int8", "asimddp", "i8mm")
_FP16_FLAGS = ("asimdhp",)
# DMI chassis types (SMBIOS 7.4.1) that are not a desktop.
_CHASSIS = {8: "laptop", 9: "laptop", 10: "laptop", 14: "laptop", 31: "laptop", 32: "laptop", 11: "phone", 30: "tablet"}


class UnknownMachineError(LatentRelayError):
    """The system does not say how much memory there is, so no ceiling can be derived."""


@dataclass(frozen=True)
class Machine:
    """One machine. `cores` may be used by this process; `limit_mib` is what a limit leaves it, None without one."""

    cpu: str
    product: str
    vendor: str
    system: str
    form_factor: str
    cores: int
    cores_reason: str
    total_mib: int
    limit_mib: int | None
    limit_reason: str | None
    int8_flags: tuple[str, ...]
    fp16: bool


def read_machine(root: Path = Path("/")) -> Machine:
    """Ask the system below `root` (another folder than "/" is for tests). Raises UnknownMachineError."""
    info = _cpu_info(root)
    product = _first_line(root / "proc/device-tree/model") or _first_line(root / "sys/class/dmi/id/product_name")
    cpu = info.get("model name") or info.get("hardware") or _sysctl("machdep.cpu.brand_string") or product
    cores, cores_reason = _cores(root)
    limit_mib, limit_reason = _memory_limit(root)
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    flags = set(info.get("flags", info.get("features", "")).split()) | ({"asimddp", "asimdhp"} if apple else set())
    return Machine(
        cpu=" ".join((cpu or platform.processor() or platform.machine() or "unknown processor").split()),
        product=product,
        vendor=_first_line(root / "sys/class/dmi/id/sys_vendor") or ("Apple" if apple else "unknown"),
        system=_system(root),
        form_factor=_form_factor(root),
        cores=cores,
        cores_reason=cores_reason,
        total_mib=_total_mib(root),
        limit_mib=limit_mib,
        limit_reason=limit_reason,
        int8_flags=tuple(flag for flag in _INT8_FLAGS if flag in flags),
        fp16=any(flag in flags for flag in _FP16_FLAGS),
    )


def largest_file(folder: Path) -> tuple[int, str]:
    """The largest file in MiB that can be written in `folder` and read as an ONNX graph, and what sets it."""
    limits = [(2047, "One ONNX file is one protobuf message, at most 2 GiB; external data is held to the same.")]
    if hasattr(os, "statvfs"):
        disk = os.statvfs(folder)
        limits.append((disk.f_blocks * disk.f_frsize // _MIB, "The whole file system here holds no more."))
    if hasattr(os, "pathconf") and "PC_FILESIZEBITS" in os.pathconf_names:
        bits = os.pathconf(folder, "PC_FILESIZEBITS")
        limits.append(((1 << (bits - 1)) // _MIB - 1, f"The file system counts sizes in {bits} bits."))
    soft = _resource_limit("RLIMIT_FSIZE")
    if soft is not None:
        limits.append((soft // _MIB, "The process may not write larger files (RLIMIT_FSIZE)."))
    size, reason = min(limits)
    return max(1, size), reason


def _cpu_info(root: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo, keys in lower case."""
    pairs = (line.partition(":") for line in _text(root / "proc/cpuinfo").splitlines())
    info: dict[str, str] = {}
    for key, _, value in pairs:
        info.setdefault(key.strip().lower(), value.strip())
    return info


def _cores(root: Path) -> tuple[int, str]:
    if hasattr(os, "sched_getaffinity"):
        cores, reason = len(os.sched_getaffinity(0)), "what the process may run on"
    else:
        cores, reason = os.cpu_count() or 1, "all that there are"
    quota = _cpu_quota(root)
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"the control group grants {quota:g}"
    return cores, reason


def _total_mib(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    told = _sysctl("hw.memsize")
    if told.isdigit():
        return int(told) // _MIB
    raise UnknownMachineError(
        "this system does not say how much memory it has",
        do="Write a profile by hand: copy one that `latentrelay devices show` prints and change its numbers.",
    )


def _memory_limit(root: Path) -> tuple[int | None, str | None]:
    found = [
        *((size, "the control group") for size in _group_values(root, "memory", _V2_MEMORY, _V1_MEMORY)),
        *((size, "RLIMIT_AS") for size in [_resource_limit("RLIMIT_AS")] if size is not None),
    ]
    limits = [(size, reason) for size, reason in found if 0 < size < _UNLIMITED]
    return (min(limits)[0] // _MIB, min(limits)[1]) if limits else (None, None)


_V2_MEMORY, _V1_MEMORY = "memory.max", "memory.limit_in_bytes"


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for folder in _group_folders(root, "cpu"):
        told = _text(folder / "cpu.max").split()
        if len(told) != 2:
            told = [_text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()]
        if all(item.isdigit() for item in told) and int(told[1]) > 0:
            quotas.append(int(told[0]) / int(told[1]))
    return min(quotas, default=None)


def _group_values(root: Path, controller: str, *names: str) -> Iterator[int]:
    for folder in _group_folders(root, controller):
        for name in names:
            told = _text(folder / name).strip()
            if told.isdigit():
                yield int(told)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's control group and every one above it, of both versions; a limit anywhere above holds too."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = number == "0" and controllers == ""
        if not unified and controller not in controllers.split(","):
            continue
        for base in (mount, mount / "unified") if unified else (mount / controllers, mount / controller):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            yield from (base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _resource_limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _form_factor(root: Path) -> str:
    if (root / "proc/device-tree/model").exists():
        return "single-board"
    chassis = _first_line(root / "sys/class/dmi/id/chassis_type")
    return _CHASSIS.get(int(chassis), "desktop") if chassis.isdigit() else "desktop"


def _system(root: Path) -> str:
    for line in _text(root / "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return f"{line.partition('=')[2].strip(chr(34))} ({platform.machine()})"
    name = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
    return f"{name or 'unknown system'} ({platform.machine()})"


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip()


def _first_line(path: Path) -> str:
    return _text(path).strip("\0\n ").partition("\n")[0].strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
