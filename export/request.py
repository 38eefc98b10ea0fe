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
from medge.spec import Variant, variant

SETTINGS = {
    "variant": "preprocessing: " + ", ".join(get_args(Variant)),
    "parity": "how many sample images and prompts to compare on, or off",
    "calibration": "a folder of your own images for calibration and sensitivity",
    "layout": "split (one graph a tower) or optimum (the joint graph of optimum's exporter)",
}
LAYOUTS = ("split", "optimum")
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
    on_progress: Progress = lambda stage, done, total: None

    def __post_init__(self) -> None:
        for name in self.settings:
            if name not in SETTINGS:
                known = "; ".join(f"{key}: {text}" for key, text in SETTINGS.items())
                raise UsageError(f"'{name}' is no setting of medge export", f"Settings: {known}")
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout={self.layout} is none of: {', '.join(LAYOUTS)}")
        _ = self.variant, self.parity_samples  # say now what would be wrong after minutes of work
        if self.checkpoint.root.resolve().is_relative_to(self.out.resolve()):
            raise UsageError(f"{self.out} holds the checkpoint itself", "Name another folder")

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
    def parity_samples(self) -> int:
        """How many samples parity uses; 0 is off."""
        value = self.settings.get("parity", str(self._default_parity_samples()))
        if value != "off" and not (value.isdecimal() and int(value) > 0):
            raise UsageError(f"parity={value} is neither 'off' nor a number of samples")
        return 0 if value == "off" else int(value)

    def _default_parity_samples(self) -> int:
        return PARITY_SAMPLES if self.checkpoint.spec.parameters < LARGE else PARITY_SAMPLES_LARGE

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
    def key(self) -> str:
        """Identity of the work: only the same request resumes a partial folder."""
        settings = {k: v for k, v in self.settings.items() if k != "parity"}
        lines = [
            self.checkpoint.sha256,
            self.scheme.digest,
            self.format,
            json.dumps(settings, sort_keys=True),
        ]
        return hashlib.sha256("\n".join([*lines, __version__]).encode()).hexdigest()
