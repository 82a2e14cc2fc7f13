"""What `cbir check --scale` says of larger collections, against sums by hand."""

from collections.abc import Callable

import pytest

from cbir.config import Config
from cbir.layout import ID_BYTES
from pipelines.estimates import estimate
from pipelines.scale import MAPPED_SHARE, Scale, at_scale

ConfigOf = Callable[..., Config]


def figures(config: Config, scale: Scale) -> dict[str, str]:
    return {line.what: line.value for line in at_scale(config, estimate(config), scale)}


def test_figures_grow_with_the_images_and_not_with_the_collection_that_was_tried(config: ConfigOf) -> None:
    settings = config(partition_megabytes=1000)
    found = estimate(settings)
    ten, hundred = (
        {line.what: line.value for line in at_scale(settings, found, Scale(n, price=1.0))} for n in (10**7, 10**8)
    )
    assert ten.keys() == hundred.keys()
    assert (ten["images"], hundred["images"]) == ("10,000,000", "100,000,000")
    counts = {what: [int(each[what].replace(",", "")) for each in (ten, hundred)] for what in ("partitions",)}
    assert counts["partitions"][1] == pytest.approx(10 * counts["partitions"][0], rel=0.01)


def test_partitions_and_the_pool_hold_what_is_published(config: ConfigOf) -> None:
    settings = config(partition_megabytes=500)
    found = estimate(settings)
    (trial,) = found.trials.values()
    (channel,) = settings.channels.values()
    image = ID_BYTES + trial.entry_bytes + (trial.feature_bytes if channel.keep_features else 0)
    lines = {line.what: line.value for line in at_scale(settings, found, Scale(10**7, machine_gb=8))}
    assert int(lines["partitions"].replace(",", "")) == -(-(10**7) * image // 500e6)
    assert int(lines["machines of the query pool"].replace(",", "")) == -(-(10**7) * image // (MAPPED_SHARE * 8e9))


def test_money_is_told_if_the_price_is_known(config: ConfigOf) -> None:
    assert not any("price" in what for what in figures(config(), Scale(1000)))
    dear = figures(config(), Scale(10**9, machine_workers=1, price=2.0))
    assert dear["price of the pool"].endswith(" a month")
    machines = int(dear["machines of the query pool"].replace(",", ""))
    assert int(dear["price of the pool"].split()[0].replace(",", "")) == machines * 730 * 2
