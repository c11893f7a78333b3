"""What an operator sets: every option of `warmkv serve`, declared once, and passed whole to whoever acts on it.

A declaration says an option's name, type, limits, help text and default. `config.py` reads the values and checks them;
whoever makes `Settings` of its own, such as a test, isn't checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field

from warmkv_server.contract.kv_choice import KvChoice
from warmkv_server.contract.store import Durability

DEFAULT_KV = "affine4"
"""How K and V are stored if the operator doesn't say."""

CONSTANTS = "codecs"
"""Folder of the data directory that keeps what codecs need to know of models."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Bytes = Annotated[int, ByteSize, Field(ge=0)]
"""Also read as 8GiB or 500MB."""
Port = Annotated[int, Field(ge=0, le=65535)]
Number = BeforeValidator(int)
"""For a choice among numbers, which comes as text."""


def _readable(kv: str | None) -> str | None:
    if kv is not None:
        KvChoice.read(kv)
    return kv


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Descriptions are the help texts of `warmkv serve`.

    Where an operator names none, budgets of memory are a part of the machine's, which is not known here.
    """

    model: Annotated[str, Field(description="builtin:tiny, random:SHAPE, a folder, or ORG/NAME[@REV] of a hub.")] = (
        "builtin:tiny"
    )
    adapter: Annotated[str | None, Field(description="Folder of a LoRA adapter to put on the model.")] = None
    chat_template: Annotated[
        Path | None, Field(description="File of a chat template, in Jinja, in place of the model's own.")
    ] = None
    context_limit: Annotated[
        int | None, Field(ge=2, description="Most tokens of a context. Default: the model's own.")
    ] = None
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, Field(description="Port to listen on; 0 takes a free one.")] = 50051
    data_dir: Annotated[
        Path,
        Field(
            description="Folder of the contexts; made if it is not there. Default: where this platform has data, such "
            "as ~/.local/share/warmkv.",
        ),
    ] = Path("data")
    hot_bytes: Annotated[
        Bytes,
        Field(
            description="RAM for contexts at rest, pinned or not, such as 8GiB. Default: a quarter of the machine's.",
        ),
    ] = 4 << 30
    disk_bytes: Annotated[Bytes, Field(description="Limit of the data folder, such as 100GiB; 0 for none.")] = 0
    headroom_bytes: Annotated[
        Bytes,
        Field(
            description="Free space of the data folder's filesystem that commits leave alone, so that deleting always "
            "has room."
        ),
    ] = 256 << 20
    inflight_bytes: Annotated[
        Bytes,
        Field(
            description="RAM for requests at work, what computing them takes included, and as much for contexts that "
            "are loaded next. Default: a quarter of the machine's.",
        ),
    ] = 8 << 30
    kv: Annotated[
        str | None,
        AfterValidator(_readable),
        Field(
            description="How K and V are stored: exact, near-exact, quality or compact; or a codec, such as o4, "
            f"hadamard4, affine8; or one for each, such as k=o5,v=o4. Default: {DEFAULT_KV}.",
        ),
    ] = None
    kv_bits: Annotated[
        Literal[0, 4, 8] | None,
        BeforeValidator(lambda said: None if said is None else int(said)),
        Field(description="In place of --kv: 4 or 8 for affine4 or affine8, 0 for exact."),
    ] = None
    kv_group_size: Annotated[Literal[32, 64, 128], Number, Field(description="K or V values that share a scale.")] = 64
    durability: Annotated[
        Durability,
        Field(
            description="What a commit waits for: full is safe from a power cut; so is fsync, but on macOS from a "
            "crash of the system only; none waits for nothing, and no answer says persisted.",
        ),
    ] = Durability.FULL
    max_batch: Annotated[int, Field(ge=1, description="Requests computed at once.")] = 32
    max_queue: Annotated[
        int,
        Field(
            ge=1,
            description="Requests that wait for the engine, as many that wait for memory, and as many for their "
            "agent's turn. Where that is full, a tenant that has less than its equal share is still let in.",
        ),
    ] = 256
    prefill_chunk: Annotated[
        int,
        Field(ge=0, multiple_of=256, description="Tokens of one prefill step; 0 takes what suits the device."),
    ] = 0
    max_decode_gap_ms: Annotated[
        int,
        Field(ge=1, description="Milliseconds that another's prefill may hold up answers that are streaming."),
    ] = 200
    speculate_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="Most tokens guessed from the context and checked in one step of an answer that is computed "
            "alone; 0 for none.",
        ),
    ] = 0
    force_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="Most tokens that a response format forces and that are checked in one step of an answer that "
            "is computed alone; 0 for none.",
        ),
    ] = 16
    default_max_tokens: Annotated[int, Field(ge=1, description="Length of an answer where the request names none.")] = (
        256
    )
    max_message_bytes: Annotated[Bytes, Field(ge=1024, description="Largest request that is read.")] = 16 << 20
    load_seconds: Annotated[
        float, Field(gt=0, description="Longest wait for blocks from disk before computing them anew.")
    ] = 30.0
    tls_cert: Annotated[Path | None, Field(description="Certificate chain in PEM form; needs --tls-key.")] = None
    tls_key: Annotated[Path | None, Field(description="The certificate's key in PEM form.")] = None
    token_file: Annotated[
        Path | None,
        Field(description="Who may call: a line for each token, TENANT TOKEN [AGENT_PREFIX]. Default: everybody."),
    ] = None
    insecure_bind: Annotated[
        bool, Field(description="Listen on other addresses than this machine's own without TLS and without tokens.")
    ] = False
    health_port: Annotated[
        Port | None,
        Field(
            ge=1,
            description="Port for gRPC's health service alone, on --host, with connections of its own: a probe is "
            "answered there also while clients have all others. Default: health is served on --port only.",
        ),
    ] = None
    metrics_port: Annotated[
        Port | None, Field(ge=1, description="Port for Prometheus, on --metrics-host. Default: no metrics.")
    ] = None
    metrics_host: Annotated[str | None, Field(description="Address for Prometheus. Default: --host.")] = None
    tracing: Annotated[
        bool,
        Field(
            description="Send a trace of each request by OpenTelemetry, as the environment's OTEL_* say; needs the "
            "extra `otel`."
        ),
    ] = False
    drain_seconds: Annotated[
        float,
        Field(ge=0, description="Time for requests at work to end after SIGTERM, before they are cut short."),
    ] = 30.0
    drain_notice_seconds: Annotated[
        float,
        Field(
            ge=0,
            description="Time after SIGTERM in which health says NOT_SERVING and calls are still let in, so that a "
            "router has seen it before the first is refused. --drain-seconds begin behind it.",
        ),
    ] = 0.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="What is logged, on stderr.")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Field(description="Lines for people, or one JSON object a line.")
    ] = "text"

    @property
    def kv_choice(self) -> KvChoice:
        """How K and V are stored."""
        if self.kv_bits is not None:
            return KvChoice.read(f"affine{self.kv_bits}" if self.kv_bits else "exact")
        return KvChoice.read(self.kv or DEFAULT_KV)
