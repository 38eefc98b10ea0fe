"""What `medge export` is asked for, validated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from medge import __version__
from medge.checkpoint import Checkpoint
from medge.errors import UsageError
from medge.progress import Progress, counter
from medge.quantize.scheme import Scheme
from medge.samples import list_images, sample_root
from medge.spec import ChatSpec, ModelSpec, Task, Variant, variant
from medge.staging import stamp


@dataclass(frozen=True)
class Setting:
    """One `--set` of medge export."""

    help: str
    values: tuple[str, ...] = ()
    """What it may be, the default first; empty: checked where it is used."""
    format: str = ""
    """The one format that it is for; empty: all."""
    task: Task | None = None
    """The one kind of model that it is for; None: all."""
    path: bool = False
    """A path, unless it is one of `values`."""


SETTINGS = {
    "variant": Setting("preprocessing: " + ", ".join(get_args(Variant)), task="embed"),
    "parity": Setting("how many sample images and prompts to compare on, or off"),
    "calibration": Setting(
        "your own data: a folder of images or, for chat models, also a text or a .jsonl of prompts", path=True
    ),
    "importance": Setting(
        "off, collect (what each weight column meets, on the calibration data) or llama.cpp's matrix, a file",
        ("off", "collect"),
        "gguf",
        task="generate",
        path=True,
    ),
    "layout": Setting(
        "split (one graph a tower) or optimum (the joint graph of optimum's exporter)", ("split", "optimum"), "onnx"
    ),
    "fallback": Setting(
        "error or allow: whether a heavy operation may stay outside XNNPACK", ("error", "allow"), "executorch"
    ),
    "context": Setting("tokens that a chat model's cache may hold, at most", format="onnx", task="generate"),
    "vision": Setting(
        "gguf (llama.cpp's image tower) or onnx (int8 in ONNX Runtime, several times faster)",
        ("gguf", "onnx"),
        "gguf",
        task="generate",
    ),
    "target": Setting("the oldest system to run on, ios18 or ios17", ("ios18", "ios17"), "coreml"),
    "input": Setting("array (a float tensor) or image (RGB pixels, scaled inside)", ("array", "image"), "coreml"),
}
CONTEXT = 32_768
"""Room for a CT series of 85 slices, which is 21,760 tokens. Rotations for MedGemma's own 131,072 would take 268 MB."""
PARITY_SAMPLES = 4
PARITY_SAMPLES_LARGE = 2
"""From LARGE parameters on, where one image through the fp32 reference costs as much as the export itself."""
LARGE = 100_000_000


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    checkpoint: Checkpoint
    format: str
    scheme: Scheme
    out: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    replace: bool = False
    tapped: bool = False
    """Also write the output of every block, for tracing (parity = off: an Embedder takes one output)."""
    on_progress: Progress = lambda stage, done, total: None

    def __post_init__(self) -> None:
        for name, value in self.settings.items():
            self._check(name, value)
        if isinstance(self.checkpoint.any_spec, ModelSpec):
            _ = self.variant  # say now what would be wrong after minutes of work
        _ = self.parity_samples, self.context
        if self.checkpoint.root.resolve().is_relative_to(self.out.resolve()):
            raise UsageError(f"{self.out} holds the checkpoint itself", "Name another folder")

    def _check(self, name: str, value: str) -> None:
        if name not in SETTINGS:
            known = "; ".join(f"{key}: {one.help}" for key, one in SETTINGS.items())
            raise UsageError(f"'{name}' is no setting of medge export", f"Settings: {known}")
        setting = SETTINGS[name]
        if setting.format not in ("", self.format):
            raise UsageError(f"'{name}' is a setting of {setting.format}, not of {self.format}", "Leave it out")
        if setting.task not in (None, self.checkpoint.any_spec.task):
            kind = {"embed": "dual encoders", "generate": "chat models"}[setting.task]
            raise UsageError(f"'{name}' is a setting of {kind} alone", "Leave it out")
        if setting.values and not setting.path and value not in setting.values:
            raise UsageError(f"{name}={value} is none of: {', '.join(setting.values)}")

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback that adds up what is done of a stage and reports it."""
        return counter(self.on_progress, stage, total)

    @property
    def layout(self) -> str:
        """One graph a tower, or optimum's joint one."""
        return self.settings.get("layout", "split")

    @property
    def variant(self) -> Variant:
        """The preprocessing variant, validated."""
        value = self.settings.get("variant", self.checkpoint.spec.image.variant)
        return variant(value)

    @property
    def context(self) -> int:
        """Tokens that an artifact's cache may hold: rotations are stored for as many. 0 of a dual encoder."""
        spec = self.checkpoint.any_spec
        if not isinstance(spec, ChatSpec):
            return 0
        own = spec.chat.context
        if self.format != "onnx":
            return own
        value = self.settings.get("context", str(min(own, CONTEXT)))
        if not (value.isdecimal() and 1 < int(value) <= own):
            raise UsageError(f"context={value} is no number of tokens", f"The model takes 2 to {own:,}")
        return int(value)

    @property
    def parity_samples(self) -> int:
        """How many samples parity uses; 0 is off."""
        value = self.settings.get("parity", str(self._default_parity_samples()))
        if value != "off" and not (value.isdecimal() and int(value) > 0):
            raise UsageError(f"parity={value} is neither 'off' nor a number of samples")
        return 0 if value == "off" else int(value)

    def _default_parity_samples(self) -> int:
        return PARITY_SAMPLES if self.checkpoint.any_spec.parameters < LARGE else PARITY_SAMPLES_LARGE

    def calibration_images(self, count: int) -> list[Path]:
        """Images for calibration and sensitivity: the user's folder, or those that ship with medge.

        Raises:
            UsageError: the folder holds no image.
        """
        root = Path(self.settings["calibration"]) if "calibration" in self.settings else sample_root()
        images = list_images(root, count)
        if not images:
            raise UsageError(f"{root} holds no images to calibrate on")
        return images

    @property
    def recorded(self) -> dict[str, str]:
        """The settings for a manifest, which holds no path."""
        return {**self.settings, **dict.fromkeys(self._paths(), "own")}

    def _paths(self) -> dict[str, Path]:
        given = ((name, SETTINGS[name], value) for name, value in self.settings.items())
        return {name: Path(value) for name, setting, value in given if setting.path and value not in setting.values}

    @property
    def key(self) -> str:
        """Identity of the work: only the same request resumes a partial folder."""
        settings = {k: v for k, v in self.settings.items() if k != "parity"}
        lines = [
            self.checkpoint.stamp,
            self.scheme.digest,
            f"{self.format} {self.tapped}",
            json.dumps(settings, sort_keys=True),
            *(stamp(_files(path)) for path in self._paths().values()),
        ]
        return hashlib.sha256("\n".join([*lines, __version__]).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return [one for one in sorted(path.rglob("*")) if one.is_file()] if path.is_dir() else [path]
