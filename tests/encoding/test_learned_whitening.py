import csv
from pathlib import Path

import numpy as np
import pytest

import cbir
from cbir.encoding.learned_whitening import LearnedWhitening, read_pairs, whitening_of_pairs
from cbir.encoding.normalise import l2_normalised
from cbir.encoding.pca import Pca
from cbir.errors import ConfigError, DataError
from cbir.layout import Layout
from cbir.types import FeatureBatch, Regions, image_id
from pipelines.indexing import index

DIM, NUISANCES = 16, 6


def views(num_things, seed=0):
    """Two pictures each (n, D): of what they show, with little in every direction, and of light, strong in a few."""
    rng = np.random.default_rng(seed)
    things = rng.normal(size=(num_things, DIM))
    strengths = np.concatenate([np.full(NUISANCES, 4.0), np.full(DIM - NUISANCES, 0.3)])
    basis = np.linalg.qr(np.random.default_rng(99).normal(size=(DIM, DIM)))[0]
    return [((things + rng.normal(size=things.shape) * strengths) @ basis + 2).astype(np.float32) for _ in range(2)]


def batch(names, rows):
    return FeatureBatch.of_global(np.array([image_id(name) for name in names], np.int64), rows)


def write(path: Path, pairs, header=("query", "positive")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *pairs])
    return str(path)


@pytest.fixture
def sample():
    """300 things, the queries of which are a0, a1, ... and the positives b0, b1, ..."""
    queries, positives = views(300)
    names = [f"{kind}{number}" for kind in "ab" for number in range(300)]
    return batch(names, np.concatenate([queries, positives]))


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.csv", [(f"a{number}", f"b{number}") for number in range(300)])


def test_differences_of_pairs_are_white():
    queries, positives = (rows.astype(np.float64) for rows in views(500))
    mean, whitening = whitening_of_pairs(queries, positives)
    scatter = (queries - positives).T @ (queries - positives) / 500
    np.testing.assert_allclose(whitening @ scatter @ whitening.T, np.eye(DIM), atol=1e-9)
    np.testing.assert_allclose(mean, queries.mean(axis=0))
    np.testing.assert_allclose(whitening, np.tril(whitening), atol=1e-12)


def test_the_projection_whitens_differences_and_its_rows_are_principal(sample, pairs):
    state = LearnedWhitening(dim=DIM, pairs=pairs).fit(sample, 0).state()
    projection = state["projection"].astype(np.float64)
    queries, positives = (rows.astype(np.float64) for rows in np.split(sample.descriptors, 2))
    scatter = (queries - positives).T @ (queries - positives) / len(queries)
    np.testing.assert_allclose(projection @ scatter @ projection.T, np.eye(DIM), atol=1e-4)
    projected = (sample.descriptors - queries.mean(axis=0)) @ projection.T
    moments = projected.T @ projected / len(projected)
    np.testing.assert_allclose(moments, np.diag(np.diag(moments)), atol=1e-3)
    assert (np.diff(np.diag(moments)) <= 0).all()
    assert (projection[np.arange(DIM), np.abs(projection).argmax(axis=1)] > 0).all()


def test_rows_are_projected_around_the_mean_of_the_queries_and_unit_vectors(sample, pairs):
    encoder = LearnedWhitening(dim=5, pairs=pairs).fit(sample, 0)
    state = encoder.state()
    expected = l2_normalised((sample.descriptors - state["mean"]) @ state["projection"].astype(np.float64).T)
    np.testing.assert_allclose(encoder.encode(sample).descriptors, expected, atol=1e-6)
    np.testing.assert_array_equal(
        state["projection"], LearnedWhitening(dim=DIM, pairs=pairs).fit(sample, 0).state()["projection"][:5]
    )
    zeros = sample.with_descriptors(np.zeros_like(sample.descriptors))
    assert not encoder.encode(zeros).descriptors.any()


