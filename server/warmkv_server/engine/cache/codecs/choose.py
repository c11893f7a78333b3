"""From what the operator sets to the codec of each stream."""

from __future__ import annotations

from warmkv_server.contract.kv_choice import AFFINE, EXACT, KvChoice
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.cache.codecs.affine import AffineCodec
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import CodecPlan


def codecs_for(kv_bits: int = 4, kv_group_size: int = 64) -> CodecPlan:
    """One codec for all streams.

    Args:
        kv_bits: 4 or 8; 0 keeps keys and values as they are computed.
        kv_group_size: values that share a scale.
    """
    return CodecPlan(AffineCodec(kv_bits, kv_group_size) if kv_bits else AsComputed())


def codecs_chosen(choice: KvChoice, kv_group_size: int = 64) -> CodecPlan:
    """One for keys and one for values; what depends on the model is left to be made for it."""
    keys, values = choice.keys, choice.values
    if keys == values and keys.kind in (AFFINE, EXACT):
        return codecs_for(keys.bits, kv_group_size)
    return CodecPlan(AffineCodec(max(keys.bits, values.bits), kv_group_size), asked=choice)


def codecs_of(settings: Settings) -> CodecPlan:
    """As the operator says."""
    return codecs_chosen(settings.kv_choice, settings.kv_group_size)
