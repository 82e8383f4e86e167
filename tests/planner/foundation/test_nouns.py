"""Nouns: frozen dataclasses whose methods nothing compiles."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import field

import pytest

from planner.foundation.frozen import frozen, replaced


@frozen
class Named:
    """A noun for tests."""

    name: str
    size: float = 1.0
    tags: dict[str, str] = field(default_factory=dict)


@frozen
class Pair:
    """Another one, whose values can be hashed."""

    a: int
    b: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """The same as dataclasses makes it."""

    a: int
    b: tuple[int, ...] = ()


def test_a_noun_behaves_as_a_frozen_dataclass() -> None:
    one, same, other = Pair(a=1, b=(2,)), Pair(a=1, b=(2,)), Pair(a=2)
    usual = Usual(a=1, b=(2,))
    assert (one == same, one == other, one == usual, one != other) == (True, False, False, True)
    assert hash(one) == hash(same) == hash(usual)
    assert repr(one) == repr(usual).replace("Usual", "Pair")
    assert dataclasses.asdict(one) == dataclasses.asdict(usual)
    assert dataclasses.replace(one, a=5) == replaced(one, a=5) == Pair(a=5, b=(2,))


def test_a_noun_cannot_be_changed() -> None:
    value = Pair(a=1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="'a'"):
        value.a = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="'a'"):
        del value.a
    with pytest.raises(AttributeError):
        value.c = 2  # type: ignore[attr-defined]


def test_a_noun_takes_its_fields_by_name_alone() -> None:
    for wrong in (lambda: Pair(), lambda: Pair(1), lambda: Pair(a=1, c=2)):  # type: ignore[call-arg, misc]
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError):
        replaced(Pair(a=1), c=2)


def test_defaults_are_made_anew() -> None:
    one, other = Named(name="one"), Named(name="other")
    one.tags["k"] = "v"
    assert other.tags == {} and other.size == 1.0
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_copies_and_pickles_are_equal() -> None:
    value = Named(name="one", tags={"a": "b"})
    for again in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert again == value
