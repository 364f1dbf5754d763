"""What uploads cost the steps of a training that saves every 10 of them and uploads all the time; contenders by turns.

    python -m benchmarks.mirror_training DIR --rounds 20 --out results/

Every contender is a process of its own that lives through the whole run and is stopped (SIGSTOP) while another has its
turn, in an order that is drawn anew in each round: what the machine does meanwhile hits all alike. "no uploads, again"
shows what is left of that. "obstore put" is the control: a niced thread of the training process gives each committed
file to the library's own put, with the same settings; the difference between it and "mirror" is what a mirror costs.

The server takes the bytes and forgets them (`s3_sink`), because in life it is another machine; with
`--server seaweedfs` it is a real one, which takes most of a core here. Both are niced.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.mirror import mirror_of, store_of
from benchmarks.results import keep, parser_of
from benchmarks.workloads import commit
from tests.mirror.servers import ACCESS_KEY, SECRET_KEY, SeaweedFS
from tests.support.processes import Talking

CONTENDERS = ("no uploads", "no uploads, again", "mirror", "obstore put")
THREAD_TIMES = ("on_cpu_s", "queued_s", "asleep_s")
_EVERY = 10


class Putter:
    """The control: one thread, one put after the other."""

    def __init__(self, spec: dict[str, Any], root: str) -> None:
        from async_ckpt.threads.executor import lower_priority

        self.sent_bytes = 0
        self._spec, self._root, self._store = spec, root, store_of(spec)
        self._thread = ThreadPoolExecutor(1, initializer=lower_priority)

    def put(self, tag: str) -> None:
        self._thread.submit(self._put, tag).add_done_callback(lambda put: put.result())

    def _put(self, tag: str) -> None:
        import obstore

        path = Path(self._root, tag, "model.pt")
        how = {"chunk_size": self._spec["part_bytes"], "max_concurrency": self._spec["parallel"]}
        obstore.put(self._store, f"{os.getpid()}/{tag}.pt", path, **how)
        self.sent_bytes += path.stat().st_size


def thread_times() -> dict[str, float]:
    """Seconds that this thread has been on a processor, waiting for one, and asleep: without a device it sleeps only
    where it waits for the interpreter lock."""
    text = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
    on_cpu_s, queued_s = (int(number) / 1e9 for number in text.split()[:2])
    return {"on_cpu_s": on_cpu_s, "queued_s": queued_s, "asleep_s": time.perf_counter() - on_cpu_s - queued_s}


def train(spec: dict[str, Any]) -> None:
    """Steps of fixed work; each line of standard input says how many."""
    import torch

    from async_ckpt import AsyncCheckpointEngine, KeepLast

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(spec["num_layers"])))
    optimizer, data = torch.optim.AdamW(model.parameters()), torch.randn(160, 512)
    root, pendings, num_done = tempfile.mkdtemp(dir=spec["directory"]), [], 0
    mirrors = (mirror_of(spec, f"training-{os.getpid()}"),) if spec["contender"] == "mirror" else ()
    putter = Putter(spec, root) if spec["contender"] == "obstore put" else None
    how: dict[str, Any] = {"mirrors": mirrors, "retention": KeepLast(40), "keep_local_until_mirrored": False}
    engine = AsyncCheckpointEngine(root, staging_bytes=256 << 20, **how)
    engine.guard(optimizer)

    def sent_bytes() -> int:
        sent = sum(one.mirrored.metrics.sent_bytes for one in pendings if one.mirrored is not None)
        return sent + (putter.sent_bytes if putter is not None else 0)

    print("ready", flush=True)
    for line in sys.stdin:
        steps, saves, sent, before = [], [], sent_bytes(), thread_times()
        for _ in range(int(line)):
            started = time.perf_counter()
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()
            steps.append(time.perf_counter() - started)
            num_done += 1
            if num_done % _EVERY == 0:
                started, state = time.perf_counter(), {"model": model.state_dict(), "optim": optimizer.state_dict()}
                pendings.append(commit(engine, f"step-{num_done}", state, "model.pt"))
                if putter is not None:
                    pendings[-1].add_done_callback(lambda pending: putter.put(pending.tag))
                saves.append(time.perf_counter() - started)
        times = {name: now - before[name] for name, now in thread_times().items()}
        rate = (sent_bytes() - sent) / (sum(steps) + sum(saves))
        found = {"steps_s": steps, "saves_s": saves, "sent_bytes_per_s": rate, **times}
        print(json.dumps(found), flush=True)
    os._exit(0)


_CHILD = "import json, sys; from benchmarks.mirror_training import train; train(json.loads(sys.argv[1]))"


class Turns:
    """The contenders' processes, of which one runs at a time."""

    def __init__(self) -> None:
        self.processes: dict[str, Talking] = {}

    def start(self, spec: dict[str, Any]) -> None:
        for name in CONTENDERS:
            self.processes[name] = Talking(_CHILD, json.dumps({**spec, "contender": name}))
        for process in self.processes.values():
            assert process.hear() == "ready"
            self._signal(process.pid, signal.SIGSTOP)

    def run(self, name: str, num_steps: int) -> dict[str, Any]:
        process = self.processes[name]
        self._signal(process.pid, signal.SIGCONT)
        process.say(f"{num_steps}")
        found = json.loads(process.hear())
        self._signal(process.pid, signal.SIGSTOP)
        # What it has written is not to be written out in the next one's turn.
        os.sync()
        return dict(found)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        """To a contender, and to the process that uploads for it."""
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                os.kill(int(child), number)
        os.kill(pid, number)

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def summary(rounds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per contender: steps against those of "no uploads" in the same round, in percent, with the standard error."""
    rows = []
    for name, found in rounds.items():
        row: dict[str, Any] = {"contender": name}
        for figure, reduce in (("mean", statistics.fmean), ("median", statistics.median)):
            base = [reduce(one["steps_s"]) for one in rounds[CONTENDERS[0]]]
            own = [reduce(one["steps_s"]) for one in found]
            longer = [100 * (a / b - 1) for a, b in zip(own, base, strict=True)]
            row[f"{figure}_step_s"] = statistics.median(own)
            row[f"{figure}_longer_percent"] = statistics.fmean(longer)
            row[f"{figure}_longer_error"] = statistics.stdev(longer) / len(longer) ** 0.5 if len(longer) > 1 else None
            row[f"{figure}_longer_percent_median"] = statistics.median(longer)
        saves, num_steps = [save for one in found for save in one["saves_s"]], sum(len(one["steps_s"]) for one in found)
        row |= {"save_s": statistics.median(saves), "slowest_save_s": max(saves), "num_rounds": len(found)}
        row["sent_bytes_per_s"] = statistics.fmean(one["sent_bytes_per_s"] for one in found)
        row |= {f"{what}_per_step": sum(one[what] for one in found) / num_steps for what in THREAD_TIMES}
        rows.append(row)
    return rows


def start_server(kind: str, home: Path) -> tuple[int, dict[str, Any]]:
    """Its process group, and the options of a store there."""
    options = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY, "region": "us-east-1"}
    if kind == "sink":
        command = ["nice", "-n", "19", sys.executable, "-m", "benchmarks.s3_sink"]
        sink = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert sink.stdout is not None
        return sink.pid, {**options, "endpoint": f"http://127.0.0.1:{sink.stdout.readline().strip()}"}
    server = SeaweedFS(home / "server")
    server.start()
    assert server.process is not None
    for thread in os.listdir(f"/proc/{server.process.pid}/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), 19)
    return server.process.pid, dict(server.options())


def main() -> None:
    parser = parser_of(__doc__, rounds=20, seconds=600.0, part_mib=16, parallel=4)
    parser.add_argument("--server", choices=("sink", "seaweedfs"), default="sink")
    parser.add_argument("--steps", type=int, default=30, help="of each contender in each round")
    parser.add_argument("--layers", type=int, default=10, help="3.1 MB of state each")
    given = parser.parse_args()
    # What is stopped would stay for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    home = Path(tempfile.mkdtemp(dir=given.directory)).resolve()
    group, options = start_server(given.server, home)
    spec = {"directory": str(home), "prefix": "run", "options": options, "num_layers": given.layers}
    spec |= {"part_bytes": given.part_mib << 20, "parallel": given.parallel}
    turns, stop_at = Turns(), time.monotonic() + given.seconds
    try:
        turns.start(spec)
        for name in CONTENDERS:
            turns.run(name, 30)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for number in range(given.rounds):
            for name in random.Random(number).sample(CONTENDERS, len(CONTENDERS)):
                rounds[name].append(turns.run(name, given.steps))
            if time.monotonic() > stop_at:
                break
    finally:
        turns.kill()
        os.killpg(group, signal.SIGKILL)
        environment = describe(home)
        shutil.rmtree(home)
    rows = summary(rounds)
    print("\n".join(map(json.dumps, rows)))
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "directory")}
    keep(given, "mirror training", {**settings, "rows": rows}, environment)


if __name__ == "__main__":
    main()
