"""Uploads and restores of the second tier against a SeaweedFS on loopback, beside what else does that, each in a
process of its own.

    python -m benchmarks.mirror DIR --size-mib 1024 --repeats 3 --out results/

- upload: seconds until one checkpoint of one file is in the store; processor seconds and memory above what the
  process had before, both with those of the process that uploads for it; longest hold of the interpreter lock.
  "obstore put" is the library's own put of the same file with the same settings; DCP and s3torchconnector write from
  memory. The file is not in the page cache: a commit leaves it so.
- restore: seconds into existing tensors; "obstore get" are ranges of the same object by as many threads, into memory.
- What uploads cost a training is measured by `mirror_training`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import describe, memory_bytes, resident_bytes
from benchmarks.limits import evict
from benchmarks.results import in_own_process, keep, parser_of
from benchmarks.ticker import Ticker
from benchmarks.workloads import commit
from tests.mirror.making import upload_processes
from tests.mirror.servers import BUCKET, SeaweedFS

_GET_BYTES = 8 << 20
_NUM_GETS = 8


def state_of(size_mib: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    num = max(1, size_mib // 16)
    return {f"layer.{k}.weight": torch.randn(16 << 18 if size_mib >= 16 else size_mib << 18) for k in range(num)}


# What runs in processes of their own: each takes the specification and returns what is to be timed.


def mirror_of(spec: dict[str, Any], prefix: str = "mirrored", **fields: Any) -> Any:
    from async_ckpt import Mirror

    return Mirror(
        f"s3://{BUCKET}/{spec['prefix']}/{prefix}",
        parallel=spec["parallel"],
        part_bytes=spec["part_bytes"],
        options=spec["options"],
        **fields,
    )


def store_of(spec: dict[str, Any]) -> Any:
    from obstore.store import S3Store

    options = dict(spec["options"], client_options={"allow_http": True, "timeout": "300s"})
    return S3Store(BUCKET, prefix=spec["prefix"], checksum_algorithm="SHA256", **options)


def upload_ours(spec: dict[str, Any]) -> Callable[[], object]:
    from async_ckpt.mirror.mirrors import Mirrors
    from async_ckpt.storage.filesystem import FileSystem

    made = Mirrors((mirror_of(spec),), filesystem=FileSystem(), root=spec["root"], with_backlog=False)
    made.check()

    def run() -> None:
        pending = made.expect("step-0")
        made.committed(pending, None)
        pending.result()

    return run


def upload_obstore(spec: dict[str, Any]) -> Callable[[], object]:
    import obstore

    store = store_of(spec)
    how = {"chunk_size": spec["part_bytes"], "max_concurrency": spec["parallel"]}
    return lambda: obstore.put(store, "put.pt", Path(spec["file"]), **how)


def upload_boto3(spec: dict[str, Any]) -> Callable[[], object]:
    import boto3
    from boto3.s3.transfer import TransferConfig

    options = spec["options"]
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint"],
        aws_access_key_id=options["access_key_id"],
        aws_secret_access_key=options["secret_access_key"],
        region_name=options["region"],
    )
    config = TransferConfig(
        multipart_threshold=spec["part_bytes"], multipart_chunksize=spec["part_bytes"], max_concurrency=spec["parallel"]
    )
    return lambda: client.upload_file(spec["file"], BUCKET, f"{spec['prefix']}/boto3.pt", Config=config)


def upload_dcp(spec: dict[str, Any]) -> Callable[[], object]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    options = spec["options"]
    how = {"key": options["access_key_id"], "secret": options["secret_access_key"]}
    client = {"endpoint_url": options["endpoint"], "region_name": options["region"]}
    writer = FsspecWriter(f"s3://{BUCKET}/{spec['prefix']}/dcp", client_kwargs=client, **how)
    state = state_of(spec["size_mib"])
    return lambda: dcp.save(state, storage_writer=writer, no_dist=True)


def upload_s3torchconnector(spec: dict[str, Any]) -> Callable[[], object]:
    import torch
    from s3torchconnector import S3Checkpoint, S3ClientConfig

    options = spec["options"]
    os.environ.update(AWS_ACCESS_KEY_ID=options["access_key_id"], AWS_SECRET_ACCESS_KEY=options["secret_access_key"])
    config = S3ClientConfig(force_path_style=True, part_size=spec["part_bytes"])
    checkpoint = S3Checkpoint(region=options["region"], endpoint=options["endpoint"], s3client_config=config)
    state = state_of(spec["size_mib"])

    def run() -> None:
        with checkpoint.writer(f"s3://{BUCKET}/{spec['prefix']}/connector.pt") as file:
            torch.save(state, file)

    return run


def restore_ours(spec: dict[str, Any]) -> Callable[[], object]:
    from async_ckpt.mirror.remote import remote_catalog
    from async_ckpt.reading.load import load_committed_into

    catalog, state = remote_catalog(mirror_of(spec)), state_of(spec["size_mib"])
    return lambda: load_committed_into(catalog, "step-0", "model.pt", state, atomic=False)


def restore_obstore(spec: dict[str, Any]) -> Callable[[], object]:
    from concurrent.futures import ThreadPoolExecutor

    import obstore

    store, size = store_of(spec), os.path.getsize(spec["file"])
    memory = memoryview(bytearray(size))
    memory[::4096] = bytes(len(memory[::4096]))

    def get(offset: int) -> None:
        length = min(_GET_BYTES, size - offset)
        memory[offset : offset + length] = memoryview(obstore.get_range(store, "put.pt", start=offset, length=length))

    def run() -> None:
        with ThreadPoolExecutor(_NUM_GETS) as pool:
            list(pool.map(get, range(0, size, _GET_BYTES)))

    return run


CONTENDERS: dict[str, dict[str, Callable[[dict[str, Any]], Callable[[], object]]]] = {
    "upload": {
        "async_ckpt": upload_ours,
        "obstore put": upload_obstore,
        "boto3": upload_boto3,
        "DCP fsspec+s3fs": upload_dcp,
        "s3torchconnector": upload_s3torchconnector,
    },
    "restore": {"async_ckpt": restore_ours, "obstore get": restore_obstore},
}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """One measurement; the imports and the state are there before it begins."""
    run = CONTENDERS[spec["scenario"]][spec["contender"]](spec)
    evict(Path(spec["file"]))
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.005):
            others = (memory_bytes("Private_", f"{pid}/smaps_rollup") for pid in upload_processes())
            peak[0] = max(peak[0], resident_bytes() + sum(others))

    def processor_s() -> float:
        return time.process_time() + sum(map(_processor_s, upload_processes()))

    watcher = threading.Thread(target=watch)
    before_bytes = resident_bytes()
    with Ticker() as ticker:
        watcher.start()
        began, cpu_s = time.monotonic(), processor_s()
        run()
        ended, cpu_s = time.monotonic(), processor_s() - cpu_s
        stop.set()
        watcher.join()
    return {
        "seconds": ended - began,
        "cpu_s": cpu_s,
        "peak_bytes": max(0, peak[0] - before_bytes),
        "gil_s": ticker.longest(began, ended),
        "control_gil_s": ticker.control_longest(began, ended),
    }


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = parser_of(__doc__, size_mib=256, part_mib=16, parallel=4, repeats=3, scenarios="upload,restore")
    parser.add_argument("--contenders", help="only these, by commas")
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(dir=given.directory))
    server = SeaweedFS(home / "server")
    server.start()
    try:
        _run_all(given, home, server)
    finally:
        server.kill()
        shutil.rmtree(home)


def _run_all(given: argparse.Namespace, home: Path, server: SeaweedFS) -> None:
    from async_ckpt import AsyncCheckpointEngine

    root = home / "root"
    with AsyncCheckpointEngine(root, staging_bytes=256 << 20) as engine:
        commit(engine, "step-0", state_of(given.size_mib), "model.pt")
    common = {"root": str(root), "file": str(root / "step-0" / "model.pt"), "size_mib": given.size_mib}
    common |= {"part_bytes": given.part_mib << 20, "parallel": given.parallel, "options": dict(server.options())}
    runs: list[dict[str, Any]] = []
    for scenario in given.scenarios.split(","):
        chosen = [name for name in CONTENDERS[scenario] if name in (given.contenders or name).split(",")]
        for repeat, name in itertools.product(range(given.repeats), chosen):
            # Each repetition uploads anew, to a prefix of its own.
            spec = {**common, "scenario": scenario, "contender": name, "prefix": f"run-{repeat}"}
            if scenario == "upload":
                shutil.rmtree(root / ".mirrors", ignore_errors=True)
            try:
                found = in_own_process(measure, spec)
            except Exception as error:  # noqa: BLE001 - a contender that cannot run keeps its reason
                found = {"reason": f"{type(error).__name__}: {error}"}
            about = {"scenario": f"mirror {scenario}", "contender": name, "size_mib": given.size_mib, "repeat": repeat}
            runs.append({**about, **found})
            print(json.dumps(runs[-1]), flush=True)
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "directory")}
    keep(given, "mirror", {**settings, "rows": runs}, describe(home))


if __name__ == "__main__":
    main()
