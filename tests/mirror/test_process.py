"""Uploads run in a process of their own: nothing of them in the training's, and no death of either loses anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.errors import MirrorError
from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.process import portable
from async_ckpt.mirror.store import PassingFailure

from ..support.stepping import until
from .making import (
    big,
    commit,
    commit_and_send,
    content,
    garbage,
    mirroring,
    mirroring_through,
    remote_content,
    s3_mirror,
    upload_processes,
)
from .proxy import Fault, Proxy
from .servers import ACCESS_KEY, SECRET_KEY, unfinished_uploads
from .test_upload import root_of

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
]


def num_read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_training_process_reads_and_sends_nothing(tmp_path: Path) -> None:
    root, mirror = tmp_path / "root", Mirror(f"file://{tmp_path}/other")
    with mirroring(root, mirror) as made:
        made.check()
        pending = made.expect("step-1")
        commit(root, "step-1", big(), created=1)
        before = num_read_bytes()
        made.committed(pending, None)
        pending.result(60)
        assert num_read_bytes() - before < len(big()["model.bin"]) / 10
        assert len(upload_processes()) == 1
        assert pending.metrics.sent_bytes == sum(map(len, big().values()))
    assert upload_processes() == [] and remote_content(mirror, "step-1") == content(root, "step-1")


@pytest.mark.parametrize("at", ["an object", "the manifest", "a deletion"])
def test_a_process_that_dies_is_an_error_and_the_next_one_goes_on(
    at: str, moto: Any, tmp_path: Path, prefix: str
) -> None:
    """The upload of the last commit comes first; then the one that was cut short goes on, and what it replaces goes."""
    asked = {"an object": "PUT", "the manifest": "PUT", "a deletion": "DELETE"}[at]
    where = {"an object": "partNumber=2", "the manifest": "step-1/manifest.json", "a deletion": "/step-1/"}[at]
    killed: list[int] = []

    def kill(number: int, method: str, path: str) -> Fault:
        if made.is_mirrored("step-0", 1) and method == asked and where in path and not killed:
            killed.extend(upload_processes())
            os.kill(killed[0], signal.SIGKILL)
            return "reset"
        return None

    with mirroring_through(kill, moto, tmp_path, prefix) as made:
        for tag in ("step-1", "step-0"):
            commit_and_send(made, tmp_path, tag).result(60)
        error = commit_and_send(made, tmp_path, "step-1", big(), created=2, overwrite="replace").exception(60)
        assert isinstance(error, MirrorError) and "status -9" in str(error)
        commit_and_send(made, tmp_path, "step-2", big(), created=2).result(60)
        until(lambda: made.is_mirrored("step-1", 2) and garbage(moto, prefix) == [])
        assert upload_processes() != killed
    mirror = s3_mirror(moto, prefix)
    assert remote_content(mirror, "step-1") == remote_content(mirror, "step-2") == big()
    assert garbage(moto, prefix) == [] and unfinished_uploads(moto, prefix) == []


def test_it_hears_no_signal(tmp_path: Path) -> None:
    """Whoever signals the whole group or job means the training, which may still wait for what is on its way."""
    root = root_of(tmp_path / "root")
    with mirroring(root, Mirror(f"file://{tmp_path}/other")) as made:
        commit_and_send(made, root, "first").result(60)
        (child,) = upload_processes()
        # Else its niceness would not count against the training's.
        assert os.getsid(child) == os.getsid(0)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(child, signum)
            commit_and_send(made, root, signum.name).result(60)
        assert upload_processes() == [child]


def test_one_that_dies_between_uploads_is_replaced_without_a_word(tmp_path: Path) -> None:
    """Also where SIGPIPE, which a message to the dead one would be, ends the training."""
    _run(
        "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "with mirroring(root, mirror) as made:\n"
        "    made.check(); commit_and_send(made, root, 'step-1').result(60)\n"
        "    (child,) = upload_processes(); os.kill(child, signal.SIGKILL)\n"
        "    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)\n"
        "    commit_and_send(made, root, 'step-2').result(60)\n"
        "    assert upload_processes() not in ([], [child])\n",
        tmp_path,
    )


def test_close_ends_it_although_a_forked_process_holds_its_channel(tmp_path: Path) -> None:
    _run(
        "import signal\n"
        "with mirroring(root, mirror) as made:\n"
        "    commit_and_send(made, root, 'step-1').result(60)\n"
        "    forked = os.fork()\n"
        "    if not forked: signal.pause()\n"
        "left = upload_processes(); os.kill(forked, signal.SIGKILL); assert left == [], left\n",
        tmp_path,
    )


def test_it_finds_this_package_and_nothing_in_the_working_directory(tmp_path: Path) -> None:
    """Also where the path leads to this package no more: by an entry that was relative, say."""
    (tmp_path / "tempfile.py").write_text("raise SystemExit('it was imported')")
    _run(
        "os.chdir(root.parent)\n"
        "sys.path[:] = [at for at in sys.path if at and not os.path.isdir(os.path.join(at, 'async_ckpt'))]\n"
        "with mirroring(root, mirror) as made:\n"
        "    commit_and_send(made, root, 'step-1').result(60)\n",
        tmp_path,
    )


def _run(program: str, tmp_path: Path) -> None:
    """In a process of its own, with a `root` and a `mirror`."""
    root_of(tmp_path / "root")
    begin = (
        "import os, sys; from pathlib import Path; from async_ckpt import Mirror\n"
        "from tests.mirror.making import commit_and_send, mirroring, upload_processes\n"
        "root, mirror = Path(sys.argv[1]) / 'root', Mirror('file://' + sys.argv[1] + '/other')\n"
    )
    command = [sys.executable, "-c", begin + program, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)


@pytest.mark.parametrize("is_forked", [False, True])
def test_it_ends_with_the_training(is_forked: bool, moto: Any, tmp_path: Path, prefix: str) -> None:
    """However that ends, also while a process that it has forked holds whatever it has open."""
    program = (
        "import json, os, sys, time; from pathlib import Path; from async_ckpt import Mirror\n"
        "from tests.mirror.making import big, commit_and_send, mirroring, upload_processes\n"
        "mirror, root = Mirror(sys.argv[2], part_bytes=5 << 20, options=json.loads(sys.argv[3])), Path(sys.argv[1])\n"
        "with mirroring(root, mirror) as made:\n"
        "    commit_and_send(made, root, 'step-1').result(60)\n"
        "    forked = os.fork() if len(sys.argv) > 4 else 0\n"
        "    if len(sys.argv) > 4 and not forked: time.sleep(600)\n"
        "    commit_and_send(made, root, 'step-2', big(), created=2)\n"
        "    print(json.dumps([*upload_processes(), forked]), flush=True); time.sleep(600)\n"
    )
    sending: list[str] = []

    def hang(number: int, method: str, path: str) -> Fault:
        if "partNumber" not in path:
            return None
        sending.append(path)
        return "stall"

    with Proxy(moto.endpoint, hang) as proxy:
        options = json.dumps({**moto.options(), "endpoint": proxy.endpoint})
        command = [sys.executable, "-c", program, str(tmp_path), s3_mirror(moto, prefix).url, options]
        training = subprocess.Popen([*command, *["fork"] * is_forked], stdout=subprocess.PIPE, text=True)
        forked = 0
        try:
            assert training.stdout is not None
            child, forked = json.loads(training.stdout.readline())
            until(lambda: sending)
            training.kill()
            training.wait()
            until(lambda: not os.path.exists(f"/proc/{child}") or _is_zombie(child))
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)
            training.kill()
            training.communicate()
    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        until(lambda: made.is_mirrored("step-2", 2))
    assert garbage(moto, prefix) == [] and unfinished_uploads(moto, prefix) == []


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


asked: list[int] = []


def provide() -> dict[str, Any]:
    asked.append(os.getpid())
    return {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY, "token": None, "expires_at": None}


def test_options_that_exist_here_alone_are_used_here(moto: Any, tmp_path: Path, prefix: str) -> None:
    """A provider of credentials cannot be given to another process, not even one that can be pickled: nothing of the
    user's is imported there, and what was the main module here is another one there."""
    options, url = dict(moto.options()), s3_mirror(moto, prefix).url
    del options["access_key_id"], options["secret_access_key"]
    with mirroring(tmp_path, Mirror(url, options={**options, "credential_provider": provide})) as made:
        commit_and_send(made, tmp_path, "step-1").result(60)
        assert upload_processes() == [] and set(asked) == {os.getpid()}
    assert remote_content(s3_mirror(moto, prefix), "step-1") == content(tmp_path, "step-1")


class Unreadable(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


class Unwritable(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(self)


@pytest.mark.parametrize(
    "error", [Unreadable(1, "why"), Unwritable("why"), SystemExit("why"), KeyboardInterrupt("why")]
)
def test_an_error_that_cannot_be_told_whole_or_would_end_the_training_is_told_as_text(error: BaseException) -> None:
    told = portable(error, "file:///x")
    assert type(told) is MirrorError and f"{type(error).__name__}: why" in str(told)


def test_other_errors_are_told_as_they_are() -> None:
    errors = [None, ValueError("x" * 10_000_000), PassingFailure("why", url="file:///x")]
    assert [portable(error, "file:///y") for error in errors] == errors


@pytest.mark.parametrize(("name", "value"), [("executable", ""), ("executable", None), ("frozen", True)])
def test_where_no_interpreter_can_be_started_uploads_run_here(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an application that is frozen, the executable is the training itself: another one would begin."""
    monkeypatch.setattr(sys, name, value, raising=False)
    root = root_of(tmp_path / "root")
    with mirroring(root, Mirror(f"file://{tmp_path}/other")) as made:
        commit_and_send(made, root, "step-1").result(60)
        assert upload_processes() == []
