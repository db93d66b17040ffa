"""What tests of live models share: the logs of some days, and a model that has learnt three of them."""

import shutil

import pytest

from helpers.live_models import CONFIG, NUM_DAYS, SCHEMA, WIDE, write_day
from torchdlrm import LiveSettings, advance


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    """The logs of five days; not to be changed."""
    folder = tmp_path_factory.mktemp("logs")
    return [write_day(folder, day) for day in range(NUM_DAYS)]


@pytest.fixture(scope="session")
def three_days(logs, tmp_path_factory):
    """The folder of a live model after three days; not to be changed."""
    folder = tmp_path_factory.mktemp("live") / "clicks"
    for day in range(3):
        advance(folder, logs[day], config=CONFIG, schema=SCHEMA, settings=LiveSettings(gate=WIDE))
    return folder


@pytest.fixture
def copied(three_days, tmp_path):
    """A copy of the live model that may be changed."""
    return shutil.copytree(three_days, tmp_path / "clicks", symlinks=True)
