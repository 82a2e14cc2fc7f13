"""The demo collection: complete, readable, deterministic, and its views really show the objects that they name."""

import csv
import hashlib
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cbir.errors import DataError
from pipelines import demo
from pipelines.demo import PHOTOGRAPHS, SURFACES, Source, main, make_collection

VIEWS, DISTRACTORS = 3, 11


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "collection"
    make_collection(folder, seed=3, views=VIEWS, distractors=DISTRACTORS)
    return folder


def ground_truth(folder: Path) -> list[dict[str, str]]:
    with (folder / "ground_truth.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def members(folder: Path) -> dict[str, bytes]:
    """Every tar member; a name that stood twice would be lost, and is therefore counted first."""
    found: dict[str, bytes] = {}
    for shard in sorted((folder / "images").iterdir()):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def grey(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def common_points(one: bytes, other: bytes) -> int:
    """How many SIFT matches agree on one homography."""
    sift = cv2.SIFT_create(1500)
    points, descriptors = zip(*(sift.detectAndCompute(grey(content), None) for content in (one, other)), strict=True)
    pairs = cv2.BFMatcher().knnMatch(descriptors[0], descriptors[1], k=2)
    good = [a for a, b in pairs if a.distance < 0.75 * b.distance]
    if len(good) < 4:
        return 0
    here = np.array([points[0][match.queryIdx].pt for match in good])
    there = np.array([points[1][match.trainIdx].pt for match in good])
    _, inliers = cv2.findHomography(here, there, cv2.USAC_MAGSAC, 5.0)
    return 0 if inliers is None else int(inliers.sum())


def test_ground_truth_names_exactly_the_images_that_are_there(collection: Path) -> None:
    rows = ground_truth(collection)
    assert {row["image"] for row in rows if row["role"] != "query"} == set(members(collection))
    queries = {str(path.relative_to(collection)) for path in (collection / "queries").iterdir()}
    assert {row["image"] for row in rows if row["role"] == "query"} == queries
    assert len({row["image"] for row in rows}) == len(rows)


def test_every_object_has_a_reference_views_and_queries(collection: Path) -> None:
    rows = ground_truth(collection)
    for source in PHOTOGRAPHS:
        roles = [row["role"] for row in rows if row["instance_id"] == source.name]
        assert sorted(roles) == ["database"] * 3 + ["query"]
    assert sum(row["role"] == "distractor" and row["instance_id"] == "" for row in rows) == DISTRACTORS


def test_every_image_is_a_jpeg_in_colour(collection: Path) -> None:
    contents = [*members(collection).values(), *(path.read_bytes() for path in (collection / "queries").iterdir())]
    for content in contents:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert np.asarray(image).std() > 2


def test_same_seed_same_bytes_and_another_seed_other_views(collection: Path, tmp_path: Path) -> None:
    make_collection(tmp_path / "again", seed=3, views=VIEWS, distractors=DISTRACTORS)
    assert digests(tmp_path / "again") == digests(collection)
    make_collection(tmp_path / "other", seed=4, views=1, distractors=1)
    old, new = members(collection), members(tmp_path / "other")
    views = {name for name in new if "reference" not in name}
    assert len(views) == len(PHOTOGRAPHS) + 1
    assert all(old[name] != new[name] for name in views)


def test_more_images_leave_the_others_as_they_are(collection: Path, tmp_path: Path) -> None:
    make_collection(tmp_path / "smaller", seed=3, views=1, distractors=2)
    old = members(collection)
    assert all(old[name] == content for name, content in members(tmp_path / "smaller").items())


def test_the_shards_mix_objects_and_distractors(collection: Path) -> None:
    shards = sorted((collection / "images").glob("shard-*.tar"))
    assert len(shards) == demo.NUM_SHARDS
    for path in shards:
        with tarfile.open(path) as shard:
            kinds = {name.split("-")[0] for name in shard.getnames()}
        assert len(kinds) > 2


@pytest.mark.parametrize("name", ["astronaut", "motorcycle"])
def test_a_query_shows_its_object_and_no_other(collection: Path, name: str) -> None:
    query = (collection / "queries" / f"{name}-view-02.jpg").read_bytes()
    images = members(collection)
    points = {source.name: common_points(query, images[f"{source.name}-reference.jpg"]) for source in PHOTOGRAPHS}
    assert points[name] >= 15
    assert all(count < points[name] / 2 for other, count in points.items() if other != name)


def test_the_motorcycle_is_queried_from_the_other_camera() -> None:
    (motorcycle,) = (source for source in PHOTOGRAPHS if source.name == "motorcycle")
    left, right = (np.asarray(picture, np.float64) for picture in motorcycle.pictures())
    assert left.shape == right.shape
    assert np.abs(left - right).mean() > 10


def test_homography_maps_the_corners() -> None:
    here = np.array([[0, 0], [400, 0], [400, 300], [0, 300]], np.float64)
    there = np.array([[13, -5], [380, 40], [420, 333], [-20, 250]], np.float64)
    matrix = np.append(demo._homography(here, there), 1).reshape(3, 3)
    mapped = np.column_stack([here, np.ones(4)]) @ matrix.T
    np.testing.assert_allclose(mapped[:, :2] / mapped[:, 2:], there, atol=1e-6)


def test_credits_name_every_picture(collection: Path) -> None:
    text = (collection / "CREDITS.txt").read_text()
    for source in PHOTOGRAPHS + SURFACES:
        assert f"{source.name}: {source.credit}" in text


def test_a_second_collection_in_the_same_folder_is_refused(
    collection: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(collection)
    assert main([str(collection)]) == 1
    assert "already holds images, queries, ground_truth.csv" in capsys.readouterr().err
    assert digests(collection) == before


def test_a_missing_package_is_named() -> None:
    with pytest.raises(DataError, match=r"package no_such_package: pip install"):
        Source("nothing", "no_such_package", ("picture.png",), "").pictures()


def test_command_line_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    assert main([str(tmp_path / "new"), "--seed", "3", "--views", "0", "--distractors", "0"]) == 0
    assert {row["role"] for row in ground_truth(tmp_path / "new")} == {"database"}
    assert len(members(tmp_path / "new")) == len(PHOTOGRAPHS)


def test_a_negative_number_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "new"), "--views", "-3"])
    assert stopped.value.code == 2
    assert "found '-3'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
