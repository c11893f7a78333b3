"""Chat templates and texts that would take for ever, or all memory; and who waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, Server, chat, refused, serving, some_tokens, text, token_ids
from tests.engine.tokenizers import variant
from tests.hostile.others import MIB, family, watching
from warmkv import v1
from warmkv_server.engine.model.load import BUILT_IN

TEMPLATE = """\
{%- for m in messages -%}
{%- if m.content == 'loop' -%}
{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif m.content == 'wide' -%}{{ '%1000000000d' % loop.index }}
{%- elif m.content == 'long' -%}{{ 'x' * 2000000000 }}
{%- endif -%}
{%- if m.role == 'user' -%}<|ask|>{{ m.content }}{%- endif -%}
{%- endfor -%}
"""
"""Hostile where a message asks for it. It doesn't write out what the assistant said."""

LOOP, WIDE, LONG = (chat(("user", word)) for word in ("loop", "wide", "long"))
BOOK = text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 12_000)
"""Just short enough that it could fit; it doesn't."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with that template, and with a special token that the model has no row for."""
    made = tmp_path_factory.mktemp("hostile-model")
    variant(made, special=["<|ask|>"], chat_template=TEMPLATE)
    (made / "model.safetensors").symlink_to(BUILT_IN / "tiny" / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def attacked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client, Client]]:
    """A server, the client of one tenant, and that of another."""
    room = tmp_path_factory.mktemp("text-work")
    (room / "tokens").write_text(f"attackers {'a' * 32}\nothers {'b' * 32}\n")
    with (
        serving(room / "data", "--model", str(folder), "--token-file", str(room / "tokens")) as (server, _),
        Client(server.address, token="a" * 32) as attacker,
        Client(server.address, token="b" * 32) as other,
    ):
        yield server, attacker, other


@pytest.mark.parametrize("content", [LOOP, WIDE, LONG], ids=["loop", "wide", "long"])
def test_a_template_that_takes_too_much_fails_its_request_alone(
    attacked: tuple[Server, Client, Client], content: v1.Content
) -> None:
    server, attacker, other = attacked
    with watching(server, token="b" * 32) as seen, refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        attacker.generate("", content)
    assert "chat template" in found[0].message
    assert found[0].fields == ["content.chat.messages"]
    print(f"longest gap {seen.longest * 1000:.0f} ms, {seen.growth / MIB:.0f} MiB")
    assert other.count(text("hi")).token_count


def test_a_tenants_long_texts_hold_up_nobodys_short_one(attacked: tuple[Server, Client, Client]) -> None:
    server, attacker, other = attacked
    began = time.perf_counter()
    other.count(text("hi"))
    alone = time.perf_counter() - began
    with ThreadPoolExecutor(6) as threads, watching(server, token="b" * 32) as seen:
        flood = [threads.submit(attacker.count, BOOK) for _ in range(6)]
        assert all(answer.result().token_count > 32_768 for answer in flood)
        took = time.perf_counter() - began
    print(
        f"alone {alone * 1000:.0f} ms, longest {seen.longest * 1000:.0f} ms while {took:.1f} s of text were worked on"
    )
    assert seen.longest < max(took / 4, 10 * alone)


def test_work_whose_client_has_left_ends(attacked: tuple[Server, Client, Client]) -> None:
    server, attacker, other = attacked
    for _ in range(3):
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            list(attacker.stream("", LOOP, timeout=0.5))
    other.count(text("hi"))
    time.sleep(0.5)  # more than the grace of a task that nobody waits for
    before = processor_seconds(server)
    time.sleep(2)
    assert processor_seconds(server) - before < 1


def test_what_the_model_has_no_row_for_is_refused(attacked: tuple[Server, Client, Client]) -> None:
    _, attacker, _ = attacked
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        attacker.prime("unknown", text("so <|ask|> it is"))
    assert found[0].fields == ["content.text"]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        attacker.generate("unknown", chat(("user", "hi")))
    assert found[0].fields == ["content.chat.messages"]
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        attacker.get("unknown")


def test_a_template_without_answers_says_that_it_cant_go_on(attacked: tuple[Server, Client, Client]) -> None:
    _, attacker, _ = attacked
    attacker.prime("held", token_ids(some_tokens(20)))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
        attacker.extend("held", chat(("user", "hi")))
    assert "chat template" in found[0].message


def test_a_drain_keeps_its_word(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--model", str(folder), "--drain-seconds", "1") as (server, client):
        stuck = client.stream("", LOOP)
        client.count(text("hi"))
        began = time.perf_counter()
        assert server.terminate() == 0
        assert time.perf_counter() - began < 1 + 10
        with pytest.raises(grpc.RpcError):
            list(stuck)


def test_no_process_outlives_the_server(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--model", str(folder)) as (server, client):
        stuck = client.stream("", LOOP)
        client.count(text("hi"))
        processes = family(server.process.pid)
        assert len(processes) >= 4
        server.kill()
        end = time.monotonic() + 30
        while any(Path(f"/proc/{pid}/exe").exists() for pid in processes) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}/exe").exists() for pid in processes)
        stuck.cancel()


def processor_seconds(server: Server) -> float:
    """Of the server and its processes, so far."""
    return sum(_processor_seconds(pid) for pid in family(server.process.pid))


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
