"""``sb3-resnet card``: the model card of a run, filled in from its folder."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.loading import algorithm_class, algorithm_name
from sb3_resnet.cli.runs import WINDOW, Run, find_runs
from sb3_resnet.cli.saved_groups import saved_groups
from sb3_resnet.cli.texts import one_line, printable

_ORDERED = "tag:yaml.org,2002:python/object/apply:collections.OrderedDict"
_TUPLE, _NAME = "tag:yaml.org,2002:python/tuple", "tag:yaml.org,2002:python/name:"
_HUB_MODULES = {"qrdqn": "sb3_contrib"}


def command(
    context: typer.Context,
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="such as logs/dqn/PongNoFrameskip-v4_1")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the card; - prints it")] = Path(
        "README.md"
    ),
    env: Annotated[str | None, typer.Option(metavar="ID", help="environment, where RL-Zoo did not train")] = None,
    repo_id: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="where the model will be")] = None,
) -> None:
    """
    The model card of a run: training set-up, environment, scores, and the command that trained it.

    Everything in it is read from the folder of the run. A file that exists is not overwritten.
    """
    text = card(run_folder, env, repo_id)
    if str(output) == "-":
        typer.echo(text, nl=False)
        return
    if output.exists():
        raise ValueError(f"{output} exists and is not overwritten: remove it, or write another --output")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent} is no folder: make it first, or write another --output")
    output.write_text(text, encoding="utf-8")
    context.obj.print(f"{output}: model card of {run_folder}", highlight=False, soft_wrap=True)


def card(folder: str | Path, env_id: str | None = None, repo_id: str | None = None) -> str:
    """
    :param folder: folder of one run, with its model
    :param env_id: id of the environment; ``None``: that which RL-Zoo wrote down
    :param repo_id: ``owner/name`` of the repository on the hub; ``None`` leaves it to be filled in
    :return: the card as Markdown, with the metadata that the hub reads
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if it holds no model, several runs, or does not name its environment
    """
    runs = find_runs(folder)
    if len(runs) > 1:
        raise ValueError(f"{folder} holds several runs, give one of them: {', '.join(str(run.folder) for run in runs)}")
    (run,) = runs
    if run.model is None:
        raise ValueError(f"{folder} holds no model: a card describes one")
    zoo = next((file.parent for file in sorted(run.folder.glob("*/args.yml"))), None)
    arguments = {} if zoo is None else _saved(zoo / "args.yml")
    env_id = env_id or arguments.get("env")
    if env_id is None:
        raise ValueError(f"{folder} does not say which environment it was: write --env ID")
    algorithm = algorithm_name(run.model)
    name = algorithm_class(algorithm).__name__
    parts = [
        _metadata(run, name, env_id),
        f"# {name} agent of {env_id}",
        f"A ResNet agent of [Stable-Baselines3](https://stable-baselines3.readthedocs.io)'s {name}, trained with "
        "`sb3_resnet`.",
        "## Scores\n\n" + _table(("what", "value"), _scores(run)),
        "## Use it\n\n" + _usage(algorithm, name, env_id, run.model.name, repo_id or "OWNER/NAME"),
        "## Training\n\n" + _training(zoo, arguments),
        "## Network\n\n" + "\n\n".join(_network(run.model)),
    ]
    return printable("\n\n".join(parts)) + "\n"


def _metadata(run: Run, algorithm: str, env_id: str) -> str:
    tags = [env_id, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3_resnet"]
    data: dict[str, Any] = {"library_name": "stable-baselines3", "tags": tags}
    if len(run.evaluations):
        shown = run.results[run.shown_evaluation]
        metric = {"type": "mean_reward", "name": "mean_reward", "value": f"{shown.mean():.2f} +/- {shown.std():.2f}"}
        result = {
            "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
            "dataset": {"name": env_id, "type": env_id},
            "metrics": [metric],
        }
        data["model-index"] = [{"name": algorithm, "results": [result]}]
    text: str = import_extra("yaml").safe_dump(data, sort_keys=False)
    return f"---\n{text}---"


def _scores(run: Run) -> Iterator[tuple[str, str]]:
    if len(run.evaluations):
        means, deviations = run.results.mean(axis=1), run.results.std(axis=1)
        for what, index in (("last evaluation", len(means) - 1), ("best evaluation", int(means.argmax()))):
            score = f"{means[index]:.4g} ± {deviations[index]:.4g} over {run.results.shape[1]} episodes"
            yield what, f"{score}, at step {run.evaluations[index]:,.0f}"
    if len(run.episodes):
        last = run.episodes[-WINDOW:, 1]
        yield f"last {len(last)} training episodes", f"{last.mean():.4g} ± {last.std():.4g}"
        yield "environment steps", f"{run.episodes[-1, 0]:,.0f} up to the end of the last episode"
    if not len(run.evaluations) and not len(run.episodes):
        yield "reward", "not measured: the logs hold no finished episode"


def _usage(algorithm: str, name: str, env_id: str, file: str, repo_id: str) -> str:
    module = _HUB_MODULES.get(algorithm, "stable_baselines3")
    return f"""```
pip install 'sb3_resnet[atari,zoo]'
```

