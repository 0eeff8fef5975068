"""Each test has a cache of its own, and time limits of a test; and a server where it asks for one."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.elsewhere.served import Handler, Server
from ufo_ds.data import download


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UFO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = Server(tmp_path / "served")
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    http.daemon_threads = True
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()
