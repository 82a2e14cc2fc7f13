"""The role of an encoder: features in, features of another form out."""

from typing import ClassVar, Protocol

from cbir.spec import Method
from cbir.types import FeatureBatch, State

__all__ = ["Encoder", "EncoderSpec"]


class Encoder(Protocol):
    """A trained encoder. `encode(a ++ b) == encode(a) ++ encode(b)`."""

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """The batch in encoded form: the same images, in the same order."""
        ...

    def state(self) -> State:
        """Everything that `EncoderSpec.restore` needs to build the same encoder again."""
        ...


class EncoderSpec(Method):
    """Configuration of an encoder; `trained` says whether `fit` looks at the sample."""

    role: ClassVar[str] = "encoder"
    aggregates: ClassVar[bool] = False
    """Whether it turns the local features of an image into one descriptor."""

    @property
    def trained(self) -> bool:
        """Whether a sample is needed."""
        return False

    def output_dim(self, dim: int) -> int:
        """D of what it makes of descriptors with D = `dim`; the same unless the encoder says otherwise."""
        return dim

    def fit(self, sample: FeatureBatch, seed: int) -> Encoder:
        """Train on the sample; the same sample and seed give the same bytes. DataError if the sample is too small."""
        raise NotImplementedError

    def restore(self, state: State) -> Encoder:
        """The encoder that had this state."""
        raise NotImplementedError
