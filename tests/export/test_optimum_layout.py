"""`--set layout=optimum`: the folder that optimum's own model class loads, with transformers' answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.errors import UnsupportedError
from medge.manifest import Artifact
from medge.runtimes import open_embedder as open_artifact
from medge.runtimes.base import normalize

pytest.importorskip("optimum.onnxruntime")


@pytest.fixture(scope="module")
def joint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from medge.checkpoint import Checkpoint
    from medge.export.pipeline import export
    from medge.export.request import Request
    from medge.quantize.scheme import load

    out = tmp_path_factory.mktemp("optimum") / "out"
    return export(Request(Checkpoint.open(checkpoint), "onnx", load("fp32"), out, {"layout": "optimum"}))


def test_optimum_loads_it_and_answers_as_transformers(joint: Artifact, reference: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.onnxruntime import ORTModelForZeroShotImageClassification as Model

        model = Model.from_pretrained(joint.root, local_files_only=True)
    found = model(input_ids=reference.ids, pixel_values=reference.pixels)
    np.testing.assert_allclose(normalize(found.image_embeds), reference.image_embeddings, atol=1e-4)
    np.testing.assert_allclose(normalize(found.text_embeds), reference.text_embeddings, atol=1e-4)
    expected = 10 * reference.image_embeddings @ reference.text_embeddings.T - 10
    np.testing.assert_allclose(found.logits_per_image, expected, atol=1e-3)


def test_it_is_an_artifact_like_any_other(joint: Artifact) -> None:
    listed = {file.path for file in joint.verify()}
    assert listed | {"manifest.json"} == {path.name for path in joint.root.iterdir()}
    assert {"NOTICE", "README.md", "model.onnx", "config.json"} <= listed
    assert list(joint.manifest.parts) == ["joint"]


def test_medge_s_own_runtime_says_that_it_is_not_for_it(joint: Artifact) -> None:
    with pytest.raises(UnsupportedError, match=r"the graph of another tool \(joint\).*ORTModelForZeroShotImage"):
        open_artifact(joint.root)


def test_only_fp32_exists(run_export: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="optimum's own fp32 ONNX export, not onnx int8"):
        run_export("int8", layout="optimum")
    assert not (tmp_path / "out").exists()
