"""The configuration: what stands in the YAML, and every mistake with its path and the nearest right word."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbir.config import Config, assets_of, load_config, parse_config
from cbir.errors import ConfigError
from tests.conftest import PROJECT

CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))

DEEP = {"name": "deep", "backbone": "resnet18", "weights": "none", "pooling": {"name": "gem", "p": 4}}
GLOBAL = {"extractor": DEEP, "encoders": [{"name": "pca", "dim": 8}], "index": {"name": "ivfpq", "bytes": 4}}
LOCAL = {
    "extractor": {"name": "sift"},
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 16}],
    "index": {"name": "flat"},
    "keep_features": True,
}


def fused(**changes: Any) -> dict[str, Any]:
    """Plain settings with two channels, fusion, re-ranking and a gate; keywords replace top-level keys."""
    return {
        "images": ["a/", "s3://bucket/b/"],
        "store": "index",
        "channels": {"whole": GLOBAL, "parts": LOCAL},
        "search": {
            "fuse": {"name": "late", "weights": {"parts": 2}},
            "rerank": [{"name": "ransac", "channel": "parts"}],
        },
        "evaluate": {"ground_truth": "truth.csv", "floor": {"map": 0.5, "ann_recall": 0.5}},
    } | changes


def at(path: str, value: Any) -> Callable[[], dict[str, Any]]:
    """The settings with one value changed, or removed if it is `...`."""

    def make() -> dict[str, Any]:
        data = yaml.safe_load(yaml.safe_dump(fused()))
        *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
        place = data
        for key in parents:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        return data

    return make


def message_of(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "my.yaml")
    return str(caught.value)


class TestShippedConfigurations:
    def test_there_is_one_per_use(self) -> None:
        assert {"quickstart", "sift_vlad", "deep_ivfpq", "fused", "cluster"} <= {path.stem for path in CONFIGS}

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_they_load(self, path: Path) -> None:
        config = load_config(path)
        assert config.channels

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_they_are_whole_and_flat(self, path: Path) -> None:
        """Nothing is included from elsewhere: what the file says is all that differs from the defaults."""
        assert parse_config(yaml.safe_load(path.read_text()), "plain") == load_config(path)


class TestRoundTrip:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_of_shipped_configurations_is_the_identity(self, path: Path) -> None:
        config = load_config(path)
        assert parse_config(config.model_dump(mode="json"), "manifest") == config

    def test_keeps_what_differs_from_the_defaults(self) -> None:
        config = parse_config(fused(pools={"extract": {"gpus": 0.5}}, ray="auto", max_bad=0), "my.yaml")
        again = parse_config(config.model_dump(mode="json"), "manifest")
        assert again == config
        assert again.model_dump_json() == config.model_dump_json()
        assert again.pools.extract.gpus == 0.5
        assert list(again.channels) == ["whole", "parts"]

    def test_one_source_is_a_list_of_one(self) -> None:
        assert parse_config(fused(images="photos/"), "my.yaml").images == ("photos/",)


class TestMistakes:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            pytest.param(at("chanels", {}), "top level: unknown key 'chanels'; did you mean 'channels'?", id="top"),
            pytest.param(
                at("sample", {"imgaes": 1}), "sample: unknown key 'imgaes'; did you mean 'images'?", id="section"
            ),
            pytest.param(
                at("evaluate.floor.mpa", 1), "evaluate.floor: unknown key 'mpa'; did you mean 'map'?", id="deeper"
            ),
            pytest.param(
                at("channels.parts.extractor.max_feature", 9),
                "channels.parts.extractor: unknown key 'max_feature'; did you mean 'max_features'?",
                id="of-a-method",
            ),
            pytest.param(
                at("channels.parts.encoders.1.wrods", 9),
                "channels.parts.encoders.1: unknown key 'wrods'; did you mean 'words'?",
                id="in-a-list",
            ),
            pytest.param(
                at("search.rerank.0.topp", 9), "search.rerank.0: unknown key 'topp'; did you mean 'top'?", id="reranker"
            ),
            pytest.param(
                at("channels.whole.extractor.pooling.q", 9),
                "channels.whole.extractor.pooling: unknown key 'q'; known are",
                id="nothing-similar",
            ),
            pytest.param(
                at("channels.parts.extractor.name", "sitf"),
                "channels.parts.extractor.name: unknown extractor 'sitf'; did you mean 'sift'?",
                id="extractor",
            ),
            pytest.param(
                at("channels.parts.encoders.1.name", "vald"),
                "channels.parts.encoders.1.name: unknown encoder 'vald'; did you mean 'vlad'?",
                id="encoder",
            ),
            pytest.param(
                at("channels.parts.index.name", "faltt"),
                "channels.parts.index.name: unknown index 'faltt'; did you mean 'flat'?",
                id="index",
            ),
            pytest.param(
                at("channels.whole.extractor.pooling.name", "gme"),
                "channels.whole.extractor.pooling.name: unknown pooling 'gme'; did you mean 'gem'?",
                id="pooling",
            ),
            pytest.param(
                at("search.rerank.0.name", "ransack"),
                "search.rerank.0.name: unknown reranker 'ransack'; did you mean 'ransac'?",
                id="only-one-method",
            ),
            pytest.param(
                at("channels.parts.index", {}),
                "channels.parts.index.name: is missing; known are asmk, .*flat, .*ivfpq, .*smk",
                id="no-name",
            ),
            pytest.param(
                at("channels.parts.index", "flat"),
                "channels.parts.index: expected a method such as {name: asmk}, found 'flat'",
                id="bare-word",
            ),
            pytest.param(
                at("channels.parts.encoders", "vlad"),
                "channels.parts.encoders: Input should be a valid tuple",
                id="no-list",
            ),
            pytest.param(at("store", ...), "store: is missing", id="missing"),
            pytest.param(
                at("channels.parts.extractor", ...), "channels.parts.extractor: is missing", id="missing-deeper"
            ),
            pytest.param(
                at("channels.whole.extractor.backbone", ...), "whole.extractor.backbone: is missing", id="of-method"
            ),
            pytest.param(
                at("workers", "two"), "workers: Input should be a valid integer.*found 'two'", id="word-for-number"
            ),
            pytest.param(
                at("workers", -1), "workers: Input should be greater than or equal to 0, found -1", id="negative"
            ),
            pytest.param(
                at("max_bad", 1.5), "max_bad: Input should be less than or equal to 1, found 1.5", id="too-large"
            ),
            pytest.param(at("images", []), "images: .*at least 1 item", id="no-images"),
            pytest.param(at("store", ""), "store: String should have at least 1 character", id="empty-word"),
            pytest.param(at("channels", {}), "channels: .*at least 1 item", id="no-channels"),
            pytest.param(
                at("channels.parts.encoders.1.words", 2.5), "parts.encoders.1.words: .*found 2.5", id="fraction"
            ),
            pytest.param(at("sample", None), "sample: .*found None", id="empty-section"),
            pytest.param(
                at("evaluate.protocol", "meduim"),
                "evaluate.protocol: unknown word 'meduim'; did you mean 'medium'?",
                id="literal",
            ),
            pytest.param(
                at("channels.Parts-2", LOCAL), "channels.Parts-2: String should match pattern", id="channel-name"
            ),
        ],
    )
    def test_name_their_path_and_the_nearest_word(self, data: Callable[[], dict[str, Any]], message: str) -> None:
        found = message_of(data())
        assert found.startswith("my.yaml is not a valid configuration:\n  ")
        pattern = message if ".*" in message else re.escape(message)
        assert any(re.search(f"^  .*{pattern}", line) for line in found.splitlines()), found

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (at("search.fuse", ...), "search.fuse: several channels need a fusion; add {name: late}"),
            (
                at("search.fuse.weights", {"prats": 1}),
                "search.fuse.weights.prats: no channel 'prats'; did you mean 'parts'?",
            ),
            (
                at("search.rerank.0.channel", "prats"),
                "search.rerank.0.channel: no channel 'prats'; did you mean 'parts'?",
            ),
            (
                at("channels.parts.keep_features", False),
                "search.rerank.0: needs the features of its channel; set channels.parts.keep_features: true",
            ),
            (
                at("channels.whole.encoders", [{"name": "vlad"}]),
                "channels.whole.encoders.0: vlad aggregates local features, but at this place there is one",
            ),
            (
                at("channels.parts.encoders", [{"name": "rootsift"}]),
                "channels.parts.encoders: the index flat holds one descriptor per image, but nothing aggregates",
            ),
            (at("evaluate.ground_truth", ...), "evaluate.floor.map: can be measured only with evaluate.ground_truth"),
            (at("evaluate.probes", 0), "evaluate.floor.ann_recall: can be measured only with evaluate.probes above 0"),
            (at("store", "a/index"), "store: a/index lies in images.0 (a/)"),
            (at("store", "s3://bucket/b"), "store: s3://bucket/b lies in images.1 (s3://bucket/b/)"),
            (at("channels.whole.extractor.weights_sha256", "0" * 64), "whole.extractor.weights_sha256 needs weights"),
        ],
    )
    def test_impossible_combinations(self, data: Callable[[], dict[str, Any]], message: str) -> None:
        found = message_of(data())
        assert any(line.startswith("  ") and message in line for line in found.splitlines()), found

    def test_a_reranker_of_local_features_refuses_a_global_channel(self) -> None:
        data = at("channels.whole.keep_features", True)()
        data["search"]["rerank"] = [{"name": "ransac", "channel": "whole"}]
        assert "search.rerank.0.channel: needs local features, but 'whole' has one" in message_of(data)

    def test_all_are_told_at_once(self) -> None:
        found = message_of(fused(workers="two", max_bad=7, sample={"images": 0}))
        assert len(found.splitlines()) == 4

    def test_a_store_beside_the_images_is_fine(self) -> None:
        for store in ("index", "ab", "b", "s3://bucket/bc", "s3://other/b/x"):
            assert parse_config(fused(store=store), "my.yaml").store == store

    def test_long_values_are_cut(self) -> None:
        assert len(message_of(fused(workers=["x" * 1000] * 100))) < 300


class TestYaml:
    def load(self, tmp_path: Path, text: str, *overrides: str) -> Config:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    def test_a_key_that_stands_twice_is_an_error_with_its_line(self, tmp_path: Path) -> None:
        text = yaml.safe_dump(fused(), sort_keys=False) + "store: again\n"
        with pytest.raises(ConfigError, match=rf"'store' stands twice\s+in .*line {text.count(chr(10))},"):
            self.load(tmp_path, text)

    def test_anchors_and_merges_are_understood(self, tmp_path: Path) -> None:
        text = """
