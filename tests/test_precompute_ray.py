"""`--engine ray` on a real cluster of two nodes on this machine, with workers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from precompute_examples import keys_of, parts_of
from proc_examples import children_of

from precompute.config import PrecomputeConfig
from precompute.config_file import load_config
from precompute.run import pipeline
from precompute.run.shard import Shard
from store.errors import ConfigError, EngineError, StoreBusyError
from store.format.files import shard_lock
from store.records import Problem

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")

ROOT = Path(__file__).parents[1]
Keys = dict[tuple[str, str, int], str]
PROBLEMS = 32
SAMPLES = 2
CONFIG = f"""
[problems]
train = "{ROOT / "lab" / "problems" / "train.jsonl"}"
[store]
part_traces = 2
[verify]
workers = 1
[ray]
num_workers = 2
problems_per_task = 8
[[teachers]]
name = "totals"
model = "{ROOT / "lab" / "models" / "teacher-totals"}"
system_prompt = ""
max_tokens = 80
batch_size = 4
samples = {SAMPLES}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "ray.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """What one process without Ray makes of all problems."""
    store = tmp_path_factory.mktemp("whole") / "traces"
    pipeline.run(settings(config_file, store), limit=PROBLEMS)
    return keys_of(store)


def settings(config_file: Path, store: Path, *more: str) -> PrecomputeConfig:
    return load_config(PrecomputeConfig, str(config_file), [f"store.path={store}", *more])


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
cluster.add_node(**node)
nodes = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
print("cluster", cluster.address, *nodes, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """A cluster on this machine."""

    address: str
    pids: frozenset[int]
    """Of its nodes; the workers are their children."""

    def workers(self) -> list[int]:
        """The pids of the workers."""
        found = (child for node in self.pids for child in children_of(node).items())
        return [pid for pid, (_, command) in found if b"ray::Worker" in command]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Two nodes of two CPUs, in a process of their own, which stops what it started and nothing else."""
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        text=True,
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("cluster "))
        _, address, *pids = line.split()
        yield Nodes(address=address, pids=frozenset(map(int, pids)))
        # The pipe's end is the process's.


def start(cluster: Nodes | None, config_file: Path, store: Path, *more: str) -> subprocess.Popen[str]:
    """`ampo precompute teachers --engine ray`, as a user starts it."""
    command = ["precompute", "teachers", "--config", str(config_file), "--engine", "ray"]
    options = ["--set", f"store.path={store}", "--limit", str(PROBLEMS), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *command, *options],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": cluster.address if cluster else "127.0.0.1:9"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_killed_half_way_costs_nothing(
    cluster: Nodes, config_file: Path, whole: Keys, tmp_path: Path
) -> None:
    store = tmp_path / "traces"
    run = start(cluster, config_file, store)
    wait_for(lambda: len(parts_of(store)) >= 8, run)
    workers = cluster.workers()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    before = len(parts_of(store))
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    # 64 samples in parts of two or fewer: a quarter was there when the worker died.
    assert 8 <= before < PROBLEMS
    assert "a worker died; another continued its block" in output
    assert keys_of(store) == whole
    assert len(whole) == PROBLEMS * SAMPLES
    assert f"{PROBLEMS * SAMPLES}/{PROBLEMS * SAMPLES}" in output
    # A second run has nothing left to do: it starts no worker.
    output, _ = start(cluster, config_file, store).communicate(timeout=240)
    assert "totals: 64/64  nothing left to do" in output
    assert "blocks for" not in output


def test_workers_of_a_cluster_make_what_one_process_makes(
    cluster: Nodes, config_file: Path, whole: Keys, tmp_path: Path
) -> None:
    store = tmp_path / "traces"
    output, _ = start(cluster, config_file, store, "--limit", "8").communicate(timeout=240)
    assert "Ray cluster: 2 machines, 4 CPUs, 0 GPUs" in output
    assert "totals: 2 blocks for 2 workers of 1 CPU and 0 GPU with transformers" in output
    made = keys_of(store)
    assert len(made) == 8 * SAMPLES
    assert made.items() <= whole.items()


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_next_run_goes_on(
    cluster: Nodes, config_file: Path, whole: Keys, tmp_path: Path
) -> None:
    store = tmp_path / "traces"
    run = start(cluster, config_file, store)
    wait_for(lambda: len(parts_of(store)) >= 4, run)
    with pytest.raises(StoreBusyError, match="is being written by process"):
        pipeline.run(settings(config_file, store), limit=2)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 130, output
    assert "interrupted; what the workers wrote is kept. Go on with the same command." in output
    deadline = time.monotonic() + 30
    while cluster.workers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kept = keys_of(store)
    assert 0 < len(kept) < len(whole)
    # Also without Ray.
    pipeline.run(settings(config_file, store), limit=PROBLEMS)
    assert keys_of(store) == whole


