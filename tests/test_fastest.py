"""Which kernel decodes, where several can: the one that is measured to be fastest."""

from __future__ import annotations

import pytest
import torch

from vattn.kernels import KERNELS, AttentionSpec, Kernel, measure
from vattn.kernels.measure import fastest


class Fake(Kernel):
    def __init__(self, name: str, **properties) -> None:
        self.name = name
        vars(self).update({"capturable": True, "measured": True, "reason": None, **properties})

    def missing(self) -> str | None:
        return None

    def refuses(self, task: AttentionSpec) -> str | None:
        return self.reason


TASK = AttentionSpec(device="cuda", dtype=torch.bfloat16, query_heads=4, kv_heads=2, head_dim=64, v_head_dim=64)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"a": 1.0, "b": 0.9}, "b"),
        ({"a": 1.0, "b": 0.98}, "a"),  # what is nearly the same does not change the choice
        ({"a": None, "b": 5.0}, "b"),
        ({"a": 1.0, "refuses": 0.1, "eager": 0.1, "b": 2.0}, "a"),
        ({"a": None, "b": None, "slow to set up": None}, "slow to set up"),
        ({"slow to set up": None, "b": 3.0}, "b"),
    ],
)
def test_the_fastest_is_chosen(times, expected, monkeypatch):
    of = {"refuses": {"reason": "no"}, "eager": {"capturable": False}, "slow to set up": {"measured": False}}
    made = [Fake(name, **of.get(name, {})) for name in times]
    monkeypatch.setattr(measure, "named", lambda name: made)
    monkeypatch.setattr(measure, "_seconds", lambda kernel, task, device, few: times[kernel.name])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert fastest(TASK).name == expected


def test_few_sequences_may_have_another_kernel(monkeypatch):
    monkeypatch.setattr(measure, "named", lambda name: [Fake("a"), Fake("b")])
    monkeypatch.setattr(
        measure, "_seconds", lambda kernel, task, device, few: 1.0 if (kernel.name == "a") == few else 2.0
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert [fastest(TASK, few=few).name for few in (True, False)] == ["a", "b"]


def test_without_a_kernel_there_is_an_error(monkeypatch):
    monkeypatch.setattr(measure, "_seconds", lambda kernel, task, device, few: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for kernels in ([], [Fake("a", capturable=False)], [Fake("a"), Fake("b")]):
        monkeypatch.setattr(measure, "named", lambda name, kernels=kernels: kernels)
        with pytest.raises(ValueError, match="no attention kernel can be captured"):
            fastest(TASK)


def test_a_kernel_that_fails_has_no_time(caplog):
    class Failing(Fake):
        def decode(self, *args, **options):
            raise RuntimeError("there is no compiler\nmore")

    caplog.set_level("INFO", "vattn")
    assert measure._seconds(Failing("failing"), TASK, 0, False) is None
    assert "failing is not used" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("few", [False, True])
def test_kernels_are_measured_on_a_gpu(few):
    measure._seconds.cache_clear()
    task = AttentionSpec(
        device="cuda", dtype=torch.bfloat16, query_heads=32, kv_heads=8, head_dim=128, v_head_dim=128, adjacent=False
    )
    chosen = fastest(task, few=few)
    assert chosen.capturable
    times = {
        kernel.name: measure._seconds(kernel, task, 0, few)
        for kernel in KERNELS.values()
        if kernel.capturable and kernel.measured and not (kernel.missing() or kernel.refuses(task))
    }
    print(times)
    assert times[chosen.name] <= min(took for took in times.values() if took) / 0.97
