"""`python -m training STEP --work DIR`: the steps that make the model, in this order.

fetch       download the packages that the text comes from (Debian and npm clients)
collect     gather text and facts from them into DIR/collection.json.xz
tokenizer   learn the tokenizer and write it, with the configs, into the model's folder
prepare     make the token streams DIR/*.npz
basis       train from random weights; writes DIR/basis.safetensors
finish      train on from DIR/basis.safetensors; writes the model's weights

The last two run with PyTorch where it finds a CUDA device, otherwise with MLX. They are resumed nowhere: `--tokens`
says how long they take.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from . import MODEL, collect, prepare, recipe, sources, tokenizer
from .shape import Shape
from .talks import Talks


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(
        prog="training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("step", choices=["fetch", "collect", "tokenizer", "prepare", "basis", "finish"])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is downloaded and made on the way")
    parser.add_argument("--tokens", type=int, help="tokens to train on (default: as the shipped weights)")
    parser.add_argument("--out", type=Path, default=MODEL, help="the model's folder (default: the built-in one)")
    given = parser.parse_args()
    collection, streams, first = (given.work / name for name in ("collection.json.xz", "streams", "basis.safetensors"))
    tokens = [given.tokens] if given.tokens else []
    if given.step == "fetch":
        sources.fetch(given.work / "sources")
    elif given.step == "collect":
        collect.save(collect.collect(given.work / "sources"), collection)
    elif given.step == "tokenizer":
        make_tokenizer(collect.load(collection), given.out)
    elif given.step == "prepare":
        learned = Tokenizer.from_file(str(given.out / "tokenizer.json"))
        prepare.prepare(collect.load(collection), learned, prepare.Sizes(), streams)
    elif given.step == "basis":
        train(recipe.basis(*tokens), streams, first)
    else:
        train(recipe.finish(*tokens), streams, given.out / "model.safetensors", first)


def make_tokenizer(data: collect.Collection, folder: Path) -> None:
    """Learn the tokenizer from a third of the documents and about as much conversation."""
    talks, rng = Talks(data), Random("tokenizer")
    texts = [d.text for d in data.documents[::3] if not d.held_out]
    said = [text for _ in range(20_000) for _, text in talks.short(rng)]
    shape = Shape()
    tokenizer.write(tokenizer.train(texts + said, shape.vocab), folder, shape.positions)
    shape.write(folder)


def train(plan: recipe.Plan, streams: Path, out: Path, start: Path | None = None) -> None:
    """Train with what this machine has."""
    try:
        import torch

        cuda = torch.cuda.is_available()
    except ImportError:
        cuda = False
    if cuda:
        from .train_torch import train as train_with_torch

        train_with_torch(Shape(), plan, streams, out, start)
    else:
        from .train_mlx import train as train_with_mlx

        train_with_mlx(Shape(), plan, streams, out, start)


if __name__ == "__main__":
    main()
