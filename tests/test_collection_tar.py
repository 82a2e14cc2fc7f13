"""Images in tars, whole and damaged."""

import gzip
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from cbir.collection import InputSpec, read_images, read_place
from cbir.errors import DataError
from tests.collection_forms import (
    IMAGES,
    LIMIT,
    SPEC,
    content,
    images_of,
    read_until_error,
    shards_of,
    tar_bytes,
    write_files,
    write_tar,
)

THREE = {"a.jpg": b"a" * 1000, "b.jpg": b"b" * 1000, "c.jpg": b"c" * 1000}
"""Members at 0, 1536 and 3072, data of 1000 bytes from 512 after that; end blocks from 4608."""


def test_members_are_named_without_a_leading_dot_slash(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"./a/b.jpg": b"1", "././c.jpg": b"2", "./.d.jpg": b"3"})
    assert content(images_of(path)) == {"a/b.jpg": b"1", "c.jpg": b"2"}


def test_members_that_are_no_files_are_passed_over_and_hard_links_are_followed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "photos", {"sub/a.jpg": b"content", "z.jpg": b"z"})
    (folder / "link.jpg").symlink_to("sub/a.jpg")
    (folder / "sub/hard.jpg").hardlink_to(folder / "sub/a.jpg")
    names = ["sub/a.jpg", "sub/hard.jpg", "link.jpg", "sub", "z.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, name, recursive=False)
        assert archive.getmember("sub/hard.jpg").islnk()
    images = images_of(tmp_path / "x.tar")
    assert [(image.key, image.data) for image in images] == [
        ("sub/a.jpg", b"content"),
        ("sub/hard.jpg", b"content"),
        ("z.jpg", b"z"),
    ]
    assert read_place(tmp_path.as_uri(), images[1].at, SPEC) == b"content"


def test_a_hard_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    member = tarfile.TarInfo("link.jpg")
    member.type, member.linkname = tarfile.LNKTYPE, "gone.jpg"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(DataError, match=r"'link\.jpg' is a hard link to 'gone\.jpg'"):
        images_of(tmp_path / "x.tar")


def test_the_systems_own_tar_is_read(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", IMAGES)
    subprocess.run(["tar", "-C", tmp_path / "photos", "-cf", tmp_path / "x.tar", "."], check=True)
    assert content(images_of(tmp_path / "x.tar")) == IMAGES


def test_a_sparse_member_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"island")
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "-cf", tmp_path / "x.tar", "sparse.jpg"], check=True)
    with pytest.raises(DataError, match=r"with holes \(tar --sparse\)"):
        images_of(tmp_path / "x.tar")


def test_a_name_in_another_encoding_is_kept_readable(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("café.jpg"))
    assert content(images_of(tmp_path / "x.tar")) == {"caf\\xe9.jpg": b""}


def test_joined_tars_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.jpg": b"1"}) + tar_bytes({"b.jpg": b"2"}))
    assert content(images_of(tmp_path / "x.tar")) == {"a.jpg": b"1", "b.jpg": b"2"}


def test_a_tar_without_images_gives_none(tmp_path: Path) -> None:
    assert images_of(write_tar(tmp_path / "x.tar", {})) == []
    assert images_of(write_tar(tmp_path / "y.tar", {"a.txt": b"1"})) == []


def test_a_tar_without_end_blocks_is_read(tmp_path: Path) -> None:
    for name, size in {"none": 4608, "half of one": 4608 + 256, "one": 4608 + 512}.items():
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(THREE)[:size])
        assert content(images_of(tmp_path / f"{name}.tar")) == THREE


