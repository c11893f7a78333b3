"""`python -m warmkv_bench`."""

from warmkv_bench.cli import app

app(prog_name="warmkv bench")
