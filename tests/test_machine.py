"""The machine: limits of containers, what is fast, what clashes, and the verb that says it."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from weitiao import machine
from weitiao.cli import main
from weitiao.machine import Clash, hardware, packages, speed

STATUS = Path("/proc/self/status")


def files(root, **contents):
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Make ``machine`` see cgroup folders that a test writes."""

    def groups(own, **contents):
        files(tmp_path / "fs", **contents)
        (tmp_path / "own").write_text(own)
        found = hardware.cgroups(tmp_path / "fs", tmp_path / "own")
        monkeypatch.setattr(hardware, "cgroups", lambda: found)

    return groups


def test_memory_of_a_v2_group_counts_its_parents_and_what_can_be_taken_back(groups):
    gib = 2**30
    groups(
        "0::/a/b\n",
        memory_dot_max="max\n",
        a__memory_dot_max=f"{2 * gib}\n",
        a__memory_dot_current=f"{gib}\n",
        a__memory_dot_stat=f"anon 5\ninactive_file {gib // 2}\nactive_file 7\n",
        a__b__memory_dot_max="max\n",
    )
    usable = machine.memory()
    assert usable.total_bytes == 2 * gib and usable.available_bytes == gib + gib // 2


def test_memory_of_a_v1_group(groups):
    gib = 2**30
    groups(
        "9:memory:/box\n3:cpu,cpuacct:/box\n",
        memory__box__memory_dot_limit_in_bytes=f"{gib}",
        memory__box__memory_dot_usage_in_bytes=f"{gib // 4}",
        memory__box__memory_dot_stat="total_inactive_file 0\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712",
    )
    assert machine.memory() == machine.Memory(gib, gib - gib // 4)


@pytest.mark.parametrize(
    ("own", "contents", "cores"),
    [
        ("0::/\n", {"cpu_dot_max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu_dot_max": "20000 100000\n"}, 1),
        (
            "4:cpu,cpuacct:/x\n",
            {"cpu__x__cpu_dot_cfs_quota_us": "100000", "cpu__x__cpu_dot_cfs_period_us": "100000"},
            1,
        ),
        ("4:cpu:/x\n", {"cpu__x__cpu_dot_cfs_quota_us": "-1", "cpu__x__cpu_dot_cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu_dot_max": "max 100000\n"}, None),
    ],
)
def test_cores_are_cut_by_the_quota(groups, own, contents, cores):
    free = machine.usable_cores()
    groups(own, **contents)
    assert machine.usable_cores() == (cores or free)


def test_the_processor_from_cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : Xeon\nflags : avx2 amx_bf16\n\nprocessor : 1\nflags : none\n")
    assert hardware._proc_cpuinfo(path) == ("Xeon", {"avx2", "amx_bf16"})
    path.write_text("processor : 0\nFeatures : fp asimd bf16 i8mm\n")
    assert hardware._proc_cpuinfo(path)[1] >= {"neon", "bf16"}
    assert hardware._proc_cpuinfo(tmp_path / "none") == ("", set())


def test_here(tmp_path):
    usable = machine.memory()
    assert 0 < usable.available_bytes <= usable.total_bytes
    assert machine.disk(tmp_path / "not" / "yet").free_bytes > 0


@pytest.mark.skipif(os.name == "nt", reason="Linux's table of mounts")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_folder_in_memory_is_known(tmp_path, kind):
    device = tmp_path.stat().st_dev
    other = "0:5 / /proc rw - proc proc rw"
    own = f"{os.major(device)}:{os.minor(device)} / /x rw,nosuid shared:2 - {kind} {kind} rw"
    (tmp_path / "mounts").write_text(f"21 1 {other}\n22 1 {own}\n")
    assert machine.in_memory(tmp_path / "not" / "yet", tmp_path / "mounts") == (kind == "tmpfs")
    assert not machine.in_memory(tmp_path, tmp_path / "absent")
    assert 1 <= machine.cpu().cores <= machine.cpu().cores_total and machine.cpu().name
    assert bool(machine.gpus()) == (machine.why_no_gpu() == "")
    environment = machine.environment()
    assert json.dumps(environment) and environment["packages"]["torch"]


@pytest.fixture
def speeds(tmp_path, monkeypatch):
    """A fresh cache folder and a count of measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    taken = []
    original = speed.measure

    def measure():
        taken.append(1)
        return original(0.02)

    monkeypatch.setattr(speed, "measure", measure)
    speed._speeds.cache_clear()
    yield taken
    speed._speeds.cache_clear()


def test_speeds_are_measured_once_and_kept(speeds, tmp_path):
    assert machine.gemm_gflops("float32") > 0.1 and machine.bandwidth() > 1e8
    speed._speeds.cache_clear()
    assert machine.gemm_gflops("bfloat16") > 0 and len(speeds) == 1
    (tmp_path / "weitiao" / "speeds.json").write_text('{"other": {"float32": 1}}')
    speed._speeds.cache_clear()
    assert machine.gemm_gflops("float32") > 0 and len(speeds) == 2


def test_a_cache_that_cannot_be_written_is_no_error(speeds, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.gemm_gflops("float32") > 0


@pytest.mark.parametrize(
    ("bf16", "rates", "best"),
    [
        (True, {"float32": 100.0, "bfloat16": 400.0}, "bfloat16"),
        (True, {"float32": 100.0, "bfloat16": 90.0}, "float32"),
        (False, {"float32": 1.0, "bfloat16": 9.0}, "float32"),
    ],
)
def test_the_dtype_is_measured_and_never_float16_on_a_processor(monkeypatch, bf16, rates, best):
    cpu = machine.cpu()
    monkeypatch.setattr(speed, "gpus", list)
    monkeypatch.setattr(speed, "cpu", lambda: machine.Cpu(cpu.name, cpu.architecture, 1, 1, (), bf16))
    monkeypatch.setattr(speed, "gemm_gflops", lambda dtype: rates[dtype])
    assert machine.best_dtype() == best


def test_an_old_gpu_takes_float16(monkeypatch):
    monkeypatch.setattr(speed, "gpus", lambda: [machine.Gpu("V100", 1, 1, "7.0", False)])
    assert machine.best_dtype() == "float16"


@pytest.mark.parametrize(
    ("cuda", "device", "driver", "said"),
    [
        (None, False, "", "no NVIDIA GPU is present"),
        (None, True, "550", "CPU build although"),
        ("12.8", False, "", "no NVIDIA GPU is present; the CUDA build"),
        ("12.8", True, "", "nvidia-smi does not answer"),
        ("12.8", True, "450.80", "driver 450.80 is too old"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, cuda, device, driver, said):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(hardware, "has_nvidia_device", lambda: device)
    monkeypatch.setattr(hardware, "_output", lambda *command: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert said in machine.why_no_gpu()


GOOD = dict.fromkeys(packages.NEEDED, "99")


@pytest.mark.parametrize(
    ("found", "packages"),
    [
        (GOOD, None),
        (GOOD | {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "torchvision 0.28.0, torch 2.13.0+cpu"),
        (GOOD | {"torch": "2.13.0+cpu", "torchaudio": "2.13.0+cpu"}, None),
        (GOOD | {"torch": "2.5.1"}, "torch 2.5.1"),
        (GOOD | {"torchao": "0.15.0"}, "torchao 0.15.0"),
        (GOOD | {"transformers": "4.57.0"}, "transformers 4.57.0"),
        (GOOD | {"bitsandbytes": "0.45.0"}, "bitsandbytes 0.45.0"),
        ({name: version for name, version in GOOD.items() if name != "peft"}, "peft"),
    ],
)
def test_known_clashes(found, packages):
    problems = machine.clashes(found)
    assert [clash.packages for clash in problems] == ([packages] if packages else [])
    assert all(clash.problem and "pip" in clash.remedy for clash in problems)


def test_requirements_that_are_not_met(monkeypatch):
    monkeypatch.setattr(packages, "versions", lambda: {"x": "1.0"})
    monkeypatch.setattr(packages.metadata, "requires", lambda name: ["numpy<2", "nothing>1", 'peft>9; extra == "y"'])
    monkeypatch.setattr(packages.metadata, "version", lambda name: _version(name))
    assert packages.unmet() == [Clash("x 1.0, numpy 2.4.6", "x needs numpy<2", 'pip install "numpy<2"')]


def _version(name):
    if name == "nothing":
        raise packages.metadata.PackageNotFoundError
    return "2.4.6"


def test_the_verb(speeds, capsys, monkeypatch):
    machine.gemm_gflops("float32")
    assert main(["env", "--json"]) == 0 and len(speeds) == 2  # a person who asks gets today's speeds
    report = json.loads(capsys.readouterr().out)
    assert set(report["gemm_gflops"]) == set(machine.DTYPES)
    assert {"cpu", "memory", "disk", "gpus", "why_no_gpu", "clashes", "packages", "best_dtype"} <= set(report)
    assert main(["env"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_pages_of_a_mapped_file_are_given_back_and_others_stay(tmp_path):
    def resident():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))

    file, kib = tmp_path / "weights", 32 << 10
    file.write_bytes(np.arange(kib * 256, dtype=np.int32).tobytes())
    mapped, own = np.memmap(file, np.int32, "r"), np.ones(kib * 256, np.int32)
    total, before = int(mapped.sum(dtype=np.int64)), resident()
    machine.give_back(mapped.ctypes.data + 100, mapped.nbytes - 200)
    machine.give_back(own.ctypes.data, own.nbytes)
    assert before - resident() > 0.9 * kib
    assert int(mapped.sum(dtype=np.int64)) == total and own.all()
