"""The trained parts of an inverted file: a rotation, a coarse quantiser, and how the vectors of a list are coded."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from cbir.encoding.product import ReproducibleProduct
from cbir.index.coarse import Coarse, coarse_of, restore_coarse
from cbir.index.dense import Metric, array_view
from cbir.types import Floats, Int64s, State

__all__ = ["Codes", "ListCode", "Quantisers", "StoredCodes", "inverted_file", "list_contents"]

Codes = npt.NDArray[np.uint8]

StoredCodes = tuple[Int64s, Int64s, Codes]
"""Ids (n,), lists (n,) and codes (n, B) of some vectors, in the order of their lists."""


class ListCode(ABC):
    """How the vectors of a list are coded. A vector's code depends on nothing but the vector and its list."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What the bytes of a code are, for readers of the entries."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """B, the bytes of a code."""

    @abstractmethod
    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """Codes (K, B) of rows (K, D) in these lists (K,)."""

    @abstractmethod
    def empty_index(self, coarse: Coarse) -> Any:
        """A faiss inverted file of these codes, without vectors."""

    @abstractmethod
    def state(self) -> State:
        """The trained arrays by name."""

    def searchable(self, index: Any) -> Any:
        """The form in which a filled inverted file is searched."""
        return index

    def code_lists(self, index: Any) -> Any:
        """The faiss InvertedLists of a searchable inverted file, one code after the other."""
        return index.invlists


class Quantisers:
    """An optional rotation (D', D), a coarse quantiser of D' dimensions, and a code of the vectors in its lists."""

    def __init__(self, rotation: Floats | None, coarse: Coarse, code: ListCode) -> None:
        self.rotation, self.coarse, self.code = rotation, coarse, code
        self._rotated = None if rotation is None else ReproducibleProduct(rotation)

    @classmethod
    def of_index(cls, index: faiss.Index, code_of: Callable[[Any], ListCode]) -> "Quantisers":
        """Those of a faiss index, which must outlive them; `code_of` reads the code of an inverted file."""
        ivf, rotation = inverted_file(index), None
        if isinstance(index, faiss.IndexPreTransform):
            transform: Any = faiss.downcast_VectorTransform(index.chain.at(0))  # type: ignore[attr-defined]
            rotation = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        metric: Metric = "ip" if ivf.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        return cls(rotation, coarse_of(ivf.quantizer, metric), code_of(ivf))

    @classmethod
    def restore(cls, state: State, metric: Metric, code: ListCode) -> "Quantisers":
        """With the rotation and the coarse quantiser of a state."""
        return cls(state.get("rotation"), restore_coarse(state, metric), code)

    @property
    def dim(self) -> int:
        """D of the vectors before the rotation."""
        return self.coarse.dim if self.rotation is None else int(self.rotation.shape[1])

    def rotate(self, rows: Floats) -> Floats:
        """(K, D) -> (K, D')."""
        return rows if self._rotated is None else self._rotated(rows).astype(np.float32)

    def encode(self, rows: Floats) -> tuple[Int64s, Codes]:
        """Rotated rows (K, D') -> their lists (K,) and codes (K, B)."""
        lists = self.coarse.nearest(rows)
        return lists, self.code.encode(rows, lists, self.coarse)

    def index_of(self, parts: Iterable[StoredCodes], probes: int) -> Any:
        """A faiss index of these codes."""
        ivf = self.code.empty_index(self.coarse)
        ivf.is_trained, ivf.nprobe = True, min(probes, self.coarse.num_lists)
        for image_ids, lists, codes in parts:
            numbers, starts, sizes = np.unique(lists, return_index=True, return_counts=True)
            for number, start, size in zip(numbers.tolist(), starts.tolist(), sizes.tolist(), strict=True):
                some = slice(start, start + size)
                ivf.invlists.add_entries(number, size, faiss.swig_ptr(image_ids[some]), faiss.swig_ptr(codes[some]))
            ivf.ntotal += len(image_ids)
        searchable = self.code.searchable(ivf)
        return searchable if self.rotation is None else self._with_rotation(searchable)

    def _with_rotation(self, ivf: Any) -> faiss.IndexPreTransform:
        dim_out, dim = self.rotation.shape  # type: ignore[union-attr]
        rotation: Any = faiss.LinearTransform(dim, dim_out, False)
        faiss.copy_array_to_vector(self.rotation.ravel(), rotation.A)  # type: ignore[union-attr]
        rotation.is_trained = True
        rotation.set_is_orthonormal()
        return faiss.IndexPreTransform(rotation, ivf)

    def state(self) -> State:
        """The arrays of the three parts; `rotation` (D', D) where there is one."""
        state = {**self.coarse.state(), **self.code.state()}
        return state if self.rotation is None else {**state, "rotation": self.rotation}


def inverted_file(index: Any) -> Any:
    """The inverted file inside a faiss index."""
    return faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index)


def list_contents(lists: Any, number: int) -> tuple[Int64s, Codes]:
    """The ids (n,) and codes (n, B) of one list of faiss's InvertedLists, as views that these must outlive."""
    size, width = lists.list_size(number), lists.code_size
    if not size:
        return np.empty(0, np.int64), np.empty((0, width), np.uint8)
    return array_view(lists.get_ids(number), size), array_view(lists.get_codes(number), size * width).reshape(-1, width)
