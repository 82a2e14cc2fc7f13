"""Descriptors of regions against plain torch; levels of the pyramid against the formula; regional search."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torchvision.ops import FeaturePyramidNetwork, ps_roi_align

import cbir
from cbir.config import Config
from cbir.errors import ConfigError
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.roi import Maps
from cbir.features.regions.proposer import regions_of
from cbir.features.roi import Roi, pyramid_level
from cbir.index.flat import Flat
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels, Regions
from pipelines.extract import ExtractTask
from pipelines.indexing import index
from pipelines.plans import plan
from pipelines.work import Asset, ChannelWork
from tests.features.scenes import scene

ConfigOf = Callable[..., Config]

GRID = {"name": "grid"}
WHOLE = {"name": "grid", "levels": [1]}
TINY = {"backbone": "test_resnet", "weights": "none", "size": 96, "proposer": WHOLE}
MEAN = {"grid": 1, "pooling": {"name": "spoc"}}
PICTURE = scene(64, 96)


def images_of(*pictures: Pixels, enlarged: int = 1) -> ImageBatch:
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32) * enlarged
    return ImageBatch(np.arange(len(pictures), dtype=np.int64), pictures, sizes)


def features(*pictures: Pixels, enlarged: int = 1, **fields: Any) -> FeatureBatch:
    return Roi(**{**TINY, **fields}).build("cpu", {}).extract(images_of(*pictures, enlarged=enlarged))


class Given:
    """Proposes the same boxes in every image."""

    def __init__(self, *boxes: tuple[float, float, float, float]) -> None:
        self._boxes = np.array(boxes, np.float32)

    def propose(self, batch: ImageBatch) -> Regions:
        return regions_of([self._boxes] * len(batch))


def rows_of(*boxes: tuple[float, float, float, float], **fields: Any) -> Floats:
    """Those of boxes in the picture; the whole image is left out."""
    extractor: Any = Roi(**{**TINY, **fields}).build("cpu", {})
    extractor._proposer = Given(*boxes)
    rows: Floats = extractor.extract(images_of(PICTURE)).descriptors
    return rows[1:]


def maps_of(picture: Pixels, *layers: int) -> list[torch.Tensor]:
    with torch.inference_mode():
        return Backbone(Roi(**TINY), None, *layers).outputs(torch.from_numpy(picture[None].copy()))


def unit(rows: torch.Tensor) -> Floats:
    return torch.nn.functional.normalize(rows.flatten(), dim=0).numpy()


class TestRegions:
    def test_the_whole_box_in_one_cell_is_the_mean_of_the_map(self) -> None:
        (maps,) = maps_of(PICTURE, -2)
        assert maps.shape[-2:] == (4, 6)
        found = features(PICTURE, layers=(-2,), **MEAN)
        np.testing.assert_allclose(found.descriptors[0], unit(maps[0].mean((-2, -1))), atol=1e-6)

    def test_a_box_along_the_places_of_a_map_is_their_mean(self) -> None:
        """A place is 16 pixels here; three columns and two rows of the map, from the inside of the image."""
        (maps,) = maps_of(PICTURE, -2)
        found = rows_of((32, 16, 80, 48), layers=(-2,), **MEAN)
        np.testing.assert_allclose(found[0], unit(maps[0, :, 1:3, 2:5].mean((-2, -1))), atol=1e-6)

    @pytest.mark.parametrize("pooling", ["gem", "mac", "spoc"])
    def test_the_pooling_works_over_the_cells(self, pooling: str) -> None:
        (maps,) = maps_of(PICTURE, -2)
        cells = maps[0, :, :, 2:6].double()
        expected = {
            "gem": (cells.clamp(min=1e-6) ** 3).mean((-2, -1)) ** (1 / 3),
            "mac": cells.amax((-2, -1)),
            "spoc": cells.mean((-2, -1)),
        }
        found = rows_of((32, 0, 96, 64), layers=(-2,), grid=4, pooling={"name": pooling})
        np.testing.assert_allclose(found[0], unit(expected[pooling].float()), atol=1e-5)

    def test_the_whole_image_is_always_the_first_of_the_regions(self) -> None:
        window = {"name": "sliding_window", "whole": False}
        found = features(PICTURE, scene(96, 64), enlarged=3, proposer=window)
        assert found.regions is not None
        assert found.counts.tolist() == np.diff(found.regions.offsets).tolist()
        assert (found.counts > 2).all()
        assert found.regions.of(0)[0].tolist() == [0, 0, 288, 192]
        whole = features(PICTURE, scene(96, 64), enlarged=3)
        np.testing.assert_allclose(found.descriptors[found.offsets[:-1]], whole.descriptors, atol=1e-6)

    def test_boxes_are_in_pixels_of_the_original(self) -> None:
        small, large = (features(PICTURE, enlarged=number, proposer=GRID) for number in (1, 4))
        np.testing.assert_allclose(large.regions.boxes, 4 * small.regions.boxes)
        np.testing.assert_allclose(large.descriptors, small.descriptors, atol=1e-5)

    def test_many_boxes_are_what_each_is_alone(self) -> None:
        rng = np.random.default_rng(0)
        corners = np.sort(rng.uniform(0, 1, (100, 2, 2)), axis=1).reshape(100, 4) * (90, 60, 90, 60) + (0, 0, 4, 4)
        together = rows_of(*corners)
        assert len(together) == 100
        for number in (0, 63, 64, 99):
            np.testing.assert_allclose(together[number], rows_of(corners[number])[0], atol=1e-6)


class TestRows:
    def test_mean_and_sum_are_those_of_each(self) -> None:
        each, mean, total = (features(PICTURE, proposer=GRID, rows=rows) for rows in ("each", "mean", "sum"))
        assert each.counts.tolist() == [14]
        assert mean.regions is None
        np.testing.assert_allclose(mean.descriptors[0], each.descriptors.mean(axis=0), atol=1e-6)
        summed = each.descriptors.sum(axis=0)
        np.testing.assert_allclose(total.descriptors[0], summed / np.linalg.norm(summed), atol=1e-6)

    def test_of_one_region_all_are_the_same(self) -> None:
        each, mean, total = (features(PICTURE, rows=rows).descriptors for rows in ("each", "mean", "sum"))
        np.testing.assert_allclose(mean, each, atol=1e-6)
        np.testing.assert_allclose(total, each, atol=1e-6)

    def test_the_product_with_the_mean_is_the_mean_of_the_products(self) -> None:
        query = features(scene(seed=2)).descriptors[0]
        each, mean = (features(PICTURE, proposer=GRID, rows=rows).descriptors for rows in ("each", "mean"))
        assert query @ mean[0] == pytest.approx((each @ query).mean(), abs=1e-6)

    def test_an_index_ranks_images_by_their_best_region(self) -> None:
        pictures = [scene(64, 96, seed) for seed in range(12)]
        found, queries = features(*pictures, proposer=GRID), features(*pictures[::-1][:5])
        trained = Flat().train(found, 0)
        hits = trained.build(trained.entries(found)).search(queries, 12)
        products = queries.descriptors.astype(np.float64) @ found.descriptors.T.astype(np.float64)
        best = np.maximum.reduceat(products, found.offsets[:-1], axis=1)
        assert np.array_equal(hits.image_ids, np.argsort(-best, axis=1))
        np.testing.assert_allclose(hits.scores, -np.sort(-best, axis=1), atol=1e-6)

    def test_queries_are_one_row_of_the_whole_picture_at_their_size(self) -> None:
        spec = Roi(**{**TINY, "proposer": {"name": "rpn", "model": "x", "weights": "a.pth"}})
        assert spec.for_queries == Roi(**{**TINY, "size": 48})
        assert spec.for_queries.assets == {}
        asked = Roi(**{**TINY, "proposer": GRID, "query_size": 80}).for_queries.build("cpu", {})
        found = asked.extract(images_of(PICTURE))
        assert found.counts.tolist() == [1]
        assert found.descriptors.tobytes() == features(PICTURE, size=80).descriptors.tobytes()

    def test_sums_are_asked_for_by_sums(self) -> None:
        spec = Roi(**{**TINY, "proposer": GRID, "rows": "sum"})
        assert spec.for_queries == spec


class TestLayout:
    def test_parts_stand_side_by_side_row_by_row(self) -> None:
        (maps,) = maps_of(PICTURE, -2)
        found = rows_of((32, 0, 96, 64), layers=(-2,), parts=2, **MEAN)[0]
        expected = [maps[0, :, top : top + 2, left : left + 2].mean((-2, -1)) for top in (0, 2) for left in (2, 4)]
        np.testing.assert_allclose(found, unit(torch.stack(expected)), atol=1e-6)

    def test_position_sensitive_parts_are_those_of_torchvision(self) -> None:
        (maps,) = maps_of(PICTURE, -2)
        box = (7.0, 5.0, 90.0, 50.0)
        pooled = ps_roi_align(maps, [torch.tensor([box]) / 16], 2)[0]
        found = rows_of(box, layers=(-2,), parts=2, position_sensitive=True, **MEAN)[0]
        assert len(found) == maps.shape[1]
        np.testing.assert_allclose(found, unit(pooled.flatten(1).T), atol=1e-6)

    def test_of_equal_maps_the_vote_of_the_parts_is_the_average_of_the_box(self, monkeypatch) -> None:
        """R-FCN: every part has its own map, here four times the same."""
        (maps,) = maps_of(PICTURE, -2)
        equal = maps[:, :6].repeat_interleave(4, 1)
        monkeypatch.setattr(Maps, "of", lambda self, image: [equal])
        fields: dict[str, Any] = {"layers": (-2,), **MEAN}
        parts = rows_of((32, 0, 96, 64), parts=2, position_sensitive=True, **fields)[0].reshape(4, 6)
        plain = rows_of((32, 0, 96, 64), **fields)[0].reshape(6, 4)[:, 0]
        vote = parts.mean(axis=0)
        np.testing.assert_allclose(vote / np.linalg.norm(vote), plain / np.linalg.norm(plain), atol=1e-6)


class TestPyramid:
    def test_levels_are_those_of_the_formula(self) -> None:
        strides = (4, 8, 16, 32)
        for width in (1, 30, 56, 111, 112, 113, 223, 224, 225, 447, 448, 449, 1000):
            for height in (1, 56, 100, 224, 448, 900):
                level = math.floor(4 + math.log2(math.sqrt(width * height) / 224))
                assert pyramid_level(width, height, strides) == min(max(level, 2), 5) - 2

    @pytest.mark.parametrize(("side", "level"), [(55, 0), (111, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3)])
    def test_levels_in_a_table(self, side: int, level: int) -> None:
        assert pyramid_level(side, side, (4, 8, 16, 32)) == level
        assert pyramid_level(side, side, (16, 32)) == max(0, level - 2)
        assert pyramid_level(side, side, (32,)) == 0

    def test_a_box_is_pooled_in_the_map_for_its_size(self) -> None:
        """Strides of 8 and 16: boxes of 224 pixels and more are for the second."""
        picture, layers = scene(448, 448), (-3, -2)
        fields = {**TINY, "size": 448, "layers": layers, "pyramid_channels": 8, **MEAN}
        extractor: Any = Roi(**fields).build("cpu", {})
        assert extractor._maps.strides == (8, 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pyramid = FeaturePyramidNetwork([found.shape[1] for found in maps_of(picture, *layers)], 8)
        with torch.inference_mode():
            fine, coarse = pyramid(dict(zip("ab", maps_of(picture, *layers), strict=True))).values()
        assert [fine.shape, coarse.shape] == [(1, 8, 56, 56), (1, 8, 28, 28)]
        extractor._proposer = Given((0, 0, 208, 208), (224, 224, 448, 448))
        rows = extractor.extract(images_of(picture)).descriptors
        expected = [coarse[0], fine[0, :, :26, :26], coarse[0, :, 14:, 14:]]
        for row, maps in zip(rows, expected, strict=True):
            np.testing.assert_allclose(row, unit(maps.mean((-2, -1))), atol=1e-5)

    def test_its_weights_come_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "fpn.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            save_file(
                FeaturePyramidNetwork([found.shape[1] for found in maps_of(PICTURE, -2, -1)], 8).state_dict(), path
            )
        fields = {"layers": (-2, -1), "pyramid_channels": 8}
        own = features(PICTURE, **fields, pyramid=str(path)).descriptors
        assert own.shape == (1, 8)
        assert not np.allclose(own, features(PICTURE, **fields).descriptors, atol=1e-3)
        with pytest.raises(
            ConfigError, match=r"extractor.pyramid: .* is not of maps of \[\d+, 192\] channels: .*another"
        ):
            features(PICTURE, layers=(-3, -2), pyramid_channels=8, pyramid=str(path))
        with pytest.raises(ConfigError, match=r"extractor.pyramid: there is no file .*absent.pth"):
            features(PICTURE, **fields, pyramid=str(tmp_path / "absent.pth"))


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"position_sensitive": True}, "position_sensitive: needs parts above 1"),
            ({"pyramid": "fpn.pth"}, "pyramid: needs several layers"),
            ({"pyramid": "hub", "layers": (-2, -1)}, "pyramid must be 'none' or the path or s3:// URI of a file"),
            ({"rows": "max"}, "'each', 'mean' or 'sum'"),
        ],
    )
    def test_impossible_settings_are_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            Roi(**{**TINY, **fields})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"proposer": {"name": "rpn", "model": "ssd300_vgg16", "weights": "none"}},
                r"^extractor.proposer.model: ssd300_vgg16 has no region proposal network",
            ),
            ({"layers": (-9,)}, r"extractor.layers: \[-9\] of backbone 'test_resnet'"),
            ({"backbone": "test_vit", "layers": (-2, -1)}, r"extractor.layers: .* from fine to coarse"),
            (
                {"parts": 5, "position_sensitive": True},
                r"extractor.parts: \d+ maps cannot be divided among 5 x 5 parts",
            ),
        ],
    )
    def test_networks_that_do_not_fit_are_refused_at_once(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Roi(**{**TINY, **fields}).build("cpu", {})


def channel(**extractor: Any) -> dict[str, Any]:
    return {"regions": {"extractor": {"name": "roi", **TINY, **extractor}, "index": {"name": "flat"}}}


class TestPipeline:
    @pytest.mark.parametrize("rows", ["each", "mean", "sum"])
    def test_pictures_are_indexed_by_their_regions_and_found(
        self, config: ConfigOf, pictures: dict[str, bytes], rows: str
    ) -> None:
        proposer = {"name": "edge_boxes", "max_boxes": 5}
        channels = channel(proposer=proposer, rows=rows, query_size=96)
        settings = config(channels=channels, search={"depth": 50})
        manifest = index(settings)
        assert manifest.counts["indexed"] == 40
        searcher = cbir.open(settings.store)
        vectors = searcher.partitions[0].indexes["regions"].faiss.ntotal  # type: ignore[attr-defined]
        assert (40 < vectors <= 40 * 6) if rows == "each" else vectors == 40
        answer = searcher.answer([pictures["object3/view1.jpg"], pictures["object5/view2.jpg"]], depth=3)
        assert answer.query_features["regions"].counts.tolist() == [1, 1]
        if rows != "mean":
            assert [answer.results(number)[0].key for number in (0, 1)] == ["object3/view1.jpg", "object5/view2.jpg"]
            assert answer.hits.scores[:, 0] == pytest.approx(1, abs=1e-5)

    def test_a_box_of_a_query_is_found_as_the_region_that_it_is(
        self, config: ConfigOf, pictures: dict[str, bytes]
    ) -> None:
        """A quarter of a picture is more like that picture's own regions than any picture is as a whole."""
        proposer = {"name": "grid", "levels": [1, 2]}
        settings = config(channels=channel(proposer=proposer, size=160, query_size=80), search={"depth": 50})
        index(settings)
        result = cbir.open(settings.store).search(pictures["object3/view1.jpg"], box=(80, 0, 80, 80))[0]
        assert result.key == "object3/view1.jpg"

    def test_files_of_proposer_and_pyramid_identify_what_is_extracted(self, config: ConfigOf) -> None:
        rpn = {"name": "rpn", "model": "fasterrcnn_mobilenet_v3_large_320_fpn", "weights": "a.pth"}

        def identity(sha256: str = "0", **changes: Any) -> str:
            settings = config(channels=channel(**changes), search={})
            names = settings.channels["regions"].assets
            work = ChannelWork("r", settings.channels["regions"], {name: Asset("key", sha256) for name in names})
            return ExtractTask.of(plan(settings)[0], work, settings).fingerprint

        made = identity(proposer=rpn)
        assert identity("1", proposer=rpn) != made
        assert identity(proposer={**rpn, "weights": "moved/b.pth"}) == made
        assert identity(proposer={**rpn, "iou": 0.6}) != made
        assert identity(proposer=rpn, query_size=50) == made
        pyramid = partial(identity, layers=[-2, -1])
        assert len({pyramid(), pyramid(pyramid="fpn.pth"), pyramid("1", pyramid="fpn.pth")}) == 3

    def test_missing_files_are_named_by_their_place(self, config: ConfigOf) -> None:
        rpn = {"name": "rpn", "model": "fasterrcnn_mobilenet_v3_large_320_fpn", "weights": "absent/a.pth"}
        with pytest.raises(ConfigError, match=r"channels.regions.extractor.proposer.weights: cannot read absent/a.pth"):
            index(config(channels=channel(proposer=rpn), search={}))
        with pytest.raises(
            ConfigError, match=r"regions.extractor.proposer.name: unknown proposer 'gird'; did you mean"
        ):
            config(channels=channel(proposer={"name": "gird"}), search={})


