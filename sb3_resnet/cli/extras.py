"""Optional libraries, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

#: Words in an import error, and the extra that installs the missing library.
_EXTRAS = {
    "ale_py": "atari",
    "cv2": "atari",
    "OpenCV": "atari",
    "rl_zoo3": "zoo",
    "sb3_contrib": "contrib",
    "onnx": "tools",  # and onnxruntime, onnxscript, onnx_ir
}


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
        # What is missing may be what the module itself imports.
        name = (error.name or module).split(".")[0]
        what = "is missing" if isinstance(error, ModuleNotFoundError) else "cannot be imported"
        pip = f"pip install 'sb3_resnet[{_extra_of(name) or extra}]'"
        raise ImportError(f"{name} {what} ({error}): {pip}", name=name) from error


def missing_extra(error: BaseException) -> str:
    """
    :param error: any error
    :return: the command that installs the missing extra; empty if neither the error nor its cause is a missing module
    """
    if "sb3_resnet[" in str(error):
        return ""
    # SB3 asserts that OpenCV is installed, and gymnasium has an error class of its own.
    if not isinstance(error, ImportError) and "not installed" not in str(error):
        return "" if error.__cause__ is None else missing_extra(error.__cause__)
    extra = _extra_of(f"{getattr(error, 'name', '')} {error}")
    return "" if extra is None else f"pip install 'sb3_resnet[{extra}]'"


def _extra_of(words: str) -> str | None:
    return next((extra for word, extra in _EXTRAS.items() if word in words), None)
