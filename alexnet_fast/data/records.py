"""JSON files that strangers may have written: read, and held against a type, before anything follows from them.

A type is a Python annotation: bool, int, float, str, unions with None, list, dict, tuple, Literal, Any, TypedDict, or
``Annotated[T, Range(...)]``.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


@dataclass(frozen=True)
class Range:
    """Numbers, or lengths of text, lists and dicts, from ``least`` to ``most``."""

    least: float = -math.inf
    most: float = math.inf

    def check(self, value: Any, where: str) -> None:
        measured = len(value) if isinstance(value, (str, list, tuple, dict)) else value
        if not self.least <= measured <= self.most:
            wanted = f"at least {_bound(self.least)}"
            if self.most != math.inf:
                wanted = f"from {_bound(self.least)} to {_bound(self.most)}" if self.most > self.least else self.most
            what = "" if measured is value else " entries"
            raise ValueError(f"{where}: expected {wanted}{what}, got {_short(measured)}")


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


Count = Annotated[int, Range(0, 2**53)]


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises OSError, and ValueError with the file's name where it is no JSON."""
    return parse_json(path.read_bytes(), path.name)


def parse_json(content: bytes, name: str) -> Any:
    """The value in ``content``; raises ValueError, with ``name``, where it is no JSON."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{name}: nested too deep") from None
    except ValueError as error:  # of JSON, of UTF-8, and of numbers with thousands of digits
        raise ValueError(f"{name}: not JSON: {error}") from None


def conform(value: Any, wanted: Any, where: str) -> Any:
    """``value`` as type ``wanted``, lists made tuples where it says so; raises ValueError, from ``where`` on, where it
    is not. Numbers are finite; a whole one may stand for a float.
    """
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if origin is Annotated:
        value = conform(value, inner[0], where)
        if value is not None:
            for limit in inner[1:]:
                limit.check(value, where)
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return conform(value, next(kind for kind in inner if kind is not type(None)), where)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, inner))}, got {_short(value)}")
        return value
    if is_typeddict(wanted):
        return fields(value, get_type_hints(wanted, include_extras=True), where)
    if origin in (list, tuple):
        _is(value, LIST, where)
        if origin is tuple and inner[-1] is not Ellipsis:
            if len(value) != len(inner):
                raise ValueError(f"{where}: expected {len(inner)} entries, got {len(value)}")
            kinds = inner
        else:
            kinds = [inner[0]] * len(value)
        return origin(conform(v, kind, f"{where}[{n}]") for n, (v, kind) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict:
        _is(value, dict, where)
        return {key: conform(v, inner[1], f"{where}.{_short(key)}") for key, v in value.items()}
    if wanted is float:
        _is(value, (int, float), where)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {value}")
        return value
    _is(value, wanted, where)
    return value


def fields(value: Any, hints: dict[str, Any], where: str) -> dict[str, Any]:
    """``value``, an object with the keys of ``hints`` and no others, as :func:`conform` has it."""
    _is(value, dict, where)
    if missing := hints.keys() - value.keys():
        raise ValueError(f"{where}: without {', '.join(sorted(missing))}")
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{where}: unknown {', '.join(map(_short, sorted(unknown)))}")
    return {name: conform(value[name], hint, f"{where}: {name}") for name, hint in hints.items()}


LIST = (list, tuple)
NAMES = {dict: "an object", list: "a list", LIST: "a list", int: "a whole number", str: "text", bool: "true or false"}


def _is(value: Any, kind: Any, where: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {NAMES.get(kind, 'a number')}, got {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{NAMES[type(value)]} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