def test_it_finds_more_than_whitening_and_than_nothing(sample, pairs):
    asked, indexed = views(200, seed=5)

    def first_is_right(encoded_queries, encoded):
        return np.mean((encoded_queries @ encoded.T).argmax(axis=1) == np.arange(len(encoded)))

    plain = first_is_right(l2_normalised(asked), l2_normalised(indexed))
    found = {}
    for spec in (Pca(dim=DIM, whiten=True), LearnedWhitening(dim=DIM, pairs=pairs)):
        encoder = spec.fit(sample, 0)
        encoded = [
            encoder.encode(FeatureBatch.of_global(np.arange(200), rows)).descriptors for rows in (asked, indexed)
        ]
        found[spec.name] = first_is_right(*encoded)
    assert found["learned_whitening"] > 0.8
    assert found["learned_whitening"] > found["pca"] + 0.2
    assert found["learned_whitening"] > plain + 0.2


def test_the_bytes_of_a_row_depend_on_this_row_alone(sample, pairs):
    encoder = LearnedWhitening(dim=7, pairs=pairs).fit(sample, 0)
    rows = np.concatenate(views(700, seed=3))
    whole = encoder.encode(FeatureBatch.of_global(np.arange(1400), rows)).descriptors
    parts = [
        encoder.encode(FeatureBatch.of_global(np.arange(len(some)), some)).descriptors
        for some in np.split(rows, [1, 300, 1027])
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_constant_components_are_no_obstacle():
    queries, positives = (np.pad(rows, ((0, 0), (0, 3))) for rows in views(200))
    _, whitening = whitening_of_pairs(queries, positives)
    assert np.isfinite(whitening).all()
    small = whitening_of_pairs(queries[:, :DIM], positives[:, :DIM])[1]
    np.testing.assert_allclose(whitening[:DIM, :DIM], small, rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match="both images of every pair have the same descriptor"):
        whitening_of_pairs(queries, queries)


def test_pairs_of_unknown_images_and_of_images_without_features_are_skipped(sample, tmp_path):
    known = [(f"a{number}", f"b{number}") for number in range(100)]
    clean = LearnedWhitening(dim=4, pairs=write(tmp_path / "clean.csv", known)).fit(sample, 0)
    empty = FeatureBatch(np.array([image_id("empty")]), np.zeros(2, np.int64), np.empty((0, DIM), np.float32))
    more = FeatureBatch.concatenate([empty, sample])
    mixed = [("a0", "unknown"), *known, ("empty", "b7"), ("unknown", "other")]
    found = LearnedWhitening(dim=4, pairs=write(tmp_path / "mixed.csv", mixed)).fit(more, 0)
    for name, array in clean.state().items():
        assert array.tobytes() == found.state()[name].tobytes()


def test_of_several_rows_the_first_is_learned_from(sample, pairs):
    first = LearnedWhitening(dim=4, pairs=pairs).fit(sample, 0)
    rows = np.repeat(sample.descriptors, 2, axis=0)
    rows[1::2] = 7
    offsets = 2 * np.arange(len(sample) + 1)
    boxes = Regions(offsets, np.ones((len(rows), 4), np.float32))
    regional = FeatureBatch(sample.image_ids, offsets, rows, regions=boxes)
    encoder = LearnedWhitening(dim=4, pairs=pairs).fit(regional, 0)
    assert encoder.state()["projection"].tobytes() == first.state()["projection"].tobytes()
    assert encoder.encode(regional).descriptors.shape == (len(rows), 4)


def test_too_few_pairs_are_an_error_that_tells_how_many_were_found(sample, tmp_path):
    some = [(f"a{number}", f"b{number}") for number in range(31)] + [("a0", "b1"), ("nobody", "a0")]
    with pytest.raises(
        DataError, match=r"pairs: of 33 pairs, 32 are in the sample of 600 images, with 62 .* D = 16 needs 64 .*pca"
    ):
        LearnedWhitening(dim=4, pairs=write(tmp_path / "few.csv", some)).fit(sample, 0)
    enough = write(tmp_path / "enough.csv", [*some, ("a50", "b50")])
    assert LearnedWhitening(dim=4, pairs=enough).fit(sample, 0).encode(sample).descriptors.shape == (600, 4)


def test_other_bad_samples_are_refused(sample, pairs):
    with pytest.raises(DataError, match=r"dim: 17 components .* set dim to at most 16"):
        LearnedWhitening(dim=17, pairs=pairs).fit(sample, 0)
    with pytest.raises(DataError, match="NaN or infinite"):
        LearnedWhitening(dim=4, pairs=pairs).fit(sample.with_descriptors(sample.descriptors * np.float32(np.nan)), 0)


def test_columns_may_be_in_any_order_and_have_neighbours(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\xef\xbb\xbfscore,positive,query\r\n1,b,a\r\n\r\n2,'d, 1','c'\r\n".replace(b"'", b'"'))
    assert read_pairs(path) == [("a", "b"), ("c", "d, 1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column 'query'; the first line must be query,positive"),
        ("query,other\na,b\n", "no column 'positive'"),
        ("query,positive\na,b\nc\n", r"pairs, line 3: a pair is two keys, found \['c'\]"),
        ("query,positive\na,a\n", "pairs, line 2: 'a' is paired with itself"),
        (b"query,positive\n\xff,a\n", "no CSV in UTF-8"),
    ],
)
def test_a_file_that_is_no_list_of_pairs_is_refused(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv cannot be read: No such file"):
        read_pairs(tmp_path / "nothing.csv")


def channel(pairs):
    encoders = [
        {"name": "rootsift"},
        {"name": "vlad", "words": 8},
        {"name": "pca", "dim": 6},
        {"name": "learned_whitening", "dim": 4, "pairs": pairs},
        {"name": "balance"},
    ]
    return {"extractor": {"name": "sift", "max_features": 60}, "encoders": encoders, "index": {"name": "flat"}}


def test_through_the_pipeline(config, pictures, tmp_path):
    """The pairs are copied into the store, count by their content, and are not needed to search."""
    views_of = [key for key in pictures if key.startswith("object")]
    matching = [(one, other) for one in views_of for other in views_of if one < other and one[:7] == other[:7]]
    pairs = write(tmp_path / "pairs.csv", matching)
    settings = {"channels": {"it": channel(pairs)}, "search": {}}
    manifest = index(config(**settings))
    layout = Layout.from_json(manifest.layout).channels["it"]
    assert list(layout.assets) == ["encoders.3.pairs"]
    assert (tmp_path / "store" / layout.assets["encoders.3.pairs"]).read_text() == Path(pairs).read_text()

    moved = Path(pairs).rename(tmp_path / "moved.csv")
    again = index(config(**settings | {"channels": {"it": channel(str(moved))}}))
    assert Layout.from_json(again.layout).channels["it"].encoders == layout.encoders
    write(moved, matching[::2])
    other = index(config(**settings | {"channels": {"it": channel(str(moved))}}))
    theirs = Layout.from_json(other.layout).channels["it"].encoders
    same = [Path(one).name == Path(two).name for one, two in zip(theirs, layout.encoders, strict=True)]
    assert same == [True, True, True, False, True]

    moved.unlink()
    found = cbir.open(str(tmp_path / "store")).search(pictures["object2/view0.jpg"], depth=1)
    assert found[0].key == "object2/view0.jpg"


def test_local_features_have_no_pairs(config):
    words = {**channel("pairs.csv"), "index": {"name": "asmk", "words": 8}}
    words["encoders"] = [words["encoders"][0], words["encoders"][3]]
    with pytest.raises(ConfigError, match=r"encoders\.1: learned_whitening learns from one descriptor per image, but"):
        config(channels={"it": words}, search={})


def test_pairs_that_cannot_be_had_or_do_not_fit_name_their_place(config, tmp_path):
    missing = {"channels": {"it": channel(str(tmp_path / "nothing.csv"))}, "search": {}}
    with pytest.raises(ConfigError, match=r"channels\.it\.encoders\.3\.pairs: cannot read .*nothing\.csv"):
        index(config(**missing))
    few = {"channels": {"it": channel(write(tmp_path / "few.csv", [("a", "b")]))}, "search": {}}
    with pytest.raises(DataError, match=r"channels\.it\.encoders\.3: pairs: of 1 pairs, 0 are in the sample"):
        index(config(**few))
