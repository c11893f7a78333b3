"""The console command `warmkv`. Imports nothing heavy, so that it can say what is not installed."""

from __future__ import annotations

import sys

from warmkv_server.malloc import keep_freed_memory

OWN_PACKAGES = ("warmkv", "warmkv_server", "warmkv_bench", "warmkv_evaluation")


def main() -> None:
    """Runs the command line; exits with status 2 if the packages that it needs are not installed."""
    keep_freed_memory()
    try:
        from warmkv_server.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OWN_PACKAGES:
            raise
        print(
            f"warmkv: the server needs packages that are not installed ({missing} is missing): run "
            "`pip install 'warmkv[server]'` on macOS, `pip install 'warmkv[cpu]'` on Linux, or "
            "`pip install 'warmkv[cuda13]'` on Linux with an NVIDIA GPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    app()
