"""The image collection on an S3 server: what waits for the network is asked ahead, and errors stay what they are."""

from pathlib import Path

import pytest

from cbir.collection import read_images, read_place
from cbir.errors import DataError, StorageError
from cbir.storage import Store, open_store
from tests.collection_forms import IMAGES, LIMIT, SPEC, content, images_of, shards_of, tar_bytes, write_parquet

pytestmark = pytest.mark.service


@pytest.fixture
def root(moto_bucket: str, tmp_path: Path) -> Store:
    """The same images as files, as a tar and as Parquet, and a folder's mark as consoles make them."""
    store = open_store(f"s3://{moto_bucket}/my root")
    for key, data in IMAGES.items():
        store.write(f"files/{key}", data)
    store.write("files/sub/", b"")
    store.write("tars/0 0.tar", tar_bytes(IMAGES))
    store.write("tables/0.parquet", write_parquet(tmp_path / "x.parquet", IMAGES, row_group_size=3).read_bytes())
    return store


@pytest.mark.parametrize("name", ["files", "files/", "tars", "tars/0 0.tar", "tables", "tables/0.parquet", "ta"])
def test_objects_folders_and_beginnings_of_names(name: str, root: Store) -> None:
    uri = f"{root.uri}/{name}"
    if name == "ta":
        assert [shard.name for shard in shards_of(uri)] == ["tables/0.parquet", "tars/0 0.tar"]
        return
    images = images_of(uri)
    assert content(images) == IMAGES
    for image in images:
        assert read_place(uri, image.at, SPEC) == IMAGES[image.key]


def test_a_place_is_found_from_the_beginning_of_names_that_listed_it(root: Store) -> None:
    (image,) = images_of(f"{root.uri}/files/a")
    assert (image.key, image.place) == ("a.jpg", f"{root.uri}/files/a.jpg")
    assert read_place(f"{root.uri}/files/a", image.at, SPEC) == IMAGES["a.jpg"]


def test_nowhere_is_an_error_that_says_what_is_missing(root: Store) -> None:
    for name in ("missing", "missing/", "missing.tar"):
        with pytest.raises(DataError, match=rf"nothing lies under .*{name}"):
            shards_of(f"{root.uri}/{name}")
    for uri in ("s3://no-such-bucket", "s3://no-such-bucket/photos"):
        with pytest.raises(StorageError, match="the bucket does not exist"):
            shards_of(uri)


@pytest.mark.parametrize("name", ["files", "tars", "tables"])
def test_an_object_that_is_replaced_is_an_error(name: str, root: Store) -> None:
    shards = shards_of(f"{root.uri}/{name}")
    for shard in shards:
        root.write(f"{name}/{shard.objects[0].key}", b"other")
    with pytest.raises(DataError, match="changed while indexing"):
        [list(read_images(shard, SPEC, LIMIT)) for shard in shards]


@pytest.mark.parametrize("name", ["tars", "tables"])
def test_an_error_of_the_store_stays_one(name: str, root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = shards_of(f"{root.uri}/{name}")

    def fail(store: Store, *_: object) -> bytes:
        raise StorageError(f"{store.uri} has gone away")

    monkeypatch.setattr("cbir.storage.s3.S3Store._block", fail)
    with pytest.raises(StorageError, match="has gone away"):
        list(read_images(shard, SPEC, LIMIT))
