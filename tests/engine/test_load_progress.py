"""Loading tells how far it is with the weights, and what it tells adds up."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from tests.engine.conftest import FolderOf
from tests.engine.families import VOCAB
from tests.engine.test_model import load
from warmkv_server.engine.model import load_progress


def test_every_stage_is_told_of_up_to_its_end(folder_of: FolderOf) -> None:
    told: list[tuple[str, int, int]] = []
    folder = folder_of("llama")
    loaded = load(folder, progress=lambda *now: told.append(now))
    assert loaded.model(mx.array([[5]])).shape[-1] == VOCAB
    nbytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    for what in ("reading the weights", "checking the weights"):
        done = [(now, total) for stage, now, total in told if stage == what]
        assert done[-1][0] == done[-1][1]
        assert 0.9 * nbytes <= done[-1][1] <= nbytes  # the file has a header


def test_portions_are_the_whole() -> None:
    """However large they are, each weight is computed, in its turn."""

    class Model:
        weights = {f"w{n}": mx.ones((n + 1, 1 << 20)) for n in range(12)}  # noqa: RUF012

        def parameters(self) -> dict[str, mx.array]:
            return self.weights

    told: list[tuple[int, int]] = []
    load_progress.evaluate(Model(), "reading", lambda _, done, total: told.append((done, total)))
    done = [each for each, _ in told]
    assert {total for _, total in told} == {sum(range(1, 13)) << 22}
    assert len(done) > 3
    assert done == sorted(done)
    assert done[-1] == told[0][1]
