"""What the system says of itself, read from folders that look like Linux's: boards, containers, old control groups."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

import pytest
from latentrelay.tools.machine import UnknownMachineError, largest_file, read_machine

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="reads Linux's files")
MINE = len(os.sched_getaffinity(0))


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal:        8245292 kB\nMemFree: 1 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_board(tmp_path: Path) -> None:
    cpuinfo = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\n\nprocessor\t: 1\nFeatures\t: fp\n"
    board = {"proc/cpuinfo": cpuinfo, "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}
    machine = read_machine(system(tmp_path, board | {"etc/os-release": 'NAME="x"\nPRETTY_NAME="Debian 12"\n'}))
    assert (machine.cpu, machine.product) == ("Raspberry Pi 5 Model B Rev 1.0",) * 2
    assert (machine.form_factor, machine.total_mib) == ("single-board", 8245292 // 1024)
    assert (machine.int8_flags, machine.fp16) == (("asimddp",), True)
    assert machine.system == f"Debian 12 ({platform.machine()})"
    assert (machine.cores, machine.limit_mib) == (MINE, None)


def test_a_laptop(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "model name\t: 13th Gen  Example(R)   CPU\nflags\t: sse avx2 avx_vnni\n",
        "sys/class/dmi/id/sys_vendor": "LENOVO\n",
        "sys/class/dmi/id/product_name": "21ABCDEF\n",
        "sys/class/dmi/id/chassis_type": "10\n",
    }
    machine = read_machine(system(tmp_path, files))
    assert (machine.cpu, machine.vendor, machine.product) == ("13th Gen Example(R) CPU", "LENOVO", "21ABCDEF")
    assert (machine.form_factor, machine.int8_flags, machine.fp16) == ("laptop", ("avx_vnni",), False)


def test_an_old_processor_has_no_8_bit_products(tmp_path: Path) -> None:
    machine = read_machine(system(tmp_path, {"proc/cpuinfo": "model name: Old\nflags: sse avx2\n"}))
    assert machine.int8_flags == ()
    assert machine.form_factor == "desktop"


@pytest.mark.parametrize("depth", ["", "/a", "/a/b"])
def test_a_container_of_version_2(tmp_path: Path, depth: str) -> None:
    """A limit anywhere above the process's own group holds, and "max" is none."""
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
    }
    limit = {f"sys/fs/cgroup{depth}/memory.max": "3221225472\n", f"sys/fs/cgroup{depth}/cpu.max": "50000 100000\n"}
    machine = read_machine(system(tmp_path, files | limit))
    assert (machine.limit_mib, machine.limit_reason) == (3072, "the control group")
    assert (machine.cores, machine.cores_reason) == (1, "the control group grants 0.5")


def test_a_container_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/job/7\n2:cpu,cpuacct:/job/7\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/job/7/memory.limit_in_bytes": "2147483648\n",
        "sys/fs/cgroup/cpu,cpuacct/job/7/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/7/cpu.cfs_period_us": "100000\n",
    }
    machine = read_machine(system(tmp_path, files))
    assert machine.limit_mib == 2048
    assert machine.cores == 1


def test_version_1_without_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n2:cpu:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    machine = read_machine(system(tmp_path, files))
    assert (machine.limit_mib, machine.cores) == (None, MINE)


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnknownMachineError, match="does not say how much memory"):
        read_machine(tmp_path)


def test_this_machine() -> None:
    machine = read_machine()
    assert machine.cpu
    assert machine.cores <= MINE
    assert machine.total_mib == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20


def test_the_largest_file_is_a_protobufs_or_what_the_process_may_write(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert largest_file(tmp_path)[0] <= 2047
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, hard))
    try:
        assert largest_file(tmp_path) == (100, "The process may not write larger files (RLIMIT_FSIZE).")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
