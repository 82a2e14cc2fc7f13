"""The choice of an index: what is tried fits, what is chosen is the cheapest that is good enough, and that is true."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import cbir.index.choice
from cbir.errors import ArtifactError, DataError
from cbir.evaluation.metrics import ann_recall
from cbir.index.auto import Auto, AutoIndex
from cbir.index.choice import candidates
from cbir.index.dense import exact_search
from cbir.index.flat import Flat, FlatPartition
from cbir.index.ivf import InvertedFile
from cbir.index.ivfflat import IvfFlat
from cbir.index.ivfpq import IvfPq
from cbir.index.refine import RefinableFile
from cbir.index.scalar import bytes_of
from cbir.types import FeatureBatch
from tests.index.test_conformance import SEED
from tests.index.vectors import DIM, assert_same, descriptors, one_each

ALL = [Flat(), IvfFlat(code="float16"), IvfFlat(code="sq8"), *candidates(DIM, 8, "ip"), *candidates(DIM, 80, "ip")[2:]]
SMALL = {"lists": 8, "probes": 2, "iterations": 3}


@pytest.fixture(scope="module")
def sample():
    return one_each(1000, 1)


def trained(sample: FeatureBatch, **fields: Any) -> AutoIndex:
    return Auto(**fields).train(sample, SEED)


def settings(index: AutoIndex) -> dict[str, Any]:
    return index.spec.model_dump()


@pytest.mark.parametrize("dim", [1, 3, 16, 37, 128, 1000])
@pytest.mark.parametrize("num_bytes", [1, 8, 31, 64, 200, 5000])
def test_every_candidate_fits_into_its_bytes_and_the_vectors(dim, num_bytes):
    found = candidates(dim, num_bytes, "l2")
    assert any(isinstance(spec, IvfPq) and not spec.opq for spec in found)
    for spec in found:
        ids = 8 if not isinstance(spec, RefinableFile) or spec.refine is None else 16
        assert spec.entry_bytes(dim) - ids <= num_bytes
        assert Auto(bytes=num_bytes).entry_bytes(dim) >= spec.entry_bytes(dim)
        if isinstance(spec, InvertedFile):
            spec.check_dim(dim)


def test_the_cheapest_that_is_good_enough_is_chosen(sample):
    for fields in ({"bytes": 128, "recall": 0.9}, {"bytes": 32, "recall": 0.8}, {"bytes": 40, "recall": 0.97}):
        choice = trained(sample, **fields).choice
        (chosen,) = [trial for trial in choice.trials if trial.chosen]
        reached = [trial for trial in choice.trials if trial.recall >= fields["recall"]]
        assert chosen.cost == min(trial.cost for trial in reached)
        assert all(trial.bytes <= fields["bytes"] for trial in choice.trials)
        assert f"the cheapest of {len(choice.trials)} tried for a recall of {fields['recall']:g}" in choice.summary
        assert (choice.index["probes"], choice.index["lists"]) == (chosen.probes, chosen.lists)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_recall_is_that_of_other_queries(metric, sample):
    index, queries = trained(sample, recall=0.9, metric=metric), one_each(200, 9)
    (chosen,) = [trial for trial in index.choice.trials if trial.chosen]
    assert 0.9 <= chosen.recall < 1
    found = index.build(index.entries(sample)).search(queries, 10)
    recall = ann_recall(found.image_ids, exact_search(queries, sample, metric, 10).image_ids, 10)
    assert recall == pytest.approx(chosen.recall, abs=0.05)


def test_probes_are_the_fewest_that_suffice():
    """Among vectors without clusters, which one probe would find."""
    rng = np.random.default_rng(4)
    rows = [rng.normal(size=(num, DIM)).astype(np.float32) for num in (1000, 300)]
    sample, queries = (one_each(len(some), 1).with_descriptors(some) for some in rows)
    index = trained(sample, recall=0.6)
    spec = index.spec
    assert isinstance(spec, InvertedFile)
    assert 1 < spec.probes < (spec.lists or 0)
    exact = exact_search(queries, sample, "ip", 10).image_ids
    half = spec.model_copy(update={"probes": spec.probes // 2}).restore(index.state())
    fewer = ann_recall(half.build(half.entries(sample)).search(queries, 10).image_ids, exact, 10)
    assert fewer < 0.6


def test_the_cost_is_the_bytes_of_codes_that_a_query_reads(sample):
    """Counted by hand over the lists that the nearest centroids name."""
    index = trained(sample, bytes=32, recall=0.97)
    (chosen,) = [trial for trial in index.choice.trials if trial.chosen]
    assert chosen.index == "ivfflat sq8"
    state, queries = index.state(), one_each(400, 9).descriptors
    centroids = next(array for array in state.values() if array.shape == (chosen.lists, DIM))
    lists = index.entries(sample).column("list").to_numpy()
    sizes = np.bincount(lists, minlength=chosen.lists)
    nearest = np.argsort(-(queries @ centroids.T), axis=1)[:, : chosen.probes]
    assert chosen.cost == pytest.approx(32 * sizes[nearest].sum(1).mean() / len(sample), rel=0.1)


def test_flat_is_exact_and_reads_all(sample):
    choice = trained(sample, bytes=4 * DIM, recall=1.0).choice
    flat = choice.trials[0]
    assert (flat.index, flat.recall, flat.cost) == ("flat", 1.0, 4 * DIM)
    assert next(trial for trial in choice.trials if trial.chosen).recall == 1.0


def test_out_of_reach_the_best_is_chosen_and_that_is_said(sample):
    choice = trained(sample, bytes=4, recall=0.9).choice
    assert max(choice.trials, key=lambda trial: trial.recall).chosen
    assert all(trial.recall < 0.9 and trial.probes < trial.lists for trial in choice.trials)
    assert "the best of 2 tried, but below the recall of 0.9 wanted; allow more than 4 bytes" in choice.summary


def test_a_rotation_is_tried_only_where_codes_fall_short(sample):
    short, enough = (
        [trial.index for trial in trained(sample, bytes=16, recall=recall).choice.trials] for recall in (0.99, 0.5)
    )
    assert short == ["ivfpq", "ivfpq opq", "ivfrabitq"]
    assert enough == ["ivfpq", "ivfrabitq"]


def test_queries_are_held_out(sample):
    choice = trained(sample, bytes=4).choice
    assert choice.queries == 1000 // 5
    assert choice.queries + choice.vectors == len(sample)


@pytest.mark.parametrize("num_images", [0, 1, 319])
def test_a_sample_too_small_to_be_measured_gives_flat(num_images):
    index = trained(one_each(319, 1).take(np.arange(num_images)), bytes=1)
    assert isinstance(index.spec, Flat)
    assert index.choice.trials == ()
    assert f"flat: {num_images} images with vectors are too few" in index.choice.summary
    assert isinstance(index.build(index.entries(one_each(20, 2))), FlatPartition)


def test_the_least_sample_that_is_measured():
    choice = trained(one_each(320, 1), bytes=8).choice
    assert (choice.queries, choice.vectors) == (64, 256)
    assert choice.trials


def test_images_of_a_sample_may_have_many_rows_or_none():
    index = trained(descriptors([0, 3, 1, 0, 5, 2] * 100, 5), bytes=16)
    assert index.choice.queries == 400 // 5
    assert all(trial.recall > 0.4 for trial in index.choice.trials)


def test_the_choice_of_a_large_sample_is_trained_on_all_of_it(sample, monkeypatch):
    whole = trained(sample, bytes=8).choice
    monkeypatch.setattr(cbir.index.choice, "MOST_SEARCHED", 600)
    monkeypatch.setattr(cbir.index.choice, "MOST_TRAINED", 300)
    choice = trained(sample, bytes=8).choice
    assert choice.vectors == 600
    chosen = [trial.lists for trial in choice.trials if trial.chosen]
    assert chosen == [trial.lists for trial in whole.trials if trial.chosen]
    assert all(trial.lists < chosen[0] for trial in choice.trials if not trial.chosen)


def test_values_beyond_float16_are_not_stored_in_it(sample):
    large = FeatureBatch.of_global(sample.image_ids, sample.descriptors * np.float32(1e6))
    tried = [trial.index for trial in trained(large, bytes=80, metric="l2").choice.trials]
    assert "ivfflat sq8" in tried
    assert not [name for name in tried if "float16" in name]


@pytest.mark.parametrize("spec", ALL, ids=[f"{n}-{spec.name}" for n, spec in enumerate(ALL)])
def test_a_partition_is_opened_as_what_it_is(spec, sample, tmp_path):
    spec = spec if isinstance(spec, Flat) else spec.model_copy(update=SMALL)
    index, queries = spec.train(sample, SEED), one_each(50, 3)
    partition = index.build(index.entries(one_each(300, 2)))
    partition.save(tmp_path / "part.faiss")
    opened = Auto().load(tmp_path / "part.faiss")
    assert type(opened) is type(partition)
    assert_same(opened.search(queries, 10), partition.search(queries, 10))


def test_a_partition_of_another_kind_is_refused(sample, tmp_path):
    additive = cbir.index.ivfaq.IvfAq(lists=2, bytes=4, bits=4, iterations=2).train(sample, SEED)
    additive.build(additive.entries(sample)).save(tmp_path / "part.faiss")
    with pytest.raises(ArtifactError, match=r"part.faiss: holds a faiss \w+, which the index auto never chooses"):
        Auto().load(tmp_path / "part.faiss")


def test_mistakes_are_named(sample):
    for fields in ({"recall": 0.0}, {"recall": 1.1}, {"bytes": 0}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            Auto(**fields)
    broken = FeatureBatch.of_global(np.arange(400), np.full((400, 4), np.inf, np.float32))
    with pytest.raises(DataError, match="image 0 has a descriptor with NaN or infinite"):
        trained(broken)


def test_what_was_wanted_and_chosen_survives_its_record(sample):
    index = trained(sample, bytes=16, recall=0.5)
    restored = Auto().restore(index.state())
    assert restored.choice == index.choice
    assert settings(restored) == settings(index)
    assert bytes_of("sq8", DIM) > index.choice.bytes
