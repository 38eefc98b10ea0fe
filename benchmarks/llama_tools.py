"""llama.cpp's own programs, medge's peers: built from the source that llama-cpp-python ships.

So the tools and the library that medge runs on are one version. Needs cmake, a C++ compiler and five minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medge.errors import MedgeError, require

_PACKAGE = "llama-cpp-python"
_PROGRAMS = ("llama-quantize", "llama-bench")
_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF")


@dataclass(frozen=True)
class LlamaTools:
    """Where the programs are."""

    source: Path
    build: Path

    def convert(self, checkpoint: Path, outtype: str, out: Path, *, mmproj: bool = False) -> list[str]:
        """convert_hf_to_gguf.py on a folder that `with_sentencepiece` made."""
        script = str(self.source / "convert_hf_to_gguf.py")
        part = ["--mmproj"] if mmproj else []
        return [sys.executable, script, str(checkpoint), "--outtype", outtype, "--outfile", str(out), *part]

    def quantize(self, source: Path, out: Path, kind: str, threads: int) -> list[str]:
        """llama-quantize to one of its types, such as Q4_K_M."""
        return [str(self.build / "bin" / "llama-quantize"), str(source), str(out), kind, str(threads)]

    def rates(self, decoder: Path, threads: int, *, prompt: int, tokens: int, depth: int) -> dict[str, list[float]]:
        """llama-bench: tokens a second, each of five repetitions. prefill: of a prompt alone; decode: after `depth`."""
        common = ["-m", str(decoder), "-t", str(threads), "-o", "json"]
        prefill = self._bench([*common, "-p", str(prompt), "-n", "0"])
        decode = self._bench([*common, "-p", "0", "-n", str(tokens), "-d", str(depth)])
        return {"prefill": prefill, "decode": decode}

    def _bench(self, arguments: list[str]) -> list[float]:
        command = [str(self.build / "bin" / "llama-bench"), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        return [float(rate) for rate in json.loads(done.stdout)[0]["samples_ts"]]


def build(folder: Path) -> LlamaTools:
    """Download and compile what is missing in a folder.

    Raises:
        MedgeError: pip or the compiler failed; its own message is on stderr.
    """
    tools = LlamaTools(folder / "llama.cpp", folder / "llama.cpp-build")
    if not tools.source.is_dir():
        _unpack(_download(folder), tools.source)
    if not all((tools.build / "bin" / program).is_file() for program in _PROGRAMS):
        _run(["cmake", "-S", str(tools.source), "-B", str(tools.build), *_OPTIONS])
        _run(["cmake", "--build", str(tools.build), "--parallel", "--target", *_PROGRAMS])
    return tools


def _download(folder: Path) -> Path:
    wanted = f"{_PACKAGE}=={version(_PACKAGE)}"
    _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE, "-d", str(folder), wanted])
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def _unpack(archive: Path, source: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(source.parent, filter="data")
    (source.parent / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp").rename(source)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise MedgeError(f"{' '.join(command[:4])} … failed with {done.returncode}", "See its own message above")


def with_sentencepiece(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint by links, with the tokenizer.model that llama.cpp's converter wants beside tokenizer.json.

    Gemma's ids rise with the merges' ranks, so minus the id is a score that merges alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        link = folder / path.name
        if not link.exists():
            link.symlink_to(path.absolute())
    document = json.loads((checkpoint / "tokenizer.json").read_bytes())
    (folder / "tokenizer.model").write_bytes(_sentencepiece(document))
    return folder


def _sentencepiece(document: dict[str, Any]) -> bytes:
    proto = require("sentencepiece.sentencepiece_model_pb2", "eval").ModelProto()
    kinds = proto.SentencePiece
    added = {int(one["id"]): one for one in document["added_tokens"]}
    pieces = {int(i): str(text) for text, i in document["model"]["vocab"].items()}
    pieces |= {i: str(one["content"]) for i, one in added.items()}
    for i in range(max(pieces) + 1):
        text, kind = pieces.get(i, f"[PAD{i}]"), kinds.NORMAL
        if i in added:
            kind = kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
        if text == "<unk>":
            kind = kinds.UNKNOWN
        if len(text) == 6 and text.startswith("<0x"):
            kind = kinds.BYTE
        proto.pieces.add(piece=text, score=-float(i) if kind == kinds.NORMAL else 0.0, type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True  # BPE
    named = {text: i for i, text in pieces.items()}
    for field, text in (("unk_id", "<unk>"), ("bos_id", "<bos>"), ("eos_id", "<eos>"), ("pad_id", "<pad>")):
        setattr(proto.trainer_spec, field, named[text])
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())
