"""vllm.grpc.engine.VllmEngine, served by the agents of one tenant."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from warmkv_server.agents.run import Run
from warmkv_server.agents.types import GenerateEvent, GenerateFinished, GenerateStarted
from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.model import ModelInfo, ModelKind
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import RequestCancelled, Unsupported
from warmkv_server.platform.versions import version_of
from warmkv_server.service import convert
from warmkv_server.service.endpoint import Call
from warmkv_server.service.gateway import asked, bundle, kv_events
from warmkv_server.service.gateway.answered import Answered
from warmkv_server.service.metrics import Metrics

SERVICE = vllm.DESCRIPTOR.services_by_name["VllmEngine"]

_NO_TOKEN = -1
_NOT_SERVED = "is not served by WarmKV"


@dataclass(frozen=True)
class VllmServicer:
    """The RPCs of VllmEngine, but HealthCheck, which is answered whatever else is (`service/open_services.py`)."""

    settings: Settings
    metrics: Metrics
    started: float = field(default_factory=time.time)
    _running: dict[str, set[Run[GenerateEvent]]] = field(default_factory=dict)

    async def generate(self, request: vllm.GenerateRequest, call: Call) -> None:
        info = call.agents.engine.info
        key = call.key(asked.agent_id(request.request_id))
        call.asked.agent_id = key.agent_id
        wanted = asked.generate_request(request, key, call.stages, info.sampling_defaults, call.model)
        answered = Answered(wanted, request.sampling_params.logprobs == 0, info.eos_token_ids)
        run = await call.agents.generate(wanted)
        finished: GenerateFinished | None = None
        with run.watch() as events, self._abortable(request.request_id, run):
            async for event in events:
                if isinstance(event, GenerateStarted):
                    # With it a gateway tells its client that the answer is coming, and keeps the connection alive.
                    await call.context.send_initial_metadata(())
                elif isinstance(event, GenerateFinished):
                    finished = event
                    self.metrics.answered(event)
                for message in answered.messages(event):
                    await call.send(message)
        if finished is not None:
            (call.asked.last,) = convert.generate_responses(finished)  # which the log and traces can read

    async def abort(self, request: vllm.AbortRequest, call: Call) -> vllm.AbortResponse:
        """End what runs under these ids; it keeps what it has as a cancelled call does."""
        del call
        for each in request.request_ids:
            for run in [*self._running.get(each, ())]:
                run.stop(RequestCancelled("the gateway has aborted the request"))
        return vllm.AbortResponse()

    async def get_model_info(self, _: vllm.GetModelInfoRequest, call: Call) -> vllm.GetModelInfoResponse:
        info = call.agents.engine.info
        # A path that is none here or there: the tokenizer comes from GetTokenizer, with this server's chat template.
        place = f"warmkv:{info.model_id}"
        return vllm.GetModelInfoResponse(
            model_path=place,
            tokenizer_path=place,
            is_generation=True,
            max_context_length=info.context_limit,
            max_req_input_len=info.context_limit,
            vocab_size=info.vocab_size,
            served_model_name=model_name(info),
            model_type="warmkv",
            eos_token_ids=sorted(info.eos_token_ids),
            pad_token_id=_NO_TOKEN,
            bos_token_id=_NO_TOKEN,
            default_sampling_params_json=json.dumps(_defaults(info.sampling_defaults)),
        )

    async def get_server_info(self, _: vllm.GetServerInfoRequest, call: Call) -> vllm.GetServerInfoResponse:
        stats, now = call.agents.engine.stats(), time.time()
        return vllm.GetServerInfoResponse(
            active_requests=stats.prefilling + stats.decoding,
            last_receive_timestamp=now,
            uptime_seconds=now - self.started,
            server_type="vllm-grpc",
            data_parallel_size=1,
            block_size=kv_events.BLOCK_TOKENS,
            kv_cache_dtype=str(self.settings.kv_choice),
            max_num_seqs=self.settings.max_batch,
            constrained_decoding_start="first_token",
        )

    async def get_loads(self, _: vllm.GetLoadsRequest, call: Call) -> vllm.GetLoadsResponse:
        stats, waiting = call.agents.engine.stats(), call.agents.waiting
        running, most = stats.prefilling + stats.decoding, self.settings.inflight_bytes
        load = vllm.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            token_usage=min(1.0, stats.in_flight_bytes / most) if most else 0.0,
            max_running_requests=self.settings.max_batch,
            utilization=min(1.0, running / self.settings.max_batch),
        )
        return vllm.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=version_of("warmkv"), dp_rank_count=1, loads=[load]
        )

    async def get_tokenizer(self, _: common.GetTokenizerRequest, call: Call) -> None:
        files = await call.agents.tokenizer_files()
        for chunk in bundle.chunks(await asyncio.to_thread(bundle.archive, files)):
            await call.send(chunk)

    async def subscribe_kv_events(self, request: common.SubscribeKvEventsRequest, call: Call) -> None:
        async with call.agents.held(call.principal.tenant) as held:

            async def end() -> None:
                await call.closing.wait()
                await held.aclose()

            ending = asyncio.create_task(end())
            try:
                async for batch in kv_events.batches(held, request.start_sequence_number):
                    await call.send(batch)
            finally:
                ending.cancel()

    async def embed(self, _: vllm.EmbedRequest, __: Call) -> vllm.EmbedResponse:
        raise Unsupported(f"Embed {_NOT_SERVED}: its model generates text")

    async def flush_cache(self, _: common.FlushCacheRequest, __: Call) -> common.FlushCacheResponse:
        raise Unsupported(f"FlushCache {_NOT_SERVED}: what is kept is the agents'; delete those, or evict them")

    async def start_profile(self, _: common.StartProfileRequest, __: Call) -> common.ProfileResponse:
        raise Unsupported(f"StartProfile {_NOT_SERVED}; look at its metrics and traces")

    async def stop_profile(self, _: common.StopProfileRequest, __: Call) -> common.ProfileResponse:
        raise Unsupported(f"StopProfile {_NOT_SERVED}; look at its metrics and traces")

    @contextmanager
    def _abortable(self, request_id: str, run: Run[GenerateEvent]) -> Iterator[None]:
        runs = self._running.setdefault(request_id, set())
        runs.add(run)
        try:
            yield
        finally:
            runs.discard(run)
            if not runs:
                self._running.pop(request_id, None)


def model_name(info: ModelInfo) -> str:
    """What clients call the model: no path of this machine, no revision, and nothing that needs quoting."""
    match info.kind:
        case ModelKind.LOCAL:
            return info.model_id.rstrip("/").rpartition("/")[2]
        case ModelKind.HUB:
            return info.model_id.partition("@")[0]
    return info.model_id.partition(":")[2]


def _defaults(sampling: Sampling) -> dict[str, float]:
    """The model's own, by the names that gateways know them by."""
    off = Sampling()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: getattr(sampling, name) for name in names if getattr(sampling, name) != getattr(off, name)}
    return {"temperature": sampling.temperature, **found}
