"""The model that will serve a directory: its fingerprint, and the shapes of its KV."""

from __future__ import annotations

from warmkv_server.contract.kv import all_kinds
from warmkv_server.contract.settings import CONSTANTS, Settings
from warmkv_server.engine.cache.codecs.choose import codecs_of
from warmkv_server.engine.model import device
from warmkv_server.engine.model import load as models
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.index.records import Fingerprint
from warmkv_server.offline.importing import Specs


def load(settings: Settings) -> tuple[Fingerprint, Specs, int]:
    """Load the model as `warmkv serve` would, and forget it again. The number is the vocabulary's.

    Raises:
        OperatorError
    """
    device.prepare()
    info = models.load(
        settings.model,
        adapter=settings.adapter,
        codecs=codecs_of(settings),
        context_limit=None,
        constants=settings.data_dir / CONSTANTS,
    ).info
    specs = {kind: blockfile.ordered(info.layout.of_kind(kind)) for kind in all_kinds()}
    return Fingerprint.of_model(info.fingerprint_fields), specs, info.vocab_size
