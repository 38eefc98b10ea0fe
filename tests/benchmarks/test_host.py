import json
import os
import platform
import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest

from medge.benchmarks import host as module
from medge.benchmarks.host import Host, Noise, fingerprint, noise

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_int8

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
Features\t: fp asimd asimdhp asimddp i8mm bf16 sve
CPU implementer\t: 0x41
CPU variant\t: 0x1
CPU part\t: 0xd4d
"""


def _from(monkeypatch: pytest.MonkeyPatch, text: str) -> Host:
    file = SimpleNamespace(exists=lambda: True, read_text=lambda errors: text)
    monkeypatch.setattr(module, "_CPUINFO", file)
    return fingerprint()


def test_an_x86_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    host = _from(monkeypatch, X86)
    assert host.cpu == "AMD EPYC (family 26, model 2)"
    assert host.isa == ("amx-int8", "avx2", "avx512", "avx512-bf16", "avx512-vnni")


def test_an_arm_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    host = _from(monkeypatch, ARM)
    assert host.cpu == "ARM part 0xd4d variant 0x1"
    assert host.isa == ("bf16", "dotprod", "fp16", "i8mm", "neon", "sve")


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "machdep.cpu.brand_string: Apple M3\nhw.optional.neon: 1\nhw.optional.arm.FEAT_I8MM: 1\n"
    monkeypatch.setattr(module, "_CPUINFO", SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=listed))
    host = fingerprint()
    assert host.cpu == "Apple M3"
    assert host.isa == ("i8mm", "neon")


def test_this_machine() -> None:
    host = fingerprint()
    assert 1 <= host.usable_cores <= host.logical_cores
    assert host.ram_gib > 0
    assert "numpy" in host.versions
    assert Host.model_validate(json.loads(host.model_dump_json())) == host
    assert platform.node() not in host.model_dump_json()


def test_times_compare_across_versions_but_not_across_machines(host: Host) -> None:
    newer = host.model_copy(update={"versions": {"onnxruntime": "9"}, "python": "3.12.1", "ram_gib": 8.0})
    assert host.times_compare(newer)
    for change in ({"cpu": "other"}, {"isa": ("avx2",)}, {"usable_cores": 1}, {"os": "Windows"}):
        assert not host.times_compare(host.model_copy(update=change))


def test_noise_has_a_reason_only_above_the_limit() -> None:
    assert Noise(0.02, 0.01).reason == ""
    assert "other programs take 50%" in Noise(0.5, 0.01).reason
    assert "spread by 40%" in Noise(0.0, 0.4).reason


def test_other_programs_are_seen_and_this_one_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 4 cores whose other programs use one core, and this process a second."""
    start, own = time.perf_counter(), time.process_time()
    real = psutil.cpu_times()

    def cpu_times() -> object:
        wall = time.perf_counter() - start
        busy = wall + time.process_time() - own
        return type(real)(**(dict.fromkeys(real._fields, 0.0) | {"user": busy, "idle": 4 * wall - busy}))

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert noise(0.2).others == pytest.approx(0.25, abs=0.05)


def test_noise_measures_within_its_time() -> None:
    start = time.perf_counter()
    measured = noise(0.1)
    assert time.perf_counter() - start < 5
    assert 0 <= measured.others <= 1
    assert measured.spread >= 0
