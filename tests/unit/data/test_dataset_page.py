"""The page of a dataset says what its rows say, worst first."""

import re
import shutil

import numpy as np
import polars as pl
import pytest

from helpers.pages import tables_of
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.page import _pieces, dataset_page
from torchdlrm.data.summary import summarize
from torchdlrm.errors import DatasetError


def table(page, heading):
    """The rows of the table below a heading, by their first cell."""
    part = page.partition(f"<h2>{heading}")[2].partition("<h2>")[0]
    head, *rows = tables_of(part[part.index("<table>") : part.index("</table>")] + "</table>")
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_what_is_unknown_missing_or_has_drifted_is_there_worst_first(small_dataset):
    page, splits = dataset_page(small_dataset), small_dataset.manifest.splits
    for heading, of in (
        ("Drift", lambda split, name: splits[split].drift[name]),
        ("Unknown", lambda split, name: 100 * splits[split].unknown_rate(name)),
        ("Missing", lambda split, name: 100 * splits[split].missing_rate(name)),
    ):
        rows = table(page, heading)
        shown = [split for split in ("train", "val", "test") if split in next(iter(rows.values()))]
        largest = [max(of(split, name) for split in shown) for name in rows]
        assert largest == sorted(largest, reverse=True)
        assert len(largest) > 5
        for name, row in rows.items():
            assert [row[split] for split in shown] == [
                f"{of(split, name):,.{4 if heading == 'Drift' else 2}f}" for split in shown
            ]


def test_the_click_rate_is_that_of_the_rows(small_dataset, monkeypatch):
    for name in ("val", "test"):
        split = small_dataset.splits[name]
        labels = pl.concat([pl.read_parquet(file.path)["label"] for file in split.files]).to_numpy()
        monkeypatch.setattr("torchdlrm.data.page._LEAST_ROWS", 50)
        rows, clicks = _pieces(split, "label")
        pieces = len(rows)
        assert pieces == split.rows // 50
        place = np.arange(len(labels)) * pieces // len(labels)
        assert rows.tolist() == np.bincount(place).tolist()
        assert clicks.tolist() == [labels[place == i].sum() for i in range(pieces)]
    assert "val: " in dataset_page(small_dataset)


def test_how_much_the_most_frequent_values_cover_is_counted(small_dataset):
    vocabulary = small_dataset.vocabulary("cat_2").table
    covered = summarize(small_dataset, 1).sparse["cat_2"].coverage
    rows = small_dataset.manifest.splits["train"].rows
    assert covered[10] == pytest.approx(vocabulary["count"].head(10).sum() / rows)
    assert max(covered) == vocabulary.height
    assert covered[vocabulary.height] == pytest.approx(vocabulary["count"].sum() / rows)
    assert table(dataset_page(small_dataset), "Frequencies")["cat_2"]["top 10, %"] == f"{100 * covered[10]:.1f}"


def test_a_dataset_without_test_rows_or_vocabularies_has_a_page(small_dataset):
    manifest = small_dataset.manifest
    hashed = {name: record.model_copy(update={"vocabulary": None}) for name, record in manifest.sparse.items()}
    splits = manifest.splits | {"test": manifest.splits["test"].model_copy(update={"rows": 0, "files": ()})}
    page = dataset_page(Dataset(small_dataset.path, manifest.model_copy(update={"sparse": hashed, "splits": splits})))
    assert {row["most frequent value"] for row in table(page, "Frequencies").values()} == {"-"}
    assert "val: " in page
    assert "test: " not in page


def test_a_damaged_part_is_named(small_dataset, tmp_path):
    folder = shutil.copytree(small_dataset.path, tmp_path / "dataset")
    part = folder / "val" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9] + bytes(9))
    with pytest.raises(DatasetError, match="cannot be read"):
        dataset_page(Dataset.open(folder))


def test_the_page_needs_nothing_but_itself(small_dataset):
    assert re.findall(r"<script|<link|\b(?:src|href)=|url\(|@import", dataset_page(small_dataset)) == []
