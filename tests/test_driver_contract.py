"""The contract of csrc/driver.hpp, which both backends must meet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from vattn import BackendUnavailable, DriverError, OutOfDeviceMemory, _core


@pytest.fixture
def granule(driver):
    return driver.granularity


def bytes_at(driver, address, n):
    """n bytes at an address, as a torch tensor."""
    return torch.utils.dlpack.from_dlpack(driver.dlpack(address, [n], [1], 1)).view(torch.uint8)


def mapped(driver, base, offset, size):
    handle = driver.create(size)
    driver.map(base + offset, size, handle)
    driver.set_access(base + offset, size)
    driver.zero(base + offset, size)
    driver.zeroed()
    return handle


def test_a_mapped_range_is_memory(driver, granule):
    base = driver.reserve(8 * granule)
    handle = mapped(driver, base, granule, 2 * granule)
    memory = bytes_at(driver, base + granule, 2 * granule)
    assert not memory.any()
    memory[5] = 7
    memory[-1] = 9
    assert memory[5] == 7
    assert memory[-1] == 9
    driver.synchronize()
    driver.unmap(base + granule, 2 * granule)
    driver.release(handle)
    driver.free_address(base, 8 * granule)


def test_addresses_are_multiples_of_the_granularity(driver, granule):
    bases = [driver.reserve(granule) for _ in range(3)]
    assert all(base % granule == 0 for base in bases)
    for base in bases:
        driver.free_address(base, granule)


def test_terabytes_of_addresses_cost_nothing(driver, granule):
    base = driver.reserve(4 << 40)
    handle = mapped(driver, base, (4 << 40) - granule, granule)
    assert not bytes_at(driver, base + (4 << 40) - 8, 8).any()
    driver.unmap(base + (4 << 40) - granule, granule)
    driver.release(handle)
    driver.free_address(base, 4 << 40)


def test_one_handle_at_two_addresses_is_one_memory(driver, granule):
    base = driver.reserve(4 * granule)
    handle = mapped(driver, base, 0, granule)
    driver.map(base + 2 * granule, granule, handle)
    driver.set_access(base + 2 * granule, granule)
    bytes_at(driver, base, granule)[3] = 5
    assert bytes_at(driver, base + 2 * granule, granule)[3] == 5
    driver.synchronize()
    driver.unmap(base, granule)
    assert bytes_at(driver, base + 2 * granule, granule)[3] == 5
    driver.unmap(base + 2 * granule, granule)
    driver.release(handle)
    driver.free_address(base, 4 * granule)


def test_memory_outlives_its_handle_while_it_is_mapped(driver, granule):
    base = driver.reserve(granule)
    handle = mapped(driver, base, 0, granule)
    bytes_at(driver, base, granule)[0] = 3
    driver.release(handle)
    assert bytes_at(driver, base, granule)[0] == 3
    driver.synchronize()
    driver.unmap(base, granule)
    driver.free_address(base, granule)


@pytest.mark.parametrize("granules", [1, 2, 4, 32])
def test_a_handle_may_lie_at_any_granule(driver, granule, granules):
    base = driver.reserve(64 * granule)
    handle = mapped(driver, base, 3 * granule, granules * granule)
    assert not bytes_at(driver, base + 3 * granule, granules * granule).any()
    driver.synchronize()
    driver.unmap(base + 3 * granule, granules * granule)
    driver.release(handle)
    driver.free_address(base, 64 * granule)


def test_released_memory_returns_to_the_system(driver, granule):
    if driver.kind == "cpu":
        driver = _core.host_driver(granule, capacity=256 * granule)
    base = driver.reserve(64 * granule)
    before = driver.memory_info()[0]
    handle = mapped(driver, base, 0, 64 * granule)
    assert driver.memory_info()[0] <= before - 64 * granule
    driver.unmap(base, 64 * granule)
    driver.release(handle)
    assert driver.memory_info()[0] >= before - granule
    driver.free_address(base, 64 * granule)


def test_host_memory_is_really_given_back():
    def shared() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Rss")) * 1024

    driver = _core.host_driver(1 << 21)
    size = 64 << 21
    base = driver.reserve(size)
    before = shared()
    handle = driver.create(size)
    driver.map(base, size, handle)
    driver.set_access(base, size)
    driver.zero(base, size)
    driver.zeroed()
    assert shared() >= before + size * 0.9
    driver.unmap(base, size)
    assert shared() <= before + size * 0.1
    driver.release(handle)
    driver.free_address(base, size)


def test_zero_and_copy(driver, granule):
    base = driver.reserve(4 * granule)
    one, two = mapped(driver, base, 0, granule), mapped(driver, base, granule, granule)
    bytes_at(driver, base, granule).copy_(torch.arange(granule) % 251)
    expected = bytes_at(driver, base, 1000).clone()
    driver.synchronize()
    driver.copy(base + granule, base, 1000)
    driver.synchronize()
    assert torch.equal(bytes_at(driver, base + granule, 1000), expected)
    assert not bytes_at(driver, base + granule + 1000, 100).any()
    driver.zero(base, 500)
    driver.zeroed()
    assert not bytes_at(driver, base, 500).any()
    assert torch.equal(bytes_at(driver, base + 500, 500), expected[500:])
    driver.synchronize()
    for offset, handle in ((0, one), (granule, two)):
        driver.unmap(base + offset, granule)
        driver.release(handle)
    driver.free_address(base, 4 * granule)


def test_a_fence_passes_when_the_work_before_it_is_done(driver):
    fence = driver.record()
    driver.wait(fence)
    assert driver.passed(fence)
    driver.drop(fence)


@pytest.mark.gpu
def test_a_fence_does_not_pass_early():
    driver = _core.cuda_driver(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    fence = driver.record(stream=stream.cuda_stream)
    assert not driver.passed(fence)
    driver.wait(fence)
    assert driver.passed(fence)
    driver.drop(fence)


def refused(call, *args):
    with pytest.raises(DriverError) as caught:
        call(*args)
    assert caught.value.call
    assert caught.value.code != 0
    assert isinstance(caught.value, RuntimeError)


def test_what_is_refused(driver, granule):
    base = driver.reserve(8 * granule)
    handle = driver.create(2 * granule)
    refused(driver.create, granule // 2)
    refused(driver.reserve, granule // 2)
    refused(driver.map, base, granule, handle)  # a part of a handle
    refused(driver.map, base + granule // 2, 2 * granule, handle)  # between granules
    refused(driver.set_access, base, granule)  # nothing mapped
    driver.map(base, 2 * granule, handle)
    other = driver.create(granule)
    refused(driver.map, base + granule, granule, other)  # the address is in use
    refused(driver.unmap, base, granule)  # a part of a mapping
    driver.unmap(base, 2 * granule)
    driver.release(handle)
    driver.release(other)
    driver.free_address(base, 8 * granule)


def test_the_host_refuses_more_than_cuda():
    driver = _core.host_driver(4096)
    base = driver.reserve(8192)
    handle = driver.create(4096)
    refused(driver.unmap, base, 4096)  # nothing mapped, which cuMemUnmap accepts
    driver.map(base, 4096, handle)
    refused(driver.free_address, base, 8192)  # something mapped
    refused(driver.map, 1 << 40, 4096, handle)  # not reserved
    driver.unmap(base, 4096)
    driver.release(handle)
    refused(driver.release, handle)  # twice
    refused(driver.map, base, 4096, handle)  # released
    driver.free_address(base, 8192)
    refused(driver.free_address, base, 8192)  # twice


def test_a_simulated_device_has_a_size():
    driver = _core.host_driver(4096, capacity=3 * 4096)
    assert driver.memory_info() == (3 * 4096, 3 * 4096)
    handle = driver.create(2 * 4096)
    with pytest.raises(OutOfDeviceMemory) as caught:
        driver.create(2 * 4096)
    assert isinstance(caught.value, MemoryError)
    driver.release(handle)
    driver.release(driver.create(3 * 4096))


def test_granularity_must_be_a_multiple_of_the_page():
    with pytest.raises(ValueError, match="granularity must be a multiple of the page size"):
        _core.host_driver(1000)


def test_calls_are_counted(driver, granule):
    base = driver.reserve(granule)
    handle = mapped(driver, base, 0, granule)
    driver.unmap(base, granule)
    driver.release(handle)
    driver.free_address(base, granule)
    counts = {name: count for name, count in driver.counts().items() if count}
    assert counts == dict.fromkeys(
        ["reserve", "create", "map", "set_access", "zero", "zeroed", "unmap", "release", "free_address"], 1
    )


def test_the_kth_call_fails_and_reaches_nobody(driver, granule):
    driver.fail_at(2)
    base = driver.reserve(granule)
    with pytest.raises(DriverError, match="create failed with code -1: injected fault"):
        driver.create(granule)
    driver.fail_at(1, times=2, out_of_memory=True)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemory):
            driver.create(granule)
    driver.release(driver.create(granule))
    driver.free_address(base, granule)


def test_a_call_can_be_charged():
    import time

    driver = _core.host_driver(4096)
    driver.charge("create", 20_000_000)
    start = time.perf_counter()
    driver.release(driver.create(4096))
    assert time.perf_counter() - start >= 0.02


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.thorough(1)
@pytest.mark.parametrize("when", ["unmapped", "no access", "after unmap"])
def test_touching_what_is_not_there_is_a_fault_on_the_host(when):
    done = run_script(f"""
        import ctypes
        from vattn import _core
        driver = _core.host_driver(4096)
        base = driver.reserve(8192)
        handle = driver.create(4096)
        if {when!r} != "unmapped":
            driver.map(base, 4096, handle)
        if {when!r} == "after unmap":
            driver.set_access(base, 4096)
            driver.unmap(base, 4096)
        print("reached", flush=True)
        ctypes.string_at(base, 1)
    """)
    assert done.stdout == "reached\n"
    assert done.returncode == -11


@pytest.mark.gpu
def test_touching_what_is_not_there_is_a_fault_on_the_gpu():
    done = run_script("""
        import torch
        from vattn import _core
        driver = _core.cuda_driver(0)
        base = driver.reserve(driver.granularity)
        tensor = torch.utils.dlpack.from_dlpack(driver.dlpack(base, [16], [1], 4))
        print("reached", flush=True)
        tensor.sum().item()
    """)
    assert done.stdout == "reached\n"
    assert "illegal memory access" in done.stderr


@pytest.mark.gpu
def test_calls_work_in_a_thread_without_a_context():
    import threading

    driver = _core.cuda_driver(0)
    failures: list[Exception] = []

    def work() -> None:
        try:
            base = driver.reserve(driver.granularity)
            driver.release(mapped(driver, base, 0, driver.granularity))
            driver.unmap(base, driver.granularity)
            driver.free_address(base, driver.granularity)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu_asking_for_cuda_says_why():
    probe = _core.probe_cuda()
    assert not probe["available"]
    assert probe["why"]
    with pytest.raises(BackendUnavailable, match="CUDA cannot be used"):
        _core.cuda_driver(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_harms_nobody():
    driver = _core.host_driver(4096)
    base = driver.reserve(4096)
    handle = mapped(driver, base, 0, 4096)
    bytes_at(driver, base, 4096)[0] = 42
    child = os.fork()
    if child == 0:
        try:
            driver.unmap(base, 4096)
        except BackendUnavailable as error:
            os._exit(0 if "was forked off" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes_at(driver, base, 4096)[0] == 42
    driver.unmap(base, 4096)
    driver.release(handle)
    driver.free_address(base, 4096)
