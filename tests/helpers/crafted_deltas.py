"""Deltas that are made to do harm: what each has that none may have, with checksums that are right."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.crafted import change_manifest, fifo, write
from torchdlrm.bundle.delta import Delta

TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"


def seal_delta(delta, change=lambda _: None):
    """Give all files of a delta the checksums that they must have."""

    def sums(content):
        change(content)
        content["result"]["manifest_sha256"] = hashlib.sha256((delta / "files/bundle.json").read_bytes()).hexdigest()
        stored = {f"files/{name}": recipe["file"] for name, recipe in content["files"].items()}
        for name, record in {"weights.delta": content["weights"]["file"], **stored}.items():
            if record is not None and (delta / name).is_file():
                data = (delta / name).read_bytes()
                record |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    change_manifest(delta, sums, "delta.json")


def says(change):
    return lambda delta: seal_delta(delta, change)


def table_says(**fields):
    return says(lambda content: next(p for p in content["weights"]["pieces"] if isinstance(p, dict)).update(fields))


def file_says(name, **fields):
    return says(lambda content: content["files"][name].update(fields))


def result_says(change):
    def craft(delta):
        change_manifest(delta / "files", lambda content: change(content) and None)
        seal_delta(delta)

    return craft


def row_numbers(change):
    """The numbers of the rows of the first block that has them, changed."""

    def craft(delta):
        place = 0
        for piece in Delta.open(delta).manifest.weights.pieces:
            if not isinstance(piece, int):
                start, stop, changed = next(piece.blocks())
                if 2 < changed < stop - start:
                    break
            place += piece if isinstance(piece, int) else piece.size_bytes
        data = bytearray((delta / "weights.delta").read_bytes())
        ids = np.frombuffer(data, "<u2", changed, place)
        change(ids)
        data[place : place + 2 * changed] = ids.tobytes()
        write(delta / "weights.delta", bytes(data))
        seal_delta(delta)

    return craft


def swap(ids):
    ids[[0, 1]] = ids[[1, 0]]


def repeat(ids):
    ids[1] = ids[0]


def beyond(ids):
    ids[-1] = 60_000


def other_than_new(ids):
    """The row before the new ones is said to be one of them, and the first of them is left out."""
    missing = sorted({*range(int(ids[-1]))} - {*ids.tolist()})[-1]
    ids[:] = sorted([missing, *ids[ids != ids[-1] - 1].tolist()])[: len(ids)]


def file_is(name, data):
    def craft(delta):
        write(delta / name, data() if callable(data) else data)
        seal_delta(delta)

    return craft


def packed_rows():
    """A file of some kilobytes that unpacks to hundreds of megabytes."""
    sink, rows = pa.BufferOutputStream(), 20_000_000
    columns = {"value": pa.nulls(rows, pa.string()), "count": pa.array(np.ones(rows, np.int64))}
    pq.write_table(pa.table(columns | {"id": pa.array(np.zeros(rows, np.int32))}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def linked(name, target):
    def craft(delta):
        (delta / name).unlink()
        (delta / name).symlink_to(target)

    return craft


ITEM = "vocabulary/item.parquet"
CRAFTED = {
    "a newer format": says(lambda content: content.update(format_version=2)),
    "row numbers that fall": row_numbers(swap),
    "a row number twice": row_numbers(repeat),
    "a row number beyond the block": row_numbers(beyond),
    "new rows without content": row_numbers(other_than_new),
    "more rows than there are": table_says(num_rows=2**31 - 1),
    "more base rows than there are": table_says(base_rows=10_000),
    "all rows from the base": table_says(changed_rows=[0]),
    "negative rows": table_says(changed_rows=[-1]),
    "wide rows": table_says(row_bytes=2**40),
    "no bytes a row": table_says(row_bytes=0),
    "long blocks": table_says(block_rows=2**31),
    "a table that is not the base's": table_says(table="over_arch.model.0.weight"),
    "a table of another place": table_says(table=TABLE.format("shop")),
    "a number of bytes that is none": says(lambda content: content["weights"]["pieces"].insert(0, -5)),
    "weights of other sizes": says(lambda content: content["weights"]["pieces"].insert(0, 7)),
    "a file that the result has not": says(lambda content: content["files"].update(x={"how": "base", "file": None})),
    "an index of no vocabulary": file_says("sample.parquet", how="index", file=None),
    "rows of no vocabulary": file_says("sample.parquet", how="rows"),
    "a whole file that is not there": file_says("vocabulary/shop.index", how="whole"),
    "the base's file where it changed": file_says(ITEM, how="base", file=None),
    "removed rows": file_says(ITEM, removed_ids=[1, 2]),
    "a removed row that cannot be": file_says(ITEM, removed_ids=[2**62]),
    "rows that are none": file_is(f"files/{ITEM}", b"PAR1nothingPAR1"),
    "rows of gigabytes": file_is(f"files/{ITEM}", packed_rows),
    "a file out of the folder": linked("weights.delta", "/etc/passwd"),
    "no file of rows": lambda delta: (delta / "weights.delta").unlink(),
    "no manifest of the result": lambda delta: (delta / "files/bundle.json").unlink(),
    "a file that waits": fifo("files/sample.parquet"),
    "a manifest that waits": fifo("files/bundle.json"),
    "a result without weights": result_says(lambda content: content["files"].pop("weights.safetensors")),
    "another model": result_says(lambda content: content["model"].update(embedding_dim=16)),
    "a path out of the folder": result_says(lambda content: content["files"].update({"../x": content["files"][ITEM]})),
    "an absolute path": result_says(lambda content: content["files"].update({"/tmp/x": content["files"][ITEM]})),
}


WELL_FORMED = {
    "all rows from the base",
    "the base's file where it changed",
    "removed rows",
    "an index of no vocabulary",
    "rows of no vocabulary",
}
