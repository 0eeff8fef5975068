"""The one place that reads a pickle: lists, tuples, dicts, numbers, text, bytes and flat arrays of bytes, nothing else.

A pickle is a program: its ``GLOBAL`` opcodes name functions and ``REDUCE`` calls them. Here no global is ever looked
up. The few names that a list of images needs stand for functions of this module, which only keep the bytes they are
given; numpy's own would not do, since the state of a ``dtype`` can make numpy take bytes for pointers. All others are
refused. What is admitted follows "Restricting Globals" in the documentation of Python's ``pickle``.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ufo_ds.errors import UserError


class Array:
    """What a pickle says of a numpy array.

    Attributes:
        dtype: "u1" (uint8) or "b1" (bool).
        data: one byte per element.
    """

    __slots__ = ("data", "dtype")

    def __init__(self, dtype: str = "u1", data: bytes = b""):
        self.dtype, self.data = dtype, data

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, data = state  # version, shape, dtype, whether in Fortran's order, elements
        self.dtype, self.data = _code(dtype), _bytes(data)


class _Dtype:
    __slots__ = ("code",)

    def __init__(self, code: str):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like say nothing about elements of one byte."""


class _Global:
    """An admitted name. It has ``__setstate__`` because a pickle could else set its attributes with ``BUILD``."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


def read(file: Path) -> Any:
    """Read a pickle of any protocol; the strings of Python 2 become bytes.

    Raises:
        UserError: it cannot be read, is not a pickle, or asks for anything but the types that the module names.
    """
    try:
        return _Unpickler(file).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a file of face pairs") from None
    except Exception as error:  # on broken bytes pickle raises nearly anything
        fault = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} is not a pickle of images ({fault}): copy it again") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Path):
        super().__init__(io.BytesIO(file.read_bytes()), encoding="bytes")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name, compared as a whole: a dotted one leads nowhere."""
        if (module, name) not in _ADMITTED:
            raise UserError(
                f"{self._file} asks for {f'{module}.{name}'!r}, which no list of images needs and which may run code: "
                f"get the file from a source you trust"
            )
        return _ADMITTED[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding!r}")
    return text.encode("latin1")


def _dtype(code: str | bytes, *_: Any) -> _Dtype:
    code = code.decode() if isinstance(code, bytes) else code
    if code not in ("u1", "b1"):
        raise pickle.UnpicklingError(f"an array of {code!r}")
    return _Dtype(code)


def _scalar(dtype: Any, data: Any) -> bool | int:
    value = _bytes(data)[0]
    return bool(value) if _code(dtype) == "b1" else value


def _code(dtype: Any) -> str:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a dtype")
    return dtype.code


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array without bytes")
    return bytes(data)


_RECONSTRUCT = _Global(lambda *_: Array())  # BUILD then gives it its elements
_SCALAR = _Global(_scalar)
_FROM_BUFFER = _Global(lambda data, dtype, *_: Array(_code(dtype), _bytes(data)))  # of protocol 5
_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _Global(_encode),
    ("numpy", "dtype"): _Global(_dtype),
    ("numpy", "ndarray"): None,  # only handed on to _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # `core` became `_core` with numpy 2
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
}
