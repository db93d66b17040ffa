"""Each model of `examples/zoo/` is one that trains; benchmarks/zoo.py has what they reach on real rows."""

import pytest

import zoo
from torchdlrm.config import load_config
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.model_class import architecture_of

MODELS = {name: variant.model_class for name, variant in zoo.models().items() if variant.model_class}


def test_there_are_models():
    assert len(MODELS) >= 9


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_literature_takes_a_step(name, small_dataset):
    config = load_config("criteo-small").model
    shape = ModelShape.of(config, small_dataset, architecture_of(config, MODELS[name]))
    shape.architecture.check(shape)  # with a row of padding, whose gradients must be finite
    assert shape.num_weights > 10_000
