"""Runs the commands of README.md's conversation against a real server and puts what they print beneath them.

With --check it changes nothing and fails if README says something else, up to what no two runs have in common: times
and durations. Needs grpcurl; `make clients` builds it and calls this.

In README.md, each `sh` block that calls grpcurl and each `python` block is run, in order, on one server with an empty
data directory. The comment `<!-- kill -9 -->` kills that server and starts it again. `<!-- prints PATH -->` says that
the block behind it is what the commands before it printed: all of it without a PATH, the streamed text for `text`, or
else what is at that path of the last message that has it, such as `finished.cache`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ADDRESS = "127.0.0.1:50051"
"""What README says; the server of a check takes a free port."""

_STEP = re.compile(
    r"^```(?P<language>sh|python)\n(?P<commands>.*?)^```$"
    r"|^<!-- (?P<kill>kill -9) -->$"
    r"|^<!-- prints(?P<path> [\w.]+)? -->\n```\w+\n(?P<printed>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_VARIES = (
    (re.compile(r'"\d{4}-\d\d-\d\dT[\d:.]+Z"'), '"a time"'),
    (re.compile(r'"\d+(\.\d+)?s"'), '"a duration"'),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md says something else")
    check = parser.parse_args().check
    before = README.read_text()
    with tempfile.TemporaryDirectory() as data:
        after, commands = run(before, Path(data))
    if not check:
        README.write_text(after)
        print(f"README.md: {commands} commands ran")
        return
    difference = list(difflib.unified_diff(_settled(before), _settled(after), "README.md", "what its commands print"))
    if difference:
        sys.exit("".join(difference) + "README.md isn't what its commands print; tools/transcript.py writes it anew")
    print(f"README.md: {commands} commands ran, and print what it says")


def run(readme: str, data: Path) -> tuple[str, int]:
    """README with what its commands print now, and how many there are."""
    pieces: list[str] = []
    printed, commands, end = "", 0, 0
    server = Server(data)
    try:
        for step in _STEP.finditer(readme):
            if step["kill"]:
                server.kill()
                server = Server(data)
            elif step["printed"] is not None:
                pieces += [readme[end : step.start("printed")], shown(printed, (step["path"] or "").strip())]
                end = step.end("printed")
            elif step["language"] == "python":
                printed = server.run([sys.executable, "-c"], step["commands"])
                commands += 1
            elif "grpcurl" in step["commands"]:
                printed = server.run(["bash", "-euo", "pipefail", "-c"], step["commands"])
                commands += sum(line.startswith("grpcurl") for line in step["commands"].splitlines())
    finally:
        server.kill()
    return "".join([*pieces, readme[end:]]), commands


class Server:
    """A server on the built-in model and a free port."""

    def __init__(self, data: Path) -> None:
        command = [str(Path(sys.executable).with_name("warmkv")), "serve", "--port", "0", "--data-dir", str(data)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.match(r"listening on (\S+)", line):
                self._address = found[1]
                return
        sys.exit(f"the server ended with {self._process.wait()} before it was serving")

    def run(self, interpreter: list[str], commands: str) -> str:
        """What they print, as they stand in README."""
        path = f"{ROOT / 'tests' / 'clients' / 'go' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*interpreter, commands.replace(ADDRESS, self._address)],
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout.replace(self._address, ADDRESS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def shown(printed: str, path: str) -> str:
    """The part of an output that README shows."""
    if not path:
        return printed
    messages = list(_messages(printed))
    if path == "text":
        return "".join(message.get("delta", {}).get("text", "") for message in messages) + "\n"
    found = [value for message in messages if (value := _at(message, path.split("."))) is not None]
    return json.dumps(found[-1], indent=2) + "\n"


def _messages(printed: str) -> Iterator[Any]:
    """grpcurl prints the messages of a stream one behind the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(printed.rstrip()):
        message, at = decoder.raw_decode(printed, at)
        at += len(printed[at:]) - len(printed[at:].lstrip())
        yield message


def _at(message: Any, path: list[str]) -> Any:
    for name in path:
        message = message.get(name) if isinstance(message, dict) else None
    return message


def _settled(readme: str) -> list[str]:
    """Its lines, without what no two runs have in common."""
    for pattern, word in _VARIES:
        readme = pattern.sub(word, readme)
    return readme.splitlines(keepends=True)


if __name__ == "__main__":
    main()
