"""What the server would do with a model: found out by loading it, and by trying its tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from warmkv_server.contract.fairness import Bound
from warmkv_server.contract.model import LayerInfo
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.cache.codecs.choose import codecs_of
from warmkv_server.engine.model import device
from warmkv_server.engine.model import load as models
from warmkv_server.errors import InvalidField, OperatorError
from warmkv_server.text.pool import TextPool
from warmkv_server.text.probe import unusual
from warmkv_server.text.task import TokenizerSource
from warmkv_server.text.template_file import require_usable


def check(settings: Settings) -> dict[str, Any]:
    """Everything, as JSON has it.

    Raises:
        OperatorError: if the model would be refused.
    """
    device.prepare()
    sources: list[TokenizerSource] = []
    loaded = models.load(
        settings.model,
        adapter=settings.adapter,
        codecs=codecs_of(settings),
        context_limit=settings.context_limit,
        chat_template=settings.chat_template,
        tokenizer_found=sources.append,
    )
    info = loaded.info
    found, lines = asyncio.run(_tried(sources[0], settings.chat_template))
    return {
        "model": info.model_id,
        "device": info.device,
        "chat_template": str(settings.chat_template or ""),
        "context_limit": info.context_limit,
        "vocabulary": info.vocab_size,
        "choosable": loaded.choosable.count,
        "ends": [{"id": end.token_id, "text": end.text, "named_by": list(end.sources)} for end in info.ends],
        "caches": dict(Counter(layer.cache_kind for layer in info.layers)),
        "kv_codecs": list(_codecs(info.layers)),
        "kv_bits": info.kv_bits,
        "kv_group_size": info.kv_group_size,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "sampling": {name: value for name, value in asdict(info.sampling_defaults).items() if value is not None},
        **found,
        "unusual": lines,
    }


def _codecs(layers: Sequence[LayerInfo]) -> Iterator[dict[str, Any]]:
    """Streams that are coded alike, for one reason: how many, and the most that one of them loses."""
    found: dict[tuple[str, str, int, str], list[float | None]] = {}
    for layer in layers:
        for side, stream in (("keys", layer.keys), ("values", layer.values)):
            if stream is not None:
                key = side, stream.codec, stream.group_size, stream.reason
                found.setdefault(key, []).append(stream.loss)
        for each in _codecs(layer.members):
            found.setdefault((each["of"], each["codec"], each["group_size"], each["reason"]), []).extend(
                [each["most_lost"]] * each["caches"]
            )
    for (side, codec, group_size, reason), losses in found.items():
        yield {
            "of": side,
            "codec": codec,
            "group_size": group_size,
            "caches": len(losses),
            "most_lost": max((loss for loss in losses if loss is not None), default=None),
            "reason": reason,
        }


async def _tried(source: TokenizerSource, chat_template: Path | None) -> tuple[dict[str, Any], list[str]]:
    """What the processes for text work find, and what of it is unusual.

    Raises:
        OperatorError: the chat template that was given is none.
    """
    pool = TextPool(Bound(1))
    try:
        pool.found(source)
        await pool.ready()
        findings = await pool.probe()
        if chat_template is not None:
            require_usable(chat_template, findings)
        return findings, unusual(findings)
    except (InvalidField, RuntimeError) as error:
        if chat_template is not None:
            raise OperatorError(f"--chat-template {chat_template} can't be tried: {error}") from error
        return {}, [f"the tokenizer and the chat template can't be tried: {error}"]
    finally:
        pool.stop()
