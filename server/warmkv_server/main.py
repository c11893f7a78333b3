"""The console command `warmkv`. Imports nothing heavy, so that it can say what is not installed."""

from __future__ import annotations

import sys
import time

from warmkv_server.platform.malloc import keep_freed_memory

OWN_PACKAGES = ("warmkv", "warmkv_server", "warmkv_bench", "warmkv_evaluation")


def main() -> None:
    """Runs the command line; exits with status 2 if the machine has no clock for it, or not the packages it needs."""
    keep_freed_memory()
    try:
        time.time()
    except OverflowError:
        print(
            "warmkv: this machine's clock is set beyond the year 2262, which is as far as Python can reckon; set it",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        from warmkv_server.cli.main import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OWN_PACKAGES:
            raise
        print(
            f"warmkv: the server needs packages that are not installed ({missing} is missing): run, in WarmKV's "
            "checkout, `pip install '.[server]'` on macOS, `pip install '.[cpu]'` on Linux, or "
            "`pip install '.[cuda13]'` on Linux with an NVIDIA GPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    app()
