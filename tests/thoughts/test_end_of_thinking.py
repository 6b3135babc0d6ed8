"""The end of thinking is its text: whatever tokens spell it, thinking ends there, and what stands behind it is judged.

pytest tests/thoughts/test_end_of_thinking.py
"""

import itertools
import random

import pytest
import torch
from conftest import tiny_policy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.end_of_thinking import EndOfThinking
from rl_soft.thoughts.layout import Layout, check_texts
from rl_soft.thoughts.thinking import Thinking

WORDS = [" ####", "\n####", ".####", "####", "##", "#", "####5", " so", " The", " answer", "\n", "a", "aab", "ab", "b"]


def byte_level(extra=(), special=(), words=WORDS):
    """A tokenizer of bytes, as GPT-2's, whose vocabulary spells an end in many ways."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["a"], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    made.add_special_tokens(list(special))
    made.add_tokens([AddedToken(word, special=False, normalized=False) for word in (*words, *extra)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def sentence_piece():
    """A tokenizer that writes a space as part of a word, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "#", "##", "####", "▁####", "▁a", "1", "▁1", "\n"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("end", ["####", "\n####", "aab", "abab", " The answer", "#"])
def test_the_count_is_that_of_the_text(end):
    """Against the text itself: thinking ends with the first token after which the end has been said."""
    tokenizer, pick = byte_level(), random.Random(0)
    found = EndOfThinking.of(end, tokenizer)
    for _ in range(300):
        ids = [tokenizer.convert_tokens_to_ids(word) for word in pick.choices(WORDS, k=8)]
        texts = ["", *itertools.accumulate(found.texts[i] for i in ids)]
        n = next((n for n, text in enumerate(texts) if end in text), None)
        said = found.split(ids)
        assert said == (None if n is None else (n, texts[n][texts[n].index(end) + len(end) :]))


def test_a_token_has_its_text_behind_other_text():
    found = EndOfThinking.of("a ####", sentence_piece())
    tokenizer = sentence_piece()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "▁####", "1"])
    assert found.split(ids) == (2, "")


@pytest.mark.parametrize("end", ["</think>", "[/THINK]", "<|end_of_thought|>"])
@pytest.mark.parametrize("special", [True, False])
def test_what_stands_before_the_end_is_not_judged(end, special):
    tokenizer = byte_level(extra=[] if special else [end], special=[end] if special else [])
    layout = Layout(Thinking(phase="explicit", end_of_thinking=end, num_thoughts=60), tokenizer)
    check_texts(layout)
    ids = layout.encode(r"Try \boxed{3}; no.") + layout.end_ids + layout.encode(" The answer is 4.")
    assert layout.answer_text([*ids, tokenizer.eos_token_id]) == " The answer is 4."
    assert layout.answer_text(layout.encode("3 and 4")) == "", "thinking that was not ended has no answer"


def test_an_end_that_cannot_be_heard_is_refused():
    letters = tiny_policy().tokenizer
    with pytest.raises(ValueError, match="end_of_thinking 'done' cannot be produced by this tokenizer"):
        check_texts(Layout(Thinking(phase="explicit", end_of_thinking="done"), letters))
    with pytest.raises(ValueError, match=r"end_of_thinking '<eos>' holds '<eos>', which ends the completion"):
        check_texts(Layout(Thinking(phase="explicit", end_of_thinking="<eos>"), byte_level()))


@pytest.mark.parametrize("word", [" ####", "\n####", ".####", "####", "####5", "##"])
@pytest.mark.parametrize("thought", ["token", "gumbel"])
def test_a_rollout_hears_every_spelling(word, thought):
    """A model that is made to write the end in some token stops thinking there, and goes on with the answer."""
    tokenizer = byte_level()
    made = tiny_policy()
    made.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    thinking = Thinking(
        phase="explicit", thought=thought, thought_k=2, end_of_thinking="####", num_thoughts=7, max_answer_tokens=2
    )
    layout, target = Layout(thinking, tokenizer), tokenizer.convert_tokens_to_ids(word)
    head = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.full((len(tokenizer),), -20.0))
        head.bias[target] = 20.0
    made.model.lm_head, made.model.config.tie_word_embeddings = head, False
    out = rollout(made.model, layout, [[1, 2, 3]], None, [tokenizer.eos_token_id])
    thoughts = 2 if word == "##" else 1
    assert int(out.thought_mask.sum()) == thoughts, "not the cap"
    assert layout.answer_text(out.completion_ids[0].tolist()).startswith("5" if word == "####5" else word)
