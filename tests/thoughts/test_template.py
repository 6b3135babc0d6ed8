"""What the chat template is told: the same prompts in training, evaluation and generation.

pytest tests/thoughts/test_template.py
"""

import dataclasses

import pytest
from conftest import tiny_policy

from rl_soft.thoughts.layout import Layout, check_texts
from rl_soft.thoughts.thinking import Thinking

# as Qwen3's: a closed block of thinking stands in the prompt where thinking is switched off
QWEN3 = (
    "{% for m in messages %}{{ m.content }};{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}#--#{% endif %}"
)
EXPLICIT = Thinking(phase="explicit", end_of_thinking="#", num_thoughts=3, thought_k=3, max_answer_tokens=2)


def layout(template=QWEN3, **values):
    tokenizer = tiny_policy().tokenizer
    tokenizer.chat_template = template
    return Layout(dataclasses.replace(EXPLICIT, **values), tokenizer)


@pytest.mark.parametrize(("told", "ending"), [(None, ""), ({"enable_thinking": True}, ""),
                                             ({"enable_thinking": False}, "#--#")])  # fmt: skip
def test_the_template_is_told(told, ending):
    made = layout(chat_template_kwargs=told)
    check_texts(made)
    expected = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, **(told or {})
    )
    assert made.prompt_ids("1+1") == expected["input_ids"] == made.encode("1+1;" + ending)
    assert made.prompt_ids([{"role": "user", "content": "1+1"}]) == made.prompt_ids("1+1")


def test_a_template_of_the_recipe_is_the_tokenizer_s_from_then_on():
    made = layout(template=None, chat_template="{% for m in messages %}{{ m.content }}={% endfor %}")
    check_texts(made)
    assert made.prompt_ids("1+1") == made.encode("1+1=")
    assert made.tokenizer.chat_template == made.thinking.chat_template


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chat_template_kwargs": {"enable_thinkin": False}}, "enable_thinkin .* is no name in the tokenizer's chat"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize .* is not for a recipe to say"),
        ({"template": None, "chat_template_kwargs": {"a": 1}}, "needs a chat template, and the tokenizer has none"),
        ({"chat_template": "{% for"}, "chat_template '{% for' cannot be used"),
    ],
)
def test_what_has_no_effect_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check_texts(layout(**values))


def test_thinking_with_a_mapping_can_be_a_key():
    one, same = (dataclasses.replace(EXPLICIT, chat_template_kwargs={"enable_thinking": False}) for _ in range(2))
    assert {one: 1}[same] == 1 and Thinking.from_dict(one.to_dict()) == one != EXPLICIT
