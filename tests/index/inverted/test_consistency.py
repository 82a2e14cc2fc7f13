"""Weak geometric consistency in an inverted file: votes against a brute force, and what geometry does to a score."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

import cbir
from cbir.config import Config
from cbir.encoding.rootsift import RootSift
from cbir.errors import ArtifactError, DataError
from cbir.features.sift import Sift
from cbir.index.inverted import consistency
from cbir.index.inverted.consistency import coded_geometry
from cbir.index.inverted.hamming_embedding import HammingEmbedding
from cbir.index.inverted.inverted import InvertedIndex
from cbir.index.inverted.smk import Smk
from cbir.rerank.matches import Matches
from cbir.rerank.wgc import Wgc
from cbir.types import FeatureBatch, ImageBatch
from pipelines.indexing import index as run
from tests.index.inverted.features import DIM, SEED, assert_same, local_features

WORDS = 16
NUM = 40


def trained(words: int = WORDS, seed: int = 1, **fields: object) -> InvertedIndex:
    spec = HammingEmbedding(words=words, **{"bits": 16, "threshold": 6, "sigma": 4.0} | fields)
    return spec.train(local_features(200, seed), SEED)


def without_geometry(index: InvertedIndex) -> InvertedIndex:
    return InvertedIndex(index.spec.model_copy(update={"geometry": False}), index.vocabulary, index.own)


def scores(index: InvertedIndex, database: FeatureBatch, query: FeatureBatch) -> dict[int, float]:
    hits = index.build(index.entries(database)).search(index.queries(query), len(database))
    return {i: s for i, s in zip(hits.image_ids[0].tolist(), hits.scores[0].tolist(), strict=True) if i >= 0}


def with_geometry(batch: FeatureBatch, sizes: np.ndarray, angles: np.ndarray) -> FeatureBatch:
    return replace(batch, geometry=np.column_stack([batch.geometry[:, :2], sizes, angles]).astype(np.float32))


def moved(batch: FeatureBatch, degrees: float, zoom: float) -> FeatureBatch:
    """Every image as a whole, turned and zoomed."""
    return with_geometry(batch, batch.geometry[:, 2] * zoom, (batch.geometry[:, 3] + degrees) % 360)


def features_of_their_own(seed: int) -> tuple[InvertedIndex, FeatureBatch]:
    """One image whose features have a word each, so that every one matches itself and nothing else."""
    rng = np.random.default_rng(seed)
    rows = 10 * rng.normal(size=(NUM, DIM)).astype(np.float32)
    columns = rng.uniform(0, 400, (NUM, 2)), 2 ** rng.uniform(1, 5, NUM), rng.uniform(0, 360, NUM)
    image = FeatureBatch.of_images(np.arange(1), [rows], [np.column_stack(columns).astype(np.float32)])
    spec = HammingEmbedding(words=NUM, bits=16, threshold=16, sigma=0.0, idf=False, geometry=True)
    return spec.train(image, SEED), image


def brute_force(index: InvertedIndex, query: FeatureBatch, postings: list[dict], weights: np.ndarray) -> float:
    """S' of one query and one image, by the words of the paper: two histograms, smoothed, the smaller of the peaks."""
    turns, zooms = np.zeros(64), np.zeros(32)
    asked = index.queries(query)
    for word, code, (angle, scale) in zip(
        asked.words, asked.descriptors, coded_geometry(asked.geometry).tolist(), strict=True
    ):
        same = [posting for posting in postings if posting["word"] == word]
        distances = [sum((a ^ b).bit_count() for a, b in zip(code.tolist(), p["code"], strict=True)) for p in same]
        worth = [float(np.exp(-(h**2) / 32)) if h <= 6 else 0.0 for h in distances]
        if index.spec.burst == "intra" and any(worth):
            worth = [value * np.sqrt(value / sum(worth)) for value in worth]
        for posting, value in zip(same, worth, strict=True):
            turn = round((posting["angle"] - angle + 0.1) / 4) % 64  # a difference between two bins goes to the upper
            zoom = round((posting["scale"] - scale + 0.1) / 4) + 16
            if 0 <= zoom < 32:
                turns[turn] += weights[word] * value
                zooms[zoom] += weights[word] * value
    smoothed = [turns[n - 1] + turns[n] + turns[(n + 1) % 64] for n in range(64)]
    padded = [0.0, *zooms, 0.0]
    return min(max(smoothed), max(sum(padded[n : n + 3]) for n in range(32)))


