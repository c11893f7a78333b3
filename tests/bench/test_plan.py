"""The plan of a run, its presets, and the options that make it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from warmkv_bench.config import ConfigError, Isolation, MatrixConfig, Mode, State, prefix_tokens
from warmkv_bench.plan import Purpose, calibration, plan
from warmkv_bench.presets import PRESETS, Preset

SMALL = MatrixConfig(contexts=(1024, 4096), runs=2)


def test_the_seed_preset_is_the_audited_matrix() -> None:
    config = MatrixConfig(**PRESETS[Preset.SEED])
    assert config.contexts == (1024, 2048, 4096, 8192, 16384, 32768)
    for context in config.contexts:
        rounds = [round_ for round_ in plan(config) if round_.context_tokens == context]
        single = Counter((state, round_.mode) for round_ in rounds if round_.batch_size == 1 for state in round_.states)
        # 3 states x 2 modes x 3 runs = 18 scenarios
        assert single == {(state, mode): 3 for state in (State.COLD, State.WARM, State.HOT) for mode in Mode}
        pairs = [round_ for round_ in rounds if round_.batch_size == 2]
        assert sum(State.COLD in round_.states for round_ in pairs) == 6
        assert {state for round_ in pairs for state in round_.states} == {State.COLD, State.WARM, State.HOT}
    assert {round_.isolation for round_ in plan(config)} == {Isolation.STRICT}


def test_the_quick_preset_is_one_streaming_run() -> None:
    config = MatrixConfig(**PRESETS[Preset.QUICK])
    assert (config.runs, config.modes, config.batch_sizes) == (1, (Mode.STREAMING,), (1,))


@pytest.mark.parametrize("preset", Preset)
def test_every_preset_gives_a_plan_of_distinct_rounds(preset: Preset) -> None:
    rounds = plan(MatrixConfig(**PRESETS[preset]))
    assert len({round_.key for round_ in rounds}) == len(rounds) > 0


def test_cold_pays_first_and_a_restart_comes_last() -> None:
    config = replace(SMALL, states=tuple(State), runs=20)
    orders = {round_.states for round_ in plan(config)}
    assert len(orders) > 1  # the states between are shuffled
    assert all(order[0] == State.COLD and order[-1] == State.RESTART for order in orders)
    strict = {round_.states for round_ in plan(replace(config, isolation=Isolation.STRICT))}
    assert len({order[0] for order in strict}) > 1
    assert all(order[-1] == State.RESTART for order in strict)


def test_repeats_are_of_what_forks_make_cheap() -> None:
    for isolation in Isolation:
        for round_ in plan(replace(SMALL, states=tuple(State), repeats=3, isolation=isolation)):
            counts = Counter(round_.states)
            assert (counts[State.COLD], counts[State.RESTART]) == (1, 1)
            assert counts[State.WARM] == counts[State.WARM_DROPPED] == counts[State.HOT] == 3
            assert round_.states[-1] == State.RESTART


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    config = replace(SMALL, states=tuple(State), runs=10)
    assert plan(config) == plan(config)
    assert plan(config) != plan(replace(config, seed=1))


def test_a_concurrent_pair_is_measured_once() -> None:
    alone = plan(replace(SMALL, concurrency=True))
    pairs = [round_ for round_ in alone if round_.purpose == Purpose.CONCURRENT]
    assert len(pairs) == 2 * 2 * 2
    assert {(round_.batch_size, round_.states) for round_ in pairs} == {(2, (State.COLD,))}
    with_pairs = plan(replace(SMALL, concurrency=True, batch_sizes=(1, 2)))
    assert not [round_ for round_ in with_pairs if round_.purpose == Purpose.CONCURRENT]


def test_the_cross_check_is_at_the_smallest_context_and_has_both_isolations() -> None:
    rounds = [round_ for round_ in plan(replace(SMALL, cross_check=True)) if round_.purpose == Purpose.CROSS_CHECK]
    assert {round_.context_tokens for round_ in rounds} == {1024}
    assert Counter(round_.isolation for round_ in rounds) == {Isolation.FORK: 15, Isolation.STRICT: 15}


def test_calibration_extrapolates_over_no_more_than_a_factor_of_four() -> None:
    rounds = calibration(MatrixConfig(contexts=(1024, 32768), states=(State.WARM,)))
    assert [round_.context_tokens for round_ in rounds] == [512, 2048, 8192][1:]
    assert all(round_.purpose == Purpose.CALIBRATION for round_ in rounds)


def test_the_largest_context_leaves_room_for_suffix_and_answer() -> None:
    assert prefix_tokens(1024, SMALL, 32768) == 1024
    assert prefix_tokens(32768, SMALL, 32768) == 32768 - 32 - 64
    with pytest.raises(ConfigError, match="--contexts has 65536, but the model's limit is 32768"):
        prefix_tokens(65536, SMALL, 32768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": ()}, "--contexts is empty"),
        ({"contexts": (0,)}, "--contexts is 0"),
        ({"runs": 0}, "--runs is 0"),
        ({"batch_sizes": (1, 1)}, "--batch-sizes names a value twice"),
        ({"output_tokens": 1}, "--output-tokens is 1"),
        ({"max_time_s": 0.0}, "--max-time is 0"),
    ],
)
def test_a_wrong_option_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_a_config_survives_json() -> None:
    config = MatrixConfig(**PRESETS[Preset.FULL])
    assert MatrixConfig.from_json(config.to_json()) == config
