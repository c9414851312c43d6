"""Optional libraries, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

#: Words in an import error, and the extra that installs the missing library.
_EXTRAS = {"ale_py": "atari", "cv2": "atari", "OpenCV": "atari", "rl_zoo3": "zoo", "sb3_contrib": "contrib"}


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


def missing_extra(error: BaseException) -> str:
    """
    :param error: any error
    :return: the command that installs the missing extra; empty if the error has another cause
    """
    if not isinstance(error, ImportError) or "sb3_resnet[" in str(error):
        return ""
    extra = next((extra for word, extra in _EXTRAS.items() if word in f"{error.name} {error}"), None)
    return "" if extra is None else f"pip install 'sb3_resnet[{extra}]'"
