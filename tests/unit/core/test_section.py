"""Configuration: strict, frozen, unknown keys named with the nearest allowed one."""

from typing import Literal

import pytest
from pydantic import Field

from cellray.core.errors import ConfigError
from cellray.core.section import (
    Section,
    apply_overrides,
    build_section,
    flatten,
    merge,
    parse_value,
    read_toml,
    to_dict,
    to_toml,
)


class Optim(Section):
    lr: float = Field(default=1e-4, gt=0)
    steps: int = 10


class Plugin(Section):
    name: str
    width: int = 4


class Whole(Section):
    name: str
    optim: Optim = Optim()
    model: Section
    maybe: Optim | None = None


def plugs(raw):
    raw["model"].setdefault("name", "small")
    return {"model": Plugin}


def test_unknown_key_names_the_nearest_allowed_key():
    with pytest.raises(
        ConfigError, match=r"run.toml: unknown key 'optim.lrr'\. Did you mean 'lr'\? Allowed"
    ):
        build_section(
            Whole, {"name": "x", "optim": {"lrr": 1}, "model": {}}, plugs=plugs, source="run.toml"
        )


def test_unknown_key_in_a_plugged_section_is_refused():
    with pytest.raises(ConfigError, match=r"unknown key 'model.widht'\. Did you mean 'width'"):
        build_section(Whole, {"name": "x", "model": {"widht": 3}}, plugs=plugs)


def test_wrong_type_says_what_was_given():
    with pytest.raises(ConfigError, match=r'optim.steps = "ten" is not allowed: .*integer'):
        build_section(Whole, {"name": "x", "model": {}, "optim": {"steps": "ten"}}, plugs=plugs)


def test_a_float_is_not_taken_for_an_integer():
    with pytest.raises(ConfigError, match=r"optim.steps = 1.5"):
        build_section(Whole, {"name": "x", "model": {}, "optim": {"steps": 1.5}}, plugs=plugs)


def test_an_integer_is_taken_for_a_float():
    assert build_section(Optim, {"lr": 1}).lr == 1.0


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match=r"optim.lr = -1.*'name' is missing|'name' is missing.*"):
        build_section(Whole, {"model": {}, "optim": {"lr": -1}}, plugs=plugs)


def test_sections_are_frozen():
    section = Optim()
    with pytest.raises(ValueError, match="frozen"):
        section.lr = 3


def test_resolved_configuration_reads_back_through_toml(tmp_path):
    whole = build_section(
        Whole, {"name": 'a "b"', "model": {"width": 7}, "optim": {"lr": 2e-5}}, plugs=plugs
    )
    file = tmp_path / "run.toml"
    file.write_text(to_toml(to_dict(whole)))
    assert to_dict(build_section(Whole, read_toml(file), plugs=plugs)) == to_dict(whole)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("3", 3), ("true", True), ("[1, 2]", [1, 2]), ("scgpt", "scgpt")],
)
def test_override_values_are_read_as_toml(text, value):
    assert parse_value(text) == value


def test_overrides_reach_into_sections_and_leave_the_input_alone():
    raw = {"optim": {"lr": 1}}
    assert apply_overrides(raw, ["optim.lr=2", "a.b.c=x"]) == {
        "optim": {"lr": 2},
        "a": {"b": {"c": "x"}},
    }
    assert raw == {"optim": {"lr": 1}}


@pytest.mark.parametrize("word", ["optim.lr", "=3", "optim..lr=3"])
def test_malformed_override(word):
    with pytest.raises(ConfigError, match="not of the form section.key=value"):
        apply_overrides({}, [word])


def test_override_through_a_value():
    with pytest.raises(ConfigError, match="'name' is a value, not a section"):
        apply_overrides({"name": "x"}, ["name.first=3"])


def test_missing_file_lists_what_there_is(tmp_path):
    (tmp_path / "demo.toml").write_text("")
    with pytest.raises(ConfigError, match=r"no configuration file at .*Did you mean 'demo.toml'"):
        read_toml(tmp_path / "dmo.toml")


def test_broken_toml_names_the_place(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("x = \n")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 1"):
        read_toml(file)


def test_flatten_and_merge():
    merged = merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": [1]})
    assert flatten(merged) == {"a.b": 1, "a.c": 3, "d": [1]}


def test_a_key_of_several_types_says_what_each_wants():
    class Several(Section):
        tokens: int | Literal["auto"] = 0

    told = r"tokens = \"lots\" is not allowed: Input should be a valid integer.*; or: .* 'auto'"
    with pytest.raises(ConfigError, match=told) as caught:
        build_section(Several, {"tokens": "lots"})
    assert "literal" not in str(caught.value)
