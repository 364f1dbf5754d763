"""Whatever is typed wrong, missing or crafted: one clear line, the right exit code, no traceback."""

from __future__ import annotations

import json
import pickle
import struct
import zlib

import pytest
import torch

from async_ckpt.format.checksum import crc32
from async_ckpt.format.manifest import FileEntry, Manifest, encode


@pytest.mark.wide
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("list", "{tmp}/nothing"), 3, "does not exist"),
        (("list", "{root}/step-100"), 2, "its root is"),
        (("list", "{root}/step-100/model.pt"), 3, "not a directory"),
        (("verify", "{root}", "step-999"), 3, "step-100"),
        (("verify", "{root}", "../root"), 2, "tag"),
        (("verify", "{root}", "--level", "half"), 2, "--level"),
        (("inspect", "{root}/step-999"), 3, "step-200"),
        (("inspect", "{root}/step-100/nothing.pt"), 3, "model.pt"),
        (("inspect", "{root}"), 2, "step-200"),
        (("inspect", "{tmp}"), 3, "not a checkpoint"),
        (("diff", "{root}/step-100", "{root}/step-300"), 3, "does not exist"),
        (("prune", "{root}"), 2, "--keep-last"),
        (("prune", "{root}", "--keep-last", "0"), 2, "positive"),
        (("prune", "{root}", "--keep-best", "accuracy"), 3, "accuracy"),
        (("prune", "{root}", "--keep-best", "note"), 2, "not a number"),
        (("prune", "{root}", "--keep-best", "loss", "--best-mode", "sideways"), 2, "--best-mode"),
        (("prune", "{root}", "--keep-newer-than", "soon"), 2, "soon"),
        (("prune", "{root}", "--keep-last", "1", "--best-num", "3"), 2, "--keep-best"),
        (("sweep", "{tmp}/nothing"), 3, "does not exist"),
        (("watch", "{tmp}/nothing"), 3, "does not exist"),
        (("export", "{root}/step-100", "{tmp}/x.pt"), 2, "model.pt"),
        (("export", "{root}/step-100/model.pt", "{tmp}/x.zip"), 2, ".safetensors"),
        (("export", "{root}/step-100/model.pt", "{tmp}/no/such/folder/x.pt"), 3, "folder"),
        (("bench", "{tmp}/nothing"), 3, "not a directory"),
        (("bench", "{tmp}", "--checkpoint-gib", "-1"), 2, "--checkpoint-gib"),
        (("demo", "--root", "{tmp}/demo", "--device", "abacus"), 2, "it has cpu"),
        (("lsit", "{root}"), 2, "lsit"),
        (("list",), 2, ""),
        (("list", "{root}", "--frobnicate"), 2, "frobnicate"),
    ],
)
def test_clear_errors_and_exit_codes(cli, root, tmp_path, arguments, code, said):
    ran = cli(*(argument.format(root=root, tmp=tmp_path) for argument in arguments))
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    assert said in ran.err


def test_an_error_is_one_line(cli, tmp_path):
    ran = cli("list", tmp_path / "no\nsuch\x1b[31m")
    assert ran.err.count("\n") == 1
    assert "\x1b" not in ran.err


def test_debug_adds_the_traceback(cli, tmp_path):
    ran = cli("list", tmp_path / "nothing", "--debug")
    assert ran.code == 3 and "Traceback" in ran.err and ran.err.endswith("does not exist\n")


def committed(root, data: bytes, *, file_format: str = "torch") -> str:
    """A checkpoint whose manifest is right and whose one file holds `data`."""
    home = root / "crafted"
    home.mkdir(parents=True)
    entry = FileEntry(
        path="x.pt",
        size_bytes=len(data),
        extent_bytes=1 << 20,
        extent_crc32=(crc32(data),) if data else (),
        format=file_format,
        planner="fast",
        plan_hash=None,
    )
    (home / "x.pt").write_bytes(data)
    (home / "manifest.json").write_bytes(
        encode(Manifest(tag="crafted", created_unix_ns=1, files=(entry,), metadata={}, writer={}))
    )
    return f"{home}/x.pt"


def torch_file(tmp_path, pickled: bytes) -> bytes:
    """A torch container around any pickle: torch writes it, then data.pkl is replaced by one of the same length."""
    path = tmp_path / "made.pt"
    torch.save("x" * (len(pickled) - len(pickle.dumps("x" * 300, 2)) + 300), path)
    raw = path.read_bytes()
    start = raw.index(b"\x80\x02X")
    length = len(raw[start : raw.index(b"PK\x07\x08", start)])
    padded = pickled.ljust(length, b".")
    old, new = zlib.crc32(raw[start : start + length]), zlib.crc32(padded)
    raw = raw[:start] + padded + raw[start + length :]
    return raw.replace(struct.pack("<I", old), struct.pack("<I", new))


def evil_pickle() -> bytes:
    class Evil:
        def __reduce__(self):
            return (print, ("run" * 200,))

    return pickle.dumps(Evil(), 2)


def test_inspect_shows_what_would_run_and_runs_nothing(cli, root, tmp_path):
    path = committed(tmp_path / "bad", torch_file(tmp_path, evil_pickle()))
    ran = cli("inspect", path)
    assert ran.code == 0
    assert "runrunrun\n" not in ran.out
    assert ".print('run" in ran.out
    shown = cli("inspect", path, "--records", "--json")
    assert shown.code == 0
    assert "data.pkl" in [record["name"] for record in json.loads(shown.out)[0]["records"]]


@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"not a zip file at all" * 100, b"PK\5\6" + bytes(18), bytes(5000)],
    ids=["empty", "two bytes", "text", "empty zip", "zeros"],
)
def test_inspect_refuses_what_is_no_torch_file(cli, tmp_path, data):
    assert cli("inspect", committed(tmp_path / "bad", data)).code == 1


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1000000000000,1000000000000],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
        b'{"a":{"dtype":"EVIL","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}}',
        b'{"a":[]}',
        b"[" * 50_000,
    ],
    ids=["huge", "overlap", "negative", "dtype", "float", "list", "deep"],
)
def test_inspect_refuses_crafted_safetensors(cli, tmp_path, header):
    data = struct.pack("<Q", len(header)) + header + bytes(24)
    ran = cli("inspect", committed(tmp_path / "bad", data, file_format="safetensors"))
    assert ran.code == 1
    assert "Traceback" not in ran.err


def test_inspect_refuses_a_header_length_beyond_the_file(cli, tmp_path):
    data = struct.pack("<Q", 1 << 60) + b"{}"
    assert cli("inspect", committed(tmp_path / "bad", data, file_format="safetensors")).code == 1


@pytest.mark.wide
def test_every_flipped_byte_of_the_directory_is_an_error_or_harmless(cli, root):
    """Headers are not verified bytes: any damage must end in exit code 0 or 1, never in a traceback."""
    path = root / "step-100" / "sub" / "optim.pt"
    raw = path.read_bytes()
    for offset in [*range(0, 400, 7), *range(len(raw) - 600, len(raw), 5)]:
        path.write_bytes(raw[:offset] + bytes([raw[offset] ^ 0x41]) + raw[offset + 1 :])
        ran = cli("inspect", path, "--json")
        assert ran.code in (0, 1), (offset, ran)
        assert "Traceback" not in ran.err