@pytest.mark.slow
def test_a_block_that_kills_its_workers_is_given_up(
    cluster: Nodes, config_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "traces"
    run = start(cluster, config_file, store, "--set", "ray.max_task_retries=1", "--set", "ray.num_workers=1")
    lock, killed = store / shard_lock("ray-0"), set[int]()
    while run.poll() is None:
        # The worker wrote its pid into its lock.
        holder = int(lock.read_text() or 0) if lock.exists() else 0
        if holder in cluster.workers() and holder not in killed:
            os.kill(holder, signal.SIGKILL)
            killed.add(holder)
        time.sleep(0.05)
    output = run.communicate()[0]
    assert run.returncode == 2, output
    assert "a block of problems was given up: 2 workers died over it" in output
    assert len(killed) == 2


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_error_of_the_run(
    cluster: Nodes, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr("precompute.run.ray_cluster.engine_version", lambda _: "0.1")
    with pytest.raises(
        EngineError, match=r"^teacher 'totals': transformers is .* on a worker and 0\.1 where the run"
    ):
        pipeline.run(settings(config_file, tmp_path / "traces"), engine="ray", limit=2)


def test_without_a_cluster_the_way_to_one_is_told(config_file: Path, tmp_path: Path) -> None:
    run = start(None, config_file, tmp_path / "traces")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert "found no Ray cluster to connect to" in output
    assert "ray start --head" in output
    assert not (tmp_path / "traces").exists()


def test_what_goes_with_no_cluster_is_refused_before_one_is_looked_for(
    config_file: Path, tmp_path: Path
) -> None:
    config = settings(config_file, tmp_path / "traces")
    with pytest.raises(ConfigError, match="--shard 1/2: --engine ray splits the problems itself"):
        pipeline.run(config, engine="ray", shard=Shard.parse("1/2"))
    with pytest.raises(ConfigError, match="--probe measures this machine alone"):
        pipeline.plan(config, engine="ray", probe=1)


def test_room_and_blocks_in_numbers_worked_out_by_hand() -> None:
    from precompute.run.ray_cluster import blocks_of, room

    machines = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}, {"memory": 1.0}]
    assert room(machines, cpus=1, gpus=0) == 12
    # 8/3 -> 2 and 4/3 -> 1.
    assert room(machines, cpus=3, gpus=0) == 3
    # One machine has two GPUs, though the cluster has three.
    assert room(machines, cpus=1, gpus=2) == 1
    # Four to a GPU: 8 on the first machine (which has 8 CPUs), 4 on the second.
    assert room(machines, cpus=1, gpus=0.25) == 12
    # 10 problems for 3 workers: 4 + 4 + 2; at most 3 at a time: 3 + 3 + 3 + 1.
    problems = [Problem(question=str(number), answer="1") for number in range(10)]
    assert list(map(len, blocks_of(problems, workers=3, largest=512))) == [4, 4, 2]
    assert list(map(len, blocks_of(problems, workers=3, largest=3))) == [3, 3, 3, 1]
    assert blocks_of(problems, workers=20, largest=3) == [[each] for each in problems]


def test_an_engine_for_workers_is_chosen_by_what_they_have(config_file: Path, tmp_path: Path) -> None:
    from precompute.run.ray_cluster import RayBackend

    config = settings(config_file, tmp_path / "traces", "teachers.totals.tensor_parallel_size=2")
    (teacher,) = config.teachers
    plain = RayBackend(config.ray, [{"CPU": 4.0}])
    rich = RayBackend(config.ray, [{"CPU": 4.0, "GPU": 2.0}])
    assert (plain.needs(teacher), plain.engine_of(teacher)[0]) == ((1, 0), "transformers")
    assert rich.needs(teacher) == (1, 2)
    assert rich.engine_of(teacher)[0] == ("vllm" if find_spec("vllm") else "transformers")
    with pytest.raises(
        EngineError, match="no machine of the cluster has room for a worker of 1 CPU and 2 GPU"
    ):
        RayBackend(config.ray, [{"CPU": 4.0, "GPU": 1.0}] * 2).engine_of(teacher)
    with pytest.raises(EngineError, match="teacher 'totals': its servers sample"):
        plain.engine_of(teacher.model_copy(update={"engine": "openai"}))
