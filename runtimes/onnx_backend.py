"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medge.errors import CorruptError
from medge.manifest import Artifact
from medge.runtimes.base import RunOptions, Session, Tensors, physical_cores
from medge.spec import FloatArray

if TYPE_CHECKING:
    import onnxruntime


SPEED = {"optimization.disable_specified_optimizers": "SkipLayerNormFusion"}
"""ONNX Runtime's SkipLayerNormalization is 10 times slower on a CPU than the Add and LayerNormalization it replaces."""


class OnnxBackend:
    """Opens .onnx parts."""

    def __init__(self) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)  # errors; a fallback is not the user's concern
        self.name = f"onnxruntime {onnxruntime.__version__} cpu"

    def open(self, artifact: Artifact, part: str, options: RunOptions) -> Session:
        """Load one part.

        Raises:
            CorruptError: ONNX Runtime cannot read the file.
        """
        path = artifact.part_path(part)
        return OnnxSession(str(path), artifact.manifest.session, options)


class OnnxSession:
    """One graph, ready to run."""

    def __init__(self, path: str, settings: dict[str, str], options: RunOptions) -> None:
        self._session = inference_session(path, settings, options)
        self._path = path
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        """Run the graph once.

        Raises:
            CorruptError: the graph does not take the inputs that its manifest states.
        """
        try:
            values: list[Any] = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise explain(f"ONNX Runtime cannot run {self._path}", error) from error
        return dict(zip(self._outputs, values, strict=True))


def inference_session(path: str, settings: dict[str, str], options: RunOptions) -> Any:
    """onnxruntime's own session over a file.

    Raises:
        CorruptError: ONNX Runtime cannot read it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(
            path, session_options(settings, options), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises bare pybind exceptions of a dozen classes
        raise explain(f"ONNX Runtime cannot open {path}", error) from error


def explain(what: str, error: Exception) -> CorruptError:
    """The error for what ONNX Runtime refuses."""
    first = (str(error) or type(error).__name__).splitlines()[0]
    return CorruptError(f"{what}: {first}", "Export the artifact again")


def session_options(settings: dict[str, str], options: RunOptions) -> onnxruntime.SessionOptions:
    """The session that the artifact was measured with."""
    import onnxruntime

    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = options.threads or physical_cores()
    session.enable_mem_pattern = False  # it speeds nothing up here and holds 90 MB for MedSigLIP
    for key, value in settings.items():
        session.add_session_config_entry(key, value)
    return session