@pytest.mark.parametrize(
    ("size", "keys", "found"),
    [
        (0, "", "at byte 0, after no member: empty file"),
        (100, "", "at byte 0, after no member: truncated header"),
        (512, "", "at byte 0, after no member: member 'a.jpg' begins at byte 0 and says that it has 1000 bytes"),
        (1511, "", "at byte 0, after no member: member 'a.jpg' begins"),
        (1700, "a", "at byte 1536, after member 'a.jpg': truncated header"),
        (2048, "a", "at byte 1536, after member 'a.jpg': member 'b.jpg' begins at byte 1536"),
        (3071, "a", "at byte 1536, after member 'a.jpg': member 'b.jpg' begins"),
        (3100, "ab", "at byte 3072, after member 'b.jpg': truncated header"),
        (4500, "ab", "at byte 3072, after member 'b.jpg': member 'c.jpg' begins"),
    ],
)
def test_a_cut_tar_is_an_error_that_names_the_place(size: int, keys: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(THREE)[:size])
    (shard,) = shards_of(tmp_path / "x.tar")
    seen, message = read_until_error(read_images(shard, SPEC, LIMIT))
    assert seen == [f"{letter}.jpg" for letter in keys]
    assert f"x.tar is cut or damaged {found}" in message
    assert "copy the tar again" in message


@pytest.mark.parametrize("limit", [LIMIT, 10])
def test_no_cut_of_a_tar_loses_an_image_in_silence(limit: int, tmp_path: Path) -> None:
    images = {"dir/a.jpg": b"a" * 700, "n" * 150 + ".jpg": b"b" * 600, "skipped.json": b"{}" * 400, "c.jpg": b"c" * 512}
    whole = tar_bytes(images, tarfile.PAX_FORMAT)
    end = len(whole.rstrip(b"\0"))
    complete = 0
    for size in range(0, end + 1, 64):
        (tmp_path / "x.tar").write_bytes(whole[:size])
        (shard,) = shards_of(tmp_path / "x.tar")
        try:
            keys = [image.key for image in read_images(shard, SPEC, limit)]
        except DataError:
            continue
        # only a cut exactly between two members cannot be told from a tar without end blocks
        assert size % 512 == 0
        assert keys == [key for key in images if key != "skipped.json"][: len(keys)]
        complete += 1
    assert complete == 4


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (1536, b"garbage"),
        (1536 + 124, b"7"),
        (1536 + 148, b"0000000"),
        (4608, b"junk at the end"),
        (6000, b"junk later"),
    ],
    ids=["name", "size", "checksum", "instead of the end", "after the end"],
)
def test_a_damaged_header_is_an_error(offset: int, data: bytes, tmp_path: Path) -> None:
    raw = bytearray(tar_bytes(THREE))
    raw[offset : offset + len(data)] = data
    (tmp_path / "x.tar").write_bytes(raw)
    (shard,) = shards_of(tmp_path / "x.tar")
    seen, message = read_until_error(read_images(shard, SPEC, LIMIT))
    assert seen == (["a.jpg"] if offset < 4000 else list(THREE))
    assert f"after member '{seen[-1]}'" in message


def test_data_in_which_headers_are_wiped_is_an_error(tmp_path: Path) -> None:
    raw = bytearray(tar_bytes(THREE))
    raw[1536:2048] = bytes(512)  # as a file system leaves it after a crash
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(DataError, match=r"after member 'a\.jpg'"):
        images_of(tmp_path / "x.tar")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [-512, -1, 1 << 60])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_that_cannot_be_is_an_error_and_neither_a_loop_nor_an_allocation(
    size: int, kind: bytes, tmp_path: Path
) -> None:
    (tmp_path / "x.tar").write_bytes(header("a.jpg", size, kind) + bytes(2048))
    with pytest.raises(DataError, match=f"says that it has {size} bytes"):
        images_of(tmp_path / "x.tar")


