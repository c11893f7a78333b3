"""The figures of the model card: `python -m training.evaluate WHAT [--work DIR]`.

losses      held-out bits per byte, beside a trigram model, gzip -9 and xz -9   (needs the streams in DIR)
positions   held-out loss by position to 32,768                                (needs the streams in DIR)
chats       ten fixed prompts, greedy: the answers, and how many end by themselves
talk        one conversation of several turns, greedy
recall      a name and a place told, asked for again after so many tokens      (needs the collection in DIR)
samples     text from nothing but BOS, seeds 1 to 5, temperature 0.8
speed       decode and prefill on this machine
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import MODEL, collect
from .documents import Document
from .model_io import read_model, token_losses
from .prepare import Tokens, encode_talk, load
from .talks import Talks
from .tokenizer import BOS_ID, END_ID
from .trigram import Trigram

_RUNS = 4  # in `positions`; one takes minutes on two cores
_WINDOW = 4_096  # tokens of context in `losses`; every document starts afresh
PROMPTS = (
    "Hello! My name is Ada. What can you do?",
    "What is a cache?",
    "Tell me a story about a fox.",
    "How do I make a cup of tea?",
    "What is the capital of Norway?",
    "I had a long day and I am tired.",
    "What is the opposite of early?",
    "Could you name three fruits for my salad?",
    "What is a harbor?",
    "My car is in the garage. Where is my car?",
)
TALK = (
    "Hello! My name is Ada.",
    "I put the key in the drawer.",
    "What is a river?",
    "Tell me a joke.",
    "Where is the key?",
    "And what is my name?",
    "Thank you, goodbye!",
)


def losses(work: Path) -> None:
    """Bits per byte of the held-out documents."""
    documents = held_out(work)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    encoded = [tokenizer.encode(d.text, add_special_tokens=False).ids for d in documents]
    whole = "".join(d.text for d in documents).encode()
    print(f"{len(documents)} documents, {len(whole)} bytes, {sum(map(len, encoded))} tokens")
    for name, size in (("gzip -9", len(gzip.compress(whole, 9))), ("xz -9", len(lzma.compress(whole, preset=9)))):
        print(f"{name:10} {8 * size / len(whole):.3f} bits per byte")
    trigram = Trigram(load(work / "streams" / "documents.npz").tokens, vocab=tokenizer.get_vocab_size())
    model, _ = read_model()
    nats = {"trigram": 0.0, "this model": 0.0}
    for ids in encoded:
        nats["trigram"] += trigram.losses(np.array([END_ID, BOS_ID, *ids], dtype=np.uint16)).sum()
        for start in range(0, len(ids), _WINDOW):
            window = np.array([BOS_ID, *ids[start : start + _WINDOW]], dtype=np.uint16)
            nats["this model"] += float(token_losses(model, window).sum())
    for name, total in nats.items():
        bits = total / math.log(2) / len(whole)
        print(f"{name:10} {bits:.3f} bits per byte, {total / sum(map(len, encoded)):.3f} nats per token")


def positions(work: Path) -> None:
    """Mean loss in bands of positions, over four runs of 32,768 tokens of held-out documents, one after another.

    Beside it the loss of the same tokens with little context, since some documents are harder than others.
    """
    model, _ = read_model()
    runs = position_runs(work)
    print(f"{len(runs)} runs of {len(runs[0])} tokens")
    whole = np.stack([token_losses(model, run) for run in runs])
    short = np.stack([windowed_losses(model, run) for run in runs])
    edges = [0, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 24_576, len(runs[0]) - 1]
    for low, high in pairwise(edges):
        band, same = whole[:, low:high].mean(axis=1), short[:, low:high].mean()
        error = band.std(ddof=1) / math.sqrt(len(band))
        print(
            f"{low:6} to {high:6}: {band.mean():.3f} nats per token (standard error {error:.3f}), "
            f"{same:.3f} with at most {_WINDOW:,} tokens of context"
        )


def position_runs(work: Path) -> list[Tokens]:
    """Held-out documents one after another, cut to runs of 32,768 tokens at even distances."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    joined = [t for d in held_out(work) for t in tokenizer.encode(d.text + "\n\n", add_special_tokens=False).ids]
    length = 32_767
    starts = np.linspace(0, len(joined) - length, _RUNS, dtype=int)
    return [np.array([BOS_ID, *joined[at : at + length]], dtype=np.uint16) for at in starts]


