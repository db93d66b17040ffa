"""What a process of a job raises reaches whoever started the job, as it was."""

import shutil

import pytest

from torchdlrm.errors import TrainingError
from torchdlrm.training.launch import Processes, launch


class UnknownColourError(TrainingError):
    """Of a module of one's own, and made of something else than its message."""

    def __init__(self, colour, rank):
        super().__init__(f"{colour} on rank {rank}")
        self.colour = colour


def mix():
    raise UnknownColourError("mauve", 3)


def test_an_exception_of_any_module_comes_back_from_a_process_as_itself():
    with pytest.raises(UnknownColourError, match=r"^mauve on rank 3$"):
        launch(mix, processes=Processes(2))


def test_tables_that_do_not_fit_are_wrong_input_also_where_a_child_process_finds_out(small_run, dlrm, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[sharding]", "[sharding]\nhost_memory_bytes = 1000"))
    done = dlrm("evaluate", run, "--nproc-per-node", 2)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "do not fit" in done.stderr
