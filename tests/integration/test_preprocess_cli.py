"""`dlrm preprocess` and `dlrm inspect` as a user meets them: exit codes, messages, JSON."""

import json
import random
import subprocess

import pyarrow.parquet as pq
import pytest

from helpers.command_server import DLRM, shared_server
from torchdlrm.cli.inspect import inspect
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError


def dlrm(*arguments):
    return shared_server().run([DLRM, *arguments])


def criteo_lines(num_rows):
    rng = random.Random(0)
    return [
        "\t".join([rng.choice("01"), *["3"] * 13, *[f"{rng.randrange(9):08x}" for _ in range(25)], ""]) + "\n"
        for _ in range(num_rows)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    lines = criteo_lines(70)
    lines[30] = "1\toops\n"
    (folder / "log.tsv").write_text("".join(lines))
    options = ("--max-bad-rows", "1", "--min-count", "1", "--json")
    return folder, dlrm("preprocess", folder / "log.tsv", "--out", folder / "dataset", *options)


def test_preprocess_prints_one_json_object_on_standard_output_and_the_summary_beside_it(made):
    folder, done = made
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == {"train": 60, "val": 5, "test": 4}
    assert result["bad_rows"]["counts"] == {"columns": 1}
    assert result["num_embeddings"] == {**{f"cat_{i}": 10 for i in range(25)}, "cat_25": 2}
    assert (
        "log.tsv, line 31: the line has the wrong number of columns (2 columns, not 40, cut at each tab)" in done.stderr
    )
    assert Dataset.open(folder / "dataset").splits["train"].rows == 60
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"phase"')]
    phases = [(phase["name"], phase["amount"]) for phase in result["phases"]]
    assert [(line["phase"], line["amount"]) for line in told] == phases
    assert [name for name, _ in phases] == ["read", "count", "encode", "write"]


def test_inspect_shows_a_dataset_and_prints_the_same_as_json(made):
    folder, _ = made
    done = dlrm("inspect", folder / "dataset", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["kind"], result["splits"]["val"]["rows"]) == ("dataset", 5)
    labels = [pq.read_table(path)["label"].to_pylist() for path in (folder / "dataset" / "train").iterdir()]
    assert result["splits"]["train"]["click_rate"] == sum(map(sum, labels)) / 60
    assert result["sparse"]["cat_25"]["most_frequent"] == [{"value": None, "share": 1.0, "id": 1}]
    assert result["sparse"]["cat_25"]["missing_share"] == {"train": 1.0, "val": 1.0, "test": 1.0}
    shown = dlrm("inspect", folder / "dataset")
    assert shown.stdout == ""
    for text in ("cat_25", "(missing) 100.0", "int_12", "log.tsv, line 31"):
        assert text in shown.stderr


def test_a_bad_row_that_is_not_allowed_ends_with_exit_code_2_and_one_message(made, monkeypatch):
    monkeypatch.chdir(made[0])
    done = dlrm("preprocess", "log.tsv", "--out", "new")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    for words in ("error: ", "log.tsv, line 31", "2 columns, not 40", "--max-bad-rows N"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (made[0] / "new").exists()


def test_a_dataset_that_is_not_whole_is_not_opened(made, tmp_path):
    def copy(name):
        target = tmp_path / name
        subprocess.run(["cp", "-r", made[0] / "dataset", target], check=True)
        return target

    without_manifest, short, changed, other_version = map(copy, "abcd")
    (without_manifest / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="an incomplete one"):
        Dataset.open(without_manifest)
    with pytest.raises(DatasetError, match="is not a folder"):
        Dataset.open(tmp_path / "absent")

    (short / "val" / "part-00000.parquet").unlink()
    with pytest.raises(DatasetError, match=r"val/part-00000\.parquet: missing"):
        Dataset.open(short)

    manifest = json.loads((other_version / "dataset.json").read_text())
    (other_version / "dataset.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DatasetError, match="format_version is 99"):
        Dataset.open(other_version)
    (other_version / "dataset.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "seed"}))
    with pytest.raises(DatasetError, match="damaged manifest\n  seed"):
        Dataset.open(other_version)
    (other_version / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="not JSON"):
        Dataset.open(other_version)

    part = changed / "train" / "part-00000.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    Dataset.open(made[0] / "dataset").verify()
    with pytest.raises(DatasetError, match=r"train/part-00000\.parquet: damaged"):
        inspect(changed)
