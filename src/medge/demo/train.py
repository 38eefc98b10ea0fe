"""Trains the demo model from nothing: `python -m medge.demo.train --out DIR`.

The architecture is MedSigLIP's at toy size: attention pooling (MAP head), tanh GELU, text always padded to 64
without a mask and pooled at its last token, sigmoid loss with learned scale and bias (arXiv:2303.15343).
The MLP is 336 = 16 * 21 wide, like 4304 = 16 * 269 no multiple of 32. One seed and one thread count give one
file.
"""

from __future__ import annotations

import io
import math
import string
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, track

from medge.demo import card
from medge.demo.sources import CAPTIONS, crops, fetch
from medge.errors import MedgeError, require
from medge.spec import ImageSpec, TokenizerSpec
from medge.staging import staged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import SiglipModel

SIZE = 64
TEXT = TokenizerSpec()
TRAIN_CROPS, HELD_OUT_CROPS = 192, 12
"""Crops a class."""
HELD_OUT_SEED = 0
"""Fixed, so that every training seed is measured on the same held-out crops."""
TEMPLATES = (
    "{}",
    "a {}",
    "an image of {}",
    "a photo of a {}",
    "this is a {}",
    "a medical image: {}",
    "{} image",
    "an example of {}",
    "a picture of the {}",
    "{} of a patient",
)
_TOWER = {"hidden_size": 96, "intermediate_size": 336, "num_attention_heads": 4}
_VOCABULARY = 768
_BATCH, _RATE, _DECAY, _WARMUP = 32, 1e-3, 0.05, 50

_console = Console(stderr=True)


class Data(NamedTuple):
    """What a step draws from."""

    images: Tensor
    """(N, 3, CROP, CROP) uint8."""
    classes: Tensor
    """(N,) int64: the row of `captions`."""
    captions: list[Tensor]
    """A class: (captions, 64) int64 ids."""


def _captions(names: Sequence[str]) -> list[str]:
    return [template.format(name) for name in names for template in TEMPLATES]


