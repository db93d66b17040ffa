"""Predictions in a pipeline, as on GPUs and on several ranks, are those without one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

from torchdlrm.config import load_config
from torchdlrm.errors import DatasetError
from torchdlrm.loader.loader import Loader
from torchdlrm.progress import SILENT
from torchdlrm.tables.optimizers import table_kernels
from torchdlrm.training import pipeline
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.job import train
from torchdlrm.training.pipeline import build_pipeline, predict_loaders
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.run import Run
from torchdlrm.training.sharded import build_empty_model


@pytest.fixture
def loaded(small_run, small_dataset):
    """The model of `small_run`, and its only rank."""
    run = Run.open(small_run)
    with join_process_group() as ranks:
        model = build_empty_model(run.config, run.shape(small_dataset), ranks=ranks)
        Checkpointer(run.checkpoints, model, None, ranks).load(67)
        yield model, ranks


def test_they_are_the_same_bits_and_the_model_is_as_it_was(loaded, small_dataset):
    model, ranks = loaded
    several = replace(ranks, world_size=2)  # what decides on the pipeline; the group has one rank

    def predicted(who, given=None):
        loaders = [Loader(small_dataset, split, batch_size_global=100) for split in ("val", "test")]
        return predict_loaders(model, loaders, who, SILENT, given).take(ranks)

    plain = predicted(ranks)
    assert len(plain[0]) == 714
    one = build_pipeline(model, None, ranks=several)
    # Twice by one, as validations of a training; by another; and without it afterwards.
    for case in ((several, one), (several, one), (several,), (ranks,)):
        for found, expected in zip(predicted(*case), plain, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert model.training


class DamagedLoader(Loader):
    """Has two batches, and a file that is damaged behind them."""

    def __iter__(self):
        batches = super().__iter__()
        yield next(batches)
        yield next(batches)
        batches.close()
        raise DatasetError("row group 1 is damaged")


def train_and_count_pipelines(dataset, run):
    made = []
    original = pipeline.TrainPipelineSparseDist
    pipeline.TrainPipelineSparseDist = lambda *args, **named: made.append(args[1]) or original(*args, **named)
    options = {"train.max_steps": "9", "validation.every_steps": "3", "logging.tensorboard": "false"}
    train(load_config("criteo-small", options), dataset, run)
    return made.count(None), [json.loads(line)["split"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_training_has_one_for_all_its_validations(small_dataset, tmp_path):
    """Each takes two streams of a GPU, and torch keeps memory for each stream."""
    num_made, splits = launch(train_and_count_pipelines, small_dataset.path, tmp_path / "run", processes=Processes(2))
    assert splits.count("val") == 3
    assert num_made == 1


def test_what_the_loader_refuses_ends_them(loaded, small_dataset):
    model, ranks = loaded
    loader = DamagedLoader(small_dataset, "val", batch_size_global=100)
    with pytest.raises(DatasetError, match="row group 1 is damaged"):
        predict_loaders(model, [loader], replace(ranks, world_size=2), SILENT)


def test_tables_leave_the_check_of_ids_to_the_loader(loaded):
    """`unit/loader/test_loader.py` holds that it refuses those outside their table."""
    model, _ = loaded
    kernels = list(table_kernels(model))
    assert kernels
    assert {kernel.bounds_check_mode_int for kernel in kernels} == {BoundsCheckMode.NONE.value}
