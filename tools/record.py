"""Records docs/first-minute.md: a terminal in which a server is started, talked to, killed, and talked to again.

    python tools/record.py

Drives tmux, so that what is in the document is what a terminal of 100 columns shows, without its colours. Takes the
port 50051 and the folder /tmp/ada, and leaves neither behind.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from warmkv.client import Client

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/first-minute.md"
HOME = Path("/tmp/ada")
PATIENCE = 120.0
COLUMNS, LINES = 100, 48
SOCKET = "warmkv-record"
PROMPT = r"^\$\Z"

INTRODUCTION = """# The first minute

What a terminal shows, recorded by `tools/record.py` on two CPU cores with the built-in model. In one window:
"""


class Window:
    """One shell in a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        shell = [
            "env",
            "-i",
            f"HOME={HOME}",
            f"PATH={path}",
            "TERM=screen",
            "LANG=C.UTF-8",
            "PS1=$ ",
            "PROMPT_COMMAND=",
        ]
        size = ["-x", str(COLUMNS), "-y", str(LINES)]
        start = ["new-session", "-d", "-s", name, *size, "-c", str(HOME), *shell, "bash", "--norc", "--noprofile", "-i"]
        _tmux(*start)
        self.expect(PROMPT)

    def type(self, line: str) -> None:
        _tmux("send-keys", "-t", self._name, "-l", line)
        _tmux("send-keys", "-t", self._name, "Enter")

    def press(self, key: str) -> None:
        _tmux("send-keys", "-t", self._name, key)

    def expect(self, pattern: str, times: int = 1) -> None:
        """Wait until it is on the screen so often."""
        give_up = time.monotonic() + PATIENCE
        while len(re.findall(pattern, self.screen(), re.MULTILINE)) < times:
            if time.monotonic() > give_up:
                sys.exit(f"{pattern!r} didn't come in the window {self._name}:\n{self.screen()}")
            time.sleep(0.05)

    def screen(self) -> str:
        lines = _tmux("capture-pane", "-p", "-t", self._name).splitlines()
        return "\n".join(line.rstrip() for line in lines).rstrip()

    def runs(self) -> str:
        """The process that its shell has started."""
        shell = _tmux("display-message", "-p", "-t", self._name, "#{pane_pid}").strip()
        return Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0]

    def clear(self) -> None:
        """An empty screen, with a new prompt."""
        self.type("clear")
        self.expect(r"\A\$\Z")


def _tmux(*arguments: str) -> str:
    done = subprocess.run(["tmux", "-L", SOCKET, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"tmux {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def shown(screen: str) -> str:
    return f"\n```text\n{screen}\n```\n"


def record() -> str:
    """The document."""
    parts = [INTRODUCTION]
    server, chat, other = Window("server"), Window("chat"), Window("other")
    server.type("warmkv serve --log-level warning")
    server.expect("^listening on 127.0.0.1:50051$")
    parts += [shown(server.screen()), "\nIn another one, a chat:\n"]

    chat.type("warmkv chat")
    chat.expect("^>")
    said = ("/system You are a helpful assistant.", "Hello! My name is Grace.", "What is my name?")
    for number, line in enumerate(said, start=1):
        chat.type(line)
        chat.expect("persisted$", number)
        chat.expect(r"^>\s*\Z")
    parts += [shown(chat.screen()), "\nNow the server is killed, in a third one:\n"]

    other.type(f"kill -9 {server.runs()}")
    server.expect("^Killed|Killed ")
    parts += [
        shown(other.screen()),
        "\nThe chat asks on. It waits for the server, which is started again, and its context comes from disk:\n",
    ]
    chat.press("C-l")
    chat.type("What is my name?")
    chat.expect("waiting for it")
    server.clear()
    server.type("warmkv serve --log-level warning")
    server.expect("^listening on")
    chat.expect("persisted$")
    chat.expect(r"^>\s*\Z")
    parts += [
        shown(chat.screen()),
        "\nWhile a long text is computed for another agent, `warmkv ps` says how far that is:\n",
    ]

    other.clear()
    words = random.Random(1)
    text = " ".join(words.choices(("The", "key", "is", "in", "the", "drawer", "of", "my", "desk."), k=16_000))
    (HOME / "book.txt").write_text(text)
    other.type("echo 'A book:' | warmkv agents prime reader -f -")
    other.expect(PROMPT)
    other.type("warmkv agents extend reader -f book.txt &")
    other.expect(PROMPT)
    with Client() as client:
        while not client.get("reader").tokens_done:
            time.sleep(0.1)
    other.type("warmkv ps")
    other.expect("at work")
    parts += [shown(other.screen()), "\nAnd `warmkv top`, until Ctrl-C:\n"]
    other.clear()
    other.type("warmkv top")
    other.expect(r"first token, mean[^$]*/s")
    parts.append(shown(other.screen()))
    for window in (other, server):
        window.press("C-c")
        window.expect(r"\$\Z")
    return "".join(parts)


def main() -> None:
    if shutil.which("tmux") is None:
        sys.exit("this needs tmux")
    HOME.mkdir()
    try:
        document = record()
    finally:
        subprocess.run(["tmux", "-L", SOCKET, "kill-server"], check=False, capture_output=True)
        shutil.rmtree(HOME, ignore_errors=True)
    DOCUMENT.write_text(document)
    print(f"{DOCUMENT.relative_to(ROOT)}: recorded")


if __name__ == "__main__":
    main()
