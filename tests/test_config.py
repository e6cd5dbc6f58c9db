"""Options: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins import config
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.features import FEATURES


def test_sections_are_the_features() -> None:
    """A feature without a section could not be switched off; a section without one does nothing."""
    sections = {
        field.name
        for field in msgspec.structs.fields(config.Config)
        if isinstance(field.default, msgspec.Struct)
    }
    assert sections == set(FEATURES)


@pytest.mark.parametrize("spelling", ["on", "off", "true", "False", "yes", "NO", True, False])
def test_a_section_can_be_switched_in_every_spelling(spelling: Any) -> None:
    expected = str(spelling).lower() in ("on", "true", "yes")
    assert config.parse({"ipc": spelling}).ipc.enabled is expected
    assert config.parse({"ipc": {"enabled": spelling}}).ipc.enabled is expected
    assert config.parse({"strict": spelling}).strict is expected


def test_values_arrive() -> None:
    parsed = config.parse({"frontend": {"workers": 4}, "sim": {"speed": 2, "kv-blocks": 100}})
    assert parsed.frontend.workers == 4
    assert parsed.sim.speed == 2.0
    assert parsed.sim.kv_blocks == 100
    assert parsed.frontend.enabled is None


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"ipcc": "on"}, ["scalellm.ipcc", "unknown option", "Valid under scalellm: ipc,"]),
        (
            {"frontend": {"wrkers": 2}},
            ["scalellm.frontend.wrkers", "given 2", "frontend: workers,"],
        ),
        ({"frontend": {"workers": 0}}, ["scalellm.frontend.workers", "0", ">= 1"]),
        ({"frontend": {"workers": "four"}}, ["scalellm.frontend.workers", "'four'", "int"]),
        ({"frontend": {"workers": True}}, ["scalellm.frontend.workers", "True", "int"]),
        ({"frontend": 3}, ["scalellm.frontend", "3", "on/off", "workers"]),
        ({"strict": "--port"}, ["scalellm.strict", "'--port'", "on, off"]),
        ({"sim": {"gpu": "h20"}}, ["scalellm.sim.gpu", "'h20'", "Valid: h200"]),
        ({"sim": {"model": "8bb"}}, ["scalellm.sim.model", "'8bb'", "Valid: 8b"]),
        ({"sim": {"speed": -1}}, ["scalellm.sim.speed", "-1", "> 0"]),
    ],
)
def test_refusals_name_the_path_the_value_and_the_valid_names(
    raw: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def _word_options() -> list[tuple[str, str, tuple[str, ...]]]:
    """Options that are one of some words: section, name, words."""
    rows = []
    for section in msgspec.inspect.type_info(config.Config).fields:  # type: ignore[attr-defined]
        for field in getattr(section.type, "fields", ()):
            kinds = [field.type, getattr(field.type, "type", None)]  # below its description
            words = [kind.values for kind in kinds if isinstance(kind, msgspec.inspect.LiteralType)]
            rows += [(section.name, field.name, tuple(found)) for found in words]
    return rows


def test_a_word_that_is_none_of_an_options_words_gets_them_told_closest_first() -> None:
    options = _word_options()
    assert ("quantization", "zero_point", ("asymmetric", "symmetric")) in options
    for section, name, words in options:
        for value in (words[-1][:3], 3):
            with pytest.raises(ConfigError) as caught:
                config.parse({section: {name: value}})
            text = str(caught.value)
            assert f"scalellm.{section}.{name}: {value!r} is unknown. Valid: " in text
            assert set(text.rpartition(": ")[2].split(", ")) == set(words)
    with pytest.raises(ConfigError, match="Valid: symmetric, asymmetric"):
        config.parse({"quantization": {"zero_point": "sym"}})


def test_a_switch_keeps_the_sections_options_whichever_side_it_is_on() -> None:
    options, switch = {"sim": {"gpu": "h100"}}, {"sim": "on"}
    for merged in (config.merge(options, switch), config.merge(switch, options)):
        assert config.parse(merged).sim.gpu == "h100"
        assert config.parse(merged).sim.enabled is True


_leaves = st.sampled_from([True, False, "on", "off", "x", 0, 7])
_sections = st.dictionaries(st.sampled_from("abc"), _leaves, max_size=3)
_trees = st.dictionaries(st.sampled_from("abc"), st.one_of(_leaves, _sections), max_size=3)


@given(_trees, _trees)
def test_merge_is_idempotent_and_takes_everything_of_the_upper_layer(base: Any, over: Any) -> None:
    merged = config.merge(base, over)
    assert config.merge(merged, over) == merged
    assert config.merge(base, {}) == base
    assert config.merge({}, over) == over
    assert set(merged) == set(base) | set(over)


def test_options_survive_the_environment(clean_environment: pytest.MonkeyPatch) -> None:
    assert config.current() == config.Config()
    config.raw_to_env({"frontend": {"workers": 3}, "ipc": "off"})
    assert config.current() == config.parse({"frontend": {"workers": 3}, "ipc": "off"})


@pytest.mark.parametrize(
    ("options", "count", "cores", "at_least", "expected"),
    [
        ({}, None, 2, 1, (1, 1)),
        ({}, None, 16, 1, (1, 4)),
        ({}, None, 256, 1, (1, 8)),
        ({}, None, 2, 4, (1, 4)),
        ({"workers": 3}, None, 2, 1, (3, 3)),
        ({"workers": 3}, 3, 2, 1, (3, 3)),
        ({"min_workers": 5}, None, 2, 1, (5, 5)),
        ({"max_workers": 5}, None, 2, 1, (1, 5)),
        ({"min_workers": 2, "max_workers": 5}, None, 2, 1, (2, 5)),
        ({"min_workers": 2, "max_workers": 5}, 5, 2, 1, (2, 5)),
        ({"min_workers": 2}, 5, 2, 1, (2, 5)),
        ({}, 5, 64, 8, (5, 5)),
        ({}, 1, 64, 8, (1, 1)),
        # As the first process leaves them for the others, and finds them after a restart.
        ({"workers": 3, "min_workers": 3, "max_workers": 3}, 3, 2, 1, (3, 3)),
    ],
)
def test_how_many_workers_there_are_to_be(
    options: dict[str, int], count: int | None, cores: int, at_least: int, expected: tuple[int, int]
) -> None:
    frontend = config.parse({"frontend": options}).frontend
    assert config.worker_bounds(frontend, count, cores, at_least) == expected


@pytest.mark.parametrize(
    ("options", "count", "parts"),
    [
        ({"workers": 3}, 2, ["frontend.workers: 3", "--api-server-count 2"]),
        ({"max_workers": 3}, 2, ["frontend.max_workers: 3", "--api-server-count 2"]),
        ({"min_workers": 3}, 2, ["frontend.min_workers: 3", "--api-server-count 2"]),
        ({"workers": 3, "max_workers": 4}, None, ["max_workers: 4", "frontend.workers 3"]),
        ({"workers": 3, "min_workers": 2}, None, ["min_workers: 2", "frontend.workers 3"]),
        ({"min_workers": 4, "max_workers": 2}, None, ["min_workers: 4", "max_workers 2"]),
    ],
)
def test_contradictory_numbers_of_workers_are_refused(
    options: dict[str, int], count: int | None, parts: list[str]
) -> None:
    frontend = config.parse({"frontend": options}).frontend
    with pytest.raises(ConfigError) as caught:
        config.worker_bounds(frontend, count, cores=2)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["nonsense", "[1]", '"on"'])
def test_a_broken_variable_is_named(clean_environment: pytest.MonkeyPatch, text: str) -> None:
    clean_environment.setenv("SCALELLM_CONFIG", text)
    with pytest.raises(ConfigError, match="SCALELLM_CONFIG"):
        config.current()


def test_every_option_is_described() -> None:
    rows = config.describe()
    assert {path for path, _, _ in rows} >= {"scalellm.strict", "scalellm.frontend.workers"}
    for path, default, text in rows:
        assert text, f"{path} has no description"
        json.loads(default) if default != "unset" else None
