"""Thin ctypes bindings on libggml, the one that llama-cpp-python brings; llama_cpp itself is not imported.

Only pointers, numbers and one struct cross the border, never the layout of a tensor. What ggml checks with an
assertion ends the process, so callers check shapes first (runtimes/ggml_graph.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import MissingExtraError
from medge.runtimes.gguf_file import BlockType

_REMEDY = "Run: pip install -U 'medge[gguf]'"
_CPU = 0
"""GGML_BACKEND_DEVICE_TYPE_CPU."""
_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Feature(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("value", c_char_p))


_P, _N, _I = c_void_p, c_int64, c_int
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_log_set": (None, (_LOG, _P)),
    "ggml_type_name": (c_char_p, (_I,)),
    "ggml_type_size": (c_size_t, (_I,)),
    "ggml_blck_size": (_N, (_I,)),
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_nbytes": (c_size_t, (_P,)),
    "ggml_new_tensor_4d": (_P, (_P, _I, _N, _N, _N, _N)),
    "ggml_set_input": (None, (_P,)),
    "ggml_set_output": (None, (_P,)),
    "ggml_new_graph_custom": (_P, (_P, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    # operations
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_div": (_P, (_P, _P, _P)),
    "ggml_sqr": (_P, (_P, _P)),
    "ggml_silu": (_P, (_P, _P)),
    "ggml_scale_bias": (_P, (_P, _P, c_float, c_float)),
    "ggml_norm": (_P, (_P, _P, c_float)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_im2col": (_P, (_P, _P, _P, _I, _I, _I, _I, _I, _I, c_bool, _I)),
    "ggml_reshape_2d": (_P, (_P, _P, _N, _N)),
    "ggml_reshape_3d": (_P, (_P, _P, _N, _N, _N)),
    "ggml_view_2d": (_P, (_P, _P, _N, _N, c_size_t, c_size_t)),
    "ggml_permute": (_P, (_P, _P, _I, _I, _I, _I)),
    "ggml_transpose": (_P, (_P, _P)),
    "ggml_cont": (_P, (_P, _P)),
    "ggml_soft_max": (_P, (_P, _P)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, c_float, c_float, c_float)),
    # memory and execution
    "ggml_backend_load_all_from_path": (None, (c_char_p,)),
    "ggml_backend_dev_by_type": (_P, (_I,)),
    "ggml_backend_dev_init": (_P, (_P, c_char_p)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_dev_buffer_type": (_P, (_P,)),
    "ggml_backend_dev_supports_op": (c_bool, (_P, _P)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, c_char_p)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_tensor_set": (None, (_P, _P, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (_P, _P, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_alloc_graph": (c_bool, (_P, _P)),
    # conversion
    "ggml_fp16_to_fp32_row": (None, (_P, _P, _N)),
    "ggml_fp32_to_bf16_row": (None, (_P, _P, _N)),
    **{
        f"dequantize_row_{type.name.lower()}": (None, (_P, _P, _N))
        for type in (BlockType.Q4_0, BlockType.Q4_1, BlockType.Q5_1, BlockType.Q8_0, BlockType.IQ4_NL)
    },
}


class Ggml:
    """The library's functions as attributes, without their "ggml_" prefix, and the CPU device."""

    def __init__(self, folder: Path) -> None:
        """Load the libraries of a folder and check that they are what this module was written for.

        Raises:
            MissingExtraError: a library is missing or broken, or one of another interface.
        """
        self._libraries = [_library(folder, name) for name in ("ggml-base", "ggml")]
        for name, (result, arguments) in _SIGNATURES.items():
            setattr(self, name.removeprefix("ggml_"), self._function(name, result, arguments))
        self._check_types()
        self._silence = _LOG(lambda level, text, data: None)  # ggml reports each repacked tensor to stderr
        self.log_set(self._silence, None)
        self.device = self._cpu(folder)
        self.registry = self.backend_dev_backend_reg(self.device)
        self.release: str = self.version().decode()

    def __getattr__(self, name: str) -> Any:  # what __init__ sets; for the type checker
        raise AttributeError(name)

    def proc(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """One of the CPU backend's own functions, which only its registry hands out."""
        address = self.backend_reg_get_proc_address(self.registry, name.encode())
        if not address:
            raise _other(f"'{name}' is missing")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    @property
    def features(self) -> dict[str, str]:
        """Instruction sets that this build uses: {"AVX512_BF16": "1", …}."""
        array = self.proc("ggml_backend_get_features", ctypes.POINTER(_Feature), c_void_p)(self.registry)
        found: dict[str, str] = {}
        for feature in array:
            if feature.name is None:
                break
            found[feature.name.decode()] = feature.value.decode()
        return found

    @property
    def extra_buffer_types(self) -> list[int]:
        """Buffer types that lay weights out for this CPU's faster kernels, the best first."""
        array = self.proc("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(c_void_p), c_void_p)(self.device)
        found: list[int] = []
        for pointer in array or ():
            if not pointer:
                break
            found.append(pointer)
        return found

    def set_threads(self, backend: int, threads: int) -> None:
        """Compute threads of a backend."""
        self.proc("ggml_backend_set_n_threads", None, c_void_p, c_int)(backend, threads)

    def context(self, owner: object, tensors: int, graph: int = 0) -> int:
        """Room for the descriptions of `tensors` tensors and a graph of `graph` nodes, freed with its owner."""
        size = self.tensor_overhead() * tensors + (self.graph_overhead_custom(graph, False) if graph else 0)
        context: int = self.init(_InitParams(size, None, True))
        weakref.finalize(owner, self.free, context)
        return context

    def write(self, tensor: int, data: NDArray[Any]) -> None:
        """Fill a tensor; `data` is contiguous and of its very size."""
        assert data.nbytes == self.nbytes(tensor) and data.flags.c_contiguous  # noqa: S101, PT018 - else memory breaks
        self.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

    def read(self, tensor: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 tensor's values."""
        data = np.empty(shape, np.float32)
        assert data.nbytes == self.nbytes(tensor)  # noqa: S101 - else memory breaks
        self.backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
        return data

    def _function(self, name: str, result: Any, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                return function  # type: ignore[no-any-return]
        raise _other(f"'{name}' is missing")

    def _check_types(self) -> None:
        """The numbers of the block types, and what a block is, are as the files have them."""
        for type in BlockType:
            found = (self.type_name(type) or b"").decode().lower(), self.blck_size(type), self.type_size(type)
            if found != (type.name.lower(), type.values, type.bytes):
                raise _other(f"type {type.value} is {found}, not {type.name}")

    def _cpu(self, folder: Path) -> int:
        """The CPU device, which some builds keep in libraries of their own."""
        device = self.backend_dev_by_type(_CPU)
        if not device:
            self.backend_load_all_from_path(str(folder).encode())
            device = self.backend_dev_by_type(_CPU)
        if not device:
            raise _other("it has no CPU backend")
        return int(device)


@cache
def load() -> Ggml:
    """The libraries beside llama_cpp, once a process.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or its ggml is none that medge can drive.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("'llama_cpp' is not installed", "Run: pip install 'medge[gguf]'")
    return Ggml(Path(spec.submodule_search_locations[0]) / "lib")


def _library(folder: Path, name: str) -> ctypes.CDLL:
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
    if hasattr(os, "add_dll_directory") and folder.is_dir():
        os.add_dll_directory(str(folder))
    try:
        return ctypes.CDLL(str(folder / f"{prefix}{name}{suffix}"))
    except OSError as error:
        raise MissingExtraError(f"libggml of llama-cpp-python cannot be loaded: {error}", _REMEDY) from error


def _other(what: str) -> MissingExtraError:
    return MissingExtraError(f"libggml of llama-cpp-python is of another version: {what}", _REMEDY)