```python
import sb3_resnet  # the model's policy
from huggingface_sb3 import load_from_hub
from {module} import {name}

# A model is pickled: set TRUST_REMOTE_CODE=True if you trust its author.
model = {name}.load(load_from_hub("{repo_id}", "{file}"))
```

The environment is `{env_id}`, with the wrappers named below."""


def _training(zoo: Path | None, arguments: Mapping[str, Any]) -> str:
    if zoo is None:
        return "Trained by a script; the folder holds no hyperparameters."
    parts = []
    if (zoo / "command.txt").is_file():
        words = shlex.split((zoo / "command.txt").read_text(encoding="utf-8"))
        # The path of the interpreter and of RL-Zoo are those of one machine.
        start = words.index("-m") if "-m" in words else 1
        parts += [f"```\n{shlex.join(['python', *words[start:]])}\n```"]
    if arguments.get("seed") is not None:
        parts.append(f"Seed: {arguments['seed']}")
    if (zoo / "config.yml").is_file():
        settings = import_extra("yaml").safe_dump(_saved(zoo / "config.yml"), sort_keys=False)
        parts.append(f"Hyperparameters, as RL-Zoo read them:\n\n```yaml\n{settings}```")
    return "\n\n".join(parts)


def _network(model: Path) -> Iterator[str]:
    yield "Parameter groups of the optimizer:"
    rows = [
        (row["name"], f"{row['lr']:.3g}", f"{row['parameters']:,}", f"{row['trainable_parameters']:,}")
        for row in saved_groups(model)
    ]
    yield _table(("group", "learning rate", "parameters", "trainable"), rows)
    with zipfile.ZipFile(model) as archive:
        steps = json.loads(archive.read("data")).get("num_timesteps")
        if steps is not None:
            yield f"Environment steps of the training: {steps:,}"
        if "system_info.txt" in archive.namelist():
            yield f"Trained on:\n\n```\n{archive.read('system_info.txt').decode(errors='replace').strip()}\n```"


def _saved(path: Path) -> dict[str, Any]:
    """Read what RL-Zoo dumped: YAML of ordered dicts, read as data and never as code."""
    yaml = import_extra("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]  # the module is imported at run time
        pass

    Loader.add_constructor(_ORDERED, lambda loader, node: dict(loader.construct_sequence(node, deep=True)[0]))
    Loader.add_constructor(_TUPLE, lambda loader, node: loader.construct_sequence(node, deep=True))
    # Classes and functions, such as of -params "policy_kwargs:dict(activation_fn=nn.ReLU)": their names, as text.
    Loader.add_multi_constructor(_NAME, lambda loader, suffix, node: suffix)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what RL-Zoo writes ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not what RL-Zoo writes: it holds no settings")
    return found


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
