"""Search in one process: queries, boxes, channels, partitions, and files that are not what they should be."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cbir
from cbir import partition
from cbir.config import Config, parse_config
from cbir.errors import ArtifactError, DataError, ObjectMissing, StorageError
from cbir.partition import LocalFiles, Partition
from cbir.search import Patience, Searcher, open_version, searcher_of
from cbir.storage import open_store
from cbir.types import FeatureBatch, Hits, image_id
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.run import Run

QUERIES = ("object1/view0.jpg", "object4/view2.jpg", "object6/view3.jpg")
TINY = {
    "extractor": {"name": "deep", "backbone": "test_resnet", "weights": "none", "size": 64},
    "index": {"name": "flat"},
}


@pytest.fixture(scope="module")
def many(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two channels in more partitions than pictures, fused and re-ranked."""
    channels = {"local": settings()["channels"]["local"], "whole": TINY}
    search = {"depth": 30, "fuse": {"name": "late"}, "rerank": [{"name": "ransac", "channel": "local", "top": 10}]}
    store = str(tmp_path_factory.mktemp("many") / "store")
    config = parse_config(settings(store=store, channels=channels, search=search, evaluate={"probes": 0}), "the test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: 50)
        index(config)
    return config


@pytest.fixture(scope="module")
def one(many: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The same in one partition."""
    config = many.model_copy(update={"store": str(tmp_path_factory.mktemp("one") / "store")})
    index(config)
    return config


@pytest.fixture(scope="module")
def searcher(many: Config) -> Searcher:
    return cbir.open(many.store)


def test_partitions_never_show_in_an_answer(one: Config, searcher: Searcher, pictures: dict[str, bytes]) -> None:
    whole = cbir.open(one.store)
    assert (len(whole.partitions), len(searcher.partitions)) == (1, 50)
    for key in QUERIES:
        assert searcher.search(pictures[key], depth=30) == whole.search(pictures[key], depth=30)
    assert searcher.keys() == whole.keys()


def test_a_path_and_its_bytes_are_the_same_query(searcher: Searcher, folder: Path, pictures: dict[str, bytes]) -> None:
    path = folder / "images" / QUERIES[0]
    answers = [searcher.search(picture, depth=5) for picture in (path, str(path), pictures[QUERIES[0]])]
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(DataError, match=r"cannot read the query picture .*none.jpg: No such file"):
        searcher.search(folder / "none.jpg")


def test_queries_do_not_depend_on_their_batch(searcher: Searcher, pictures: dict[str, bytes]) -> None:
    batch = searcher.answer([pictures[key] for key in QUERIES], depth=12)
    for number, key in enumerate(QUERIES):
        assert batch.results(number) == searcher.search(pictures[key], depth=12)


def test_no_query_has_no_answer(searcher: Searcher) -> None:
    answer = searcher.answer([], depth=5)
    assert len(answer.hits) == 0
    assert answer.labels.keys == []


def test_a_box_is_a_picture_of_its_part(searcher: Searcher, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    path = tmp_path / "whole.png"
    whole = np.asarray(Image.open(io.BytesIO(pictures[QUERIES[1]])))
    Image.fromarray(whole).save(path)
    Image.fromarray(whole[10:130, 30:150]).save(tmp_path / "part.png")
    boxed = searcher.search(path, depth=8, box=(30, 10, 120, 120))
    assert boxed == searcher.search(tmp_path / "part.png", depth=8)
    assert boxed != searcher.search(path, depth=8)
    assert searcher.search(path, depth=8, box=(-50, -50, 1000, 1000)) == searcher.search(path, depth=8)


@pytest.mark.parametrize("box", [(160, 0, 9, 9), (0, -20, 9, 9), (5, 5, 0, 9), (5, 5, -3, 9)])
def test_a_box_outside_of_the_picture_is_refused(
    searcher: Searcher, pictures: dict[str, bytes], box: tuple[float, float, float, float]
) -> None:
    with pytest.raises(DataError, match="lies outside the query picture of 160 x 160 pixels"):
        searcher.search(pictures[QUERIES[1]], box=box)


def test_results_tell_every_channel_and_the_size(searcher: Searcher, pictures: dict[str, bytes]) -> None:
    answer = searcher.answer([pictures[QUERIES[2]]], depth=40)
    results = answer.results(0)
    assert answer.version == searcher.manifest.version == 1
    assert results[0].key == QUERIES[2]
    assert results[0].image_id == image_id(QUERIES[2])
    assert set(results[0].channels) == {"local", "whole"}
    assert {(result.height, result.width) for result in results} == {(160, 160)}
    for name, hits in answer.by_channel.items():
        found = dict(zip(hits.image_ids[0].tolist(), hits.scores[0].tolist(), strict=True))
        assert all(
            result.channels.get(name, found.get(result.image_id)) == found.get(result.image_id) for result in results
        )
    assert [result.score for result in results] == sorted((result.score for result in results), reverse=True)


def test_more_results_than_images_are_all_images(searcher: Searcher, pictures: dict[str, bytes]) -> None:
    results = searcher.search(pictures[QUERIES[0]], depth=1000)
    assert len(results) == len({result.key for result in results}) == 40


def test_features_of_images_of_several_partitions_come_in_order(searcher: Searcher, pictures: dict[str, bytes]) -> None:
    keys = ["object7/view1.jpg", "object0/view0.jpg", "object3/view4.jpg", "object7/view1.jpg"]
    batch = searcher.features("local", np.array([image_id(key) for key in keys]))
    expected = searcher.encoder.extract([pictures[key] for key in keys], [None] * 4)["local"]
    assert np.array_equal(batch.offsets, expected.offsets)
    assert np.array_equal(batch.descriptors, expected.descriptors)
    assert len(searcher.features("local", np.empty(0, np.int64))) == 0


def test_an_image_that_is_not_in_the_id_map_is_named(searcher: Searcher) -> None:
    with pytest.raises(ArtifactError, match="image id 12345 is in the index but not in its id map"):
        searcher.picture(12345)


def test_a_reranker_may_meet_an_image_without_local_features(many: Config, pictures: dict[str, bytes]) -> None:
    """One channel indexed it, another had to quarantine it: it keeps its place behind the verified images."""
    searcher = cbir.open(many.store)
    own = image_id(QUERIES[0])
    for part in searcher.partitions:
        assert isinstance(part, Partition)
        stored = part._features["local"]
        keep = stored.image_ids != own
        stored._table, stored.image_ids = stored._table.filter(keep), stored.image_ids[keep]
    results = searcher.search(pictures[QUERIES[0]], depth=40)
    scores = {result.image_id: result.score for result in results}
    assert scores[own] < 1 <= results[0].score


class TestOpening:
    def test_a_store_without_a_version_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="no published version; run `cbir index` first"):
            cbir.open(str(tmp_path))

    def test_a_missing_version_is_told_with_those_that_exist(self, many: Config) -> None:
        with pytest.raises(ArtifactError, match="has no version 7; published are: 1"):
            open_version(many.store, 7)

    @pytest.mark.parametrize("damage", ["cut", "grown", "flipped", "gone"])
    @pytest.mark.parametrize("part", ["ids", "indexes", "features"])
    def test_a_damaged_file_is_not_mapped(
        self, one: Config, damage: str, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whose bytes were flipped is found in small files, and in large ones if it is asked for."""
        store = open_store(one.store)
        manifest = Versions(store).load()
        named = manifest.layout["partitions"][0][part]
        own = named if part == "ids" else named["local"]
        path = Path(one.store) / (own[0] if part == "indexes" else own)
        good = path.read_bytes()
        try:
            if damage == "gone":
                path.unlink()
            else:
                half = len(good) // 2
                flipped = good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :]
                path.write_bytes({"cut": good[:-1], "grown": good + b"x", "flipped": flipped}[damage])
            error, found = {
                "gone": (ObjectMissing, "no such object"),
                "flipped": (ArtifactError, rf"{path} has other bytes than its record says .*; run `cbir verify"),
            }.get(damage, (ArtifactError, rf"has \d+ bytes, its record says {len(good)}"))
            with pytest.raises(error, match=found):
                searcher_of(store, manifest)
            monkeypatch.setattr(partition, "_SMALL_BYTES", 0)
            with pytest.raises(error, match=found):
                LocalFiles(store, manifest, verify=True).path(path.relative_to(one.store).as_posix())
        finally:
            path.write_bytes(good)

    def test_files_of_a_remote_store_are_fetched_once_by_content(
        self, one: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, bytes]
    ) -> None:
        store = open_store(one.store)
        manifest = Versions(store).load()
        monkeypatch.setenv("CBIR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(type(store), "local_path", lambda *_: None)
        fetched: list[str] = []
        fetch = type(store).fetch
        monkeypatch.setattr(
            type(store), "fetch", lambda self, key, *rest: (fetched.append(key), fetch(self, key, *rest))[1]
        )
        answers = [searcher_of(store, manifest).search(pictures[QUERIES[0]], depth=3) for _ in range(2)]
        assert answers[0] == answers[1]
        assert len(fetched) == len(set(fetched)) == 4
        names = {path.name.split(".")[0] for path in (tmp_path / "cache").iterdir()}
        assert names == {file.sha256 for file in manifest.files if file.key in fetched}
        cached = LocalFiles(store, manifest).path(fetched[0])
        whole = cached.read_bytes()
        cached.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert LocalFiles(store, manifest).path(fetched[0]).read_bytes() == whole, "it is fetched again"
        assert len(fetched) == 5
        damaged = Path(one.store) / fetched[0]
        good = damaged.read_bytes()
        damaged.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        try:
            with pytest.raises(StorageError, match="sha256"):
                LocalFiles(store, manifest, tmp_path / "other").path(fetched[0])
        finally:
            damaged.write_bytes(good)


def test_partitions_are_asked_through_one_seam(many: Config, pictures: dict[str, bytes]) -> None:
    """A subclass that asks in another order, as the query pool does at the same time, gives the same answers."""

    class Backwards(Searcher):
        def _ask(self, question: Any, arguments: Any, patience: Any) -> Any:
            answers = super()._ask(question, dict(reversed(arguments.items())), patience)
            return {number: answers[number] for number in arguments}

    plain = cbir.open(many.store)
    other = Backwards(plain.manifest, plain.config, plain.encoder, plain.partitions)
    assert other.search(pictures[QUERIES[0]], depth=20) == plain.search(pictures[QUERIES[0]], depth=20)
    assert other.keys() == plain.keys()
    encoded = plain.encoder.encode(plain.encoder.extract([pictures[QUERIES[0]]], [None]))
    hits: Hits = other.channel_hits(encoded, 7)["whole"]
    assert np.array_equal(hits.image_ids, plain.channel_hits(encoded, 7)["whole"].image_ids)


@pytest.mark.parametrize("few", [0, 1 << 20], ids=["by_column", "one_by_one"])
def test_labels_come_with_the_hits_of_one_channel(
    searcher: Searcher, pictures: dict[str, bytes], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "_FEW", few)
    vectors = vectors_of(searcher, "whole", [pictures[key] for key in QUERIES])
    encoded = {"whole": FeatureBatch.of_global(np.arange(len(vectors)), vectors)}
    found = searcher._together.search(encoded, 9, 4)
    shown = found.hits["whole"].image_ids[:, :4]
    assert set(found.labels.by_id) == set(shown[shown >= 0].tolist())
    keys = searcher.keys()
    for image, (key, size) in found.labels.by_id.items():
        owner = searcher.partitions[int(np.searchsorted(searcher._edges, image, side="right")) - 1]
        (record,) = owner.records(np.array([image]))
        assert (key, size) == (keys[image], [record["height"], record["width"]])
    assert searcher._together.search(encoded, 9).labels.keys == []


def test_a_group_of_partitions_is_left_once_the_time_is_up(searcher: Searcher, pictures: dict[str, bytes]) -> None:
    vectors = vectors_of(searcher, "whole", [pictures[QUERIES[0]]])
    encoded = {"whole": FeatureBatch.of_global(np.arange(1), vectors)}
    found = searcher._together.search(encoded, 3, 3, end=0.0)
    assert found.missing == set(range(50))
    assert found.hits["whole"].image_ids.tolist() == [[-1, -1, -1]]
    assert found.labels.keys == []


def vectors_of(searcher: Searcher, channel: str, pictures: list[bytes]) -> Any:
    """Descriptors (Q, D) of pictures, as the channel's encoders make them of queries."""
    raw = searcher.encoder.extract(pictures, [None] * len(pictures))
    return searcher.encoder.encode(raw)[channel].descriptors


@pytest.mark.parametrize("channel", ["local", "whole"])
def test_a_vector_asks_its_channel_alone(searcher: Searcher, channel: str, pictures: dict[str, bytes]) -> None:
    files = [pictures[key] for key in QUERIES]
    vectors = vectors_of(searcher, channel, files)
    answer = searcher.answer_vectors(vectors, 7, channel)
    expected = searcher.channel_hits(searcher.encoder.encode(searcher.encoder.extract(files, [None] * 3)), 7)[channel]
    assert np.array_equal(answer.hits.image_ids, expected.image_ids)
    assert np.array_equal(answer.hits.scores, expected.scores)
    assert answer.by_channel.keys() == {channel}
    for number, key in enumerate(QUERIES):
        results = searcher.search(vectors[number], depth=7, channel=channel)
        assert results == answer.results(number)
        assert results[0].key == key
        assert results[0].channels == {channel: results[0].score}


def test_vectors_need_no_name_of_the_only_channel(
    settings: Callable[..., dict[str, Any]], pictures: dict[str, bytes], tmp_path: Path
) -> None:
    index(parse_config(settings(store=str(tmp_path), channels={"whole": TINY}, search={}), "the test"))
    searcher = cbir.open(str(tmp_path))
    vectors = vectors_of(searcher, "whole", [pictures[QUERIES[0]]])
    whole = [(result.key, result.score) for result in searcher.search(pictures[QUERIES[0]], depth=5)]
    assert [(result.key, result.score) for result in searcher.search(vectors[0], depth=5)] == whole
    assert [(r.key, r.score) for r in searcher.search(vectors[0].astype(np.float64), depth=5)] == whole
    assert len(searcher.answer_vectors(vectors[:0]).hits) == 0


@pytest.mark.parametrize(
    ("vectors", "channel", "message"),
    [
        (np.ones((1, 5), np.float32), "whole", r"have D = 5, but the index was trained on D = \d+"),
        (np.ones((1, 5), np.float32), None, "has several channels; name the one of the vectors: local, whole"),
        (np.ones((1, 5), np.float32), "whol", "no channel 'whol'; did you mean 'whole'"),
        (np.ones(5, np.float32), "whole", r"must be numbers of shape \(Q, D\), found float32 \(5,\)"),
        (np.array([["a"]]), "whole", "must be numbers of shape"),
        (np.array([[1, np.nan]], np.float32), "whole", "query vector 0 has NaN or infinite values"),
    ],
)
def test_vectors_that_cannot_be_asked_are_refused(searcher: Searcher, vectors: Any, channel: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        searcher.answer_vectors(vectors, 3, channel)


def test_boxes_are_of_pictures_and_channels_of_vectors(searcher: Searcher, pictures: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="a vector has none"):
        searcher.search(np.ones(5, np.float32), box=(0, 0, 1, 1), channel="whole")
    with pytest.raises(ValueError, match="only a vector is of one"):
        searcher.search(pictures[QUERIES[0]], channel="whole")


def test_local_features_are_not_asked_by_one_vector(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    local = {"extractor": {"name": "sift", "max_features": 60}, "index": {"name": "asmk", "words": 16}}
    index(parse_config(settings(store=str(tmp_path), channels={"words": local}, search={}), "the test"))
    for channel in (None, "words"):
        with pytest.raises(DataError, match=r"local features.*, which no single vector can ask for; send a picture"):
            cbir.open(str(tmp_path)).answer_vectors(np.ones((1, 128), np.float32), 3, channel)


class Late(Searcher):
    """Some partitions do not answer some questions in time."""

    late: Any = ()
    question = ""

    def _late(self, numbers: Any, question: str, patience: Any) -> set[int]:
        late = {number for number in numbers if number in self.late and question == self.question}
        patience.missing |= late
        return late

    def _search(self, encoded: Any, depth: int, labelled: int, patience: Any) -> Any:
        late = self._late(range(len(self.partitions)), "search", patience)
        punctual = set(range(len(self.partitions))) - late
        return [self._together.only(punctual).search(encoded, depth, labelled)] if punctual else []

    def _ask(self, question: Any, arguments: Any, patience: Any) -> Any:
        late = self._late(arguments, question, patience)
        return super()._ask(question, {n: given for n, given in arguments.items() if n not in late}, patience)


@pytest.fixture
def late(searcher: Searcher) -> Late:
    return Late(searcher.manifest, searcher.config, searcher.encoder, searcher.partitions)


def test_partitions_that_are_late_are_left_out_and_named(
    late: Late, searcher: Searcher, pictures: dict[str, bytes]
) -> None:
    late.late, late.question = set(range(25, 50)), "search"
    answer, whole = (one.answer([pictures[QUERIES[0]]], depth=40) for one in (late, searcher))
    assert (answer.missing, whole.missing) == (tuple(range(25, 50)), ())
    edge = searcher.partitions[25].low
    kept = [(result.key, result.channels) for result in whole.results(0) if result.image_id < edge]
    assert 0 < len(kept) < 40
    assert sorted((result.key, result.channels) for result in answer.results(0)) == sorted(kept)


def test_an_answer_is_not_re_ranked_without_the_features_of_a_candidate(
    late: Late, searcher: Searcher, pictures: dict[str, bytes]
) -> None:
    owner = int(np.searchsorted(searcher._edges, image_id(QUERIES[0]), side="right")) - 1
    late.late, late.question = {owner}, "features"
    answer = late.answer([pictures[QUERIES[0]]], depth=20)
    assert answer.missing == (owner,)
    assert np.array_equal(answer.hits.image_ids, answer.candidates.image_ids)
    whole = searcher.answer([pictures[QUERIES[0]]], depth=20)
    assert np.array_equal(answer.candidates.scores, whole.candidates.scores)
    assert not np.array_equal(answer.hits.scores, whole.hits.scores)


def test_images_without_their_row_of_the_id_map_are_left_out(
    late: Late, searcher: Searcher, pictures: dict[str, bytes]
) -> None:
    owner = int(np.searchsorted(searcher._edges, image_id(QUERIES[0]), side="right")) - 1
    late.late, late.question = {owner}, "labels"
    answer, whole = (one.answer([pictures[QUERIES[0]]], depth=20) for one in (late, searcher))
    assert answer.missing == (owner,)
    high = searcher.partitions[owner + 1].low if owner < 49 else 1 << 63
    left_out = [result for result in whole.results(0) if searcher.partitions[owner].low <= result.image_id < high]
    assert QUERIES[0] in {result.key for result in left_out}
    assert answer.results(0) == [result for result in whole.results(0) if result not in left_out]


def test_without_any_partition_there_is_no_result(late: Late, pictures: dict[str, bytes]) -> None:
    late.late, late.question = set(range(50)), "search"
    answer = late.answer([pictures[QUERIES[0]]], depth=5)
    assert answer.results(0) == []
    assert answer.missing == tuple(range(50))


def test_a_deadline_is_divided_among_what_a_query_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cbir.search.time.monotonic", lambda: now[0])
    patience, endless = Patience(10), Patience()
    assert [patience.seconds(question) for question in ("search", "features", "labels")] == [8, 9, 10]
    now[0] += 7
    assert [patience.seconds(question) for question in ("search", "features", "labels")] == [1, 2, 3]
    now[0] += 100
    assert [patience.seconds(question) for question in ("search", "features", "labels")] == [1, 1, 1]
    assert endless.seconds("search") is None
    with pytest.raises(ValueError, match="above 0"):
        Patience(0)


def test_in_one_process_partitions_are_left_out_once_the_time_is_up(searcher: Searcher) -> None:
    class Up(Patience):
        def seconds(self, question: Any) -> float:
            return -1.0

    patience = Up()
    assert searcher._ask("keys", {3: (), 5: ()}, patience) == {}
    assert patience.missing == {3, 5}
