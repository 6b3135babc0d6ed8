"""The rewards of a recipe: names, paths, parameters that take effect, and one line for every mistake.

pytest tests/train/test_reward_functions.py
"""

import inspect
import logging
import pickle
import sys
import types

import pytest
from conftest import tiny_policy
from trl.trainer.utils import get_callable_name

from rewards import StrictFormat, math_accuracy
from rl_soft.train import pipeline as train
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.ready import describe
from rl_soft.train.reward_functions import own_names, reward_functions

BATCH = {"prompts": ["?", "?"], "completions": ["It is 3.", "#### 3"], "answer": ["3", "3"]}


def test_parameters_of_a_function_take_effect():
    plain, strict = reward_functions(["math_accuracy", {"math_accuracy": {"strict": True}}])
    assert plain is math_accuracy
    assert plain(**BATCH) == [1, 1]
    assert strict(**BATCH) == [0, 1], "only the marked answer counts"
    assert get_callable_name(strict) == get_callable_name(plain) == "math_accuracy"  # what the logs call it
    assert pickle.loads(pickle.dumps(strict))(**BATCH) == [0, 1]


def test_parameters_of_a_class_are_its_arguments():
    assert reward_functions([{"StrictFormat": {"mark": "hashes"}}]) == [StrictFormat("hashes")]
    assert reward_functions(["StrictFormat"]) == [StrictFormat()]


@pytest.mark.parametrize(
    "entry,message",
    [
        ({"math_accuracy": {"strict": True, "bogus": 1}}, "math_accuracy has no parameter 'bogus'; it has strict$"),
        ({"math_accuracy": {"strikt": True}}, "no parameter 'strikt'; it has strict; did you mean strict"),
        ({"math_accuracy": {"answer": ["3"]}}, "no parameter 'answer'; it has strict"),  # TRL passes it
        ({"StrictFormat": {"marks": "boxed"}}, "StrictFormat has no parameter 'marks'; it has mark, think"),
        ({"ThoughtCost": None}, "ThoughtCost {}: .*missing .*cost"),
        ({"math_accuracy": True}, "math_accuracy takes its parameters as {parameter: value}, got True"),
        ({"math_accuracy": {}, "StrictFormat": {}}, "an entry is a name or"),
        (["math_accuracy"], "an entry is a name or"),
        ("math_acuracy", "cannot find 'math_acuracy'; did you mean math_accuracy"),
    ],
)
def test_a_mistake_is_told(entry, message):
    with pytest.raises(ValueError, match=message):
        reward_functions([entry])


def test_a_reward_of_one_s_own(monkeypatch):
    async def mine(completions, *, bonus=0.0, **columns):
        return [bonus] * len(completions)

    module = types.ModuleType("own_rewards")
    module.mine = mine
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    (bound,) = reward_functions([{"own_rewards.mine": {"bonus": 2.0}}])
    assert inspect.iscoroutinefunction(bound), "which the trainer asks"
    with pytest.raises(ValueError, match="no parameter 'bonos'; it has bonus; did you mean bonus"):
        reward_functions([{"own_rewards.mine": {"bonos": 2.0}}])


SOURCES = {
    "own_good": "def mine(completions, **columns):\n    return [0.0] * len(completions)\n\nnumber = 3\n",
    "own_broken": "import math\nimport no_such_package\n",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_good.mine", None),
        ("own_good.minde", r"module own_good \(.*own_good.py\) has no 'minde'; did you mean mine"),
        ("own_good.number", "own_good.number is no function, it is 3"),
        ("own_nowhere.mine", "no module 'own_nowhere' is in .* or installed; known without a module: .*math_accuracy"),
        ("own_good.sub.mine", "own_good.sub"),
        ("own_broken.mine", "importing own_broken failed in .*own_broken.py, line 2: ModuleNotFoundError"),
    ],
)
def test_a_module_of_the_current_folder_is_found_and_what_is_wrong_with_it_told(tmp_path, monkeypatch, name, message):
    for module, source in SOURCES.items():
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as the program rl-soft has it
    if message is None:
        assert reward_functions([name])[0](completions=["a"]) == [0.0]
        return
    with pytest.raises(ValueError, match=message):
        reward_functions([name])


def test_check_tells_it_before_anything_runs(tmp_path):
    from rl_soft.config.recipe import load_recipe

    path = tmp_path / "r.yaml"
    path.write_text(
        "method: grpo\noutput_dir: run\ndataset: chain_sum\nmodel_name_or_path: m\n"
        "rewards: [{math_accuracy: {bogus: 1}}]\n"
    )
    for command in (describe, train.run):
        with pytest.raises(ValueError, match="math_accuracy has no parameter 'bogus'"):
            command(load_recipe(path))


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names,own",
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a"], ["a", "a_2"]),
        (["a", "b", "a", "a", "b"], ["a", "b", "a_2", "a_3", "b_2"]),
        (["a", "a", "a_2"], ["a", "a_3", "a_2"]),
        (["a_2", "a", "a"], ["a_2", "a", "a_3"]),
        (["a", "a_2", "a_2", "a"], ["a", "a_2", "a_2_2", "a_3"]),
        ([], []),
    ],
)
def test_each_reward_has_a_name_of_its_own_and_the_first_keeps_its(names, own):
    assert own_names(names) == own
    assert len(set(own)) == len(own)


def one(completions, *, value=1.0, **columns):
    return [value] * len(completions)


def test_two_rewards_of_one_function_keep_their_metrics(tmp_path, caplog):
    from test_grpo import THINKING, config, dataset, train

    made = tiny_policy()
    functions = reward_functions(
        [{f"{__name__}.one": {"value": 3.0}}, f"{__name__}.one", {f"{__name__}.one": {"value": 5.0}}]
    )
    with caplog.at_level(logging.INFO, "rl_soft"):
        trainer = SoftGRPOTrainer(
            made.model, functions, config(tmp_path, reward_weights=[1.0, 10.0, 100.0], max_steps=2), dataset(),
            processing_class=made.tokenizer, thinking=THINKING, ratio="joint",
        )  # fmt: skip
        logs = train(trainer)
    assert [line for line in caplog.messages if "is logged as" in line] == [
        "reward 2 is logged as one_2: another one is called one too",
        "reward 3 is logged as one_3: another one is called one too",
    ]
    for log in logs:
        means = [log[f"rewards/{name}/mean"] for name in ("one", "one_2", "one_3")]
        assert means == [3.0, 1.0, 5.0]
        assert log["reward"] == pytest.approx(3.0 + 10.0 + 500.0)
