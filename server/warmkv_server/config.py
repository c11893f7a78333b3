"""Every setting of the server, its default and its limits, in one place.

A flag of `warmkv serve` wins over the environment (`WARMKV_` and the setting's name in capitals), which wins over the
default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from warmkv_server.errors import OperatorError
from warmkv_server.platform import places

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Bytes = Annotated[ByteSize, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _quarter_of_memory() -> ByteSize:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return TypeAdapter(ByteSize).validate_python(memory // 4)


class Settings(BaseSettings):
    """What an operator can set. Descriptions are the help texts of `warmkv serve`."""

    model_config = SettingsConfigDict(env_prefix="WARMKV_", extra="forbid", frozen=True)

    model: str = Field("builtin:tiny", description="builtin:tiny, random:SHAPE, a folder, or ORG/NAME[@REV] of a hub.")
    adapter: str | None = Field(None, description="Folder of a LoRA adapter to put on the model.")
    context_limit: int | None = Field(None, ge=2, description="Most tokens of a context. Default: the model's own.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Port = Field(50051, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(
        default_factory=places.data_dir,
        description="Folder of the contexts; made if it is not there. Default: where this platform keeps data, such as "
        "~/.local/share/warmkv.",
    )
    hot_bytes: Bytes = Field(
        default_factory=_quarter_of_memory,
        description="RAM for contexts at rest, pinned or not, such as 8GiB. Default: a quarter of the machine's.",
    )
    disk_bytes: Bytes = Field(ByteSize(0), description="Limit of the data folder, such as 100GiB; 0 for none.")
    inflight_bytes: Bytes = Field(
        default_factory=_quarter_of_memory,
        description="RAM for requests at work, what computing them takes included, and as much for contexts that are "
        "loaded next. Default: a quarter of the machine's.",
    )
    kv_bits: Annotated[Literal[0, 4, 8], BeforeValidator(int)] = Field(
        4, description="Bits of a K or V value: 4, 8, or 0 to keep them as computed."
    )
    kv_group_size: Annotated[Literal[32, 64, 128], BeforeValidator(int)] = Field(
        64, description="K or V values that share a scale."
    )
    durability: Literal["full", "fsync", "none"] = Field(
        "full",
        description="What a commit waits for: full is safe from a power cut; so is fsync, but on macOS from a crash of "
        "the system only; none waits for nothing, and no answer says persisted.",
    )
    max_batch: int = Field(32, ge=1, description="Requests computed at once.")
    max_queue: int = Field(
        256,
        ge=1,
        description="Requests that wait for the engine, as many that wait for memory, and as many for their agent's "
        "turn. Where that is full, a tenant that has less than its equal share is still let in.",
    )
    prefill_chunk: int = Field(
        0, ge=0, multiple_of=256, description="Tokens of one prefill step; 0 takes what suits the device."
    )
    max_decode_gap_ms: int = Field(
        200, ge=1, description="Milliseconds that another's prefill may hold up answers that are streaming."
    )
    speculate_tokens: int = Field(
        0,
        ge=0,
        le=64,
        description="Most tokens guessed from the context and checked in one step of an answer that is computed alone; "
        "0 for none.",
    )
    default_max_tokens: int = Field(256, ge=1, description="Length of an answer where the request names none.")
    max_message_bytes: ByteSize = Field(ByteSize(16 << 20), ge=1024, description="Largest request that is read.")
    load_seconds: float = Field(30.0, gt=0, description="Longest wait for blocks from disk before computing them anew.")
    tls_cert: Path | None = Field(None, description="Certificate chain in PEM form; needs --tls-key.")
    tls_key: Path | None = Field(None, description="The certificate's key in PEM form.")
    token_file: Path | None = Field(
        None, description="Who may call: a line for each token, TENANT TOKEN [AGENT_PREFIX]. Default: everybody."
    )
    insecure_bind: bool = Field(
        False, description="Listen on other addresses than this machine's own without TLS and without tokens."
    )
    health_port: Port | None = Field(
        None,
        ge=1,
        description="Port for gRPC's health service alone, on --host, with connections of its own: a probe is answered "
        "there also while clients have all others. Default: health is served on --port only.",
    )
    metrics_port: Port | None = Field(None, ge=1, description="Port for Prometheus, on --host. Default: no metrics.")
    drain_seconds: float = Field(
        30.0, ge=0, description="Time for requests at work to end after SIGTERM, before they are cut short."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged, on stderr.")
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or one JSON object a line.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key need each other")
        open_to_all = self.tls_cert is None and self.token_file is None
        if self.host not in LOOPBACK and open_to_all and not self.insecure_bind:
            raise ValueError(
                f"--host {self.host} would serve other machines with neither TLS nor tokens: "
                "give --tls-cert and --tls-key, or --token-file, or say --insecure-bind"
            )
        return self

    @classmethod
    def read(cls, flags: dict[str, object]) -> Settings:
        """Settings from flags (those given) and the environment.

        Raises:
            OperatorError: naming the first setting that is wrong.
        """
        try:
            return cls(**flags)  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"][:1])
            message = first["msg"].removeprefix("Value error, ")
            if not name:
                raise OperatorError(message) from None
            flag = f"--{name.replace('_', '-')} (WARMKV_{name.upper()})"
            raise OperatorError(f"{flag} can't be {first['input']!r}: {message[0].lower()}{message[1:]}") from None