def windowed_losses(model: Any, run: Tokens) -> npt.NDArray[np.float32]:
    """As ``token_losses``, with a context that starts afresh every ``_WINDOW`` tokens."""
    parts = [np.array([BOS_ID, *run[at : at + _WINDOW]], np.uint16) for at in range(1, len(run), _WINDOW)]
    return np.concatenate([token_losses(model, part) for part in parts])


def held_out(work: Path) -> list[Document]:
    """The documents that were never trained on."""
    return [d for d in collect.load(work / "collection.json.xz").documents if d.held_out]


def chats(_: Path) -> None:
    """The ten prompts."""
    answer = answerer(*read_model())
    ended = 0
    for prompt in PROMPTS:
        text, stopped = answer([{"role": "user", "content": prompt}], 300)
        ended += stopped
        print(f"> {prompt}\n{text}{'' if stopped else ' [cut off]'}\n")
    print(f"{ended} of {len(PROMPTS)} answers end by themselves")


def talk(_: Path) -> None:
    """The conversation."""
    answer = answerer(*read_model())
    messages: list[dict[str, str]] = []
    for said in TALK:
        messages.append({"role": "user", "content": said})
        text, _ended = answer(messages, 300)
        messages.append({"role": "assistant", "content": text})
        print(f"> {said}\n{text}\n")


def recall(work: Path) -> None:
    """Tell something first, then talk about other things for ``length`` tokens, then ask; 20 conversations each."""
    data, rng = collect.load(work / "collection.json.xz"), Random("recall")
    talks, tokenizer = Talks(data), Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    answer = answerer(*read_model())
    things, places = ("key", "book", "hat", "coat", "ring"), ("kitchen", "garden", "attic", "office")
    for length in (0, 1_000, 4_000):
        right = 0
        for _ in range(20):
            thing, place = rng.choice(things), rng.choice(places)
            said = [
                ("user", f"I put the {thing} in the {place}."),
                ("assistant", f"I will remember: the {thing} is in the {place}."),
            ]
            while len(encode_talk(tokenizer, said)) < length:
                said += [message for message in talks.facts(rng) if message[0] != "system" and thing not in message[1]]
            said.append(("user", f"Where is the {thing}?"))
            text, _ended = answer([{"role": role, "content": content} for role, content in said], 40)
            right += place in text
        print(f"after {length:6} tokens: {right} of 20")


def samples(_: Path) -> None:
    """Five samples of 160 tokens, ends of turns and documents included."""
    import mlx.core as mx
    from mlx_lm import generate
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = read_model()
    tokenizer.eos_token_ids = set()  # so that nothing ends early
    for seed in range(1, 6):
        mx.random.seed(seed)
        text = generate(model, tokenizer, [BOS_ID], max_tokens=160, sampler=make_sampler(temp=0.8))
        print(f"--- seed {seed}\n{text}\n")


def speed(_: Path) -> None:
    """Prefill of 1,024 tokens, then greedy decoding of 128 more, three times."""
    from mlx_lm import stream_generate

    model, tokenizer = read_model()
    tokenizer.eos_token_ids = set()  # so that no answer ends early
    prompt = [BOS_ID, *np.random.default_rng(1).integers(300, 3_000, 1_023).tolist()]
    for _run in range(3):
        tokens = stream_generate(model, tokenizer, prompt, max_tokens=129)
        times = [time.monotonic(), *(time.monotonic() for _ in tokens)]
        prefill, decode = times[1] - times[0], times[129] - times[1]
        print(f"1,024 tokens prefilled in {prefill:.2f} s, then {128 / decode:.0f} tokens/s")


def answerer(model: Any, tokenizer: Any) -> Callable[[list[dict[str, str]], int], tuple[str, bool]]:
    """Greedy answers: (text, whether the model ended its turn)."""
    from mlx_lm import stream_generate

    def answer(messages: list[dict[str, str]], limit: int) -> tuple[str, bool]:
        prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        parts = list(stream_generate(model, tokenizer, prompt, max_tokens=limit))
        return "".join(part.text for part in parts), parts[-1].finish_reason == "stop"

    return answer


def main() -> None:
    """Print what was asked for."""
    steps = {f.__name__: f for f in (losses, positions, chats, talk, recall, samples, speed)}
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=list(steps))
    parser.add_argument("--work", type=Path, default=Path("work"), help="the folder that the training steps used")
    given = parser.parse_args()
    steps[given.what](given.work)


if __name__ == "__main__":
    main()
