"""Read a checkpoint as data: names of code in it are refused before anything is called."""

from __future__ import annotations

import io
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_DCP = "torch.distributed.checkpoint"
_INDEX_NAMES = {
    f"{_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
}
"""All that the index of a checkpoint consists of, beside plain values and ``torch.dtype``."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's index names {module}.{name}, which is not data: it is refused")


def read_index(stream: IO[bytes]) -> Metadata:
    """Read ``.metadata``, a pickle, without calling anything but constructors of its own parts.

    Raises:
        pickle.UnpicklingError: it is something else.
    """
    index = _IndexUnpickler(stream).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"the checkpoint's index is a {type(index).__name__}")
    return index


class DataOnlyReader(FileSystemReader):
    """torch's reader with ``read_index``. It reads the index once."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint."""
        if self._index is None:
            with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
                self._index = read_index(stream)
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
            self._index.storage_meta.load_id = self.load_id
        return self._index


def load_object(planner: Any, item: ReadItem, value: io.BytesIO) -> None:
    """In place of a load planner's ``load_bytes``: an object among the tensors holds tensors and plain values.

    Raises:
        pickle.UnpicklingError: it holds something else.
    """
    found = torch.load(value, weights_only=True)
    name = item.dest_index.fqn
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], found)
    else:
        planner.state_dict[name] = found
