"""What holds for the repository and the import, whatever the models do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_resnet

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "ale_py",
    "captum",
    "cv2",
    "imageio",
    "mlflow",
    "onnx",
    "onnxruntime",
    "optuna",
    "psutil",
    "rl_zoo3",
    "safetensors",
    "sb3_contrib",
    "sqlalchemy",
    "typer",
    "wandb",
)
TO_SB3_ALONE = """
import sys
import stable_baselines3
before = set(sys.modules)
import sb3_resnet
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
WITHOUT_EXTRAS_AND_NETWORK = """
import socket, sys, warnings
for name in %r:
    sys.modules[name] = None  # as if it were not installed

def refuse(*args):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
warnings.simplefilter("ignore")
import sb3_resnet, sb3_resnet.envs
from stable_baselines3 import DQN
from stable_baselines3.common.envs import FakeImageEnv

model = DQN("ResNetCnnPolicy", FakeImageEnv(), buffer_size=10, device="cpu")
print(type(model.policy).__name__)
"""


@pytest.mark.slow
def test_importing_the_package_imports_no_extra_but_sb3_contrib():
    # Counted from SB3's own imports on: it takes OpenCV along where that is installed.
    imported = python(TO_SB3_ALONE).split()
    assert "sb3_resnet" in imported
    assert {*imported} & {*OPTIONAL} <= {"sb3_contrib"}


@pytest.mark.slow
def test_the_command_starts_without_the_libraries_of_single_subcommands():
    imported = python("import sys, sb3_resnet.cli.app; print(*sys.modules)").split()
    assert "sb3_resnet.cli.explain" in imported
    assert not {*imported} & {"ale_py", "captum", "imageio", "mlflow", "onnx", "onnxruntime", "rl_zoo3", "wandb"}


@pytest.mark.slow
def test_the_core_works_without_extras_and_without_the_network():
    assert python(WITHOUT_EXTRAS_AND_NETWORK % (OPTIONAL,)).strip() == "ResNetCnnPolicy"


def test_registering_twice_changes_nothing():
    from stable_baselines3 import DQN

    before = dict(DQN.policy_aliases)
    sb3_resnet.register_policies()
    assert DQN.policy_aliases == before
    assert DQN.policy_aliases["ResNetCnnPolicy"] is sb3_resnet.ResNetCnnPolicy


@pytest.mark.parametrize("name", sb3_resnet.__all__)
def test_public_names_are_documented(name):
    assert (getattr(sb3_resnet, name).__doc__ or "").strip()


def test_the_changelog_names_the_version():
    assert sb3_resnet.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_no_tracked_file_holds_a_path_of_somebodys_machine():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w")
    found = [
        f"{name}: {line.strip()}"
        for name in listing.stdout.split("\0")
        if (ROOT / name).is_file()
        for line in (ROOT / name).read_text(errors="replace").splitlines()
        if private.search(line)
    ]
    assert not found


def python(code):
    """:return: what the code prints in a fresh interpreter"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "sb3_resnet" / "callbacks").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_a_callback_imports_no_other_callback(path):
    imported = {*re.findall(r"from sb3_resnet\.callbacks\.([a-z]\w*) import", path.read_text())}
    assert path.stem == "__init__" or not imported


#: Methods that SB3 and PyTorch document for subclasses to override, so that ``super()._x()`` belongs to it.
PROTECTED_HOOKS = {
    "_apply",
    "_build",
    "_build_mlp_extractor",
    "_get_constructor_parameters",
    "_init_callback",
    "_load_from_state_dict",
    "_on_event",
    "_on_rollout_end",
    "_on_rollout_start",
    "_on_step",
    "_on_training_end",
    "_on_training_start",
    "_predict",
}
SEAMS = {"common/host.py", *(f"common/host_{part}.py" for part in ("optuna", "progress", "ranks", "zoo"))}
BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "attrgetter")
STACK = {"_getframe", "currentframe", "f_back", "f_locals", "stack", "trace", "getouterframes"}


def private_accesses(code):
    """
    Private parts of anything but the object itself: ``model._x``, ``self.model._x``, ``getattr(model, "_x")``, imports
    from private modules, and the frames of other functions.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and (is_foreign(node) or is_of_the_stack(node)):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_NAME):
            of_self = bool(node.args) and ast.unparse(node.args[0]) in ("self", "cls")
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if not of_self and any(is_private(part) for text in texts for part in text.split(".")):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("sb3_resnet"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, parts)) or (node.module in ("sys", "inspect") and {*parts} & STACK):
                yield node.lineno, ast.unparse(node)


def is_foreign(node):
    if not is_private(node.attr) or (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
        return False
    of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
    return not (of_super and node.attr in PROTECTED_HOOKS)


def is_of_the_stack(node):
    return node.attr in STACK and (node.attr.startswith("f_") or ast.unparse(node.value) in ("sys", "inspect"))


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def test_private_parts_of_other_objects_are_touched_in_one_place():
    package = ROOT / "sb3_resnet"
    found = [
        f"{path.relative_to(package)}:{line}: {text}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).as_posix() not in SEAMS
        for line, text in private_accesses(path.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "model._n_updates",
        "self.model._n_updates",
        "model._last_obs[0]",
        "model._total_timesteps",
        "model._logger",
        "hasattr(model, '_logger')",
        "getattr(th.cpu, '_is_avx512_bf16_supported', None)",
        "attrgetter('_version')",
        "attrgetter('weight._version')",
        "optimizer._optimizer_step_pre_hooks",
        "self.optimizer._optimizer_step_pre_hooks",
        "module._parameters",
        "th._amp_update_scale_(x)",
        "th._C._nn.x",
        "th.ops.mkldnn._convolution_pointwise",
        "tensor._version",
        "super()._update_features_extractor(x)",
        "policy._build(x)",
        "self._callback._x",
        "from torch._guards import x",
        "from torch.amp.grad_scaler import _x",
        "sys._getframe()",
        "inspect.stack()",
        "inspect.currentframe()",
        "from inspect import currentframe",
        "frame.f_back",
        "frame.f_locals['x']",
    ],
)
def test_the_search_for_private_parts_finds_them(code):
    assert [line for line, _ in private_accesses(code)][:1] == [1]


@pytest.mark.parametrize(
    "code",
    [
        "self._x",
        "cls._x()",
        "getattr(self, '_x', None)",
        "super()._build(x)",
        "super().__init__()",
        "x.__class__",
        "from sb3_resnet.callbacks._updates import record",
        "th.stack([x])",
        "from __future__ import annotations",
    ],
)
def test_the_search_for_private_parts_lets_others_pass(code):
    assert not [*private_accesses(code)]


MODULES = sorted((ROOT / "sb3_resnet").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "split it by what changes together"
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert not [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60]


def test_the_top_level_is_small_enough_to_read_at_a_glance():
    here = {path.relative_to(ROOT / "sb3_resnet") for path in MODULES}
    modules = [path.name for path in here if len(path.parts) == 1 and not path.name.startswith("_")]
    packages = {path.parts[0] for path in here if len(path.parts) > 1}
    assert 0 < len(modules) <= 8
    assert 0 < len(packages) <= 8


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.stem)
def test_test_files_do_not_import_from_each_other_and_use_no_private_names_of_the_package(path):
    """What several need is in helpers.py, and a public effect outlives the name of what brought it about."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert not module.startswith("tests.test_"), f"{path.name}: {module}"
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not (module.startswith("sb3_resnet") and private), f"{path.name}: {private}"
