"""Early stopping that could never act is refused, with its keys."""

import pytest

from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError
from torchdlrm.training.agenda import Agenda, check_early_stopping


def check(*, rows=1_000, validation_rows=100, **keys):
    settings = {name.replace("__", "."): str(value) for name, value in keys.items()}
    config = load_config(None, {"train.batch_size_global": "10"} | settings)
    check_early_stopping(config, Agenda.of(config, rows), validation_rows=validation_rows)


@pytest.mark.parametrize("stop", [{"stop__target_auc": 0.8}, {"stop__patience_validations": 2}])
def test_without_validations_before_the_end_it_is_refused(stop):
    key = next(iter(stop)).replace("__", ".")
    with pytest.raises(ConfigError, match=rf"{key}: is .* validated at its end only; set validation\.every_steps"):
        check(**stop)
    with pytest.raises(ConfigError, match=rf"{key}: is .* the dataset's val split has no rows"):
        check(**stop, validation__every_steps=10, validation_rows=0)
    check(**stop, validation__every_steps=10)
    check(**stop, validation__every_rows=100)


@pytest.mark.parametrize("unit", [{"validation__every_steps": 25}, {"validation__every_rows": 250}])
def test_patience_needs_one_validation_more_than_it_waits_for_before_the_last_step(unit):
    check(stop__patience_validations=2, **unit)  # at the steps 25, 50 and 75 of 100
    message = r"stop\.patience_validations: is 3 .* needs 4 validations before the last step, 100, and the run has 3"
    with pytest.raises(ConfigError, match=message):
        check(stop__patience_validations=3, **unit)
    check(stop__patience_validations=3, train__epochs=2, **unit)
