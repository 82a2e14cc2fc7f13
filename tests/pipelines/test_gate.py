"""The floors of the gate."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cbir.artifacts import Done
from cbir.config import parse_config
from cbir.errors import ArtifactError
from cbir.storage import open_store
from cbir.versions import Manifest
from pipelines.gate import EvaluateTask

QUALITY = {"ann_recall": {"local": {"1": 1.0, "10": 0.97}}, "map": 0.5, "recall_at_1": 0.25}
COUNTS = {"images": 1000, "indexed": 970, "quarantined": 30}


@pytest.fixture
def judged(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[[dict[str, float]], Manifest]:
    """What becomes of a candidate with these floors."""

    def judge(floor: dict[str, float]) -> Manifest:
        evaluate = {"ground_truth": "truth.csv", "floor": floor}
        config = parse_config(settings(store=str(tmp_path / "store"), evaluate=evaluate), "the test")
        manifest = Manifest(0, "content", config.model_dump(mode="json"), (), {}, COUNTS, ())
        task = EvaluateTask("candidate", "f", manifest, {}, {})
        return task.accepted(open_store(config.store), Done("evaluate", "f", (), {}, QUALITY))

    return judge


@pytest.mark.parametrize(
    ("floor", "found"),
    [
        ({"map": 0.51}, "map is 0.5000, the floor is 0.51"),
        ({"recall_at_1": 0.26}, "recall_at_1 is 0.2500, the floor is 0.26"),
        ({"ann_recall": 0.98}, "ann_recall of local is 0.9700, the floor is 0.98"),
        ({"images": 971}, "images is 970, the floor is 971"),
        ({"quarantined": 0.029}, "quarantined is 0.0300 of 1,000 images, the most is 0.029"),
    ],
)
def test_what_is_below_its_floor_is_refused_and_kept(
    floor: dict[str, float], found: str, judged: Callable[[dict[str, float]], Manifest], tmp_path: Path
) -> None:
    with pytest.raises(
        ArtifactError, match=f"the gate refuses this version: {re.escape(found)}. Nothing was published"
    ):
        judged(floor)
    assert (tmp_path / "store" / "candidates" / "content.json").exists()


def test_what_meets_every_floor_is_accepted_with_its_quality(
    judged: Callable[[dict[str, float]], Manifest], tmp_path: Path
) -> None:
    floor = {"map": 0.5, "recall_at_1": 0.25, "ann_recall": 0.97, "images": 970, "quarantined": 0.03}
    assert judged(floor).quality == QUALITY
    assert not (tmp_path / "store").exists()
