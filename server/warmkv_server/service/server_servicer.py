"""warmkv.v1.ServerService."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, fields
from time import time

from warmkv.v1 import agent_service_pb2 as pb
from warmkv.v1 import server_service_pb2 as server_pb
from warmkv_server.contract.fairness import Tenants
from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.kv import Fallback, Source
from warmkv_server.contract.model import EndSource, Features, LayerInfo, ModelInfo, ModelKind, StreamInfo
from warmkv_server.contract.settings import Settings
from warmkv_server.contract.store import Durability, StoreStats, Tier
from warmkv_server.errors import InvalidField
from warmkv_server.platform.versions import version_of
from warmkv_server.service import convert, limits, validate
from warmkv_server.service.endpoint import Call

MODEL_KINDS = {
    ModelKind.BUILT_IN: server_pb.MODEL_KIND_BUILTIN,
    ModelKind.LOCAL: server_pb.MODEL_KIND_LOCAL,
    ModelKind.HUB: server_pb.MODEL_KIND_HUB,
    ModelKind.RANDOM: server_pb.MODEL_KIND_RANDOM,
}
CACHE_KINDS = {
    "append": server_pb.CACHE_KIND_APPEND_ONLY,
    "window": server_pb.CACHE_KIND_WINDOWED,
    "state": server_pb.CACHE_KIND_RECURRENT,
    "composite": server_pb.CACHE_KIND_COMPOSITE,
}
END_SOURCES = {
    EndSource.GENERATION_CONFIG: server_pb.END_TOKEN_SOURCE_GENERATION_CONFIG,
    EndSource.CONFIG: server_pb.END_TOKEN_SOURCE_CONFIG,
    EndSource.TOKENIZER: server_pb.END_TOKEN_SOURCE_TOKENIZER,
    EndSource.CHAT_TEMPLATE: server_pb.END_TOKEN_SOURCE_CHAT_TEMPLATE,
}
DURABILITIES = {
    Durability.FULL: server_pb.DURABILITY_FULL,
    Durability.FSYNC: server_pb.DURABILITY_FSYNC,
    Durability.NONE: server_pb.DURABILITY_NONE,
}


@dataclass(frozen=True)
class ServerServicer:
    """The RPCs of ServerService. proto/warmkv/v1/server_service.proto says what each promises."""

    settings: Settings
    tenants: Tenants
    started: float = field(default_factory=time)

    async def get_server_info(
        self,
        _: server_pb.GetServerInfoRequest,
        call: Call,
    ) -> server_pb.GetServerInfoResponse:
        info = call.agents.engine.info
        return server_pb.GetServerInfoResponse(
            model_id=info.model_id,
            model_kind=MODEL_KINDS[info.kind],
            weights_digest=info.weights_digest,
            fingerprint=call.agents.store.fingerprint,
            device=info.device,
            blas=info.blas,
            context_limit=info.context_limit,
            layers=[_layer(layer) for layer in info.layers],
            kv_bits=info.kv_bits,
            kv_group_size=info.kv_group_size,
            kv_bytes_per_token=info.kv_bytes_per_token,
            hot_bytes_limit=self.settings.hot_bytes,
            disk_bytes_limit=self.settings.disk_bytes,
            durability=DURABILITIES[self.settings.durability],
            versions=_versions(info, call.agents.store.block_format),
            sampling_defaults=_sampling(info.sampling_defaults),
            default_max_tokens=self.settings.default_max_tokens,
            end_tokens=[
                server_pb.EndToken(token_id=end.token_id, text=end.text, sources=[END_SOURCES[s] for s in end.sources])
                for end in info.ends
            ],
            features=_features(await call.agents.features()),
            chat_template_digest=info.chat_template_digest,
        )

    async def get_server_stats(
        self,
        _: server_pb.GetServerStatsRequest,
        call: Call,
    ) -> server_pb.GetServerStatsResponse:
        store, engine = call.agents.store.stats(), call.agents.engine.stats()
        tally = call.agents.tallies.total
        if self.tenants.number > 1:
            tenant = call.principal.tenant
            tally = call.agents.tallies.of(tenant)
            store = StoreStats(agents_by_tier=call.agents.store.tiers(tenant))
        return server_pb.GetServerStatsResponse(
            start_time=convert.timestamp(self.started),
            counters=server_pb.ServerCounters(
                requests_by_source={_source(source): n for source, n in tally.requests.items()},
                fallbacks_by_reason={
                    pb.FallbackReason.Name(convert.FALLBACKS[Fallback(reason)]): n
                    for reason, n in tally.fallbacks.items()
                },
                hot_tokens_reused=tally.hot_tokens,
                warm_tokens_reused=tally.warm_tokens,
                shared_tokens_reused=tally.shared_tokens,
                prefilled_tokens=tally.prefilled_tokens,
                bytes_loaded=store.bytes_loaded,
                kv_bytes_written=store.kv_bytes_written,
                metadata_bytes_written=store.metadata_bytes_written,
                evictions=store.evictions,
                quarantined=store.quarantined,
                commits_failed=store.commits_failed,
                answers_by_source={_source(source): n for source, n in tally.answers.items()},
                anonymous_tokens_reused=tally.anonymous_tokens,
                spliced_tokens=tally.spliced_tokens,
                first_token_by_source={_source(s): convert.duration(spent) for s, spent in tally.first_token.items()},
            ),
            gauges=server_pb.ServerGauges(
                hot_bytes=store.hot_bytes,
                disk_bytes=store.disk_bytes,
                agents_by_tier={pb.Tier.Name(convert.TIERS[Tier(t)]): n for t, n in store.agents_by_tier.items()},
                queue_depth=call.agents.waiting,
                batch_size=engine.prefilling + engine.decoding,
                stale_agents=store.stale_agents,
                hidden_agents=store.hidden_agents,
                hidden_bytes=store.hidden_bytes,
            ),
        )

    async def count_tokens(self, request: server_pb.CountTokensRequest, call: Call) -> server_pb.CountTokensResponse:
        validate.count_tokens(request, call.model)
        replace = request.context_mode == pb.CONTEXT_MODE_REPLACE
        new = await call.agents.count_tokens(call.key(request.agent_id), convert.content(request.content), replace)
        tokens = new.tokens
        if request.include_token_ids and len(tokens) > limits.COUNTED_TOKENS:
            raise InvalidField.of(
                "include_token_ids",
                f"the content has {len(tokens)} tokens, and the ids of {limits.COUNTED_TOKENS} are returned at most; "
                "count them without it",
                limit=limits.COUNTED_TOKENS,
                actual=len(tokens),
                unit="tokens",
            )
        return server_pb.CountTokensResponse(
            token_count=len(tokens),
            token_ids=tokens.tolist() if request.include_token_ids else None,
            replaced_tokens=new.replaced,
        )


def _source(source: str) -> str:
    return pb.CacheSource.Name(convert.SOURCES[Source(source)])


def _layer(layer: LayerInfo) -> server_pb.LayerInfo:
    return server_pb.LayerInfo(
        cache_kind=CACHE_KINDS[layer.cache_kind],
        kv_heads=layer.kv_heads,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        kv_bits=max((stream.bits for stream in layer.streams if not layer.members), default=0),
        window=layer.window,
        members=[_layer(member) for member in layer.members],
        keys=_stream(layer.keys),
        values=_stream(layer.values),
    )


def _stream(stream: StreamInfo | None) -> server_pb.StreamCodec | None:
    return server_pb.StreamCodec(**asdict(stream)) if stream is not None else None


def _features(features: Features) -> server_pb.ModelFeatures:
    return server_pb.ModelFeatures(
        tool_format=features.tool_format,
        reasoning_marks=features.reasoning_marks,
        template_variables=features.template_variables,
        response_formats=features.response_formats,
        template_keeps_reasoning=features.keeps_reasoning,
    )


def _sampling(defaults: Sampling) -> pb.SamplingParams:
    message = pb.SamplingParams(logit_bias=defaults.logit_bias)
    for each in fields(defaults):
        value = getattr(defaults, each.name)
        if each.name != "logit_bias" and value is not None:
            setattr(message, each.name, value)
    return message


def _versions(info: ModelInfo, block_format: int) -> dict[str, str]:
    own = {name: version_of(name) for name in ("warmkv", "grpcio", "protobuf")}
    return {**own, **info.versions, "python": platform.python_version(), "block-format": str(block_format)}
