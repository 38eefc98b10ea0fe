"""A pass that holds one decoder layer at a time is transformers' own, to the last linear layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.demo import GENERATOR
from medge.export import calibration, importance
from medge.export.gguf_chat import is_vision, names
from medge.export.layer_stream import forward, steps
from medge.export.request import Request
from medge.quantize.scheme import Scheme, load
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import Message, Prompt
from medge.runtimes.torch_checkpoint import load as load_model
from medge.runtimes.torch_generator import TorchGenerator, open_reference
from medge.samples import list_images, sample_root
from medge.spec import FloatArray

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = list_images(sample_root(), 1)[0]
TABLE = "language_model.model.embed_tokens.weight"
OFF = {"parity": "off"}


@pytest.fixture(scope="session")
def reference() -> Iterator[TorchGenerator]:
    generator = open_reference(GENERATOR, device="cpu", options=RunOptions(threads=1))
    yield generator
    generator.close()


def request(root: Path, scheme: str | Scheme = "int4", **settings: str) -> Request:
    found = load(scheme) if isinstance(scheme, str) else scheme
    return Request(Checkpoint.open(root), "gguf", found, Path("out"), {**OFF, **settings})


def asked(reference: TorchGenerator, kind: str) -> Prompt:
    if kind == "image":
        return reference.prompt([Message("user", ("Look at ", IMAGE, " and ", IMAGE, ". The same?"))])
    if kind == "beyond the window":
        return Prompt((2, *np.random.default_rng(0).integers(300, 2000, 700).tolist()))
    return reference.prompt([Message("user", ("Describe the findings.",))])


def no_matter(tensor: str, x: Any) -> None:
    """Watches nothing."""


def test_the_streamed_pass_gives_the_reference_s_logits(chat: Path, reference: TorchGenerator) -> None:
    checkpoint = Checkpoint.open(chat)
    prompts = [asked(reference, kind) for kind in ("text", "image", "beyond the window")]
    done: list[int] = []
    states = forward(checkpoint, prompts, "fp32", no_matter, done.append)
    assert sum(done) == steps(checkpoint, prompts) == 6 + 2
    head = torch.from_numpy(checkpoint.read(TABLE)).T
    for prompt, state in zip(prompts, states, strict=True):
        expected = np.concatenate(list(reference.logits(prompt)))
        np.testing.assert_allclose((state @ head).numpy(), expected, atol=1e-5)


def test_without_an_image_tower_it_does_the_same(text_chat: Path) -> None:
    generator, checkpoint = open_reference(text_chat, device="cpu"), Checkpoint.open(text_chat)
    prompt = asked(generator, "beyond the window")
    (state,) = forward(checkpoint, [prompt], "fp32", no_matter)
    logits = state @ torch.from_numpy(checkpoint.read("model.embed_tokens.weight")).T
    np.testing.assert_allclose(logits.numpy(), np.concatenate(list(generator.logits(prompt))), atol=1e-5)


def test_bf16_is_near_and_finite(chat: Path, reference: TorchGenerator) -> None:
    prompts = [asked(reference, "image")]
    (exact,), (near,) = (forward(Checkpoint.open(chat), prompts, dtype, no_matter) for dtype in ("fp32", "bf16"))
    assert near.dtype == torch.bfloat16
    assert float((near.float() - exact).norm() / exact.norm()) < 0.05


def test_the_matrix_is_what_hooks_on_transformers_see(chat: Path, reference: TorchGenerator) -> None:
    checkpoint = Checkpoint.open(chat)
    prompts = (asked(reference, "text"), asked(reference, "image"))
    found = importance.collect(request(chat), calibration.Calibration("test", prompts))
    model, inputs = load_model(checkpoint, "cpu", torch.float32), dict[str, list[Any]]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2))
            )
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        is_image = ids == model.config.image_token_id
        pixels = [torch.from_numpy(_pixels(checkpoint, picture)) for picture in prompt.images]
        shown = {"pixel_values": torch.stack(pixels)} if pixels else {}
        with torch.inference_mode():
            model(input_ids=ids, token_type_ids=is_image.long(), **shown)
    assert len(found.sums) == len(inputs) == 6 * 7 + 4 * 6
    for name, rows in inputs.items():
        source = name.removeprefix("model.").replace("language_model.", "language_model.model.") + ".weight"
        means = torch.cat(rows).double().square().mean(0).numpy()
        mine = found.of(names(checkpoint.any_spec, vision=is_vision(source))(source))
        assert mine is not None, name
        np.testing.assert_allclose(mine, np.maximum(means, 1e-6 * means.mean()), rtol=1e-4)


def _pixels(checkpoint: Checkpoint, picture: Any) -> FloatArray:
    from medge.runtimes.preprocess import preprocess

    assert checkpoint.chat_spec.image is not None
    return preprocess(picture, checkpoint.chat_spec.image)
