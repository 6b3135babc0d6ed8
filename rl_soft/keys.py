"""Keys of recipes and commands: what `keys` makes of a class, and the hint for a name that is no key.

A class of keys is a pydantic dataclass. A field says all there is to say of its key: type, bounds, choices, default,
help text. Values are taken as they are: "3" is no number and true no whole number. A whole number becomes a float
where a float is asked for.
"""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, CoreSchema, core_schema

T = TypeVar("T")

Number = Annotated[float, AfterValidator(float)]
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # pydantic's name -> ours
OUT_OF_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}  # pydantic's types of errors


class Mistakes(ValueError):
    """What is wrong, all of it at once.

    Attributes:
        lines: one line per mistake.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(lines)
        super().__init__("\n".join(self.lines))


class Gathered:
    """Mistakes of several checks: `with gathered: check()` keeps what a check raises, and `tell` raises all of it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> Gathered:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, ValueError):
            return False
        lines = error.lines if isinstance(error, Mistakes) else [str(error)]
        self.lines += [line for line in lines if line not in self.lines]
        return True

    def tell(self) -> None:
        """Raises Mistakes where there are any."""
        if self.lines:
            raise Mistakes(self.lines)


class OneOf:
    """The choices of a text: `Annotated[str, OneOf(NAMES)]`, or of `str | None`."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        names = core_schema.literal_schema(list(self.names))
        return core_schema.nullable_schema(names) if type(None) in typing.get_args(source) else names


def nearest(name: object, known: Iterable[str], prefix: str = "") -> str:
    """How a message about an unknown name ends: `; did you mean NAME?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def either(names: Iterable[str]) -> str:
    """`A, B or C`."""
    *others, last = names
    return " or ".join([", ".join(others), last] if others else [last])


def key(help: str, **given: Any) -> Any:
    """A field of a class of keys: its help text, and pydantic's `default`, `ge`, `gt`, `le`, `lt`, `min_length`."""
    return Field(description=help, **given)


@dataclass_transform(field_specifiers=(key,))
def keys(*, frozen: bool = False) -> Callable[[type[T]], type[T]]:
    """A class decorator: a dataclass whose fields are checked when an object is made.

    Making an object raises Mistakes, a line per key, for a name that is no field (with the nearest) and for a value of
    the wrong type or out of bounds (with the field, what it takes, and the value); and what `__post_init__` raises.
    """

    def made(cls: type[T]) -> type[T]:
        config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
        checked: Any = dataclass(config=config, frozen=frozen)(cls)
        plain = checked.__init__

        @functools.wraps(plain)
        def init(self: Any, *args: Any, **values: Any) -> None:
            try:
                plain(self, *args, **values)
            except ValidationError as error:
                raise Mistakes(_lines(type(self), error, values)) from None

        checked.__init__ = init
        return checked

    return made


def check(cls: Any, values: Mapping[str, Any]) -> None:
    """Raises Mistakes for values that the fields of `cls` do not take; how they fit together is not looked at."""
    try:
        cls.__pydantic_validator__.validate_python(ArgsKwargs((), dict(values)), self_instance=cls.__new__(cls))
    except ValidationError as error:
        if error.errors()[0]["type"] != "value_error":  # that of __post_init__
            raise Mistakes(_lines(cls, error, values)) from None


def fields(cls: Any) -> dict[str, Any]:
    """Name of each key -> pydantic's field, which has `default`, `description`, `annotation` and `metadata`."""
    return cls.__pydantic_fields__


def takes(field: Any, bounds_alone: bool = False) -> str:
    """What a key takes, in words: `a whole number, at least 1, or null`."""
    kinds, nullable = _kinds(field.annotation)
    bounds = {name: getattr(m, name) for m in field.metadata for name in BOUNDS if hasattr(m, name)}
    if bounds.keys() == {"ge", "le"}:
        limits = f"between {bounds['ge']} and {bounds['le']}"
    else:
        limits = " and ".join(f"{BOUNDS[name]} {bound}" for name, bound in bounds.items())
    choices = [f"one of {', '.join(m.names)}" for m in field.metadata if isinstance(m, OneOf)]
    nonempty = ["not empty"] if any(getattr(m, "min_length", 0) for m in field.metadata) else []
    parts = choices or ([] if bounds_alone else [" or ".join(kinds)])
    return ", ".join([*parts, *([limits] if limits else []), *nonempty, *(["or null"] if nullable else [])])


def _kinds(annotation: Any) -> tuple[list[str], bool]:
    """The kinds of values that an annotation allows, in words, and whether null is one."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        parts = typing.get_args(annotation)
        return [kind for part in parts if part is not type(None) for kind in _kinds(part)[0]], type(None) in parts
    origin, (item, *_) = typing.get_origin(annotation), (*typing.get_args(annotation), None)
    if origin is list:
        return [f"a list of {NAMES[item].removeprefix('a ')}s" if item in NAMES else "a list"], False
    return [NAMES[origin or annotation]], False


def _lines(cls: Any, error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """A line per key: a key that takes several types has an error for each of them."""
    known, lines = fields(cls), dict[Any, str]()
    for found in error.errors():
        if found["type"] == "value_error":
            return [str(found["ctx"]["error"])]
        name = found["loc"][0]
        name = list(known)[name] if isinstance(name, int) else name  # given by its position
        if name in lines:
            continue
        if name not in known:
            lines[name] = f"{cls.__name__} has no key {name!r}{nearest(name, known)}"
            continue
        field, value = known[name], values.get(name, found["input"])
        hint = nearest(value, next((m.names for m in field.metadata if isinstance(m, OneOf)), ()))
        lines[name] = f"{name} must be {takes(field, found['type'] in OUT_OF_BOUNDS)}, got {value!r}{hint}"
    return list(lines.values())
