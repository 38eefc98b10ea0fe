"""Weights are proven complete before anyone reads them; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, MedgeError, UnsupportedError, UsageError, WeightsError

NAME = "text_model.head.bias"
INDEX = "model.safetensors.index.json"


def edit_config(root: Path, **fields: Any) -> None:
    path = root / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        tower, _, key = name.partition("__")
        if key:
            config[tower][key] = value
        else:
            config[tower] = value
    path.write_text(json.dumps(config))


def edit_weights(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = safetensors.numpy.load_file(root / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, root / "model.safetensors", {"format": "pt"})


def split(root: Path) -> dict[str, str]:
    """Two shards and their index, as the hub has them."""
    tensors = safetensors.numpy.load_file(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, root / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_reads_the_values(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    expected = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    assert set(opened.spec.tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(opened.read(name), value)
    assert opened.scalars() == pytest.approx({"logit_scale": np.log(10), "logit_bias": -10.0})


def test_shards_and_one_file_are_one_checkpoint(own_checkpoint: Path, checkpoint: Path) -> None:
    split(own_checkpoint)
    sharded, whole = Checkpoint.open(own_checkpoint), Checkpoint.open(checkpoint)
    for name in whole.spec.tensors:
        np.testing.assert_array_equal(sharded.read(name), whole.read(name))
    assert sharded.sha256 != whole.sha256  # identity is of the files


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_read_as_float32(dtype: str, bound: float, own_checkpoint: Path, checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensors = load_file(own_checkpoint / "model.safetensors")
    halved = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    save_file(halved, own_checkpoint / "model.safetensors", {"format": "pt"})
    found, exact = Checkpoint.open(own_checkpoint).read(NAME), Checkpoint.open(checkpoint).read(NAME)
    np.testing.assert_array_equal(found, halved[NAME].float().numpy())
    np.testing.assert_allclose(found, exact, rtol=bound)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_when_read(value: float, own_checkpoint: Path) -> None:
    edit_weights(own_checkpoint, lambda tensors: tensors[NAME].__setitem__(3, value))
    with pytest.raises(CorruptError, match=f"'{NAME}'.*NaN or infinity"):
        Checkpoint.open(own_checkpoint).read(NAME)


def test_large_finite_weights_are_not_taken_for_infinite(own_checkpoint: Path) -> None:
    edit_weights(own_checkpoint, lambda tensors: tensors[NAME].fill(3e38))
    assert Checkpoint.open(own_checkpoint).read(NAME)[0] == np.float32(3e38)


def truncate(root: Path) -> None:
    path = root / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(content)


def lost_shard(root: Path) -> None:
    (root / split(root)[NAME]).unlink()


def index(weight_map: Any) -> Callable[[Path], object]:
    return text(INDEX, json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        pytest.param(truncate, CorruptError, "is truncated", id="truncated"),
        pytest.param(without("config.json"), UsageError, "is no checkpoint", id="no config"),
        pytest.param(text("config.json", "{"), CorruptError, r"config\.json is no JSON", id="config no JSON"),
        pytest.param(text("config.json", "[" * 10**5), CorruptError, "is no JSON", id="config nested without end"),
        pytest.param(text("config.json", "[]"), CorruptError, "no JSON object", id="config a list"),
        pytest.param(text("config.json", "{}"), UnsupportedError, "It reads: siglip", id="config empty"),
        pytest.param(without("model.safetensors"), WeightsError, r"model\.safetensors is missing", id="no weights"),
        pytest.param(lost_shard, WeightsError, r"of-00002\.safetensors is missing", id="missing shard"),
        pytest.param(index({"x": "../x.safetensors"}), CorruptError, "outside its folder", id="shard outside"),
        pytest.param(index({"x": "/x.safetensors"}), CorruptError, "outside its folder", id="absolute shard"),
        pytest.param(index({"x": ["list"], "y": 3}), WeightsError, "is missing", id="shards no names"),
        pytest.param(index([]), WeightsError, "lacks", id="index no object"),
        pytest.param(text(INDEX, "{"), CorruptError, "is no JSON", id="index no JSON"),
        pytest.param(lambda r: edit_weights(r, lambda t: t.pop(NAME)), WeightsError, NAME, id="missing tensor"),
        pytest.param(lambda r: edit_weights(r, lambda t: t.update(lora=np.ones(2))), CorruptError, "F64", id="dtype"),
        pytest.param(lambda r: edit_weights(r, lambda t: t.update(lora=t[NAME].copy())), CorruptError, "'lora'",
                     id="surplus tensor"),
        pytest.param(lambda r: edit_config(r, vision_config__hidden_size=128), CorruptError, "has shape",
                     id="shapes disagree"),
        pytest.param(lambda r: edit_config(r, text_config__num_hidden_layers=3), WeightsError, "lacks",
                     id="a layer too many"),
        pytest.param(lambda r: edit_config(r, text_config__num_hidden_layers=1), CorruptError, "holds",
                     id="a layer too few"),
        pytest.param(lambda r: edit_config(r, vision_config__num_attention_heads=5), CorruptError, "5 heads",
                     id="heads do not divide"),
        pytest.param(lambda r: edit_config(r, vision_config__num_attention_heads=0), CorruptError, "num_attention",
                     id="no heads"),
        pytest.param(lambda r: edit_config(r, vision_config__num_hidden_layers=10**12), CorruptError, "num_hidden",
                     id="endless layers"),
        pytest.param(lambda r: edit_config(r, vision_config__image_size=10**6), CorruptError, "size",
                     id="gigantic image"),
        pytest.param(lambda r: edit_config(r, vision_config__num_channels=1), CorruptError, "num_channels",
                     id="grey"),
        pytest.param(lambda r: edit_config(r, vision_config__hidden_act="gelu"), CorruptError, "hidden_act",
                     id="another activation"),
        pytest.param(lambda r: edit_config(r, vision_config=None), CorruptError, "vision_config", id="no tower"),
        pytest.param(lambda r: edit_config(r, model_type="gemma4"), UnsupportedError, "gemma4", id="another model"),
        pytest.param(lambda r: edit_config(r, model_type=["siglip"]), UnsupportedError, "reads no", id="type a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    damage: Callable[[Path], object], kind: type[MedgeError], message: str, own_checkpoint: Path
) -> None:
    damage(own_checkpoint)
    with pytest.raises(kind, match=message) as caught:
        Checkpoint.open(own_checkpoint)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_a_part_of_it(own_checkpoint: Path) -> None:
    (own_checkpoint / "spiece.model").unlink()
    with pytest.raises(WeightsError, match=r"spiece\.model is missing"):
        Checkpoint.open(own_checkpoint).tokenizer_file()


def test_a_weight_is_read_when_asked_for(own_checkpoint: Path) -> None:
    edit_weights(own_checkpoint, lambda tensors: None)  # the order of the file is now that package's
    weight = Checkpoint.open(own_checkpoint).weight(NAME).map("doubled", lambda x: x * 2)
    edit_weights(own_checkpoint, lambda tensors: tensors[NAME].fill(4))
    assert weight.name == "doubled"
    assert weight.read()[0] == 8