@pytest.mark.parametrize("fields", [{}, {"burst": "intra"}, {"query_assignments": 2, "assignments": 2}], ids=str)
def test_scores_are_the_smaller_of_the_peaks_of_both_histograms(fields):
    index, batch, queries = trained(geometry=True, **fields), local_features(20, 2), local_features(5, 3)
    entries = index.entries(batch)
    postings = entries.to_pylist()
    weights = index.spec.word_weights(*(index.statistics(entries)[n] for n in ("images", "word_images")))
    plain, masses = without_geometry(index), index.build(entries)._masses
    norms = dict(zip(np.unique(entries.column("image_id")).tolist(), masses.tolist(), strict=True))
    assert masses.tolist() == plain.build(plain.entries(batch))._masses.tolist()
    some_damped = 0
    for number in range(1, len(queries)):
        query = queries.take(np.array([number]))
        # A query's own mass, from an index of the query alone with the weights of the whole.
        own = index.build(index.entries(query), index.statistics(entries))._masses[0]
        found, unvoted = scores(index, batch, query), scores(plain, batch, query)
        for image, norm in norms.items():
            expected = brute_force(index, query, [p for p in postings if p["image_id"] == image], weights)
            assert found.get(image, 0.0) == pytest.approx(expected / np.sqrt(norm * own), rel=1e-5)
            some_damped += found.get(image, 0.0) < 0.9 * unvoted.get(image, 0.0)
    assert some_damped > 20


@pytest.mark.parametrize("window", [1, 7, 50])
def test_neither_windows_nor_ranges_of_words_show(window, monkeypatch, tmp_path):
    index, batch, queries = (
        trained(geometry=True, word_ranges=3, burst="intra"),
        local_features(50, 2),
        local_features(9, 3),
    )
    entries = index.entries(batch)
    totals, paths = index.statistics(entries), [tmp_path / str(number) for number in range(3)]
    whole = index.build(entries).search(index.queries(queries), 50)
    for number, path in enumerate(paths):
        index.build(index.piece(entries, number), totals).save(path)
    monkeypatch.setattr(consistency, "WINDOW_IMAGES", window)
    assert_same(index.build(entries).search(index.queries(queries), 50), whole)
    assert_same(index.spec.load(*paths).search(index.queries(queries), 50), whole)


@pytest.mark.parametrize(("degrees", "zoom"), [(0, 1), (37, 1), (180, 0.3), (359, 4), (90, 14), (90, 1 / 8)])
def test_a_turned_and_zoomed_copy_keeps_its_plain_score(degrees, zoom):
    index, image = features_of_their_own(0)
    copy = moved(image, degrees, zoom)
    assert scores(without_geometry(index), copy, image)[0] == pytest.approx(1)
    assert scores(index, copy, image)[0] == pytest.approx(1)


def test_matches_that_scatter_fall_below_their_plain_score():
    index, image = features_of_their_own(0)
    rng = np.random.default_rng(1)
    sizes, angles = image.geometry[:, 2:4].T
    turned = with_geometry(image, sizes, rng.uniform(0, 360, NUM))
    zoomed = with_geometry(image, 2 ** rng.uniform(-1, 7, NUM), angles)
    for scattered in (turned, zoomed):
        assert scores(without_geometry(index), scattered, image)[0] == pytest.approx(1)
        assert 0 < scores(index, scattered, image)[0] < 0.5
    out_of_range = moved(image, 0, 20.0)
    assert scores(index, out_of_range, image).get(0, 0.0) == 0


def test_it_votes_as_the_reranker_does():
    index, image = features_of_their_own(2)
    rng = np.random.default_rng(3)
    # Geometry on the grid of the bins, where rounding cannot matter.
    query = with_geometry(image, 2 ** (rng.integers(0, 9, NUM) / 4), rng.integers(0, 6, NUM) * 360 / 64)
    database = with_geometry(image, 2 ** (rng.integers(8, 17, NUM) / 4), rng.integers(50, 64, NUM) * 360 / 64)
    rows, ends = np.arange(NUM, dtype=np.int32), np.array([0, NUM])
    matches = Matches(np.zeros(1, np.int64), ends, rows, rows)
    turns, scales = Wgc(channel="local").build().histograms(query, database, matches)
    votes = min(turns.max(), scales.max())
    assert 5 < votes < NUM
    assert scores(index, database, query)[0] == pytest.approx(votes / NUM)


def test_geometry_is_two_bytes_in_their_units():
    angles = np.array([0, 1.4, 90, 359.9, -90, 360, 0, 0, 0])
    sizes = np.array([1, 1, 2, 4, 8, 2**0.5, 0.25, 0, 1e9])
    columns = np.column_stack([0 * angles, 0 * angles, sizes, angles]).astype(np.float32)
    assert coded_geometry(columns).tolist() == [
        [0, 32],
        [1, 32],
        [64, 48],
        [0, 64],
        [192, 80],
        [0, 40],
        [0, 0],
        [0, 0],
        [0, 255],
    ]
    assert coded_geometry(np.empty((0, 0), np.float32)).shape == (0, 2)


