"""Core ML: Apple's runtime on a Mac, the reference interpreter everywhere else."""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from medge.errors import CorruptError, UsageError, require
from medge.manifest import Artifact, Manifest
from medge.runtimes.base import RunOptions, Session, Tensors
from medge.runtimes.mil_package import Array, Package
from medge.runtimes.mil_reference import Interpreter
from medge.spec import FloatArray


def quiet_coremltools() -> Any:
    """coremltools, without what it and torchao log at import about versions and a missing Apple runtime.

    Raises:
        MissingExtraError: it is not installed.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return require("coremltools", "coreml")
    finally:
        logging.disable(disabled)


Predict = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class CoremlBackend:
    """Opens .mlpackage parts."""

    def __init__(self) -> None:
        self._apple = sys.platform == "darwin"
        self.name = (
            f"Core ML, macOS {platform.mac_ver()[0]}"
            if self._apple
            else f"Core ML reference interpreter (numpy {np.__version__}), not Apple's runtime"
        )

    def open(self, artifact: Artifact, part: str, options: RunOptions) -> Session:
        """Load one part. Core ML and numpy choose their own threads: `options` has nothing for them.

        Raises:
            CorruptError: the package is damaged.
            UnsupportedError: off a Mac, an operation that the interpreter lacks.
            MissingExtraError: on a Mac, coremltools is not installed.
        """
        package = Package(artifact.part_path(part).parent)
        package.check_weights()
        predict = _apple(package) if self._apple else Interpreter(package).run
        return CoremlSession(package, artifact.manifest, part, predict)


class CoremlSession:
    """One part. The program's batch is 1, which the Neural Engine needs; a larger batch is run one by one."""

    def __init__(self, package: Package, manifest: Manifest, part: str, predict: Predict) -> None:
        self._package, self._image, self._predict = package, manifest.image, predict
        self._outputs = [output.name for output in manifest.parts[part].outputs]

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        """Run the graph, once for each of the batch.

        Raises:
            UsageError: inputs that the program does not take.
            CorruptError: the program lacks an output that its manifest states, or cannot run.
        """
        sizes = {len(value) for value in inputs.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise UsageError(f"Inputs have batches of {sorted(sizes)}")
        rows = [self._one({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(sizes.pop())]
        return {name: np.concatenate([row[name] for row in rows]) for name in self._outputs}

    def _one(self, inputs: Tensors) -> dict[str, FloatArray]:
        found = self._predict({name: self._native(name, value) for name, value in inputs.items()})
        missing = [name for name in self._outputs if name not in found]
        if missing:
            raise CorruptError(f"{self._package.root} gives no '{missing[0]}'", "Export the artifact again")
        return {name: np.asarray(found[name], np.float32) for name in self._outputs}

    def _native(self, name: str, value: Array) -> Array:
        """As the program takes it: 32-bit integers, and RGB levels for an image input."""
        if value.dtype.kind == "i":
            return value.astype(np.int32)
        if name in self._package.image_inputs and self._image is not None:
            mean, std = (np.reshape(x, (1, -1, 1, 1)) for x in (self._image.mean, self._image.std))
            return np.asarray(np.rint(np.clip((value * std + mean) * 255, 0, 255)), np.float32)
        return value


def _apple(package: Package) -> Predict:
    """coremltools' MLModel on all of the machine's compute units."""
    model = quiet_coremltools().models.MLModel(str(package.root))

    def predict(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        native = {k: _image(v) if k in package.image_inputs else v for k, v in inputs.items()}
        found: dict[str, Array] = model.predict(native)
        return found

    return predict


def _image(levels: Array) -> Any:
    """(1, 3, H, W) levels as the Pillow image that coremltools takes."""
    from PIL import Image

    return Image.fromarray(levels[0].transpose(1, 2, 0).astype(np.uint8))
