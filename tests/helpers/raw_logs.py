"""Raw logs: real rows, rows whose labels can be learnt, logs in the layouts of public ones; what is made of them."""

import math
import random
from pathlib import Path

import polars as pl
import pytest

from torchdlrm.files import sha256_of

REAL_ROWS = Path(__file__).parents[3] / "shared" / "data"
CRITEO_NAMES = ["label", *(f"int_{i}" for i in range(13)), *(f"cat_{i}" for i in range(26))]


def read_criteo(path):
    """A log in Criteo's layout as a frame: integers and strings."""
    dtypes = {name: pl.String if name.startswith("cat") else pl.Int64 for name in CRITEO_NAMES}
    return pl.read_csv(path, separator="\t", has_header=False, new_columns=CRITEO_NAMES, schema_overrides=dtypes)


def real_log(name):
    """The path of a file of real Criteo rows; skips the test where it is missing."""
    path = REAL_ROWS / name
    if not path.is_file():
        pytest.skip(f"needs real Criteo rows at {path.parent}, which may not be passed on")
    return path


def learnable_rows(num_rows, seed=0):
    """Lines of a log in the Criteo layout; clicks depend on int_0, cat_0 and the pair (cat_1, cat_2)."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_rows):
        ints = ["" if rng.random() < 0.2 else str(int(rng.expovariate(0.1))) for _ in range(13)]
        cats = ["" if rng.random() < 0.05 else f"{int(rng.paretovariate(1.0)) % 997:08x}" for _ in range(26)]
        score = 0.4 * math.log1p(int(ints[0] or 0)) - 1.5 + (len(cats[0]) and 1.2 * math.cos(int(cats[0], 16)))
        score += 1.0 if cats[1] == cats[2] else 0.0
        label = "1" if rng.random() < 1 / (1 + math.exp(-score)) else "0"
        lines.append("\t".join([label, *ints, *cats]))
    return lines


def avazu_like(num_rows, rng):
    """Rows with the columns of Avazu's log, and values as it has them."""

    def category(num_values):
        return f"{rng.randrange(num_values) * 2654435761 % 2**32:08x}"

    hexes = [f"{whose}_{what}" for whose in ("site", "app") for what in ("id", "domain", "category")]
    hexes += ["device_id", "device_ip", "device_model"]
    codes = {
        "device_type": [1, 1, 0, 4],
        "device_conn_type": [0, 2, 3],
        "C14": range(15_000, 24_000),
        "C15": [320, 300, 216],
        "C16": [50, 250, 36],
        "C17": range(1_700, 2_800),
        "C18": [0, 1, 2, 3],
        "C19": [35, 39, 167, 1063],
        "C20": [-1, 100_084, 100_148],
        "C21": [79, 23, 157],
    }
    header = ["id", "click", "hour", "C1", "banner_pos", *hexes, *codes]
    for i in range(num_rows):
        hours = i * 240 // num_rows
        yield (
            header,
            [
                rng.randrange(10**16, 18 * 10**18),
                int(rng.random() < 0.17),
                14_102_100 + hours // 24 * 100 + hours % 24,
                rng.choice([1005, 1002, 1010]),
                rng.choice([0, 1, 7]),
                *(category(300) for _ in hexes),
                *(rng.choice(values) for values in codes.values()),
            ],
        )


def movielens_like(num_rows, rng):
    """Ratings with what is known of user and film."""
    header = ["user id", "item", "rating", "timestamp", "age", "gender", "zip", "genres"]
    genres = ["Action", "Comedy", "Drama"]
    for _ in range(num_rows):
        user = rng.randrange(1, 944)
        yield (
            header,
            [
                user,
                min(1682, int(rng.paretovariate(0.7))),
                rng.choice([1, 2, 3, 3, 4, 4, 5]),
                880_000_000 + rng.randrange(10**7),
                20 + user % 40,
                "MF"[user % 2],
                f"{user * 7919 % 99_999:05d}",
                "|".join(rng.sample(genres, rng.randrange(1, 4))),
            ],
        )


def write(path, rows):
    rows = list(rows)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [rows[0][0], *(row for _, row in rows)]))
    return path


def clicks(num_rows, rng, **columns):
    """A log of a label, a price and a city, and columns by name: a function of the label, or a list of values."""
    header = ["click", "price", "city", *columns]
    for i in range(num_rows):
        label = int(rng.random() < 0.3)
        more = [make(label) if callable(make) else make[i % len(make)] for make in columns.values()]
        yield header, [label, rng.randrange(500), rng.choice("abcdef"), *more]


def checksums(folder):
    """Of each file in a folder, of a dataset say, by its name in it."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
