"""A real Slurm of two virtual nodes, and a repository, recipe and runs in directories whose names have spaces.

What is installed is not this tests' business: without Slurm they fail, with the line of local_cluster.sh that says how
to get it.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
# NODE_FAIL is none of them: a job shows it for a moment on its way back into the queue.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Cluster:
    """``home``: the repository, as jobs see it; ``place``: where jobs are submitted, and write what they say."""

    environment: dict[str, str]
    home: Path
    place: Path

    def call(self, *words: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        found = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **environment}, cwd=self.place, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not check or found.returncode == 0, (words, found.stdout, found.stderr)
        return found

    def submit(self, script: str, *arguments: object, options: tuple[str, ...] = (), **environment: str) -> str:
        """The id of the job."""
        words = ["sbatch", "--parsable", *options, self.home / "slurm" / script, *arguments]
        return self.call(*words, **environment).stdout.strip()

    def node(self, action: str, name: str) -> None:
        self.call(self.home / "slurm" / "local_cluster.sh", "node", action, name)

    def shown(self, job: str, key: str) -> list[str]:
        """What Slurm says of a job, or of each of an array's."""
        for _ in range(5):
            found = self.call("scontrol", "show", "job", job, "--oneliner", check=False)
            if found.returncode == 0:
                return re.findall(rf"(?<!\S){key}=(\S*)", found.stdout)
            time.sleep(1)  # a controller that has much to do drops a connection now and then
        raise AssertionError((job, found))

    def output(self, job: str) -> str:
        """Of a job, or of all of an array's."""
        return "\n".join(path.read_text() for path in sorted(self.place.glob(f"*-{job}[_.]*")))

    def wait_for(self, condition: Callable[[], bool], job: str, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            states = self.shown(job, "JobState")
            assert time.monotonic() < deadline, (states, self.output(job))
            assert not all(state in ENDED for state in states) or condition(), (states, self.output(job))
            time.sleep(0.3)

    def end(self, job: str, seconds: float = 900) -> str:
        """The state that a job, or all of an array's, ends with."""
        self.wait_for(lambda: all(state in ENDED for state in self.shown(job, "JobState")), job, seconds)
        (state,) = set(self.shown(job, "JobState"))
        return state


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    place = root / "a place"
    place.mkdir()
    (place / "a repository").symlink_to(REPOSITORY)
    script = REPOSITORY / "slurm" / "local_cluster.sh"
    directory = root / "cluster"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "UFO_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # `ufo` of the environment that runs the tests
        "UFO_CLUSTER": str(directory), "UFO_CLUSTER_PORT": "17400", "SLURM_CONF": str(directory / "slurm.conf"),
        "UFO_HOME": str(place / "a repository"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        # Its daemons must not hold the pipe of what the script says.
        with (root / "start.txt").open("w") as said:
            started = subprocess.run([script, "start"], env=environment, stdout=said, stderr=said, check=False)
        assert started.returncode == 0, (root / "start.txt").read_text()
        yield Cluster(environment, place / "a repository", place)
    finally:
        subprocess.run([script, "stop"], env=environment, stdout=subprocess.DEVNULL, check=True)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "some data"
    root.mkdir()
    return tiny.make(root)
