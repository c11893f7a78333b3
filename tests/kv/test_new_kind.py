"""A kind of KV that the store has never heard of: one class, and the store's state machine is passed with it."""

from __future__ import annotations

from tests.kv import words
from tests.kv.test_model import SETTINGS, StoreMachine
from warmkv_server.contract.kv import AlongTokens, KVLayout, PartKind, Ranges, TensorSpec, register

SINKS, WINDOW = 40, 150


class SinksAndWindow(AlongTokens):
    """Attention over the first tokens of a context and over the last ones, and over nothing between."""

    kind = PartKind("sinks")

    def needs(self, layout: KVLayout, length: int) -> Ranges:  # noqa: ARG002
        if length <= SINKS + WINDOW:
            return (range(length),)
        return range(SINKS), range(length - WINDOW, length)


register(SinksAndWindow())


def required(_: KVLayout, length: int) -> set[int]:
    return {*range(min(SINKS, length)), *range(max(length - WINDOW, 0), length)}


words.REQUIRED[SinksAndWindow.kind] = required
STREAMS = TensorSpec("kv2.words", SinksAndWindow.kind, "uint32", (2, 1, 4), 2 * 4 * 4)


class SinksMachine(StoreMachine):
    layout = KVLayout((*words.FULL, STREAMS))


class MixedMachine(StoreMachine):
    layout = KVLayout((*words.FULL, STREAMS, *words.SLIDING, *words.RECURRENT), window=300)


TestSinks = SinksMachine.TestCase
TestSinks.settings = SETTINGS
TestMixed = MixedMachine.TestCase
TestMixed.settings = SETTINGS
