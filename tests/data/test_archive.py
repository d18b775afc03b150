"""Archives: their files are read in order; bombs, links and names that lead outside are set aside, the rest is read."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from modelwright.base.errors import DataError
from modelwright.data.entry import Failure, Limits
from modelwright.data.source import ReadConfig, iterate_documents

SMALL = Limits(free_bytes=100_000, ratio=50)


def read(path, **settings):
    """Ids to texts, and paths to reasons."""
    documents, failures = {}, {}
    for item in iterate_documents(ReadConfig(str(path), **settings)):
        if isinstance(item, Failure):
            failures[item.path] = item.reason
        else:
            documents[item.id] = item.text
    return documents, failures


def make_zip(members, method=zipfile.ZIP_DEFLATED):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return held.getvalue()


def make_tar(members, mode="w"):
    """Members are bytes, or a type with the name that it links to."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                archive.addfile(info)
    return held.getvalue()


TWO = {"b.md": b"# Second\n", "sub/a.txt": b"first", "code.py": b"x = 1"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.zip", make_zip(TWO)),
        ("x.zip", make_zip(TWO, zipfile.ZIP_LZMA)),
        ("x.tar", make_tar(TWO)),
        ("x.tar.gz", make_tar(TWO, "w:gz")),
        ("x.tgz", make_tar(TWO, "w:gz")),
        ("x.tar.bz2", make_tar(TWO, "w:bz2")),
        ("x.tar.xz", make_tar(TWO, "w:xz")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_of_archive_gives_its_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    documents, failures = read(tmp_path / name)
    assert documents == {f"{name}/b.md": "# Second\n", f"{name}/sub/a.txt": "first"} and not failures
    assert read(tmp_path) == (documents, failures)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path, pack):
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    data = pack(b"# One\n") + pack(b"and two\n")  # two members of one stream
    (tmp_path / f"a.md.{suffix}").write_bytes(data + b"\0" * 512)
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(pack(b'{"id": "r", "text": "row"}\n{"text": "other"}\n'))
    documents, failures = read(tmp_path)
    assert documents == {f"a.md.{suffix}": "# One\nand two\n", "r": "row", f"rows.jsonl.{suffix}#2": "other"}
    assert not failures
    (tmp_path / f"a.md.{suffix}").write_bytes(data[:-3])
    assert "truncated" in read(tmp_path)[1][f"a.md.{suffix}"]


def test_zstandard_is_read_when_its_package_is_there(tmp_path):
    zstd = pytest.importorskip("backports.zstd")
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"one ") + zstd.compress(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress(b"x" * 5_000_000))
    (tmp_path / "c.txt.zst").write_bytes(zstd.compress(os.urandom(1000).hex().encode())[:500])
    documents, failures = read(tmp_path, limits=SMALL)
    assert documents == {"a.txt.zst": "one two"}
    assert "bomb" in failures["b.txt.zst"] and "truncated" in failures["c.txt.zst"]


def test_names_that_lead_outside_links_and_devices_are_set_aside(tmp_path):
    (tmp_path / "outside.txt").write_text("secret")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.tar").write_bytes(
        make_tar(
            {
                "../up.txt": b"up",
                "/etc/absolute.txt": b"absolute",
                "link.txt": (tarfile.SYMTYPE, "../../outside.txt"),
                "hard.txt": (tarfile.LNKTYPE, "/etc/passwd"),
                "pipe.txt": (tarfile.FIFOTYPE, ""),
                "disk.txt": (tarfile.BLKTYPE, ""),
                "good.txt": b"good",
            }
        )
    )
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(link, "/etc/passwd")
        for name in ("../up.txt", "/absolute.txt", "C:\\windows.txt", "a/../../b.txt", "good.txt"):
            archive.writestr(name, "text")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("good.txt", "another")
    (tmp_path / "docs" / "y.zip").write_bytes(held.getvalue())
    documents, failures = read(tmp_path / "docs")
    assert documents == {"x.tar/good.txt": "good", "y.zip/good.txt": "text"}
    assert len(failures) == 6 + 5 + 1
    for name in ("x.tar/../up.txt", "x.tar//etc/absolute.txt", "y.zip/../up.txt", "y.zip/C:/windows.txt"):
        assert "points outside" in failures[name], name
    assert "link" in failures["x.tar/link.txt"] and "link" in failures["x.tar/hard.txt"]
    assert "link" in failures["y.zip/link.txt"] and "second member" in failures["y.zip/good.txt"]
    assert "device" in failures["x.tar/pipe.txt"] and "device" in failures["x.tar/disk.txt"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["docs", "outside.txt", "x.tar", "y.zip"]


def test_bombs_are_stopped_and_what_stands_beside_them_is_read(tmp_path):
    zeros = b"\0" * 30_000_000
    (tmp_path / "a.zip").write_bytes(make_zip({"bomb.txt": zeros, "good.txt": "good"}))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(zeros))
    (tmp_path / "c.tar.gz").write_bytes(make_tar({"good.txt": b"good", "bomb.txt": zeros, "later.txt": b"x"}, "w:gz"))
    (tmp_path / "d.txt.gz.gz").write_bytes(gzip.compress(gzip.compress(zeros)))
    (tmp_path / "e.txt").write_text("after")
    documents, failures = read(tmp_path)
    assert documents == {"a.zip/good.txt": "good", "c.tar.gz/good.txt": "good", "e.txt": "after"}
    assert set(failures) == {"a.zip/bomb.txt", "b.txt.gz", "c.tar.gz/bomb.txt", "c.tar.gz", "d.txt.gz.gz"}
    assert all("200 to 1: this looks like a bomb" in reason for reason in failures.values())
    with pytest.raises(DataError, match=r"a.zip/bomb.txt: .*bomb(.|\n)*without strict"):
        read(tmp_path, strict=True)