images: a/
store: index
search: {fuse: {name: late}}
channels:
  one: &one
    extractor: {name: sift}
    encoders: [{name: rootsift}, {name: vlad}]
    index: {name: flat}
  two:
    <<: *one
    encoders: [{name: vlad, words: 8}]
"""
        two = self.load(tmp_path, text).channels["two"]
        assert two.extractor == self.load(tmp_path, text).channels["one"].extractor
        assert [encoder.model_dump()["name"] for encoder in two.encoders] == ["vlad"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("images: [a", "is not valid YAML"),
            ("images: 2026-99-99", "is not valid YAML"),
            ("images: " + "[" * 5000, "is not valid YAML"),
            ("- images", "must be a mapping"),
            ("", "must be a mapping"),
            ("? [a, b]\n: 1", "is not valid YAML"),
            ("images: !!python/object:os.system a", "is not valid YAML"),
        ],
    )
    def test_what_is_no_mapping_of_plain_data_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.load(tmp_path, text)

    def test_what_is_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "my.yaml").write_bytes(b"\xff\xd8\xff\xe0 a picture")
        with pytest.raises(ConfigError, match=r"is no text file: .* at byte 0"):
            load_config(tmp_path / "my.yaml")
        with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
            load_config(tmp_path)

    def test_overrides_have_yaml_values_and_reach_into_lists(self, tmp_path: Path) -> None:
        text = yaml.safe_dump(fused())
        config = self.load(
            tmp_path,
            text,
            "workers=0",
            "channels.parts.encoders.1.words=32",
            "channels.whole.encoders.0={name: pca, dim: 4}",
            "pools.extract.gpus=0.5",
            "images=[c/, d/]",
            "store=a=b",
        )
        plain = config.model_dump(mode="json")
        assert (config.workers, config.store, config.images) == (0, "a=b", ("c/", "d/"))
        assert plain["channels"]["parts"]["encoders"][1]["words"] == 32
        assert plain["channels"]["whole"]["encoders"][0]["dim"] == 4
        assert config.pools.extract.gpus == 0.5

    def test_an_override_fills_an_empty_section(self, tmp_path: Path) -> None:
        text = yaml.safe_dump({**fused(), "sample": None})
        assert self.load(tmp_path, text, "sample.seed=3").sample.seed == 3

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("workers", "expected dotted.path=value"),
            ("=3", "expected dotted.path=value"),
            ("workers.extract=3", "workers is 4, not a group of keys"),
            ("images.0.x=3", "images.0 is 'a/', not a group of keys"),
            ("images.9=b/", "images is a list of 2 elements, numbered from 0; found '9'"),
            ("search.rerank.x.top=3", "search.rerank is a list of 1 element, numbered from 0; found 'x'"),
            ("sample={images: [}", "not valid YAML"),
            ("sample.imgaes=3", "sample: unknown key 'imgaes'; did you mean 'images'?"),
        ],
    )
    def test_bad_overrides_are_refused(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            self.load(tmp_path, yaml.safe_dump(fused(workers=4)), override)


def test_the_schema_takes_what_the_parser_takes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = Config.model_json_schema()
    jsonschema.validate(fused(), schema)
    jsonschema.validate(fused(images="a/"), schema)
    dumped = parse_config(fused(), "my.yaml").model_dump(mode="json")
    jsonschema.validate(dumped, schema)
    for wrong in (fused(images=[]), fused(images=3), fused(workers=-1), fused(extra=1)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


class TestRegionsAndMasks:
    def settings(self, **changes: Any) -> dict[str, Any]:
        return fused(channels={"whole": GLOBAL, "parts": {**LOCAL, **changes}})

    def test_come_back_as_they_were(self) -> None:
        per_region = {"name": "per_region", "encoder": {"name": "vlad", "words": 8}}
        mask = {"name": "segmentation", "model": "fcn_resnet50", "weights": "a/net.pth"}
        config = parse_config(self.settings(proposer={"name": "grid"}, mask=mask, encoders=[per_region]), "my.yaml")
        assert parse_config(config.model_dump(mode="json"), "manifest") == config
        assert config.channels["parts"].assets == {"mask.weights": "a/net.pth"}

    def test_the_files_of_each_are_told_apart(self) -> None:
        assets = {"weights": 1, "mask.weights": 2, "proposer.weights": 3, "proposer.more": 4}
        assert assets_of("extractor", assets) == {"weights": 1}
        assert assets_of("mask", assets) == {"weights": 2}
        assert assets_of("proposer", assets) == {"weights": 3, "more": 4}

    def test_the_files_of_an_extractors_parts_are_its_own(self) -> None:
        pooling = {"name": "netvlad", "weights": "a/words.safetensors"}
        extractor = {**DEEP, "weights": "a/net.pth", "pooling": pooling}
        config = parse_config(fused(channels={"whole": {**GLOBAL, "extractor": extractor}, "parts": LOCAL}), "my.yaml")
        named = config.channels["whole"].assets
        assert named == {"weights": "a/net.pth", "extractor.pooling.weights": "a/words.safetensors"}
        assert assets_of("extractor", named) == {"weights": "a/net.pth", "pooling.weights": "a/words.safetensors"}

    @pytest.mark.parametrize("place", ["proposer", "mask"])
    def test_need_local_features(self, place: str) -> None:
        methods = {"proposer": {"name": "grid"}, "mask": {"name": "segmentation", "model": "x", "weights": "none"}}
        directions = {**DEEP, "pooling": {"name": "netvlad", "weights": "none"}}
        data = fused(channels={"whole": {**GLOBAL, "extractor": directions, place: methods[place]}, "parts": LOCAL})
        assert f"channels.whole.{place}: needs local features, but deep has one descriptor" in message_of(data)

    def test_a_mask_may_weigh_the_places_of_maps(self) -> None:
        mask = {"name": "segmentation", "model": "x", "weights": "none"}
        config = parse_config(fused(channels={"whole": {**GLOBAL, "mask": mask}, "parts": LOCAL}), "my.yaml")
        assert config.channels["whole"].mask is not None

    def test_an_encoder_of_regions_needs_a_proposer(self) -> None:
        found = message_of(self.settings(encoders=[{"name": "per_region", "encoder": {"name": "vlad"}}]))
        assert "channels.parts.encoders.0: per_region looks at the regions of an image, but nothing proposes" in found

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"proposer": {"name": "gird"}}, "parts.proposer.name: unknown proposer 'gird'; did you mean 'grid'?"),
            (
                {"proposer": {"name": "grid", "level": [1]}},
                "parts.proposer: unknown key 'level'; did you mean 'levels'?",
            ),
            ({"proposer": "grid"}, "channels.parts.proposer: expected a method such as {name: "),
            ({"proposer": {"name": "grid", "levels": [0]}}, "parts.proposer.levels.0: Input should be greater than 0"),
            (
                {"encoders": [{"name": "per_region", "encoder": {"name": "vlda"}}]},
                "parts.encoders.0.encoder.name: unknown encoder 'vlda'; did you mean 'vlad'?",
            ),
            (
                {"encoders": [{"name": "per_region", "encoder": {"name": "vlad", "words": "many"}}]},
                "parts.encoders.0.encoder.words: Input should be a valid integer",
            ),
            (
                {"encoders": [{"name": "per_region", "encoder": {"name": "l2"}}]},
                "parts.encoders.0.encoder.name: l2 does not make one row of local features",
            ),
        ],
    )
    def test_mistakes_have_their_path(self, changes: dict[str, Any], message: str) -> None:
        assert message in message_of(self.settings(**changes))
