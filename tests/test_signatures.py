"""Public classes and functions say what they take: in their signature, and in their docstring."""

import importlib
import inspect
import pkgutil
import re

import pytest
from stable_baselines3.common.callbacks import BaseCallback

import sb3_resnet
from sb3_resnet import callbacks

CALLBACKS = [value for value in vars(callbacks).values() if inspect.isclass(value) and issubclass(value, BaseCallback)]


def public():
    """:return: by dotted name: all public classes, functions and methods that the package defines"""
    found = {}
    for info in pkgutil.walk_packages(sb3_resnet.__path__, "sb3_resnet."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            found[f"{info.name}.{name}"] = value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(function) and not method.startswith("_"):
                    found[f"{info.name}.{name}.{method}"] = function
    return {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}


def exported():
    """:return: by dotted name: what is in an ``__all__``"""
    names = ["sb3_resnet", *(info.name for info in pkgutil.walk_packages(sb3_resnet.__path__, "sb3_resnet."))]
    modules = [importlib.import_module(name) for name in names]
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules
        for name in vars(module).get("__all__", ())
    }


#: Packages in which each public function describes all parameters; commands describe theirs in their options' help.
COMPLETE = ("sb3_resnet.cli.", "sb3_resnet.common.")
EXPORTED = exported()
DOCUMENTED = {**public(), **{name: value for name, value in EXPORTED.items() if callable(value)}}


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda cls: cls.__name__)
def test_a_callback_lists_its_arguments_and_python_refuses_all_others(cls):
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        cls(colour="red")


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_a_docstring_names_the_parameters_of_the_signature(name):
    value = DOCUMENTED[name]
    described = re.findall(r":param (\w+):", docstring(value))
    taken = parameters(value)
    assert not {*described} - {*taken}, "it describes what it does not take"
    if name in EXPORTED or described or (name.startswith(COMPLETE) and "context" not in taken):
        assert not {*taken} - {*described} - {"args", "kwargs"}, "it does not describe all that it takes"
    assert len(described) == len({*described})


def docstring(value):
    """:return: that of a function; those of a class and of its bases in this package, up to its constructor"""
    if not inspect.isclass(value):
        return value.__doc__ or ""
    owner = next(cls for cls in value.__mro__ if "__init__" in vars(cls))
    own = [cls for cls in value.__mro__[: value.__mro__.index(owner) + 1] if cls.__module__.startswith("sb3_resnet")]
    return "\n".join(vars(cls).get("__doc__") or "" for cls in own)


def parameters(value):
    """:return: names of what a user passes; nothing for a class whose constructor is another library's"""
    if inspect.isclass(value):
        owner = next(cls for cls in value.__mro__ if "__init__" in vars(cls))
        if not owner.__module__.startswith("sb3_resnet"):
            return []
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]
