"""What ExecuTorch's runtime is not given to read, and what its failures become."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.errors import CorruptError, UsageError
from medge.manifest import File, PartFiles, describe
from medge.runtimes.base import RunOptions
from medge.spec import TensorSpec

pytest.importorskip("executorch")

from medge.runtimes.executorch_backend import ExecutorchSession, check

INPUT = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
OUTPUT = TensorSpec(name="y", dtype="float32", shape=("batch", 4))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = 2x."""
    from medge.export.executorch_lower import lower, write
    from medge.export.torch_graph import Graph, Tensor

    graph = Graph()
    x = graph.input(INPUT)
    path = tmp_path_factory.mktemp("program") / "double.pte"
    write(lower(graph.module([Tensor(graph.call("aten.add.Tensor", x.node, x.node), x.shape)]), (INPUT,)), path)
    return path


def part(path: Path, **change: Any) -> PartFiles:
    return PartFiles(files=(describe(path.parent, path.name),), inputs=(INPUT,), outputs=(OUTPUT,)).model_copy(
        update=change
    )


def test_outputs_carry_the_manifest_s_names(program: Path) -> None:
    session = ExecutorchSession(program, part(program), RunOptions())
    x = np.arange(4, dtype=np.float32)[None]
    x.flags.writeable = False
    found = session.run({"x": x})
    np.testing.assert_array_equal(found["y"], 2 * x)
    again = session.run({"x": x + 1})
    np.testing.assert_array_equal(found["y"], 2 * x)  # an output outlives the next run
    np.testing.assert_array_equal(again["y"], 2 * x + 2)


def test_a_batch_is_refused(program: Path) -> None:
    session = ExecutorchSession(program, part(program), RunOptions())
    with pytest.raises(UsageError, match="one input at a time"):
        session.run({"x": np.zeros((2, 4), np.float32)})


def test_a_manifest_of_another_signature_is_corrupt(program: Path) -> None:
    with pytest.raises(CorruptError, match="other tensors"):
        ExecutorchSession(program, part(program, inputs=(INPUT, INPUT)), RunOptions())


def changed(program: Path, folder: Path, content: bytes) -> tuple[Path, File]:
    path = folder / "changed.pte"
    path.write_bytes(content)
    return path, describe(folder, path.name)


@pytest.mark.parametrize("content", [b"", b"ET12", b"garbage" * 20])
def test_a_file_that_is_no_program_is_corrupt(content: bytes, program: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="no ExecuTorch program"):
        check(*changed(program, tmp_path, content), "1.5.1")


def test_a_program_of_another_version_is_corrupt_and_says_which_to_install(program: Path, tmp_path: Path) -> None:
    content = program.read_bytes()
    with pytest.raises(CorruptError, match="schema ET99") as caught:
        check(*changed(program, tmp_path, content[:4] + b"ET99" + content[8:]), "9.9.0")
    assert "executorch==9.9.0" in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_program_is_corrupt(share: float, program: Path, tmp_path: Path) -> None:
    content = program.read_bytes()
    with pytest.raises(CorruptError, match="truncated"):
        check(*changed(program, tmp_path, content[: int(len(content) * share)]), "")


def test_an_altered_byte_is_found_before_native_code_reads_it(program: Path, tmp_path: Path) -> None:
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path, _ = changed(program, tmp_path, bytes(content))
    with pytest.raises(CorruptError, match="altered"):
        check(path, describe(program.parent, program.name), "")
    check(program, describe(program.parent, program.name), "")


def test_what_passes_the_check_and_is_no_program_is_one_line(program: Path, tmp_path: Path) -> None:
    content = bytearray(program.read_bytes())
    content[:4] = (len(content) * 2).to_bytes(4, "little")  # the root lies past the end; verified, so no crash
    path, _ = changed(program, tmp_path, bytes(content))
    with pytest.raises(CorruptError, match="cannot open") as caught:
        ExecutorchSession(path, part(path), RunOptions())
    assert "\n" not in str(caught.value)


THREADS = """
import sys
from pathlib import Path
from medge.errors import UsageError
from medge.manifest import PartFiles, describe
from medge.runtimes.base import RunOptions
from medge.runtimes.executorch_backend import ExecutorchSession
from medge.spec import TensorSpec
path = Path(sys.argv[1])
x, y = (TensorSpec(name=name, dtype="float32", shape=("batch", 4)) for name in "xy")
files = PartFiles(files=(describe(path.parent, path.name),), inputs=(x,), outputs=(y,))
session = ExecutorchSession(path, files, RunOptions(threads=3))
from executorch.extension.pybindings import portable_lib
assert portable_lib._threadpool_get_thread_count() == 3
ExecutorchSession(path, files, RunOptions(threads=3))
try:
    ExecutorchSession(path, files, RunOptions(threads=2))
except UsageError as error:
    print("refused", error)
del session
ExecutorchSession(path, files, RunOptions(threads=2))
print("threads", portable_lib._threadpool_get_thread_count())
"""


def test_threads_are_those_asked_for_and_do_not_change_under_a_loaded_program(program: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THREADS, program], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    refused, threads = found.stdout.splitlines()
    assert refused.startswith("refused ExecuTorch has one thread pool")
    assert threads == "threads 2"
