"""Memory of the process, and what is left for it."""

import resource
import sys

import psutil
import pytest
import torch as th

from sb3_resnet.common import memory

MISSING = memory.Path("/nowhere")


def test_linux_and_psutil_agree(monkeypatch):
    own, own_room = memory.process_bytes(), memory.available_bytes()
    monkeypatch.setattr(memory, "_STATM", MISSING)
    monkeypatch.setattr(memory, "_MEMINFO", MISSING)
    assert memory.process_bytes() == pytest.approx(own, rel=0.1)
    assert memory.available_bytes() <= psutil.virtual_memory().total
    assert own_room == pytest.approx(memory.available_bytes(), rel=0.3)


def test_the_resident_pages_are_counted(tmp_path, monkeypatch):
    (tmp_path / "statm").write_text("900 50 20 1 0 300 0\n")
    monkeypatch.setattr(memory, "_STATM", tmp_path / "statm")
    assert memory.process_bytes() == 50 * resource.getpagesize()


def test_nothing_is_made_up_where_nothing_tells(monkeypatch):
    for name in ("_STATM", "_MEMINFO"):
        monkeypatch.setattr(memory, name, MISSING)
    monkeypatch.setattr(memory, "_CGROUPS", ())
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory.process_bytes() is None
    assert memory.available_bytes() is None
    assert memory.device_bytes("cpu") is None


@pytest.mark.parametrize(("limit", "left"), [("3000\n", 1000), ("1000\n", 0), ("max\n", None)])
def test_a_containers_limit_counts(limit, left, tmp_path, monkeypatch):
    (tmp_path / "max").write_text(limit)
    (tmp_path / "current").write_text("2000\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((MISSING, MISSING), (tmp_path / "max", tmp_path / "current")))
    system = memory._system_available()
    assert memory.available_bytes() == (left if left is not None else pytest.approx(system, rel=0.1))


@pytest.mark.parametrize(
    "stat",
    [
        "anon 2000\nfile 31000\ninactive_file 30000\nactive_file 1000\n",
        "cache 31000\nrss 2000\ninactive_file 7\ntotal_inactive_file 30000\n",
    ],
)
def test_files_that_are_only_cached_leave_a_container_its_memory(stat, tmp_path, monkeypatch):
    for name, text in {"memory.max": "34000\n", "memory.current": "33000\n", "memory.stat": stat}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", ((tmp_path / "memory.max", tmp_path / "memory.current"),))
    assert memory.available_bytes() == 31_000


def test_tensors_on_a_gpu_are_counted(monkeypatch):
    monkeypatch.setattr(th.cuda, "memory_allocated", lambda device: 123)
    assert memory.device_bytes(th.device("cuda")) == 123
