"""Bytes from an http(s) server or from a command's standard output, with time limits; a broken transfer goes on."""

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import requests

from ufo_ds.data.shard_specs import PIPE
from ufo_ds.errors import UserError

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # without a byte
ATTEMPTS = 5
BACK_OFF_S = 1.0  # before the second attempt, twice as long before each further one
PIPE_TIMEOUT_S = 600.0  # without a byte: a command may have to wake a slow store first
CHUNK = 1 << 16  # bytes; what came of one is lost when the transfer breaks off
_MAY_PASS = (408, 416, 429)  # statuses worth another attempt, beside all of servers' own faults (5xx)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Version:
    """What a server tells about the state of a file: ETag or else Last-Modified, and its size in bytes."""

    tag: str | None
    size: int | None


class _Interrupted(Exception):
    """A fault of a transfer that may be gone the next time."""


def version_of(url: str) -> Version:
    """Ask for a file and take the headers of the answer alone (not every server that gives a file answers HEAD).

    Raises:
        UserError: no answer, or not the file.
    """

    def attempt() -> Version:
        with _answer(url, 0) as response:
            return _version(response)

    return _persistently(url, attempt)


def fetch(source: str, file: BinaryIO, reserve: Callable[[int], None], expected: Version | None = None) -> None:
    """Write what a URL or a ``pipe:`` command gives into an empty file; after an interruption from there on, if the
    server can.

    Args:
        reserve: called with the size that the file is about to have at least; it may raise.
        expected: of the file behind the URL; by default as the first answer says.

    Raises:
        UserError: it cannot be fetched whole, or is not what was expected.
    """
    if source.startswith(PIPE):
        _run(source, file, reserve)
    else:
        _download(source, file, reserve, expected)
    file.truncate()  # an attempt that was given up may have been longer
    file.flush()


def _download(url: str, file: BinaryIO, reserve: Callable[[int], None], expected: Version | None) -> None:
    def attempt() -> None:
        nonlocal expected
        start = file.tell()
        with _answer(url, start) as response:
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if response.status_code == 416 or (response.status_code == 206 and not goes_on):
                file.seek(0)
                raise _Interrupted(f"the server cannot go on at byte {start}")
            found = _version(response)
            _compare(url, found, expected)
            expected = expected or found
            if response.status_code == 200:
                file.seek(0)
            if found.size is not None:
                reserve(found.size)
            for chunk in response.iter_content(CHUNK):
                reserve(file.tell() + len(chunk))
                file.write(chunk)
        if found.size not in (None, file.tell()):
            raise _Interrupted(f"it broke off after {file.tell()} of {found.size} bytes")

    _persistently(url, attempt)


def _persistently(url: str, attempt: Callable[[], Found]) -> Found:
    problem = ""
    for number in range(ATTEMPTS):
        time.sleep(BACK_OFF_S * 2 ** (number - 1) if number else 0)
        try:
            return attempt()
        except ValueError as error:  # of requests, and of the libraries that it calls
            raise UserError(f"{url} is not a URL ({error}): correct it") from None
        except (_Interrupted, requests.RequestException) as error:
            problem = _cause(error)
    raise UserError(f"{url} cannot be fetched: {problem}, {ATTEMPTS} attempts: check the server, or start again later")


@contextlib.contextmanager
def _answer(url: str, start: int) -> Iterator[requests.Response]:
    headers = {"Accept-Encoding": "identity"}  # else sizes are not those of the file
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = f"{response.status_code} {response.reason}"
        if response.status_code in _MAY_PASS or response.status_code >= 500:
            if response.status_code != 416:
                raise _Interrupted(f"the server answers {status}")
        elif response.status_code not in (200, 206):
            raise UserError(f"{url} cannot be fetched: the server answers {status}: correct the URL or the access")
        yield response


def _version(response: requests.Response) -> Version:
    size = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        size = response.headers["Content-Range"].rpartition("/")[2]
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return Version(tag, int(size) if size.isdecimal() else None)


def _compare(url: str, found: Version, expected: Version | None) -> None:
    if expected is None:
        return
    if None not in (found.size, expected.size) and found.size != expected.size:
        raise UserError(f"{url} has {found.size} bytes, expected {expected.size}: copy it again, or start again")
    if None not in (found.tag, expected.tag) and found.tag != expected.tag:
        raise UserError(f"{url} has changed since it was first read: start again")


def _cause(error: Exception) -> str:
    """What an exception of requests says, without the names of its objects."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, requests.ReadTimeout) or "Read timed out" in str(error):
        return f"no byte for {READ_TIMEOUT_S:g} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "it broke off"
    system = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return system.group(1) if system else " ".join(str(error).split())[:200]


def _run(source: str, file: BinaryIO, reserve: Callable[[int], None]) -> None:
    with tempfile.TemporaryFile() as errors:
        # A session of its own, so that all that the shell has started can be ended.
        process = subprocess.Popen(
            source.removeprefix(PIPE), shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            with process.stdout as output:
                while chunk := _next(output.fileno(), source):
                    reserve(file.tell() + len(chunk))
                    file.write(chunk)
            status = process.wait(PIPE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{source}: the command does not end after its output: correct it") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status != 0:
            errors.seek(0)
            said = errors.read(CHUNK).decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            raise UserError(f"{source}: the command failed with status {status} ({last[:200]}): run it by hand")


def _next(descriptor: int, source: str) -> bytes:
    if not select.select([descriptor], [], [], PIPE_TIMEOUT_S)[0]:
        raise UserError(f"{source}: no byte for {PIPE_TIMEOUT_S:g} s: run the command by hand")
    return os.read(descriptor, CHUNK)
