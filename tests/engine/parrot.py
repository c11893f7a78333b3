"""A model that says what it was told to say: real llama weights, made instead of trained.

Attention and the feed-forward layer write nothing, so the logits depend on the last token alone; the output layer knows
which token follows which. That gives answers with a known text, for what the engine does with text.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import llama

from tests.engine.folders import END, TOKENIZER_FILES, write_model
from tests.engine.tokenizers import built_in, ids, variant

VOCAB = 4096

_CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def write_parrot(folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Write a model that knows these texts, each followed by the end of sequence.

    No token may be in two texts, or twice in one.

    Returns a token for each text, after which the model says it.
    """
    follows: dict[int, int] = {}
    cues: dict[str, int] = {}
    for cue, text in enumerate(texts, start=VOCAB - 100):
        for before, behind in pairwise([cue, *ids(built_in(), text), END]):
            assert before not in follows, f"{built_in().decode([before])!r} of {text!r} is there twice"
            follows[before] = behind
        cues[text] = cue
    write_model(folder, _CONFIG, _model(follows, VOCAB))
    return cues


def write_speaker(folder: Path, template: str, sayings: Iterable[Sequence[str]]) -> None:
    """Write a model with this chat template that says pieces of text in order.

    Each piece is a token of its own: a saying is the piece after which it is said, and those that it says, before the
    end of sequence. None may be in two sayings but a last one of its own.
    """
    sayings = [list(saying) for saying in sayings]
    pieces = dict.fromkeys(piece for saying in sayings for piece in saying)
    with tempfile.TemporaryDirectory() as name:
        known = built_in().get_vocab()
        special = [piece for piece in pieces if piece not in known]
        tokenizer = variant(Path(name), special=special, chat_template=template)
        vocab = -(-len(tokenizer) // 64) * 64
        follows: dict[int, int] = {}
        for saying in sayings:
            tokens = [int(tokenizer.convert_tokens_to_ids(piece)) for piece in saying]
            for before, behind in pairwise([*tokens, END]):
                assert follows.setdefault(before, behind) == behind, saying
        write_model(folder, {**_CONFIG, "vocab_size": vocab}, _model(follows, vocab))
        for file in TOKENIZER_FILES:
            shutil.copy(Path(name) / file, folder / file)


def _model(follows: Mapping[int, int], vocab: int) -> llama.Model:
    mx.random.seed(2)
    model = llama.Model(llama.ModelArgs.from_dict({**_CONFIG, "vocab_size": vocab}))
    layer = model.layers[0]
    for silent in (layer.self_attn.o_proj, layer.mlp.down_proj):
        silent.weight = mx.zeros_like(silent.weight)
    embeddings = mx.random.normal((vocab, 128))
    embeddings = embeddings / mx.linalg.norm(embeddings, axis=-1, keepdims=True)
    model.model.embed_tokens.weight = embeddings
    output = mx.zeros_like(embeddings)
    for before, behind in follows.items():
        output[behind] = output[behind] + embeddings[before]
    model.lm_head.weight = output
    return model
