"""
Tables of options, made from the code while the site is built, so that they cannot differ from it.

A page asks for one with a comment on a line of its own::

    <!-- options: sb3_resnet.ResNetExtractor -->
    <!-- command: check -->
    <!-- thresholds -->
    <!-- all options -->
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

from docs.hooks.docstrings import parameters_of

_MARKER = re.compile(r"^<!-- (all options|options|command|thresholds)(?:: *(\S+))? -->$", re.MULTILINE)
# Stable-Baselines3 passes these; nobody writes them.
_FROM_SB3 = {"observation_space", "action_space", "lr_schedule"}
_REQUIRED = object()


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """
    Hook of MkDocs: put a table where a page asks for one.

    :param markdown: text of a page
    :param kwargs: not used
    :return: the text with its tables
    """
    makers: dict[str, Callable[[str], str]] = {
        "all options": all_options_table,
        "options": options_table,
        "command": command_table,
        "thresholds": thresholds_table,
    }
    return _MARKER.sub(lambda match: makers[match[1]](match[2]), markdown)


def options_table(name: str) -> str:
    """
    What a class or function takes.

    :param name: its dotted name
    :return: a table of all arguments, their defaults and meanings
    """
    return _table(("argument", "default", "meaning"), option_rows(name))


def all_options_table(name: str = "") -> str:
    """
    What all public classes and functions take.

    :param name: not used
    :return: a table of all arguments with their owners, by module and name
    """
    # Owner, argument and default share a column, so that the meaning has room on a phone.
    rows = [
        (f"`{owner.rpartition('.')[2]}`<br>{argument}{f' = {default}' if default else ''}", meaning)
        for owner in public_names()
        if callable(pkgutil.resolve_name(owner))
        for argument, default, meaning in option_rows(owner)
    ]
    return _table(("argument", "meaning"), rows)


def public_names() -> list[str]:
    """
    What the package shows: the names in ``__all__`` of its public modules, each at the place where it is first met.

    :return: dotted names
    """
    package = importlib.import_module("sb3_resnet")
    found: dict[int, str] = {}
    modules = ["sb3_resnet", *(f"sb3_resnet.{info.name}" for info in pkgutil.iter_modules(package.__path__))]
    for module_name in modules:
        if module_name.endswith("__main__"):  # importing it would run the command
            continue
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            found.setdefault(id(getattr(module, name)), f"{module_name}.{name}")
    return [*found.values()]


def command_table(name: str) -> str:
    """
    What a command takes.

    :param name: name of a command of ``sb3-resnet``
    :return: a table of its arguments and options
    """
    import typer

    from sb3_resnet.cli.app import app

    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # of typer's group
    return _table(("option", "default", "meaning"), map(_command_row, command.params))


def thresholds_table(name: str = "") -> str:
    """
    All limits of the diagnosis.

    :param name: not used
    :return: a table of the limits, with who says so
    """
    from sb3_resnet.diagnosis import THRESHOLDS

    rows = ((f"`{name}`", f"{limit.value:g}", limit.source) for name, limit in THRESHOLDS.items())
    return _table(("limit", "value", "source"), rows)


def arguments_of(name: str) -> dict[str, Any]:
    """
    The arguments of a class or function, those of its bases within the package included.

    :param name: its dotted name
    :return: the default of each argument
    """
    return {name: default for name, default, _ in _options(name)}


def option_rows(name: str) -> Iterator[tuple[str, str, str]]:
    """
    :param name: dotted name of a class or function
    :return: argument, default and meaning of each of its arguments, those that SB3 passes last
    """
    for argument, default, meaning in sorted(_options(name), key=lambda option: option[0] in _FROM_SB3):
        if argument in _FROM_SB3:
            shown = "from SB3"
        elif default is _REQUIRED:
            shown = "required"
        else:
            shown = "" if default is inspect.Parameter.empty else _shown(default)
        yield f"`{argument}`", shown, meaning


def _options(name: str) -> Iterator[tuple[str, Any, str]]:
    """Name, default and meaning of each argument; no default is known of what only the docstring names."""
    target = pkgutil.resolve_name(name)
    bases = target.__mro__ if inspect.isclass(target) else (target,)
    own = [base for base in bases if (getattr(base, "__module__", None) or "").startswith("sb3_resnet")]
    # A subclass may describe what the constructor of its base takes.
    anywhere: dict[str, str] = {}
    for base in reversed(own):
        anywhere |= parameters_of(inspect.cleandoc(base.__doc__ or ""))
    seen: set[str] = set()
    for base in own:
        if inspect.isclass(base) and "__init__" not in vars(base):
            continue
        meanings = parameters_of(inspect.cleandoc(base.__doc__ or ""))
        function = vars(base)["__init__"] if inspect.isclass(base) else base
        parameters = [p for n, p in inspect.signature(function).parameters.items() if n != "self"]
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {p.name: _REQUIRED if p.default is p.empty else p.default for p in plain}
        variable = {p.name for p in parameters} - {*found}
        documented = {n: inspect.Parameter.empty for n in meanings if n not in found}
        for argument, default in {**found, **documented}.items():
            if argument not in seen:
                seen.add(argument)
                shown = f"**{argument}" if argument in variable else argument
                yield shown, default, meanings.get(argument) or anywhere.get(argument, "")


def _command_row(parameter: Any) -> tuple[str, str, str]:
    is_option = parameter.param_type_name == "option"
    names = ", ".join(f"`{option}`" for option in parameter.opts) if is_option else f"`{parameter.metavar}`"
    default = parameter.default
    if is_option and parameter.metavar and not parameter.is_flag:
        names += f" `{parameter.metavar}`"
    if parameter.required:
        shown = "required"
    elif is_option and parameter.is_flag:
        shown = "off"
    else:
        shown = "none" if default is None or default == [] else f"`{default}`"
    return names, shown, parameter.help or ""


def _shown(default: Any) -> str:
    if inspect.isclass(default):
        return f"`{default.__name__}`"
    if isinstance(default, int) and not isinstance(default, bool):
        return f"`{default:_}`" if abs(default) >= 10_000 else f"`{default}`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default!r}`"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
