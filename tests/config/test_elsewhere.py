"""Names that other packages have for keys: held to TRL's own classes, so that a new version of it shows here.

pytest tests/config/test_elsewhere.py
"""

import dataclasses

import pytest
import trl
from conftest import ROOT
from trl.scripts.grpo import GRPOScriptArguments

from rl_soft.config.elsewhere import ABSENT, BECOMES, CALLED, IGNORED, READ, hint_for
from rl_soft.config.recipe import GROUPS, METHODS
from rl_soft.config.trainers import trainer_fields
from rl_soft.keys import fields

KEYS = {method: {*trainer_fields(method), *(n for g in GROUPS[method] for n in fields(g))} for method in METHODS}
ALL = set().union(*KEYS.values())
TABLES = (CALLED, READ, IGNORED, BECOMES, ABSENT)
NAMES = {name: told for table in TABLES for name, told in table.items()}
OF_TRL = (trl.ModelConfig, GRPOScriptArguments, trl.DatasetMixtureConfig, trl.GRPOConfig)


@pytest.mark.parametrize("made", OF_TRL, ids=lambda c: c.__name__)
def test_each_field_of_trl_s_is_a_key_or_has_a_hint(made):
    assert {field.name for field in dataclasses.fields(made)} - KEYS["grpo"] - NAMES.keys() == set()


def test_no_name_of_the_table_is_a_key_and_what_it_leads_to_is_one():
    assert NAMES.keys() & ALL == set() and set(CALLED.values()) <= ALL
    assert len(NAMES) == sum(map(len, TABLES)), "each name is in one table"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("torch_dtype", "it is called dtype here"),
        ("dataset_config", "write dataset_options: {config: NAME}"),
        ("max_new_tokens", "write max_completion_length"),
        ("load_in_8bit", "8-bit products round the states"),
        ("reward_funcs", "it is called rewards here"),
        ("lerning_rate", "did you mean learning_rate?"),
    ],
)
def test_a_key_of_elsewhere_is_told_what_it_is_here(name, hint):
    assert hint in hint_for(name, KEYS["grpo"])


def test_the_page_shows_the_table():
    """docs/from_trl.md names every TRL and open-r1 key of the table that a GRPO script has."""
    page = (ROOT / "docs/from_trl.md").read_text()
    scripted = {field.name for made in OF_TRL for field in dataclasses.fields(made)}
    assert [name for name in NAMES if name in scripted and f"`{name}`" not in page] == []
