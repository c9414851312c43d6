"""
Every code block of README and pages runs, with small budgets, and what it prints is compared with what the page shows.

CONTRIBUTING.md says how to write a block: which names it may use without an import, and the comments that it may have.
"""

import argparse
import ast
import builtins
import contextlib
import doctest
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
import torchvision
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.callbacks import CallbackList, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_resnet
import sb3_resnet.envs
import sb3_resnet.pretraining
from tests.helpers import PONG, SHORT_RUN, TinyGame, slowly, zoo

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
STEPS = 24
#: Arguments of algorithms, and the most that a test lets them be.
MOST = {"buffer_size": 200, "learning_starts": 8, "batch_size": 8, "n_epochs": 1}
#: Why a block is not run: `<!-- not run: REASON -->` takes one of these.
NOT_RUN = {
    "it needs several machines",
    "it needs a GPU",
    "it needs a service",
    "it needs a library that no extra installs",
    "another page runs it",
    "another test starts several processes",
}
#: What users install or build; a test of its own compares their arguments with pyproject.toml and the Makefile.
CHECKED_ONLY = ("pip", "make", ".ci/run")
#: Added to commands that would take minutes.
SMALL = {
    "sb3-resnet pretrain": "--updates 2 --frames 400 --held-out 240 --n-envs 4 --batch-size 8 --probe-every 1",
    "python -m rl_zoo3.train": "-n 60 --eval-freq -1 -params learning_starts:20 buffer_size:200 batch_size:4",
    "python -m rl_zoo3.enjoy": "-n 20 --no-render",
    "sb3-resnet check": "--batch-size 2",
    "sb3-resnet explain": "--steps 20 --frames 2",
    "sb3-resnet probe": "--steps 120",
    "sb3-resnet watch": "--steps 20",
}


class Block(NamedTuple):
    language: str
    code: str
    comments: dict[str, str]
    line: int


def blocks_of(page):
    """:return: the code blocks of a page, with the comments before each, such as ``<!-- before: env = None -->``"""
    fence = re.compile(
        r"(?P<comments>(?:^[ ]*<!--[^\n]*-->\n\n?)*)^(?P<indent>[ ]*)```(?P<info>[^\n]*)\n"
        r"(?P<code>.*?)^(?P=indent)```[ ]*$",
        re.MULTILINE | re.DOTALL,
    )
    text = page.read_text(encoding="utf-8")
    found = []
    for match in fence.finditer(text):
        comments = dict(re.findall(r"<!-- ([a-z ]+?)(?:: (.*?))? -->", match["comments"]))
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        follows = text[: match.start()].rstrip().endswith("```")
        if match["info"].strip() == "text" and follows:
            comments["output"] = ""
        found.append(Block(match["info"].strip(), code, comments, text[: match.start("code")].count("\n")))
    return found


def masked(text):
    """:return: the text with ``#`` for each number and one space for each gap"""
    return " ".join(re.sub(r"[-\u2212+]?\d[\d.,_]*(?:e[-+]?\d+)?", "#", text).split())