def thumbnail(path: Path, longest: int) -> Image.Image:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((longest, longest))
    return small


def hidden_objects(photos: Path, num: int, side: int) -> tuple[list[Pixels], list[Pixels]]:
    """Covers, and photographs of places with one of them somewhere, `side` pixels large; as many without any follow."""
    rng = np.random.default_rng(1)
    covers = sorted((photos / "smvs_dvd" / "images").glob("Reference_*"))[:num]
    grounds = sorted((photos / "koe_places" / "images").glob("*"))[::7][: 2 * num]
    scenes = [thumbnail(path, 512) for path in grounds]
    for place, cover in zip(scenes, covers, strict=False):
        small = thumbnail(cover, side)
        corner = [int(rng.integers(0, free)) for free in (place.width - small.width, place.height - small.height)]
        place.paste(small, (corner[0], corner[1]))
    return [np.asarray(thumbnail(cover, 512)) for cover in covers], [np.asarray(place) for place in scenes]


def reciprocal_rank(spec: Roi, queries: list[Pixels], scenes: list[Pixels]) -> float:
    """The mean over queries, of which each lies in the scene of its own number."""
    found = spec.build("cpu", {}).extract(images_of(*scenes))
    asked = spec.for_queries.build("cpu", {}).extract(images_of(*queries))
    trained = Flat().train(found, 0)
    hits = trained.build(trained.entries(found)).search(asked, len(scenes))
    ranks = (hits.image_ids == np.arange(len(queries))[:, None]).argmax(axis=1) + 1
    return float((1 / ranks).mean())


def test_small_objects_in_photographs_are_found_by_their_regions(test_data: Path) -> None:
    queries, scenes = hidden_objects(test_data / "photos", num=8, side=150)
    network = {
        "backbone": "mobilenetv2_100",
        "backbone_args": {"pad_type": "same"},
        "weights": str(test_data / "weights" / "mobilenetv2_100_imagenet.safetensors"),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    patches = {"name": "grid", "levels": [1, 2, 3, 4], "overlap": 0.5}
    whole, *regional = (
        reciprocal_rank(Roi(**network, proposer=proposer), queries, scenes)
        for proposer in (WHOLE, patches, {"name": "selective_search"})
    )
    assert min(regional) > whole + 0.1, (whole, regional)
