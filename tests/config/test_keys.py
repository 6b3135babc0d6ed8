"""Classes of keys: a value is what its field says, or one line tells what it takes.

pytest tests/config/test_keys.py
"""

import dataclasses
import inspect
import pickle
from typing import Annotated

import pytest

from rl_soft import Decoding, Thinking
from rl_soft.config.recipe import COMMANDS, GROUPS
from rl_soft.keys import Number, OneOf, check, fields, key, keys, nearest


@keys(frozen=True)
class Parent:
    size: int = key("An amount.", default=1, ge=1)
    share: Number = key("A part of one.", default=0.5, gt=0, le=1)
    kind: Annotated[str, OneOf(("round", "square"))] = key("A shape.", default="round")
    limit: Number | None = key("No more than this.", default=None, ge=0)
    names: str | list[str] = key("What it is called.", default="it")
    layers: list[int] | None = key("Which ones.", default=None, min_length=1)

    def __post_init__(self):
        if self.size > 8 and self.kind == "round":
            raise ValueError("size above 8 needs kind square")


@keys(frozen=True)
class Child(Parent):
    flag: bool = key("Whether.", default=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": True}, "size must be a whole number, at least 1, got True"),
        ({"size": 2.0}, "size must be a whole number, at least 1, got 2.0"),
        ({"share": "0.5"}, "share must be a number, above 0 and at most 1, got '0.5'"),
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"share": float("nan")}, "share must be a number, above 0 and at most 1, got nan"),
        ({"limit": float("inf")}, "limit must be a number, at least 0, or null, got inf"),
        ({"kind": "rund"}, "kind must be one of round, square, got 'rund'; did you mean round?"),
        ({"kind": None}, "kind must be one of round, square, got None"),
        ({"names": 3}, "names must be a text or a list of texts, got 3"),
        ({"layers": []}, "layers must be a list of whole numbers, not empty, or null, got []"),
        ({"layers": [1, "2"]}, "layers must be a list of whole numbers, not empty, or null, got [1, '2']"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"siez": 1}, "Child has no key 'siez'; did you mean size?"),
        ({"size": 9}, "size above 8 needs kind square"),
    ],
)
def test_what_a_key_does_not_take_is_one_line(values, message):
    for make in (Child, lambda **given: dataclasses.replace(Child(), **given)):
        with pytest.raises(ValueError) as error:
            make(**values)
        assert str(error.value) == message


def test_a_whole_number_where_a_number_is_asked_for_is_a_float():
    made = Child(share=1, limit=3, layers=[0])
    assert type(made.share) is type(made.limit) is float and made.layers == [0]


def test_values_are_checked_one_by_one_where_the_others_are_not_known():
    check(Child, {"size": 9})  # fits a square one
    with pytest.raises(ValueError, match="size must be at least 1, got -1"):
        check(Child, {"size": -1})


def test_they_are_dataclasses():
    assert [f.name for f in dataclasses.fields(Child)] == list(fields(Child)) == [*fields(Parent), "flag"]
    assert Child(2, 0.25) == Child(size=2, share=0.25) == pickle.loads(pickle.dumps(Child(2, 0.25)))
    assert dataclasses.asdict(Child())["names"] == "it" and hash(Child()) == hash(Child())
    assert "thought" in inspect.signature(Thinking).parameters
    for made in (Thinking(), Decoding()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.order = made.thought = "paper"


def test_every_key_has_a_help_text_and_a_default_that_it_takes():
    for group in {group for groups in (*GROUPS.values(), *COMMANDS.values()) for group in groups}:
        for name, field in fields(group).items():
            assert field.description.endswith((".", ".)")), name
            check(group, {name: field.get_default(call_default_factory=True)})


def test_the_nearest_name():
    assert nearest("thought_kay", ["thought_k", "top_k"], "--") == "; did you mean --thought_k?"
    assert nearest("xyz", ["thought_k"]) == nearest(7, []) == ""
