"""From the bytes of an image file to upright RGB pixels, with limits that a hostile file cannot pass."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from cbir.spec import Spec

__all__ = ["Limits", "View"]


class View(Spec):
    """The size at which an extractor wants its pixels.

    `stretch`: exactly size x size pixels, whatever the aspect ratio, larger or smaller than the original.
    `longest`: the longest side is at most size, the aspect ratio kept, never enlarged.
    """

    size: PositiveInt
    fit: Literal["stretch", "longest"] = "longest"


class Limits(Spec):
    """What one image may cost; an image beyond a limit is quarantined and the run goes on."""

    megapixels: PositiveFloat = 100.0
    megabytes: PositiveFloat = 50.0
    seconds: PositiveFloat = 20.0
