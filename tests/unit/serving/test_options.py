"""The options of a server: one dataclass, which is the command line too."""

import dataclasses
import inspect
import re

import pytest
from cyclopts import App
from cyclopts.exceptions import CycloptsError

from torchdlrm.cli.main import app
from torchdlrm.errors import ConfigError
from torchdlrm.serving.options import ServeOptions


def parsed(*arguments):
    _, bound, _ = App.parse_args(app, ["serve", "bundle", *arguments], print_error=False, exit_on_error=False)
    bound.apply_defaults()
    return bound.arguments["options"]


def test_the_command_line_without_options_is_the_dataclass_without_arguments():
    assert parsed() == ServeOptions()


def test_every_option_is_described_once():
    described = re.findall(r"^    (\w+): ", inspect.getdoc(ServeOptions), re.MULTILINE)
    assert described == [field.name for field in dataclasses.fields(ServeOptions)]


def test_names_of_the_server_stand_between_commas():
    options = parsed("--allowed-hosts", "model.example.com, *.example.org,", "--port", "9", "--verify", "lazy")
    assert options == ServeOptions(allowed_hosts=("model.example.com", "*.example.org"), port=9, verify="lazy")


@pytest.mark.parametrize(
    "arguments",
    [("--api-keys", "secret"), ("--port", "65536"), ("--workers", "0"), ("--deadline-ms", "0"), ("--verify", "no")],
)
def test_what_is_no_option_or_out_of_range_is_refused(arguments):
    with pytest.raises(CycloptsError):
        parsed(*arguments)


def test_a_queue_that_no_request_fits_is_refused():
    with pytest.raises(ConfigError, match="`max_queue_rows` 10: a request may have 11 rows"):
        ServeOptions(max_queue_rows=10, max_rows_per_request=11).check()
