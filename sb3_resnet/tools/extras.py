"""Libraries outside of the core, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str = "tools") -> Any:
    """
    :param module: name of a module, such as ``"captum.attr"``
    :param extra: the extra of this package that installs it
    :return: the module
    :raises ImportError: if it is missing, with the command that installs it
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module.split('.')[0]} is missing ({error}): pip install 'sb3_resnet[{extra}]'") from error
