"""The role of an encoder: features in, features of another form out."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

from cbir.spec import Method
from cbir.types import FeatureBatch, State

__all__ = ["AsymmetricEncoder", "Encoder", "EncoderSpec"]


class Encoder(Protocol):
    """A trained encoder. `encode(a ++ b) == encode(a) ++ encode(b)`."""

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """The batch in encoded form: the same images, in the same order."""
        ...

    def state(self) -> State:
        """Everything that `EncoderSpec.restore` needs to build the same encoder again."""
        ...


@runtime_checkable
class AsymmetricEncoder(Encoder, Protocol):
    """An encoder that gives queries another form than indexed images."""

    def encode_queries(self, batch: FeatureBatch) -> FeatureBatch:
        """The batch in the form in which an index of encoded images is asked."""
        ...


class EncoderSpec(Method):
    """Configuration of an encoder; `trained` says whether `fit` looks at the sample."""

    role: ClassVar[str] = "encoder"
    aggregates: ClassVar[bool] = False
    """Whether it turns the local features of an image into one descriptor."""
    needs_one_row: ClassVar[bool] = False
    """Whether it needs one descriptor per image, or one per region, rather than local features."""
    drops_rows: ClassVar[bool] = False
    """Whether it may return fewer rows than `output_rows` says."""
    needs_regions: ClassVar[bool] = False
    """Whether it looks at the regions of an image, for which a channel must have a proposer."""

    @property
    def trained(self) -> bool:
        """Whether a sample is needed."""
        return False

    @property
    def precursor(self) -> "EncoderSpec | None":
        """The encoder whose output it reads; None if it reads any features."""
        return None

    def output_dim(self, dim: int) -> int:
        """D of what it makes of descriptors with D = `dim`; the same unless the encoder says otherwise."""
        return dim

    def output_rows(self, rows: int) -> int:
        """How many rows it makes of an image with so many; one if it aggregates, unless the encoder says otherwise."""
        return 1 if self.aggregates else rows

    @property
    def rows_are_regions(self) -> bool:
        """Whether it makes a row of every region of an image, so that `output_rows` cannot know how many."""
        return False

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that training needs: field name -> local path or `s3://` URI."""
        return {}

    def with_assets(self, assets: Mapping[str, Path]) -> Self:
        """The same with its assets as local files, ready for `fit`."""
        return self.model_copy(update={field: str(path) for field, path in assets.items()})

    def fit(self, sample: FeatureBatch, seed: int) -> Encoder:
        """Train on the sample; the same sample and seed give the same bytes. DataError if the sample is too small."""
        raise NotImplementedError

    def restore(self, state: State) -> Encoder:
        """The encoder that had this state."""
        raise NotImplementedError
