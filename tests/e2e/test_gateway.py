"""The contract that gateways speak to their workers, on a real server."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc
from tokenizers import Tokenizer

from tests.e2e.harness import RPC_SECONDS, Client, Server, free_port, serving, some_tokens, text, token_ids
from tests.e2e.waiting import await_that

BLOCK = 64
END = 1
"""Of the built-in model's sequences."""


class Engine:
    """The contract's own stubs."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self.stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)  # type: ignore[no-untyped-call]

    def stream(self, ids: list[int], request_id: str = "x", *, stream: bool = True, **params: Any) -> Any:
        asked = vllm_engine_pb2.GenerateRequest(
            request_id=request_id,
            tokenized=vllm_engine_pb2.TokenizedInput(input_ids=ids),
            sampling_params=vllm_engine_pb2.SamplingParams(**({"temperature": 0, "ignore_eos": True} | params)),
            stream=stream,
        )
        return self.stub.Generate(asked, timeout=RPC_SECONDS)

    def complete(self, ids: list[int], request_id: str = "x", **params: Any) -> Any:
        (answer,) = self.stream(ids, request_id, stream=False, **params)
        return answer.complete

    def events(self, cursor: int = 0) -> Any:
        asked = common_pb2.SubscribeKvEventsRequest(start_sequence_number=cursor)
        return self.stub.SubscribeKvEvents(asked, timeout=RPC_SECONDS)


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Client, Server]]:
    port = free_port()
    with serving(tmp_path_factory.mktemp("gateway") / "data", "--gateway-port", str(port)) as (server, client):
        yield Engine(port), client, server


def test_what_it_says_of_itself(behind: tuple[Engine, Client, Server]) -> None:
    engine, client, _ = behind
    assert engine.stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest()).healthy
    model = engine.stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest())
    ours = client.info()
    assert (model.served_model_name, model.is_generation) == ("tiny", True)
    assert (model.max_context_length, list(model.eos_token_ids)) == (ours.context_limit, [END])
    assert engine.stub.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest()).block_size == BLOCK
    (load,) = engine.stub.GetLoads(vllm_engine_pb2.GetLoadsRequest()).loads
    assert (load.num_total_reqs, load.max_running_requests) == (0, 32)
    with pytest.raises(grpc.RpcError) as refused:
        engine.stub.Embed(vllm_engine_pb2.EmbedRequest())
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_its_tokenizer_can_be_made_elsewhere(behind: tuple[Engine, Client, Server], tmp_path: Path) -> None:
    engine, client, _ = behind
    chunks = list(engine.stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    packed = b"".join(chunk.data for chunk in chunks)
    assert hashlib.sha256(packed).hexdigest() == chunks[-1].sha256
    with zipfile.ZipFile(io.BytesIO(packed)) as found:
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"} <= {*found.namelist()}
        found.extractall(tmp_path)
    said = "Naïve 👍🏽, and  then?"
    mine = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(said, add_special_tokens=False).ids
    assert list(client.count(text(said)).token_ids)[-len(mine) :] == mine


def test_an_answer_is_our_own_apis(behind: tuple[Engine, Client, Server], seed: int) -> None:
    engine, client, _ = behind
    ids = some_tokens(40, seed)
    pieces = list(engine.stream(ids, max_tokens=6, logprobs=0))
    tokens = [token for piece in pieces[:-1] for token in piece.chunk.token_ids]
    assert tokens == client.generate("", token_ids(ids), max_tokens=6).tokens
    assert list(pieces[-1].complete.output_ids) == tokens
    assert list(pieces[0].chunk.output_logprobs.token_ids) == tokens[:1]
    assert not pieces[0].chunk.output_logprobs.top_logprobs
    stopped = engine.complete(ids, max_tokens=6, stop_token_ids=tokens[2:3])
    assert (list(stopped.output_ids), stopped.matched_token_id) == (tokens[: tokens.index(tokens[2]) + 1], tokens[2])
    bent = engine.complete(ids, max_tokens=3, logit_bias={END: 100}, ignore_eos=False)
    assert (list(bent.output_ids), bent.finish_reason, bent.WhichOneof("matched_stop")) == ([END], "stop", None)


def test_a_named_agent_is_ours_too_and_its_context_is_replaced(
    behind: tuple[Engine, Client, Server], agent: str, seed: int
) -> None:
    engine, client, server = behind
    ids = some_tokens(70, seed)
    first = engine.complete(ids, f"agent:{agent}#-1", max_tokens=4)
    again = engine.complete([*ids, *first.output_ids, 500], f"agent:{agent}#-2", max_tokens=4)
    assert again.cached_tokens == 74
    assert client.get(agent).token_count == 79
    await_that(lambda: f"agent={agent} " in server.log_text())
    (line,) = [line for line in server.log_text().splitlines() if f"agent:{agent}#-2" in line]
    assert "cached=74" in line
    assert "completion=4" in line


@pytest.mark.parametrize("by", ["cancel", "abort"])
def test_who_leaves_stops_the_answer(behind: tuple[Engine, Client, Server], agent: str, seed: int, by: str) -> None:
    engine, client, _ = behind
    call = engine.stream(some_tokens(20, seed), f"agent:{agent}#-1", max_tokens=20_000)
    for _ in range(3):
        next(call)
    if by == "cancel":
        call.cancel()
    else:
        engine.stub.Abort(vllm_engine_pb2.AbortRequest(request_ids=["nobody", f"agent:{agent}#-1"]))
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert ended.value.code() is grpc.StatusCode.ABORTED
    await_that(lambda: client.stats().gauges.batch_size == 0)
    await_that(lambda: agent in [each.agent_id for each in client.list(page_size=1000).agents])
    kept = client.get(agent)
    assert 20 < kept.token_count < 10_000


def test_headers_come_before_a_long_prompt_is_computed(behind: tuple[Engine, Client, Server], seed: int) -> None:
    engine, client, _ = behind
    call = engine.stream(some_tokens(6000, seed), max_tokens=1)
    call.initial_metadata()
    assert client.stats().gauges.batch_size == 1
    call.cancel()


class Known:
    """What a gateway knows of the blocks, by what it was told on one stream."""

    def __init__(self, stream: Any, cursor: int = 0) -> None:
        self._stream = stream
        self.number = cursor
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def take(self) -> Any:
        batch = next(self._stream)
        assert not self.number or batch.sequence_number == self.number + 1
        self.number = batch.sequence_number
        for event in batch.events:
            if event.HasField("cleared"):
                self.blocks.clear()
            before = event.stored.parent_block_hash if event.stored.HasField("parent_block_hash") else None
            assert before is None or before in self.blocks
            for block in event.stored.blocks:
                self.blocks[block.block_hash] = (before, tuple(block.token_ids))
                before = block.block_hash
            for gone in event.removed.block_hashes:
                del self.blocks[gone]
        return batch

    def has(self, ids: list[int]) -> int:
        """How many blocks of a prompt it would find here."""
        before, count = None, 0
        while found := [h for h, b in self.blocks.items() if b == (before, tuple(ids[count * 64 : count * 64 + 64]))]:
            (before,) = found
            count += 1
        return count


def test_a_gateway_knows_which_prefixes_are_held(tmp_path: Path, seed: int) -> None:
    port, data = free_port(), tmp_path / "data"
    ids = some_tokens(64 * 300 + 10, seed)
    other = [*ids[:130], *some_tokens(200, seed + 1)]
    with serving(data, "--gateway-port", str(port)) as (_, client):
        engine = Engine(port)
        client.prime("ada", token_ids(ids[:1000]))
        stream = engine.events()
        known = Known(stream)
        while known.has(ids) < 15:
            last = known.take()
        client.prime("bob", token_ids(other))
        while known.has(other) < 5:
            known.take()
        assert (known.has(ids), len(known.blocks)) == (15, 18)  # two are both agents'
        client.delete("ada")
        while len(known.blocks) > 5:
            known.take()
        assert known.has(other) == 5
        again = Known(engine.events(last.sequence_number), last.sequence_number)
        assert again.take().events[0].HasField("cleared")
        while again.has(other) < 5:
            again.take()
        stream.cancel()
        number = again.number
    with serving(data, "--gateway-port", str(port)) as (server, _):
        fresh = Known(Engine(port).events(number), number)
        while fresh.has(other) < 5:
            fresh.take()
        assert len(fresh.blocks) == 5
        left = Engine(port).events()
        assert next(left).sequence_number > number
        assert server.terminate() == 0
        list(left)  # it ends, and not with an error


def test_a_gateway_serves_the_tenant_that_the_operator_names(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("one SECRET1\ntwo SECRET2\n")
    tokens.chmod(0o600)
    port = free_port()
    flags = ("--gateway-port", str(port), "--token-file", str(tokens), "--gateway-tenant", "two")
    with serving(tmp_path / "data", *flags) as (server, _):
        Engine(port).complete(some_tokens(5), "agent:ada#", max_tokens=1)
        for token, count in (("SECRET1", 0), ("SECRET2", 1)):
            with Client(server.address, token=token) as client:
                assert len(client.list().agents) == count
