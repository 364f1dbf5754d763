"""Real servers on loopback, started and killed by the tests: SeaweedFS, moto, rclone. Each is a process of its own."""

from __future__ import annotations

import base64
import email.utils
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ACCESS_KEY, SECRET_KEY, BUCKET = "test", "testsecret", "bucket"
_BIN = Path(sys.executable).parent


def free_ports(num: int) -> list[int]:
    """Ports that nobody listens on now, nor on the port 10,000 above (SeaweedFS takes that for gRPC)."""
    found: list[int] = []
    held = []
    while len(found) < num:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        held.append(listener)
        if port < 50_000:
            found.append(port)
    for listener in held:
        listener.close()
    return found


class Server:
    """One server process. `start` after `kill` brings it back with what it had made durable."""

    name = "server"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def options(self, **more: Any) -> Mapping[str, Any]:
        """What a mirror's `options` are for this server."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
            **more,
        }

    def command(self) -> list[str]:
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the bucket; the server answers already."""

    def start(self) -> None:
        environment = {**os.environ, "HOME": str(self.directory)}
        with open(self.directory / "log", "ab") as log:
            # A group of its own, to be killed as one; where it can be not a session, which the scheduler treats as a
            # user of its own, whatever its threads' niceness.
            apart: Any = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
            process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.directory, env=environment, **apart
            )
        self.process = process
        deadline = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{self.name} did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        self.prepare()

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except OSError:
            return False
        finally:
            connection.close()


class Moto(Server):
    name = "moto"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self.port,) = free_ports(1)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def prepare(self) -> None:
        client(self).create_bucket(Bucket=BUCKET)


class Rclone(Server):
    """Ignores If-None-Match and If-Match."""

    name = "rclone"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self.port,) = free_ports(1)
        (directory / "data" / BUCKET).mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        auth = f"{ACCESS_KEY},{SECRET_KEY}"
        return [str(_BIN / "rclone"), "serve", "s3", "data", "--addr", f"127.0.0.1:{self.port}", "--auth-key", auth]


class SeaweedFS(Server):
    """Keeps conditions and checks checksums."""

    name = "seaweedfs"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.ports = free_ports(4)
        self.port = self.ports[3]
        identity = {"name": "t", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
        identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]  # type: ignore[assignment]
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (directory / "data").mkdir(exist_ok=True)

    def command(self) -> list[str]:
        master, volume, filer, s3 = self.ports
        return [
            str(_BIN / "weed"),
            "server",
            "-dir=data",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={s3}",
            "-s3.config=s3.json",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=100",
            "-master.telemetry=false",
            # After a crash nobody else is asked: the default is ten seconds.
            "-master.electionTimeout=500ms",
            "-master.heartbeatInterval=100ms",
        ]

    def prepare(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                made = client(self)
                if not any(bucket["Name"] == BUCKET for bucket in made.list_buckets()["Buckets"]):
                    made.create_bucket(Bucket=BUCKET)
                made.put_object(Bucket=BUCKET, Key=".ready", Body=b"x")
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


class Azurite(Server):
    """Azure's own emulator of its blob storage, a program of npm."""

    name = "azurite"
    account = "devstoreaccount1"
    # Not a secret: the emulator knows this account only.
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self.port,) = free_ports(1)

    def options(self, **more: Any) -> Mapping[str, Any]:
        return {"endpoint": f"{self.endpoint}/{self.account}", "account_name": self.account, "account_key": self.key}

    def command(self) -> list[str]:
        found = shutil.which("azurite-blob") or "azurite-blob"
        where = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", "data"]
        return [found, *where, "--skipApiVersionCheck", "--silent", "--disableTelemetry"]

    def prepare(self) -> None:
        """Make the container: one request with a shared key."""
        date = email.utils.formatdate(usegmt=True)
        path, version = f"/{self.account}/{BUCKET}", "2021-08-06"
        lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{version}", f"/{self.account}{path}"]
        text = "\n".join([*lines, "restype:container"]).encode()
        signature = base64.b64encode(hmac.digest(base64.b64decode(self.key), text, "sha256")).decode()
        headers = {"x-ms-date": date, "x-ms-version": version, "Content-Length": "0"}
        headers["Authorization"] = f"SharedKey {self.account}:{signature}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("PUT", f"{path}?restype=container", headers=headers)
        assert connection.getresponse().status in (201, 409)
        connection.close()


def aws_environment(monkeypatch: Any, server: Any) -> None:
    """Where and as whom to ask for URLs without options of their own."""
    for name, value in (("ENDPOINT_URL", server.endpoint), ("ACCESS_KEY_ID", ACCESS_KEY), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


def client(server: Any) -> Any:
    """A plain S3 client, to look at and to damage what is there."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, connect_timeout=5, read_timeout=20, s3={"addressing_style": "path"}),
    )


def keys(server: Any, prefix: str = "") -> list[str]:
    """All keys below a prefix."""
    pages = client(server).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return sorted(found["Key"] for page in pages for found in page.get("Contents", []))


def unfinished_uploads(server: Any, prefix: str) -> list[str]:
    """Keys below the prefix that have multipart uploads in progress."""
    listed = client(server).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix + "/").get("Uploads", [])
    return [upload["Key"] for upload in listed if upload["Key"].startswith(prefix + "/")]
