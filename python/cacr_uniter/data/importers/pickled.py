"""Reads plain data out of a pickle without running it: numbers, texts, containers and numeric arrays.

A pickle is a program for a small machine that may call anything. Some published files keep plain tables in pickles.
This reader follows the machine's data instructions only; a call is accepted if it builds a numeric numpy array or
number, and is then done here, by hand. Everything else is refused.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from typing import Any

import numpy as np

from cacr_uniter.data.codec import numeric_dtype

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
ARGUMENTS = frozenset((*NUMBERS, *TEXTS, *BYTES))
IGNORED = frozenset(("PROTO", "FRAME"))
NUMPY_MODULES = frozenset(("numpy", "numpy.core.multiarray", "numpy._core.multiarray"))
MARK = object()


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that is only named, never looked up."""

    name: str


@dataclasses.dataclass
class _Array:
    """An array between its creation and the instruction that fills it."""

    value: np.ndarray | None = None


@dataclasses.dataclass
class _Type:
    """A numpy type; `order` arrives with the instruction that completes it."""

    code: str
    order: str = "|"

    def dtype(self) -> np.dtype:
        return numeric_dtype((self.order if self.order in ("<", ">") else "") + self.code.lstrip("<>=|"))


def _as_bytes(value: Any) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else bytes(value)


def _call(target: Any, arguments: tuple[Any, ...]) -> Any:
    """The few calls that make plain data."""
    name = target.name if isinstance(target, _Name) else repr(target)
    if name == "_codecs.encode" and len(arguments) == 2 and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")
    if name in ("__builtin__.bytes", "builtins.bytes") and not arguments:
        return b""
    if name == "numpy.reconstruct":
        return _Array()
    if name == "numpy.dtype":
        return _Type(str(arguments[0]))
    if name == "numpy.scalar" and isinstance(arguments[0], _Type):
        return np.frombuffer(_as_bytes(arguments[1]), dtype=arguments[0].dtype())[0]
    raise ValueError(f"the pickle calls {name}: refused, only plain data is read")


def _name(module: str, name: str) -> _Name:
    if module in NUMPY_MODULES:
        return _Name("numpy." + name.removeprefix("_"))
    return _Name(f"{module}.{name}")


def _build(item: Any, state: Any) -> None:
    """Fills an array (version, shape, type, fortran, data) or completes a type (version, byte order, ...)."""
    if isinstance(item, _Array) and isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Type):
        _, shape, kind, fortran, data = state
        if kind.code.lstrip("<>|=").startswith("O"):
            if not isinstance(data, list) or math.prod(shape) != len(data):
                raise ValueError(f"pickled array: {len(data)} items for shape {shape}")
            flat = np.empty(len(data), dtype=object)
            flat[:] = [_finished(value) for value in data]
            item.value = flat.reshape(shape)
            return
        flat = np.frombuffer(_as_bytes(data), dtype=kind.dtype())
        item.value = flat.reshape(shape, order="F" if fortran else "C")
    elif isinstance(item, _Type) and isinstance(state, tuple) and len(state) > 1:
        item.order = str(state[1])
    else:
        raise ValueError("the pickle sets the state of an object: refused, only plain data is read")


def _finished(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Replaces the half-made arrays in a finished structure. ``done``: parts that were met, each once."""
    done = {} if done is None else done
    if id(value) not in done:
        done[id(value)] = _replaced(value, done)
    return done[id(value)]


def _replaced(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("the pickle holds an array without content")
        return value.value
    if isinstance(value, (_Name, _Type)):
        raise ValueError("the pickle holds a class or function: refused, only plain data is read")
    if isinstance(value, dict):
        return {_finished(key, done): _finished(item, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_finished(item, done) for item in value)
    return value


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def step(self, code: str, argument: Any) -> None:
        """One instruction; refuses those that are not about data."""
        stack = self.stack
        if code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in ARGUMENTS:
            stack.append(argument)
        elif code == "MARK":
            stack.append(MARK)
        elif code in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"D": dict, "L": list, "T": tuple}[code[6]]())
        elif code in ("DICT", "LIST", "TUPLE"):
            items = self.since_mark()
            stack.append(
                dict(zip(items[::2], items[1::2])) if code == "DICT" else items if code == "LIST" else tuple(items)
            )
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(code[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif code in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if code == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            stack[-1].update(zip(items[::2], items[1::2]))
        elif code in ("APPEND", "APPENDS"):
            items = self.since_mark() if code == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif code == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_name(module, name))
        elif code == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif code == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif code not in IGNORED:
            raise ValueError(f"the pickle uses the instruction {code}: refused, only plain data is read")


def read_pickled_data(data: bytes) -> Any:
    """The plain data of a pickle; arrays of objects become arrays of plain data.

    Args:
        data: the whole pickle.

    Raises:
        ValueError: damaged, or anything but plain data; nothing of it is ever run or imported.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = machine.stack
                return _finished(result)
            machine.step(opcode.name, argument)
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"damaged pickle ({str(error) or type(error).__name__})") from error
    raise ValueError("damaged pickle (it has no end)")
