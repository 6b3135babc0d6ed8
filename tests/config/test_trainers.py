"""The fields of TRL's and transformers' classes, read from their source, are those that the classes have.

pytest tests/config/test_trainers.py
"""

import dataclasses

import pytest

from rl_soft.config.trainers import CLASSES, trainer_class, trainer_fields


@pytest.mark.parametrize("method", CLASSES)
def test_names_and_defaults_are_those_of_the_class(method):
    real = {f.name: f.default for f in dataclasses.fields(trainer_class(method)) if f.init}
    found = trainer_fields(method)
    assert found.keys() == real.keys()
    different = {name for name in real if found[name] != real[name]}
    assert different <= {"optim", "include_for_metrics"}, "which are no literals"