class Page:
    """Runs the blocks of a page one after the other, in one folder and one namespace."""

    def __init__(self, given, weights):
        self.given, self.weights = given, weights
        self.names = {}
        self.printed = None

    def run(self, block):
        if "not run" in block.comments:
            assert block.comments["not run"] in NOT_RUN, "write one of the reasons in tests/test_pages.py"
            return
        if block.language == "text":
            if "output" in block.comments:
                self.compare(block)
            return
        known = {"python": self.python, "pycon": self.pycon, "yaml": self.yaml, "bash": self.script, "": self.shell}
        assert block.language in known, f"a block of unknown language {block.language!r}"
        run = known[block.language]
        self.printed = run(block)

    def compare(self, block):
        assert self.printed is not None, "this output follows no block that runs"
        if "numbers vary" in block.comments:
            assert masked(self.printed) == masked(block.code)
        else:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(block.code, self.printed, flags), self.printed

    def python(self, block):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for code in (block.comments.get("before", ""), block.code):
                self.supply(code)
                exec(compile(code, "block", "exec"), self.names)
        return printed.getvalue()

    def pycon(self, block):
        example = doctest.DocTestParser().get_doctest(block.code, {}, "block", None, 0)
        self.supply("".join(line.source for line in example.examples))
        example.globs = self.names
        report = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(example, out=report.write, clear_globs=False)
        assert runner.failures == 0, report.getvalue()

    def yaml(self, block):
        """Train with it through RL-Zoo: the first section of a file, or lines of one."""
        given = yaml.safe_load(block.code)
        if "policy" in block.comments:  # arguments of a policy that no game of Atari has
            kwargs = given if "features_extractor_kwargs" in given else {"features_extractor_kwargs": given}
            PPO(block.comments["policy"], self.given[block.comments["env"]](), policy_kwargs=kwargs).learn(STEPS)
            return
        algorithm = block.comments.get("algorithm", "dqn")
        sections = [key for key in given if key in ("atari", "default") or key.endswith("NoFrameskip-v4")]
        lines = given[sections[0]] if sections else given
        base = {"policy": "ResNetCnnPolicy", "n_timesteps": STEPS}
        base["env_wrapper"] = ["stable_baselines3.common.atari_wrappers.AtariWrapper"]
        base |= {"frame_stack": 4, "policy_kwargs": {"features_extractor_kwargs": {"backbone": "resnet_tiny"}}}
        small = SHORT_RUN if algorithm in ("dqn", "qrdqn") else {"n_steps": 8, "batch_size": 8}
        Path("block.yml").write_text(yaml.safe_dump({PONG: base | lines}))
        manager = ExperimentManager(
            argparse.Namespace(),
            algorithm,
            PONG,
            "logs",
            n_timesteps=STEPS,
            eval_freq=10_000,  # never, but RL-Zoo tells its EvalCallback where to save
            log_interval=-1,
            hyperparams=dict(small),
            config="block.yml",
            device="cpu",
        )
        model, _ = manager.setup_experiment()
        manager.learn(model)
        assert model._n_updates > 0

    def script(self, block):
        """For a scheduler, which is not here: its syntax alone."""
        done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ""

    def shell(self, block):
        """Each command in a shell, where ``python`` and ``sb3-resnet`` are those that run this test."""
        printed = []
        lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
        for line in filter(None, (line.strip().removeprefix("$ ") for line in lines)):
            if line.startswith("#") or line.split()[0] in CHECKED_ONLY:
                continue
            script = re.match(r"python ((?:benchmarks|scripts|examples)/\S+\.py)", line)
            if script:  # measures for minutes or hours; other tests run parts of it
                assert (ROOT / script[1]).is_file(), line
                continue
            printed.append(self.command(line))
        return "".join(printed)

    def command(self, line):
        line = line.partition("  # ")[0]
        added = [options for start, options in SMALL.items() if line.startswith(start)]
        if "-optimize" in line:
            added.append("--n-evaluations 1 --eval-episodes 1 --max-total-trials 1")
        bin_ = Path("bin")
        if not bin_.exists():
            bin_.mkdir()
            for name, what in (("python", ""), ("sb3-resnet", "-m sb3_resnet")):
                (bin_ / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what} "$@"\n')
                (bin_ / name).chmod(0o755)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TORCH_HOME": str(self.weights)}
        environment["PATH"] = f"{bin_.resolve()}{os.pathsep}{environment['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        done = subprocess.run(["bash", "-c", " ".join([line, *added])], env=environment, capture_output=True, text=True)
        # Of sb3-resnet, 1 means that it found something wrong, which is no failure of the command.
        fine = (0, 1) if line.startswith(("sb3-resnet check", "sb3-resnet doctor")) else (0,)
        assert done.returncode in fine, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert not done.stderr.startswith("Error:"), done.stderr
        return done.stdout

    def supply(self, code):
        """Make the names that the code uses without having made them."""
        wanted = [node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
        for name in wanted:
            if name in self.given and name not in self.names and not hasattr(builtins, name):
                self.names[name] = self.given[name]()


class ContinuousGame(TinyGame):
    """The same, with an action that is a number."""

    def __init__(self):
        super().__init__((3, 40, 40))
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def step(self, action):
        return super().step(round(float(action[0])) + 1)


class SixActions(TinyGame):
    """As many as Pong has."""

    def __init__(self):
        super().__init__((4, 40, 40))
        self.action_space = gym.spaces.Discrete(6)


class DictGame(TinyGame):
    """Two images and a number."""

    def __init__(self):
        super().__init__((3, 40, 40))
        depth, speed = gym.spaces.Box(0, 255, (1, 40, 40), np.uint8), gym.spaces.Box(-300, 300, (2,), np.float32)
        self.observation_space = gym.spaces.Dict({"camera": self.observation_space, "depth": depth, "speed": speed})

    def _observe(self):
        image = self.np_random.integers(0, 256, (4, 40, 40), np.uint8)
        self.column = int(self.np_random.integers(3))
        return {"camera": image[:3], "depth": image[3:], "speed": self.np_random.normal(size=2).astype(np.float32)}

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.clock, self.episode = 0, self.episode + 1
        return self._observe(), {}


class ContinuousDictGame(DictGame):
    """The same, with an action that is a number."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def step(self, action):
        return super().step(round(float(action[0])) + 1)


class GoalGame(DictGame):
    """Goals that are images, as HerReplayBuffer wants them."""

    def __init__(self):
        super().__init__()
        image = self.observation_space["camera"]
        names = ("observation", "achieved_goal", "desired_goal")
        self.observation_space = gym.spaces.Dict(dict.fromkeys(names, image))

    def _observe(self):
        camera = super()._observe()["camera"]
        return dict.fromkeys(self.observation_space, camera)

    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.zeros(len(achieved_goal))


def game():
    return DummyVecEnv([SixActions])


def given_names():
    """:return: what makes each name that a block may use without an import"""
    modules = {"gym": gym, "np": np, "sb3_resnet": sb3_resnet, "th": th}
    classes = {"A2C": A2C, "DQN": DQN, "EvalCallback": EvalCallback, "PPO": PPO, "QRDQN": QRDQN, "SAC": SAC}
    return {
        **{name: lambda value=value: value for name, value in {**modules, **classes}.items()},
        "callbacks": lambda: CallbackList([]),
        "continuous_dict_env": lambda: DummyVecEnv([ContinuousDictGame]),
        "continuous_env": lambda: DummyVecEnv([ContinuousGame]),
        "dict_env": lambda: DummyVecEnv([DictGame]),
        "env": game,
        "eval_env": game,
        "folder": lambda: "logs",
        "phases": lambda: [{"at_timestep": 20, "unfreeze_from": "layer4"}],
        "goal_env": lambda: DummyVecEnv([GoalGame]),
        "model": lambda: DQN("ResNetCnnPolicy", game(), buffer_size=200),
    }


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """A hub cache with weights of random numbers under the names of torchvision's."""
    home = tmp_path_factory.mktemp("torch")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    th.manual_seed(0)
    for build, weights in (
        (torchvision.models.resnet18, torchvision.models.ResNet18_Weights.DEFAULT),
        (torchvision.models.resnet50, torchvision.models.ResNet50_Weights.DEFAULT),
    ):
        th.save(build(weights=None).state_dict(), folder / weights.url.rsplit("/", 1)[-1])
    return home


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder as a user has it: files of the repository, and a run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("zoo_configs", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    small = [f"{key}:{value}" for key, value in SHORT_RUN.items()]
    config = ROOT / "zoo_configs" / "dqn.yml"
    zoo("train", "dqn", folder / "logs", "--conf-file", config, "-n", 60, "--eval-freq", -1, "-params", *small)
    run = folder / "logs" / "dqn" / f"{PONG}_1"
    # A true evaluation of Pong would take minutes.
    np.savez(
        run / "evaluations.npz", timesteps=[30, 60], results=[[-21.0, -20.0], [-19.0, -20.0]], ep_lengths=[[1, 1]] * 2
    )
    shutil.copy(run / f"{PONG}.zip", folder / "MODEL.zip")
    given_names()["model"]().save(folder / "model.zip")
    (folder / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n100,1.0\n200,1.5\n")
    return folder


@pytest.fixture
def page(clone, torch_home, hub, tmp_path, monkeypatch):
    """What runs the blocks of one page."""
    here = tmp_path / "clone"
    shutil.copytree(clone, here, symlinks=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.setattr(th.hub, "_hub_dir", None)
    weights = torchvision.models.ResNet50_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    (here / "r3m_50.pth").symlink_to(torch_home / "hub" / "checkpoints" / weights)
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    for algorithm in (DQN, QRDQN, SAC, PPO, A2C):
        cut(monkeypatch, algorithm, "__init__", MOST | ({"n_steps": 8} if algorithm is PPO else {}))
        cut(monkeypatch, algorithm, "learn", {"total_timesteps": STEPS})
    cut(monkeypatch, stable_baselines3.common.evaluation, "evaluate_policy", {"n_eval_episodes": 1})
    cut(monkeypatch, sb3_resnet.envs, "make_atari_vec_env", {}, max_episode_steps=20)
    few = {"updates": 2, "frames": 400, "held_out": 120, "batch_size": 8, "probe_every": 1}
    cut(monkeypatch, sb3_resnet.pretraining, "pretrain", {}, **few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Page(given_names(), torch_home)


def cut(monkeypatch, owner, name, most, **defaults):
    """Let a function have smaller arguments than it is called with."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def smaller(*args, **kwargs):
        bound = signature.bind(*args, **{**defaults, **kwargs})
        for argument, limit in most.items():
            if argument in signature.parameters:
                value = bound.arguments.get(argument, signature.parameters[argument].default)
                if isinstance(value, int | float):
                    bound.arguments[argument] = min(value, limit)
        return original(*bound.args, **bound.kwargs)

    monkeypatch.setattr(owner, name, smaller)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in PAGES if blocks_of(path)], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_every_block_of_a_page_runs_and_prints_what_is_shown(path, page):
    for block in blocks_of(path):
        try:
            page.run(block)
        except Exception as error:
            raise AssertionError(f"{path.relative_to(ROOT)}, line {block.line}: {error}") from error


def commands(start):
    """:return: page and line of each command that begins so"""
    for path in PAGES:
        for block in blocks_of(path):
            for line in re.sub(r"\\\n\s*", "", block.code).splitlines() if block.language == "" else ():
                if line.strip().startswith(start):
                    yield path.name, line.strip()


def test_what_users_are_told_to_install_exists():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = {*re.findall(r"^(\w+) = \[", section, re.MULTILINE)}
    found = [line for _, line in commands("pip")]
    assert len(found) >= 5
    for line in found:
        for named in re.findall(r"\[([\w,]+)\]", line):
            assert {*named.split(",")} <= extras, line


def test_every_make_target_that_pages_name_exists():
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    words = " ".join(path.read_text() for path in PAGES)
    named = {*re.findall(r"(?:`|^)make ([a-z-]+)", words, re.MULTILINE)}
    assert {"demo", "docs", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```python\nx\n```\n", [("python", "x\n", {})]),
        ("<!-- before: y = 1 -->\n```python\nx\n```\n", [("python", "x\n", {"before": "y = 1"})]),
        ("- a\n\n  ```\n  x\n    y\n  ```\n", [("", "x\n  y\n", {})]),
        (
            "```python\nx\n```\n\n<!-- numbers vary -->\n```text\n1\n```\n",
            [("python", "x\n", {}), ("text", "1\n", {"numbers vary": "", "output": ""})],
        ),
        ("```text\n1\n```\n", [("text", "1\n", {})]),
    ],
)
def test_blocks_are_found_with_their_comments(text, blocks, tmp_path):
    (tmp_path / "page.md").write_text(text)
    assert [found[:3] for found in blocks_of(tmp_path / "page.md")] == blocks


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "1"),
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("```pycon\n>>> 1 + 1\n3\n```\n", "Expected"),
        *slowly(("```\nsb3-resnet nothing\n```\n", "sb3-resnet nothing")),
        ("```bash\nif true; then\n```\n", "syntax error"),
        ("```ruby\nputs\n```\n", "unknown language"),
        ("<!-- not run: I am tired -->\n```python\nx\n```\n", "one of the reasons"),
        ("```python\nprint(1)\n```\n\n<!-- numbers vary -->\n```text\none\n```\n", "one"),
    ],
)
def test_a_wrong_block_is_noticed(text, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(text)
    page, blocks = Page({}, tmp_path), blocks_of(tmp_path / "page.md")
    for block in blocks[:-1]:
        page.run(block)
    with pytest.raises((AssertionError, ZeroDivisionError), match=complaint):
        page.run(blocks[-1])
