"""A command whose keys are shown in its help and completed by the shell, and read by `parse_overrides`.

A recipe may name any field of TRL's configuration too, so the keys are no options of the command itself: it takes all
words after its first argument as they are.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ON_MODELS = (
    "A model that this package did not train thinks in phase explicit and needs --end_of_thinking. The keys of "
    "Thinking change what a model of this package was trained for (its rl_soft.json), which goes before a default."
)


class KeyedCommand(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and "--help" not in args):
            argument = next(param for param in self.params if param.param_type_name == "argument")
            raise ValueError(f"{self.name} needs {argument.metavar} as its first argument. {self.epilog}")
        ctx.meta["first"] = args[0]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(KeyedCommand, self._with_keys(ctx.meta["first"])).format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return super(KeyedCommand, self._with_keys(ctx.meta.get("first", ""))).shell_complete(ctx, incomplete)

    def _with_keys(self, first: str) -> KeyedCommand:
        """This command with its keys as options, of a recipe that `first` names those of its method alone."""
        from rl_soft.config.commands import EstimateArguments
        from rl_soft.config.reading import find_recipe, read_yaml
        from rl_soft.config.recipe import COMMANDS, GROUPS

        if self.name in COMMANDS:
            groups, note = COMMANDS[self.name], ON_MODELS
        else:
            method = None if not first or first.startswith("-") else read_yaml(find_recipe(first)).get("method")
            methods = [method] if method in GROUPS else list(GROUPS)
            own = (EstimateArguments,) if self.name == "estimate" else ()
            groups, note = (*own, *(group for name in methods for group in GROUPS[name])), _of_recipes(methods)
        shown = copy.copy(self)
        shown.help = f"{self.help}\n\n{_escaped(note)}"
        shown.params = [*self.params, *_options(groups)]
        return shown


def _of_recipes(methods: list[str]) -> str:
    from rl_soft.config.recipe import METHODS
    from rl_soft.config.trainers import CLASSES

    classes: dict[str, list[str]] = {}
    for method in methods:
        classes.setdefault(".".join(CLASSES[method]), []).append(method)
    named = ", ".join(f"{name} ({', '.join(of)})" for name, of in classes.items())
    return (
        f"A recipe names method ({', '.join(METHODS)}), output_dir ({{seed}} in it is the seed) and what it needs of "
        f"the keys below. Any field of {named} may be given too: seed, learning_rate, max_steps, "
        "per_device_train_batch_size, ...; docs/grpo.md has those with a default of ours."
        + ("" if len(methods) == 1 else " rl-soft RECIPE --help shows the keys of its method alone.")
    )


def _options(groups: tuple[type, ...]) -> list[Any]:
    """An option per key, in a panel per class; what classes share stands in a panel of its own."""
    parts = dict.fromkeys(part for group in groups for part in reversed(group.__mro__[:-1]))
    parameters = [parameter for part in parts for parameter in _parameters(part)]

    def keys() -> None: ...

    keys.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made = typer.Typer(add_completion=False)
    made.command()(keys)
    return typer.main.get_command(made).params


def _parameters(part: type) -> Iterator[inspect.Parameter]:
    from rl_soft.keys import fields, takes

    title = f"{part.__name__}: {(part.__doc__ or '').strip().splitlines()[0]}"
    for name in inspect.get_annotations(part):
        field = fields(part)[name]
        default = field.get_default(call_default_factory=True)
        if name == "model_name_or_path" and default == "":  # the first argument of a command on a model
            continue
        plain = isinstance(default, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", default)
        told = _escaped(f"{field.description} ({takes(field)}; default {default if plain else json.dumps(default)})")
        option = typer.Option(f"--{name}", help=told, metavar="", rich_help_panel=title, show_default=False)
        yield inspect.Parameter(
            f"{part.__name__}_{name}",  # two classes may have a key of one name
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, option],
        )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
