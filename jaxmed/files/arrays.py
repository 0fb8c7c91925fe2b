"""Arrays in Zarr's third format by path or URL, through TensorStore; every chunk that is written carries its checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, unknown

DRIVERS = {"file": "file", "gs": "gcs", "s3": "s3"}
"""Scheme of a URL -> TensorStore's driver of key-value stores."""
CHECKSUM = "crc32c"
CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
    {"name": CHECKSUM},
]
"""Of the arrays that are written, the checksum last: it covers the bytes on the disk."""
URL = re.compile(r"([a-z0-9]+)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class ArrayLayout:
    """An array to be made.

    Attributes:
        shape, chunks: sizes of the whole and of a piece that is read alone, axis by axis.
        fill: the value of pieces that were never written, as Zarr's metadata holds it.
        dims: names of the axes.
        shards: sizes of a stored file, multiples of `chunks`, where it holds several of them; by default each is a file.
        compress: whether chunks are compressed.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str = "float32"
    fill: float | int | str = 0
    dims: tuple[str, ...] = ()
    shards: tuple[int, ...] = ()
    compress: bool = True

    def metadata(self) -> dict[str, Any]:
        """As TensorStore takes it."""
        codecs = CODECS if self.compress else [CODECS[0], CODECS[-1]]
        if self.shards:
            inner = {"chunk_shape": list(self.chunks), "codecs": codecs, "index_codecs": [CODECS[0], CODECS[-1]]}
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        grid = {"name": "regular", "configuration": {"chunk_shape": list(self.shards or self.chunks)}}
        found = {"shape": list(self.shape), "data_type": self.dtype, "chunk_grid": grid, "codecs": codecs, "fill_value": self.fill}
        return found | ({"dimension_names": list(self.dims)} if self.dims else {})


def kvstore(url: str | Path) -> dict[str, str]:
    """TensorStore's description of a place: a local path, file://, gs://BUCKET/PATH or s3://BUCKET/PATH.

    Raises:
        UserError: another scheme.
    """
    found = URL.fullmatch(str(url))
    if found is None or found[1] == "file":
        return {"driver": "file", "path": f"{Path(found[2] if found else url).resolve()}/"}
    if found[1] not in DRIVERS:
        raise unknown("kind of store in a URL:", found[1], DRIVERS, "Give a local path, gs://BUCKET/PATH or s3://BUCKET/PATH.")
    bucket, _, path = found[2].partition("/")
    return {"driver": DRIVERS[found[1]], "bucket": bucket, "path": path.rstrip("/") + "/"}


def open_array(url: str | Path, layout: ArrayLayout | None = None, *, partial: bool = False) -> Any:
    """A TensorStore: the array at `url`, or with `layout` a new one in place of what was there.

    Chunks equal to the fill value are stored like any other, so a chunk that is missing was never written, or is lost. Arrays of earlier
    versions carry no checksums; of those, missing chunks are read as the fill value.

    Args:
        partial: whether chunks may be missing when it is read; they hold the fill value then.

    Raises:
        ValueError: no array there, or one that is damaged.
    """
    import tensorstore as ts

    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore(url), "store_data_equal_to_fill_value": True}
    if layout is not None:
        spec["metadata"] = layout.metadata()
        return ts.open(spec, create=True, delete_existing=True).result()
    array = ts.open(spec, open=True).result()
    if partial or not is_checked(array):
        return array
    return ts.open({**spec, "fill_missing_data_reads": False}, open=True).result()


def is_checked(array: Any) -> bool:
    """Whether the chunks of an array carry checksums."""
    return f'"{CHECKSUM}"' in json.dumps(array.spec().to_json()["metadata"]["codecs"])


def find_damage(array: Any, places: Iterable[tuple[Any, ...]], problem: Callable[[Any, Any], str] = lambda *_: "") -> list[str]:
    """Reads parts of an array that must be there; returns for each why it cannot be read, or "".

    Args:
        places: indices (integers or slices), one per part; all parts are read at once.
        problem: what is wrong with a part that can be read, from its place and its values, or "".
    """
    found = []
    for place, read in [(place, array[place].read()) for place in places]:
        try:
            found.append(problem(place, read.result()))
        except (ValueError, OSError) as error:
            found.append(reason(error))
    return found


def reason(error: Exception) -> str:
    """What is wrong with a chunk, in few words, from one of TensorStore's long messages."""
    text = str(error).partition("\n")[0]
    if "is missing" in text or "NOT_FOUND" in text:
        return "missing"
    return "damaged (" + text.partition(": ")[2].partition(" [")[0][:160].replace('"', "'") + ")"


def open_checked(url: str | Path, what: str) -> Any:
    """`open_array`, with one message where it fails."""
    try:
        return open_array(url)
    except (ValueError, OSError) as error:
        raise UserError(f"{what} cannot be read: {reason(error)}.") from None
