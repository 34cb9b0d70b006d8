"""The host driver takes no more memory than the machine has left, and its file grows no longer than it must."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vattn import KVCache, KVLayout, OutOfDeviceMemory, _core

GIB = 1 << 30
PAGE = 4096


def machine(root: Path, files: dict[str, str]) -> tuple[int, int]:
    for name, text in {"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _core.host_memory(str(root))


V1, V2 = "sys/fs/cgroup/memory/", "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "free", "total"),
    [
        ({}, 4, 8),
        ({"proc/self/cgroup": "0::/\n"}, 4, 8),
        # Version 2 of control groups: the limit of the group itself, that of a group around it, a limit that is spent.
        ({"proc/self/cgroup": "0::/a/b\n", V2 + "a/b/memory.max": f"{3 * GIB}", V2 + "a/b/memory.current": "0"}, 3, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                V2 + "a/b/memory.max": "max",
                V2 + "a/b/memory.current": f"{GIB}",
                V2 + "a/memory.max": f"{3 * GIB}",
                V2 + "a/memory.current": f"{2 * GIB}",
            },
            1,
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": f"{2 * GIB}", V2 + "memory.current": f"{5 * GIB}"}, 0, 2),
        # Inactive pages of files count as free, since the kernel gives them up before it refuses memory.
        (
            {
                "proc/self/cgroup": "0::/a\n",
                V2 + "a/memory.max": f"{3 * GIB}",
                V2 + "a/memory.current": f"{2 * GIB}",
                V2 + "a/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
            },
            2,
            3,
        ),
        # Version 1, beside other controllers. The large number is what a group without a limit shows.
        (
            {
                "proc/self/cgroup": "9:cpu,memory:/a\n4:pids:/x\n0::/\n",
                V1 + "a/memory.limit_in_bytes": f"{3 * GIB}",
                V1 + "a/memory.usage_in_bytes": f"{2 * GIB}",
                V1 + "a/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n",
                V1 + "memory.limit_in_bytes": "9223372036854771712",
                V1 + "memory.usage_in_bytes": f"{6 * GIB}",
            },
            2,
            3,
        ),
        ({"proc/self/cgroup": "nonsense\n1:\n::\n4:memory:relative\n"}, 4, 8),
    ],
)
def test_what_a_machine_has_left(tmp_path, files, free, total):
    assert machine(tmp_path, files) == (free * GIB, total * GIB)


def test_this_machine():
    free, total = _core.host_memory()
    assert 0 < free <= total
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    assert free <= int(available.split()[1]) * 1024 * 1.1


def limited(code: str) -> None:
    """Runs code in a process of its own, in which no file may become longer than 256 MiB."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))\n"
    subprocess.run([sys.executable, "-c", limits + textwrap.dedent(code)], check=True, timeout=120)


def test_more_than_the_machine_has_is_refused():
    limited(
        """
        from vattn import KVCache, KVLayout, OutOfDeviceMemory, _core
        free, total = _core.host_memory()
        for options in ({}, {"exportable": True}, {"capacity": 1 << 60}):
            layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=8, max_len=10, granularity=1 << 40)
            with KVCache(layout, slots=1, mapper=False, **options) as cache:
                try:
                    cache.open().grow(1)
                except OutOfDeviceMemory as error:
                    assert "that this machine has left" in str(error), error
                else:
                    raise AssertionError("a terabyte was taken")
                cache.check()
                assert cache.stats().physical == 0
        driver = _core.host_driver(4096)
        driver.release(driver.create(1 << 20))  # it goes on
        """
    )


def test_a_budget_is_a_part_of_what_is_available():
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=8, max_len=10)
    free, _ = _core.host_memory()
    with KVCache(layout, slots=1, budget=0.5) as cache:
        assert cache.stats().budget == pytest.approx(free / 2, rel=0.1)


@pytest.mark.thorough
def test_churn_does_not_make_the_file_longer():
    """Allocates more than 4 GiB in all, in sizes that leave holes, while the file may have 256 MiB."""
    limited(
        """
        import random
        from vattn import _core
        chance, driver = random.Random(0), _core.host_driver(4096)
        held = []
        for _ in range(4000):
            if sum(size for _, size in held) > 32 << 20:
                handle, _ = held.pop(chance.randrange(len(held)))
                driver.release(handle)
            size = 4096 * chance.choice([1, 16, 64, 256, 257, 1023])
            held.append((driver.create(size), size))
        for handle, _ in held:
            driver.release(handle)
        driver.release(driver.create(200 << 20))  # all of it is one piece again
        """
    )


def test_parts_of_the_file_are_used_by_one_handle_each():
    """What is written to one handle's memory is seen in no other's, whatever parts of the file were freed before."""
    chance, driver = random.Random(1), _core.host_driver(PAGE)
    base = driver.reserve(256 * PAGE)
    held: dict[int, tuple[int, int, int]] = {}  # by address: handle, granules and mark

    def memory(at: int, granules: int) -> torch.Tensor:
        return torch.utils.dlpack.from_dlpack(driver.dlpack(at, [granules * PAGE], [1], 1)).view(torch.uint8)

    for step in range(2000):
        at = base + 16 * PAGE * chance.randrange(16)
        if at in held:
            handle, granules, mark = held.pop(at)
            assert bool((memory(at, granules) == mark).all())
            driver.unmap(at, granules * PAGE)
            driver.release(handle)
        else:
            granules, mark = chance.randrange(1, 17), step % 251
            handle = driver.create(granules * PAGE)
            driver.map(at, granules * PAGE, handle)
            driver.set_access(at, granules * PAGE)
            assert not bool(memory(at, granules).any())  # new memory is zero, like a file that was never written
            memory(at, granules).fill_(mark)
            held[at] = handle, granules, mark
    for at, (handle, granules, mark) in held.items():
        assert bool((memory(at, granules) == mark).all())
        driver.unmap(at, granules * PAGE)
        driver.release(handle)
    driver.free_address(base, 256 * PAGE)


def test_host_memory_to_swap_to_is_no_more_than_there_is():
    driver = _core.host_driver(PAGE)
    with pytest.raises(OutOfDeviceMemory, match=r"create_host failed .* that this machine has left"):
        driver.create_host(1 << 45)
    driver.free_host(driver.create_host(1 << 20), 1 << 20)