def test_the_file_holds_them_in_plain_bytes_and_older_files_still_open(tmp_path):
    index, batch, queries = trained(geometry=True), local_features(50, 2), local_features(9, 3)
    plain = without_geometry(index)
    for name, each in (("wide", index), ("narrow", plain)):
        each.build(each.entries(batch)).save(tmp_path / name)
    wide, narrow = (pa.ipc.open_file(tmp_path / name).read_all().to_pylist()[0] for name in ("wide", "narrow"))
    assert wide.keys() - narrow.keys() == {"geometry"}
    assert len(wide["geometry"]) == 2 * sum(wide["counts"])
    held = np.frombuffer(wide["geometry"], np.uint8).reshape(-1, 2)
    assert sorted(map(tuple, held.tolist())) == sorted(map(tuple, coded_geometry(batch.geometry).tolist()))
    assert index.spec.entry_bytes(DIM) == plain.spec.entry_bytes(DIM) + 2
    built = plain.build(plain.entries(batch)).search(plain.queries(queries), 20)
    for name in ("narrow", "wide"):
        assert_same(plain.spec.load(tmp_path / name).search(plain.queries(queries), 20), built)
    with pytest.raises(ArtifactError, match=r"narrow: its postings have no angles.*index again"):
        index.spec.load(tmp_path / "narrow")


def test_equal_codes_are_stored_by_their_geometry_in_whatever_order_they_come(tmp_path):
    index = trained(geometry=True)
    rows = np.repeat(local_features(3, 2).descriptors[:2], 9, axis=0)
    rng = np.random.default_rng(0)
    places = np.column_stack([np.ones((18, 2)), rng.uniform(1, 40, 18), rng.uniform(0, 360, 18)]).astype(np.float32)
    entries = index.entries(FeatureBatch.of_images(np.arange(1), [rows], [places]))
    index.build(entries).save(tmp_path / "one")
    index.build(entries.take(rng.permutation(18))).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_it_cannot_do_is_refused():
    index, batch = trained(geometry=True), local_features(9, 2)
    with pytest.raises(DataError, match=r"2 columns of geometry.*geometry: false"):
        index.entries(replace(batch, geometry=np.ascontiguousarray(batch.geometry[:, :2])))
    with pytest.raises(ValidationError, match="geometry: needs binary: true"):
        Smk(geometry=True, binary=False)


def test_a_photograph_turned_and_halved_keeps_what_others_lose(test_data):
    paths = sorted((test_data / "photos" / "paintings" / "images").glob("*.jpg"))[:5]
    pictures = [Image.open(path).convert("RGB").resize((420, 300)) for path in paths]
    whole, copy = features(pictures), features([pictures[0].rotate(90, expand=True).resize((150, 210))])
    index = Smk(words=100, geometry=True, query_assignments=1).train(whole, SEED)
    voted, plain = scores(index, whole, copy), scores(without_geometry(index), whole, copy)
    kept = {image: voted.get(image, 0.0) / score for image, score in plain.items()}
    assert kept[0] > 0.85
    assert max(kept[image] for image in range(1, 5)) < 0.7
    margins = [found[0] / max(found[image] for image in range(1, 5)) for found in (voted, plain)]
    assert margins[0] > 1.3 * margins[1]


def features(pictures: list[Image.Image]) -> FeatureBatch:
    arrays = [np.asarray(picture) for picture in pictures]
    sizes = np.array([array.shape[:2] for array in arrays], np.int32)
    batch = ImageBatch(np.arange(len(arrays)), arrays, sizes)
    return RootSift().restore({}).encode(Sift(max_features=300).build("cpu", {}).extract(batch))


def test_views_of_an_object_are_found_through_the_pipeline(
    config: Callable[..., Config], pictures: dict[str, bytes], tmp_path: Path
) -> None:
    channel = {
        "extractor": {"name": "sift", "max_features": 200},
        "encoders": [{"name": "rootsift"}],
        "index": {"name": "he", "words": 64, "word_ranges": 2, "query_assignments": 2, "geometry": True},
    }
    run(config(channels={"local": channel}, search={"depth": 50}))
    searcher = cbir.open(str(tmp_path / "store"))
    for number in range(8):
        upright = Image.open(io.BytesIO(pictures[f"object{number}/view0.jpg"]))
        turned = io.BytesIO()
        upright.rotate(90).save(turned, "PNG")
        for query in (pictures[f"object{number}/view0.jpg"], turned.getvalue()):
            results = searcher.search(query, depth=5)
            assert {result.key.partition("/")[0] for result in results} == {f"object{number}"}
