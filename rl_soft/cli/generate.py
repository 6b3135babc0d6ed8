"""`rl-soft generate`: soft thinking in the terminal, as JSON lines, or into a file that a stopped run goes on with.

The questions, and how a question becomes ids, are those of `rl-soft eval`; with the same seed and caps a question of
a data set has the same completions here and there.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from rl_soft.cli.opening import choose_roll, load_policy, place, with_dtype
from rl_soft.cli.plans import load_rows, thinking_of
from rl_soft.cli.terminal import Terminal, decoder
from rl_soft.config.commands import GenerateArguments
from rl_soft.config.recipe import load_command
from rl_soft.data.row import encodable
from rl_soft.evaluation.generation import Completion, Mixture, Task, complete, layout_for
from rl_soft.evaluation.records import GREEDY
from rl_soft.files import JsonLines
from rl_soft.model.devices import device
from rl_soft.model.folder import model_folder, read_thinking
from rl_soft.thoughts.layout import tell_template

logger = logging.getLogger("rl_soft")

CAPS = {"num_thoughts": 256, "max_answer_tokens": 128}  # of a model that is not ours, where none are given


def run(model: str, overrides: dict[str, Any]) -> None:
    """Generate and print; go on where a run into the same `output` was stopped.

    Args:
        model: a folder of ours, a run, a transformers or PEFT folder, or a hub id.
        overrides: fields of `GenerateArguments`, of `Thinking` to change the model's own, and of `Decoding`.

    Raises:
        ValueError: arguments, questions and model that do not fit, or a file that holds completions of another run.
    """
    model = model_folder(model)
    arguments, changes, decoding = load_command("generate", model, overrides)
    arguments = with_dtype(arguments)
    ours = read_thinking(Path(model)) is not None or changes.get("phase") == "latent"
    thinking = thinking_of(model, changes if ours else CAPS | changes)
    questions = read_questions(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("generate runs in one process; `rl-soft eval` shares problems out over several")
    settings = {
        "model": model,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        **({} if arguments.engine == "ours" else {"engine": arguments.engine}),
        **thinking.to_dict(),
        **decoding.to_dict(),
    }
    numbers = [GREEDY] if arguments.greedy else list(range(arguments.samples))
    tasks = [Task(name, question, n) for name, question in questions.items() for n in numbers]
    output = Output(Path(arguments.output), settings, questions) if arguments.output else None
    try:
        if output is not None:
            missing = [task for task in tasks if (task.id, task.sample) not in output.done]
            if len(missing) < len(tasks):
                logger.info("%s has %d of %d completions", output.path, len(tasks) - len(missing), len(tasks))
            tasks = missing
        if not tasks:
            return
        loaded = load_policy(model, arguments)
        layout = layout_for(loaded.model, loaded.tokenizer, thinking)
        tell_template(layout)
        roll = choose_roll(model, arguments, [layout], questions.values())
        place(loaded.model, device())
        soft = thinking.support_size(loaded.model.config.get_text_config().vocab_size) > 1
        terminal = Terminal(decoder(loaded.tokenizer), arguments.show if soft else 0, thinking.end_of_thinking)
        streams = len(tasks) == 1 and not arguments.json

        def each(done: Completion) -> None:
            if arguments.json:
                print(json.dumps({**done.to_dict(), "settings": settings}), flush=True)
            elif streams:
                terminal.end(done)
            else:
                terminal.whole(done)
            if output is not None:
                output.add(done)

        def stream(kind: str, mixture: Mixture) -> None:
            if not (terminal.thoughts or terminal.resting):  # now it is certain that nothing is refused
                terminal.question(tasks[0].question)
            terminal.position(kind, mixture)

        watch = stream if streams else None
        complete(loaded.model, layout, tasks, decoding, arguments.seed, arguments.batch_size, each, watch, roll)
    except KeyboardInterrupt:
        logger.info("stopped%s", "; the same command goes on with what is missing" if output is not None else "")
        raise SystemExit(130) from None
    finally:
        if output is not None:
            output.close()


def read_questions(arguments: GenerateArguments) -> dict[str, str]:
    """Name -> question, in order.

    Raises:
        ValueError: a file that is missing, empty, or has a line without a question; a question that is no Unicode; a
            data set that `data` refuses.
    """
    if arguments.prompt:
        return {"0": encodable(arguments.prompt, "prompt")}
    if arguments.dataset:
        return {row.id: row.question for row in load_rows(arguments)}
    path = Path(str(arguments.prompts))
    if not path.is_file():
        raise ValueError(f"prompts {path}: no such file; give one question with --prompt TEXT")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, question = str(len(found)), line
        if path.suffix == ".jsonl":
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            text = value.get("question") if isinstance(value, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"prompts {path}, line {number}: expected a JSON object with a text `question`")
            name, question = str(name if value.get("id") is None else value["id"]), text
        if name in found:
            raise ValueError(f"prompts {path}, line {number}: id {name!r} is there already")
        found[name] = encodable(question, f"prompts {path}, line {number}")
    if not found:
        raise ValueError(f"prompts {path} holds no question")
    return found


class Output(JsonLines):
    """A file of completions; see `JsonLines`. Each line says by which settings it was made: all are of the same.

    Attributes:
        done: every (prompt id, sample) in it.

    Raises:
        ValueError: what `JsonLines` refuses; a line of other settings or of another question of the same name.
    """

    def __init__(self, path: Path, settings: dict[str, Any], questions: dict[str, str]) -> None:
        self.settings, self.done = settings, set[tuple[str, int]]()
        what = "a completion of `rl-soft generate`; choose another file"
        ours = json.loads(json.dumps(settings))  # as it is read back

        def check(found: list[dict[str, Any]]) -> None:
            for number, value in enumerate(found, start=1):
                try:
                    key, question, theirs = (
                        (value["prompt_id"], value["sample"]),
                        value["prompt"],
                        {**value["settings"]},
                    )
                    self.done.add(key)
                except (KeyError, TypeError):
                    raise ValueError(f"{path}, line {number}: not {what}") from None
                for name in sorted(ours.keys() | theirs.keys()):
                    if theirs.get(name) != ours.get(name):
                        raise ValueError(
                            f"{path} holds completions with {name} = {theirs.get(name)!r}, this run has "
                            f"{ours.get(name)!r}; choose another file to keep both"
                        )
                if questions.get(key[0], question) != question:
                    raise ValueError(f"{path} holds another question of the name {key[0]!r}; choose another file")

        try:
            super().__init__(path, what, check, b'{"prompt_id": ')
        except ValueError as error:
            raise ValueError(f"output {error}") from None

    def add(self, done: Completion) -> None:
        self.append({**done.to_dict(), "settings": self.settings})
