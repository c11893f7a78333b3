"""`warmkv agents`, `ps`, `top` and `health` against a server that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.cli.terminal import terminal
from tests.e2e.harness import Client, Server, free_port, serving, some_tokens, text, token_ids
from tests.e2e.test_access import TLS
from tests.e2e.waiting import await_that
from warmkv import v1
from warmkv_server.cli.main import app


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    with serving(tmp_path_factory.mktemp("agents") / "data") as pair:
        yield pair


@pytest.fixture
def client(pair: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch) -> Client:
    """Of the server that commands talk to."""
    monkeypatch.setenv("WARMKV_TARGET", pair[0].address)
    return pair[1]


def run(*arguments: str | Path, said: str | None = None, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(each) for each in arguments], input=said, catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def run_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_the_life_of_an_agent(client: Client, tmp_path: Path) -> None:
    (tmp_path / "system").write_text("You are a helpful assistant.")
    flags = ("--role", "system", "--pinned", "--ttl", "30d", "--label", "team=blue")
    assert "computed" in run("agents", "prime", "ada", "-f", tmp_path / "system", *flags).stdout
    agent = client.get("ada")
    assert (agent.pinned, agent.ttl.seconds, dict(agent.labels)) == (True, 30 * 86400, {"team": "blue"})
    said = json.dumps([{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}])
    assert "hot · " in run("agents", "extend", "ada", "--chat", "-f", "-", said=said).stdout
    assert run_json("agents", "fork", "ada", "bob")["parent_agent_id"] == "ada"
    assert "warm now" in run("agents", "evict", "ada").stdout
    assert "not pinned" in run("agents", "pin", "ada", "--off").stdout
    assert run_json("agents", "pin", "ada")["pinned"] is True
    assert "team=blue" in run("agents", "show", "ada").stdout
    assert run_json("agents", "show", "ada")["revision"] == "2"
    assert {each["agent_id"] for each in run_json("agents", "ls")["agents"]} >= {"ada", "bob"}
    assert "ada" in run("agents", "ls", "--label", "team=blue", "--tier", "warm").stdout
    assert run("agents", "ls", "--label", "team=red").stdout == "no agents\n"
    assert run("agents", "rm", "ada", "bob").stdout == "ada: deleted\nbob: deleted\n"
    run("agents", "rm", "ada", "--allow-missing")


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["show", "nobody"], 1, "there is no agent 'nobody'"),
        (["rm", "nobody"], 1, "there is no agent 'nobody'"),
        (["prime", "a", "-f", "/no/such/file"], 2, "No such file"),
        (["prime", "a", "-f", "/bin/sh"], 2, "is not UTF-8 text"),
        (["prime", "a", "-f", "/etc/hostname", "--chat"], 2, "is not a conversation in JSON"),
        (["prime", "a", "-f", "/etc/hostname", "--chat", "--role", "user"], 2, "exclude each other"),
        (["prime", "a", "-f", "/etc/hostname", "--ttl", "soon"], 2, "is no duration"),
        (["prime", "a", "-f", "/etc/hostname", "--label", "blue"], 2, "is not KEY=VALUE"),
        (["ls", "--tier", "cold"], 2, "it is hot or warm"),
        (["ls", "--data-dir", "/no/such/folder"], 2, "is not a data directory"),
        (["ls", "--tls-ca", "/no/such/file"], 2, "can't be read"),
        (["ls", "--target", "127.0.0.1:1"], 1, "start one with `warmkv serve`"),
        (["export", "-o", "x"], 2, "either an agent's id or --all"),
    ],
)
@pytest.mark.usefixtures("client")
def test_what_goes_wrong_is_one_sentence(arguments: list[str], status: int, word: str) -> None:
    result = run("agents", *arguments, status=status)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("warmkv: ")
    assert word in line


def test_looking_into_the_directory_of_a_server(client: Client, pair: tuple[Server, Client], tmp_path: Path) -> None:
    client.prime("one", token_ids(some_tokens(300)))
    client.prime("ONE", token_ids(some_tokens(20, 1)))
    there = ("--data-dir", pair[0].data_dir)
    assert {"one", "ONE"} <= {each["agent_id"] for each in run_json("agents", "ls", *there)["agents"]}
    assert "300" in run("agents", "show", "one", *there).stdout
    told = run("agents", "export", "--all", "-o", tmp_path / "all", *there, "--json").stdout.splitlines()
    files = {json.loads(line)["agent_id"]: Path(json.loads(line)["file"]) for line in told}
    assert files.keys() == {each.agent_id for each in client.list().agents}
    assert len({file.name.casefold() for file in files.values()}) == len(files)
    assert all(file.is_file() for file in files.values())
    run("agents", "export", "--all", "-o", tmp_path / "all", *there, status=2)


def test_what_runs_now(client: Client) -> None:
    """`ps` and `top` while a long prompt is computed."""
    client.prime("busy", token_ids(some_tokens(10)))
    stream = client.stream("busy", token_ids(some_tokens(20_000, 3)))
    try:
        await_that(lambda: client.get("busy").tokens_done > 0)
        (seen,) = run_json("ps")["agents"]
        assert (seen["agent_id"], seen["activity"], seen["tokens_total"]) == ("busy", "ACTIVITY_PREFILLING", 20_000)
        shown = run("ps").stdout
        assert "prefilling" in shown
        assert "1 request at work, 0 waiting" in shown
        assert "busy" in run("top").stdout
    finally:
        stream.cancel()
    await_that(lambda: run("ps").stdout == "0 requests at work, 0 waiting\n")


def test_the_progress_of_a_prime(client: Client, pair: tuple[Server, Client], tmp_path: Path) -> None:
    """A bar on the terminal that asks, and for who looks from elsewhere an agent that is being made."""
    (tmp_path / "long").write_text("The fox and the dog. " * 2500)
    with terminal("agents", "prime", "new", "-f", str(tmp_path / "long"), "--target", pair[0].address) as prime:
        prime.expect(r"computing the context .*[1-9]\d*/\d+")
        (seen,) = run_json("ps")["agents"]
        assert (seen["agent_id"], seen["revision"], seen["activity"]) == ("new", "0", "ACTIVITY_PREFILLING")
        assert re.search(r"^ *new +hot +0 +0 .* prefilling [\d,]+/[\d,]+", run("agents", "ls").stdout, re.MULTILINE)
        assert "prefilling" in run("agents", "show", "new").stdout
        assert client.get("new").revision == 0
        run("agents", "rm", "new")
        prime.expect("the agent 'new' was deleted")
        assert prime.wait() == 1


def test_top_in_a_terminal(client: Client, pair: tuple[Server, Client]) -> None:
    answer = client.generate("topped", text("Hello"))
    told = run_json("top")
    source = v1.CacheSource.Name(answer.cache.source)
    assert int(told["counters"]["answers_by_source"][source]) >= 1
    spent = float(told["counters"]["first_token_by_source"][source].removesuffix("s"))
    assert spent >= answer.finished.timings.first_token.ToNanoseconds() / 1e9
    assert run("top", "--count", "2", "--every", "0.01", "--json").stdout.count("start_time") == 2
    with terminal("top", "--every", "0.1", "--target", pair[0].address) as top:
        top.expect("builtin:tiny on .* 0 requests at work")
        top.expect("first token, mean")
        top.expect(r"0\.0/s")  # a second look
        top.send("\x03")
        assert top.wait() == 0


def test_health_speaks_tls_and_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("ours secret-1\n")
    port = free_port()
    flags = ["--tls-cert", str(TLS / "certificate.pem"), "--tls-key", str(TLS / "key.pem")]
    flags += ["--token-file", str(tmp_path / "tokens"), "--health-port", str(port), "--disk-bytes", "1700kB"]
    server = Server(tmp_path / "data", *flags)
    try:
        there = ("--target", server.address, "--tls-ca", TLS / "certificate.pem")
        healthy = {"status": "SERVING", "storage": "SERVING"}
        assert run_json("health", *there) == {"target": server.address, **healthy}
        assert run_json("health", *there, "--token", "secret-1")["token"] == "known"
        refused = run("health", *there, "--token", "guess", status=1)
        assert "TOKEN_INVALID" in refused.stdout
        assert "does not answer" in run("health", "--target", server.address, "--seconds", "5", status=1).stderr
        assert run("health", "--target", f"127.0.0.1:{port}", "--tls-ca", TLS / "certificate.pem").stdout.startswith(
            "SERVING\nstorage: SERVING"
        )
        (tmp_path / "long").write_text("word " * 3000)
        primed = run("agents", "prime", "a", "-f", tmp_path / "long", *there, "--token", "secret-1")
        assert "NOT persisted" in primed.stdout
        assert "NOT_SERVING (the disk refuses" in run("health", *there).stdout
        assert "give a token" in run("agents", "ls", *there, status=1).stderr
    finally:
        server.kill()


def test_commands_to_a_server_start_without_what_serving_needs(pair: tuple[Server, Client]) -> None:
    program = (
        "import sys\n"
        "from warmkv_server.cli.main import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    for command in (["agents", "ls"], ["top"], ["chat"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--target", pair[0].address],
            input="",
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        loaded = {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}
        assert not loaded & {"mlx", "mlx_lm", "transformers", "numpy", "torch"}


def test_help_version_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ([], ["agents"], ["agents", "prime"], ["chat"], ["models"], ["serve"], ["store", "gc"]):
        assert run(*command, "-h").stdout == run(*command, "--help").stdout
    assert run("--version").stdout == run("version").stdout
    monkeypatch.setenv("COMP_WORDS", "warmkv agents pr")
    monkeypatch.setenv("COMP_CWORD", "2")
    done = CliRunner().invoke(app, [], prog_name="warmkv", env={"_WARMKV_COMPLETE": "complete_bash"})
    assert done.stdout.split() == ["prime"]
