"""What `warmkv serve` says while it loads, and when it serves: one screen on a terminal, lines in the log elsewhere.

The last line on stdout, and elsewhere the only one, is `listening on HOST:PORT`: programs wait for it.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

from rich.progress import DownloadColumn

from warmkv_server.cli.bar import Bar
from warmkv_server.cli.connection import DEFAULT_TARGET
from warmkv_server.contract.settings import LOOPBACK, Settings
from warmkv_server.offline.words import size
from warmkv_server.platform import places

if TYPE_CHECKING:
    from warmkv_server.app import Serving
    from warmkv_server.contract.model import StreamInfo

log = logging.getLogger(__name__)

_CONTEXTS = (4096, 32768)
_SOON_SECONDS = 0.5
"""What takes no longer is not worth a bar."""
_LINE_SECONDS = 10.0
"""From one line in the log to the next."""


class StartScreen:
    """Says how far a model's loading is, and then that it is served: a bar and a screen on a terminal, lines elsewhere.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, bar: Bar | None = None) -> None:
        self._clock = clock
        self._bar = Bar(DownloadColumn(binary_units=True)) if bar is None else bar
        self._began: float | None = None
        self._told = 0.0
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def tell(self, what: str, done: int, total: int) -> None:
        """Say how many of its bytes are done. On any thread."""
        now = self._clock()
        if self._began is None:
            self._began = self._told = now
        if self._over:
            return
        if self._bar.is_shown:
            if now - self._began > _SOON_SECONDS:
                self._bar.tell(done, total, what)
        elif now - self._told > _LINE_SECONDS:
            self._told = now
            log.info("%s: %s of %s", what, size(done), size(total))

    def serves(self, serving: Serving) -> None:
        """It is loaded."""
        self.hide()
        show(serving)

    def hide(self) -> None:
        """Say no more."""
        self._over = True
        self._bar.hide()


def show(serving: Serving) -> None:
    rows = list(facts(serving))
    if sys.stdout.isatty():
        _draw(rows)
    else:
        about = ""
        for topic, said in rows:
            about = topic or about
            log.info("%s: %s", about, said)
    print(f"listening on {serving.address}", flush=True)


def facts(serving: Serving) -> Iterator[tuple[str, str]]:
    """A row for each thing that an operator wants to know at the start."""
    settings, info = serving.settings, serving.info
    noise = " (random numbers: its answers are noise)" if info.kind == "random" else ""
    yield "model", f"{info.model_id}{noise}, contexts of up to {info.context_limit:,} tokens"
    if settings.chat_template is not None:
        yield "", f"chat template {settings.chat_template.absolute()}, in place of the model's own"
    yield "device", ", ".join(filter(None, (info.device, info.blas.partition(" (")[0])))
    yield "KV", f"{_codecs(info.streams)}, {info.kv_bytes_per_token:,} bytes a token"
    yield "RAM", f"{size(settings.hot_bytes)} for contexts at rest{_fit(serving, settings.hot_bytes, 'hot')}"
    yield "", f"{size(settings.inflight_bytes)} for requests at work"
    yield "disk", _disk(serving)
    yield "data", f"{settings.data_dir.absolute()}, {_agents(serving)}"
    if settings.data_dir == places.data_dir() and (earlier := places.earlier_data_dir()) is not None:
        yield "", f"there are contexts in ./{earlier}, too: to go on with those, serve with --data-dir {earlier}"
    yield "access", access(settings)
    if settings.metrics_port is not None:
        yield "metrics", f"http://{_in_url(settings.metrics_host or settings.host)}:{settings.metrics_port}/metrics"
    yield "next", _next(serving)


def _codecs(streams: Sequence[StreamInfo]) -> str:
    """How keys and values are stored, and the most that one of them loses; the log has the reasons."""
    counts = Counter((stream.codec, stream.group_size) for stream in streams)
    parts = len(counts) > 1
    named = (
        f"{codec}{f' in groups of {size}' if size else ''}{f' in {count} of {len(streams)} streams' if parts else ''}"
        for (codec, size), count in counts.most_common()
    )
    losses = [stream.loss for stream in streams if stream.loss is not None]
    lost = f", losing at most {max(losses):.1%} of what tells tokens apart" if losses else ""
    return f"{' and '.join(named) or 'none that grows'}{lost}"


def access(settings: Settings) -> str:
    """Who can call, in words."""
    who = "this machine's programs" if settings.host in LOOPBACK else f"whoever reaches {settings.host}"
    with_what = "with a token of the token file" if settings.token_file is not None else "without a token"
    return f"{who}, {with_what}, {'over TLS' if settings.tls_cert is not None else 'in clear'}"


def _fit(serving: Serving, nbytes: int, tier: str) -> str:
    """How many contexts of the usual lengths, as far as this model has them."""
    limit = serving.info.context_limit
    lengths = sorted({min(length, limit) for length in _CONTEXTS})
    fits = (f"{nbytes // max(serving.info.layout.context_bytes(n), 1):,} of {_tokens(n)}" for n in lengths)
    return f": {' or '.join(fits)} tokens {tier}"


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"


def _disk(serving: Serving) -> str:
    if limit := serving.settings.disk_bytes:
        return f"{size(limit)} at most{_fit(serving, limit, 'warm')}"
    free = shutil.disk_usage(serving.settings.data_dir).free
    return f"no limit (--disk-bytes); {size(free)} free{_fit(serving, free, 'warm')}"


def _agents(serving: Serving) -> str:
    number = serving.agents
    words = f"{number:,} agent{'s' * (number != 1)}"
    stale = sum(serving.stale.values())
    if not stale:
        return words
    why = "; ".join(reason or "nobody knows any more how it differs" for reason in sorted(serving.stale))
    return f"{words}, {stale:,} of which can't use their KV with this model ({why}): the log says what to do"


def _next(serving: Serving) -> str:
    settings = serving.settings
    words = ["warmkv chat"]
    if serving.address != DEFAULT_TARGET:
        anywhere = serving.address.replace("0.0.0.0", "127.0.0.1")
        words.append(f"--target {anywhere}")
    if settings.tls_cert is not None:
        words.append(f"--tls-ca {settings.tls_cert}")
    token = "WARMKV_TOKEN=… " * (settings.token_file is not None)
    return token + " ".join(words)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _draw(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for topic, said in rows:
        grid.add_row(topic, Text(said, style="green" if topic == "next" else ""))
    Console().print(Panel(grid, title="WarmKV serves", title_align="left", border_style="dim"))