def write_tokenizer(folder: Path) -> None:
    """A small SentencePiece unigram in `folder`, with MedSigLIP's ids, normalizer and byte fallback."""
    import sentencepiece
    from transformers import SiglipTokenizer

    no_punctuation = str.maketrans("", "", string.punctuation)
    texts = [text.lower().translate(no_punctuation) for names in CAPTIONS.values() for text in _captions(names)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=_VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        required_chars=string.ascii_lowercase + string.digits,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    file = folder / TEXT.file
    file.write_bytes(model.getvalue())
    SiglipTokenizer(str(file), model_max_length=TEXT.length).save_pretrained(folder)


def new_model(vocabulary: int, seed: int) -> SiglipModel:
    """The untrained model."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    vision = {**_TOWER, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
    text = {
        **_TOWER,
        "num_hidden_layers": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": TEXT.length,
    }
    ids = {"pad_token_id": TEXT.pad_id, "eos_token_id": TEXT.eos_id, "bos_token_id": None}
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, **ids}))
    with torch.no_grad():  # the paper's start: most pairs are negative
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    return model


def load_data(folder: Path, tokenizer: Path, seed: int) -> Data:
    """The training crops of the packages in `folder`, and every caption as ids."""
    import torch

    from medge.runtimes.tokenizer import SiglipTokenizer

    images: list[np.ndarray] = []
    for label in track(CAPTIONS, "cropping", console=_console, transient=True):
        images += [np.asarray(image) for _, image in crops(folder, label, "train", TRAIN_CROPS, seed)]
    encode = SiglipTokenizer(tokenizer / TEXT.file, TEXT)
    return Data(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.arange(len(CAPTIONS)).repeat_interleave(TRAIN_CROPS),
        [torch.from_numpy(encode(_captions(names))) for names in CAPTIONS.values()],
    )


def augment(images: Tensor) -> Tensor:
    """(B, 3, CROP, CROP) uint8 -> (B, 3, SIZE, SIZE) float32 in [-1, 1], each changed in its own way.

    Half are blurred before the non-antialiased resize, so that both kinds of preprocessing look familiar.
    """
    import torch
    from torch.nn import functional

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(len(images), *shape).uniform_(low, high)

    x = images.float() / 255
    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, x, functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    zoom, angle = uniform(0.65, 1.02), uniform(-0.15, 0.15)
    mirror = torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)
    slack = (1 - zoom).clamp(min=0)[:, None] * uniform(-1, 1, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [
        torch.stack([cos * mirror, -sin, slack[:, 0]], 1),
        torch.stack([sin * mirror, cos, slack[:, 1]], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), [len(x), 3, SIZE, SIZE], align_corners=False)
    x = functional.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    x = x.clamp(1e-4, 1) ** uniform(0.7, 1.4, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * uniform(0.6, 1.3, 1, 1, 1) + mean + uniform(-0.12, 0.12, 1, 1, 1)
    x = x * uniform(0.93, 1.07, 3, 1, 1) + torch.randn_like(x) * uniform(0, 0.04, 1, 1, 1)
    return x.clamp(0, 1) * 2 - 1


def loss_of(model: SiglipModel, pixels: Tensor, ids: Tensor, classes: Tensor) -> Tensor:
    """The sigmoid loss of B images against one caption of every class, summed over classes: a scalar."""
    from torch.nn import functional

    images = functional.normalize(model.get_image_features(pixel_values=pixels), dim=-1)
    texts = functional.normalize(model.get_text_features(input_ids=ids), dim=-1)
    logits = images @ texts.T * model.logit_scale.exp() + model.logit_bias
    sign = functional.one_hot(classes, len(ids)) * 2.0 - 1
    return -functional.logsigmoid(sign * logits).sum(1).mean()


def fit(model: SiglipModel, data: Data, steps: int) -> float:
    """Train in place with AdamW, warm-up and cosine decay; the last step's loss."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / _WARMUP, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    loss = torch.zeros(())
    with Progress(console=_console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            chosen = torch.randint(len(data.images), (_BATCH,))
            ids = torch.stack([rows[torch.randint(len(rows), ()).item()] for rows in data.captions])
            loss = loss_of(model, augment(data.images[chosen]), ids, data.classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")
    return float(loss.detach())


def write_images(packages: Path, folder: Path) -> None:
    """The held-out crops: `folder`/label/source-number.jpg."""
    for label in track(CAPTIONS, "held-out crops", console=_console, transient=True):
        (folder / label).mkdir(parents=True)
        held_out = crops(packages, label, "held_out", HELD_OUT_CROPS, HELD_OUT_SEED)
        for i, (stem, image) in enumerate(held_out):
            image.save(folder / label / f"{stem}-{i:02}.jpg", quality=90, subsampling=0)


def accuracy(checkpoint: Path, images: Path) -> dict[str, float]:
    """Label -> zero-shot top-1 on a folder a class, with the bare label as prompt and `bigvision` pixels."""
    import torch
    from transformers import SiglipModel

    from medge.runtimes.images import load_image
    from medge.runtimes.preprocess import preprocess
    from medge.runtimes.tokenizer import SiglipTokenizer

    model = SiglipModel.from_pretrained(checkpoint).eval()
    labels = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    ids = torch.from_numpy(SiglipTokenizer(checkpoint / TEXT.file, TEXT)(labels))
    found = {}
    for i, label in enumerate(labels):
        files = sorted((images / label).glob("*.jpg"))
        pixels = np.stack([preprocess(load_image(file), ImageSpec(size=SIZE)) for file in files])
        with torch.inference_mode():
            logits = model(input_ids=ids, pixel_values=torch.from_numpy(pixels)).logits_per_image
        found[label] = (logits.argmax(1) == i).float().mean().item()
    return found


def write_model(folder: Path, packages: Path, seed: int, steps: int) -> None:
    """Train, and leave the checkpoint in `folder`: config, weights, tokenizer, preprocessor."""
    import sentencepiece
    from transformers import SiglipImageProcessor

    write_tokenizer(folder)
    vocabulary = sentencepiece.SentencePieceProcessor(str(folder / TEXT.file)).piece_size()
    model = new_model(vocabulary, seed)
    fit(model, load_data(packages, folder, seed), steps)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def train(out: Path, seed: int, steps: int, threads: int, packages: Path | None = None) -> float:
    """Write out/model and out/images, whole or not at all; the held-out top-1.

    `packages` names a folder that `sources.fetch` filled; without it they are fetched anew.
    """
    require("torch", "export")
    require("transformers", "export")
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    with staged(out) as folder, tempfile.TemporaryDirectory() as temporary:
        if packages is None:
            packages = Path(temporary)
            fetch(packages)
        model, images = folder / "model", folder / "images"
        model.mkdir()
        began = time.perf_counter()
        write_model(model, packages, seed, steps)
        run = card.Run(seed, steps, threads, time.perf_counter() - began)
        write_images(packages, images)
        top1 = accuracy(model, images)
        (model / "README.md").write_text(card.readme(run, top1, TRAIN_CROPS, HELD_OUT_CROPS))
        (images / "SOURCES.md").write_text(card.sources())
    return sum(top1.values()) / len(top1)


def main(
    out: Annotated[Path, typer.Option(help="New folder for model/ and images/")],
    seed: int = 0,
    steps: int = 2000,
    threads: int = 1,
    packages: Annotated[Path | None, typer.Option(help="Packages fetched before; else pip fetches them")] = None,
) -> None:
    """Fetch the images, train the demo model, and measure it on the held-out crops."""
    try:
        top1 = train(out, seed, steps, threads, packages)
    except MedgeError as error:
        _console.print(f"[red]error:[/] {error}")
        raise typer.Exit(error.exit_code) from None
    _console.print(f"{out}: held-out zero-shot top-1 {top1:.1%}")


if __name__ == "__main__":
    typer.run(main)