def test_a_directory_that_lies_about_sizes_is_not_believed(tmp_path):
    data = make_zip({"liar.txt": b"\0" * 3_000_000, "good.txt": "good"})
    (tmp_path / "a.zip").write_bytes(data.replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    documents, failures = read(tmp_path, limits=SMALL)
    assert documents == {"a.zip/good.txt": "good"} and "damaged" in failures["a.zip/liar.txt"]


def test_nested_archives_end_at_a_depth_and_a_total(tmp_path):
    data = make_zip({"deep.txt": "deep"})
    for level in range(5):
        data = make_zip({f"{level}.zip": data, f"beside{level}.txt": "beside"})
    (tmp_path / "x.zip").write_bytes(data)
    documents, failures = read(tmp_path)
    assert len(documents) == 4 and all(text == "beside" for text in documents.values())
    assert [reason for reason in failures.values()] == ["lies in 4 archives; at most 3 within each other are opened"]
    # As 42.zip is made: each layer packs no worse than text, all together a million to one.
    layer = os.urandom(2000).hex().encode() * 100
    data = make_zip({f"{i}.txt": layer for i in range(20)})
    for _ in range(2):
        data = make_zip({f"{i}.zip": data for i in range(20)})
    (tmp_path / "x.zip").write_bytes(data)
    start = time.monotonic()
    documents, failures = read(tmp_path, limits=Limits(free_bytes=100_000))
    assert len(documents) < 400 and "rest is left out" in failures["x.zip"] and time.monotonic() - start < 10


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """Source: D. Fifield, "A better zip bomb", WOOT 2019: entries overlap, so each byte unpacks many times."""
    data = make_zip({"a.txt": "kernel " * 10, "b.txt": "kernel " * 10}, zipfile.ZIP_STORED)
    second = data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 4)
    place = 10  # inside the first member
    (tmp_path / "x.zip").write_bytes(data[: second + 42] + place.to_bytes(4, "little") + data[second + 46 :])
    documents, failures = read(tmp_path)
    assert list(documents) == ["x.zip/a.txt"] and "shares its bytes" in failures["x.zip/b.txt"]


def test_very_many_members_are_refused_before_they_are_listed(tmp_path):
    (tmp_path / "x.zip").write_bytes(make_zip({f"{i:060d}.txt": "" for i in range(300)}))
    (tmp_path / "y.tar").write_bytes(make_tar({f"{i}.txt": b"x" for i in range(150)}))
    documents, failures = read(tmp_path, limits=Limits(num_members=100))
    assert "directory has" in failures["x.zip"] and "more than 100 members" in failures["y.tar"]
    assert len(documents) == 100


def test_a_huge_header_in_a_tar_archive_does_not_fill_the_memory(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 10**12
    (tmp_path / "x.tar").write_bytes(make_tar({"good.txt": b"good"})[:1024] + info.tobuf() + b"\0" * 2048)
    documents, failures = read(tmp_path)
    assert documents == {"x.tar/good.txt": "good"} and "damaged tar archive" in failures["x.tar"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.zip", b"PK\x03\x04 cut", "not a whole zip archive"),
        ("x.zip", make_zip(TWO)[:-30], "not a whole zip archive"),
        ("x.tar.gz", make_tar({"a.txt": os.urandom(5000)}, "w:gz")[:2000], "truncated"),
        ("x.tar", b"no tar at all" * 100, "damaged tar archive"),
        ("x.txt.gz", b"not gzip", "damaged"),
        ("x.txt.xz", lzma.compress(b"x", format=lzma.FORMAT_XZ, preset=9)[:-9], "truncated"),
    ],
)
def test_damaged_archives_are_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    documents, failures = read(tmp_path)
    assert documents["good.txt"] == "good" and any(reason in found for found in failures.values()), failures


def test_a_zip_with_a_password_names_each_locked_member(tmp_path):
    data = bytearray(make_zip({"locked.txt": "x", "open.txt": "open"}, zipfile.ZIP_STORED))
    data[6] |= 1
    data[data.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    documents, failures = read(tmp_path)
    assert documents == {"x.zip/open.txt": "open"} and "password" in failures["x.zip/locked.txt"]


@pytest.mark.skipif("MODELWRIGHT_DATA" not in os.environ, reason="needs MODELWRIGHT_DATA")
def test_a_real_archive_of_markdown_is_read_whole():
    path = Path(os.environ["MODELWRIGHT_DATA"], "retrieval", "docs", "github_site_policy.zip")
    documents, failures = read(path)
    assert len(documents) == 57 and not failures
