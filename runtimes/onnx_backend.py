"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medge.errors import CorruptError
from medge.manifest import Artifact
from medge.runtimes.base import RunOptions, Session, Tensors, physical_cores
from medge.spec import FloatArray

if TYPE_CHECKING:
    import onnxruntime


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
        import onnxruntime

        try:
            self._session = onnxruntime.InferenceSession(
                path, session_options(settings, options), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises bare pybind exceptions of a dozen classes
            raise _explain(f"ONNX Runtime cannot open {path}", error) from error
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
            raise _explain(f"ONNX Runtime cannot run {self._path}", error) from error
        return dict(zip(self._outputs, values, strict=True))


def _explain(what: str, error: Exception) -> CorruptError:
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
