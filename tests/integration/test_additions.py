"""A table optimizer, a serving precision and an interaction are added in the files that the docs name and in no other.

The package is copied, these files are changed, and what was added is trained, exported, looked up, checked and refused.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchdlrm

# Of each addition the files that change: what is inserted, and before what; None: the file is new.
OPTIMIZER = {
    "config/optimizers.py": [
        ('"rowwise_adagrad", "adagrad"', '"momentum_sgd", '),
        (
            '        TableOptimizer("adam"',
            '        TableOptimizer("momentum_sgd", "SGD", _DECAY | {"beta1"}, state_per_weight=1),\n',
        ),
    ],
    "tables/updates.py": [
        ("# By the names that", "MOMENTUM_SGD = 7\n"),
        ('    "sgd": SGD,\n', '    "momentum_sgd": MOMENTUM_SGD,\n'),
        (
            "    else:\n        _move_by_moments(",
            (
                "    elif rule.kind == MOMENTUM_SGD:\n"
                "        for k in range(len(grad)):\n"
                "            first[k] = rule.beta1 * first[k] + grad[k]\n"
                "        _move(weights, keeps, rule.rate, first)\n"
            ),
        ),
    ],
}
PRECISION = {
    "bundle/precision.py": [
        ("]\nDensePrecision", ', "int2"'),
        (
            "    )\n}\n\nDENSE_PRECISIONS",
            '        StoredPrecision("int2", 2, is_quantized=True, tolerance=Tolerance(1.0, 50.0, 1.0)),\n',
        ),
    ]
}
INTERACTION = {
    "config/model.py": [
        ('"projection"]\n', '"average", '),
        (
            "class FeatureConfig",
            (
                "class AverageConfig(InteractionConfig):\n"
                '    """The mean of all vectors, where model.interaction = "average"."""\n\n'
                '    scale: float = Field(1.0, description="what it is multiplied by")\n\n\n'
            ),
        ),
        ("    projection: ProjectionConfig", "    average: AverageConfig = AverageConfig()\n"),
    ],
    "model/average.py": None,
}
AVERAGE = '''"""The mean of all vectors."""

from torch import nn

from torchdlrm.model.architecture import BuiltInArchitecture


class Average(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, dense_features, sparse_features):
        return self.scale * (dense_features + sparse_features.sum(1)) / (1 + sparse_features.shape[1])


class AverageArchitecture(BuiltInArchitecture):
    def build(self, shape, embedding_bag_collection, device):
        from torchdlrm.model.dlrm import DLRM

        class AverageDLRM(DLRM):
            def make_interaction(self, num_sparse_features, embedding_dim):
                return Average(shape.config.average.scale), embedding_dim

        return AverageDLRM(embedding_bag_collection, **shape.arguments, dense_device=device)

    def interaction(self, shape):
        return [], shape.config.embedding_dim


ARCHITECTURE = AverageArchitecture()
'''
SCRIPT = """
import json, sys
from pathlib import Path
from torchdlrm import ExportOptions, export, load_config, train
from torchdlrm.bench.predict import SERVED
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.config import TABLE_OPTIMIZERS
from torchdlrm.errors import ConfigError
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.model import table_weight

dataset, out = sys.argv[1], Path(sys.argv[2])
SMALL = {
    "model.embedding_dim": "8", "model.dense_arch_layer_sizes": "16,8", "model.over_arch_layer_sizes": "16,1",
    "train.batch_size_global": "512", "logging.tensorboard": "false", "validation.max_rows": "100",
}
ALL = {"model.interaction": "average", "model.average.scale": "0.5", "table_optimizer.name": "momentum_sgd"}
RUNS = {"sgd": {"table_optimizer.name": "sgd"}, "momentum": {"table_optimizer.name": "momentum_sgd"}}

def tables(run, steps, settings):
    name = f"{run}-{steps}"
    config = load_config(None, SMALL | settings | {"train.max_steps": str(steps)})
    train(config, dataset, out / name)
    bundle = export(out / name, out / f"{name}-bundle", progress=False).bundle
    return [bundle.weights.tensor(table_weight(table.key)).clone() for table in bundle.manifest.tables]

def refused(settings):
    try:
        load_config(None, settings)
    except ConfigError as error:
        return str(error)

same = [[bool((a == b).all()) for a, b in zip(*(tables(run, steps, RUNS[run]) for run in RUNS))] for steps in (1, 2)]
tables("all", 2, ALL)
options = ExportOptions(precision="int2")
exported = export(out / "all-2", out / "small", options=options, progress=False)
search = export(out / "all-2", out / "auto", options=ExportOptions(precision="auto"), progress=False).search
manifest = exported.bundle.manifest
print(json.dumps({
    "same_tables": [all(same[0]), all(same[1])],
    "leaner_than_adam": [other.name for other in TABLE_OPTIMIZERS["adam"].leaner()],
    "refused_eps": refused({"table_optimizer.name": "momentum_sgd", "table_optimizer.eps": "0.1"}),
    "refused_scale": refused({"model.average.scale": "2.0"}),
    "config": (out / "all-2" / "config.toml").read_text(),
    "precisions": [record.precision for record in manifest.sparse.values()],
    "row_bytes": exported.bundle.weights.place(table_weight(manifest.tables[0].key)).row_bytes,
    "difference": manifest.check.largest_difference,
    "costs": list(next(iter(search.tables.values())).logloss_increase),
    "benchmarked": [tables for tables, _ in SERVED],
    "text": manifest.model.interaction_text,
    "again": Bundle.open(out / "small").manifest.model.average.scale,
}))
"""


@pytest.fixture(scope="module")
def found(small_dataset, tmp_path_factory):
    """What a copy of the package with all three says of itself."""
    folder = tmp_path_factory.mktemp("added")
    copy = folder / "torchdlrm"
    shutil.copytree(Path(torchdlrm.__file__).parent, copy)
    for addition in (OPTIMIZER, PRECISION, INTERACTION):
        for name, insertions in addition.items():
            text = AVERAGE if insertions is None else (copy / name).read_text()
            for before, inserted in insertions or ():
                assert text.count(before) == 1, (name, before)
                text = text.replace(before, inserted + before)
            (copy / name).write_text(text)
    command = [sys.executable, "-c", SCRIPT, str(small_dataset.path), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_table_optimizer_is_a_record_and_a_step(found):
    assert list(OPTIMIZER) == ["config/optimizers.py", "tables/updates.py"]
    assert found["same_tables"] == [True, False], "the first step of momentum is that of sgd"
    assert "momentum_sgd" in found["leaner_than_adam"]
    assert "table_optimizer.eps: table_optimizer.name = momentum_sgd has no such thing" in found["refused_eps"]


def test_a_serving_precision_is_a_record(found):
    assert list(PRECISION) == ["bundle/precision.py"]
    assert set(found["precisions"]) == {"int2"}
    assert found["row_bytes"] == 4 + 8 // 4
    assert found["difference"] > 0
    assert found["costs"][-1] == "int2"
    assert "int2" in found["benchmarked"]


def test_an_interaction_is_its_settings_and_a_module(found):
    assert list(INTERACTION) == ["config/model.py", "model/average.py"]
    assert "[model.average]\nscale = 0.5\n" in found["config"]
    assert found["text"] == "average (scale 0.5)"
    assert found["again"] == 0.5
    assert "model.average.scale: only model.interaction = average reads it, got 2.0 with dot" in found["refused_scale"]