def test_a_negative_size_in_a_pax_record_is_an_error(tmp_path: Path) -> None:
    record = b"14 size=-1024\n"
    (tmp_path / "x.tar").write_bytes(
        header("x", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0") + header("a.jpg", 0) + bytes(1024)
    )
    with pytest.raises(DataError, match="says that it has -1024 bytes"):
        images_of(tmp_path / "x.tar")


def pax(*members: bytes, **records: bytes) -> bytes:
    """A header with these records, and the members after it."""
    lines = b""
    for name, value in records.items():
        body = b" %b=%b\n" % (name.replace("_", ".").encode(), value)
        size = len(body) + len(str(len(body)))
        size += len(str(size)) - len(str(len(body)))
        lines += b"%d" % size + body
    return header("x", len(lines), tarfile.XHDTYPE) + lines + bytes(-len(lines) % 512) + b"".join(members)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (pax(header("a.jpg", 0), path=b"1" * 100_000 + b".jpg"), "more than 255 digits in a row"),
        (pax(header("a.jpg", 0), path=b""), "the member at byte 0 has no name"),
        (header("\0.jpg", 0), "the member at byte 0 has no name"),
        (pax() * 3000 + header("a.jpg", 0), "headers describe one another without end"),
        (header("a.jpg", 512, tarfile.GNUTYPE_SPARSE) + bytes(512), "is stored with holes"),
        (
            pax(header("a.jpg", 512), b"99999999\n0\n".ljust(512, b"\0"), GNU_sparse_major=b"1", GNU_sparse_minor=b"0"),
            "cut or damaged at byte 0",
        ),
        (pax(header("a.jpg", 0), GNU_sparse_map=b"0,1,2", GNU_sparse_size=b"x"), "cut or damaged at byte 0"),
        (gzip.compress(tar_bytes(THREE)), "cut or damaged at byte 0"),
    ],
    ids=["slow pattern", "pax without name", "no name", "chain", "holes", "holes of pax", "map of holes", "gzip"],
)
def test_a_header_that_would_keep_a_reader_busy_is_an_error(raw: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(raw + bytes(1024))
    with pytest.raises(DataError, match=found):
        images_of(tmp_path / "x.tar")


def test_names_that_lead_out_of_the_archive_are_keys_like_others(tmp_path: Path) -> None:
    images = {"../../etc/passwd": b"1", "/abs/x.jpg": b"2", "a/../b.jpg": b"3", "..": b"4", "a//b.jpg": b"5"}
    assert content(images_of(write_tar(tmp_path / "x.tar", images))) == images
    assert images_of(write_tar(tmp_path / "y.tar", {"...jpg": b"1", "a/.hidden": b"2", "..x/a.jpg": b"3"})) == []


def test_links_out_of_the_archive_and_devices_are_passed_over(tmp_path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    members = b"".join(header(f"{number}.jpg", 0, kind) for number, kind in enumerate(kinds))
    (tmp_path / "x.tar").write_bytes(members + header("a.jpg", 0) + bytes(1024))
    assert content(images_of(tmp_path / "x.tar")) == {"a.jpg": b""}


def test_a_text_file_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(DataError, match=r"x\.tar is cut or damaged at byte 0"):
        images_of(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "X.TAR.ZST", "x.tar.xz"])
def test_a_compressed_tar_is_an_error_unless_another_format_leaves_it_out(name: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": b"1", name: b"compressed"})
    for uri in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"(?i){name} is a compressed tar.*unpack"):
            shards_of(uri)
    assert set(content(images_of(tmp_path, spec=InputSpec(format="files")))) == {"a.jpg"}


def test_two_members_of_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg", "./a.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=r"key 'a\.jpg': .*a\.jpg \(offset 512\) and .*a\.jpg \(offset 1536\)"):
        images_of(tmp_path / "x.tar")


def test_a_long_tar_is_read_in_little_memory(tmp_path: Path) -> None:
    images = {f"{i:04d}.jpg": bytes([i % 256]) * 50_000 for i in range(400)}
    (shard,) = shards_of(write_tar(tmp_path / "x.tar", images))
    tracemalloc.start()
    try:
        for image in read_images(shard, SPEC, LIMIT):
            assert image.data == images[image.key]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
