"""What README, pages and docstrings say must be there: names, files, tables, code."""

import html
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sb3_resnet
import sb3_resnet.callbacks
import sb3_resnet.diagnosis
from docs.hooks import tables
from docs.hooks.docstrings import markdown_of, parameters_of

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
PUBLIC = [*tables.public_names(), "sb3_resnet.callbacks.newest_checkpoint"]
WITH_TABLE = [
    "sb3_resnet.ResNetExtractor",
    "sb3_resnet.ResNetCombinedExtractor",
    "sb3_resnet.ResNetCnnPolicy",
    "sb3_resnet.fine_tuning_callbacks",
] + [f"sb3_resnet.callbacks.{name}" for name in sb3_resnet.callbacks.__all__ if name.endswith("Callback")]


def page_id(path):
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=page_id)


def blocks(page, *languages):
    """:return: the code blocks of these languages"""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def asked_for(kind):
    """:return: what the pages ask a table of"""
    marker = re.compile(rf"^<!-- {kind}: (\S+) -->$", re.MULTILINE)
    return {name for page in GUIDES for name in marker.findall(page.read_text())}


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pages
def test_documented_names_import(page):
    for name in {*re.findall(r"\bsb3_resnet(?:\.[A-Za-z]\w*)+", page.read_text())}:
        pkgutil.resolve_name(name)


@pages
def test_imports_in_examples_import(page):
    for statement in re.findall(r"^from sb3_resnet\S* import (?:\([^)]*\)|.*$)", page.read_text(), re.MULTILINE):
        exec(statement, {})


@pages
def test_links_and_pictures_exist(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pages
def test_named_files_of_the_repository_exist(page):
    for path in re.findall(r"\b(?:benchmarks|zoo_configs|scripts)/[\w./-]*\w", page.read_text()):
        assert (ROOT / path).exists(), path


@pages
def test_python_blocks_compile(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pages
def test_yaml_blocks_parse(page):
    for code in blocks(page, "yaml"):
        assert yaml.safe_load(code)


@pages
def test_code_blocks_fit_a_narrow_screen(page):
    # What the package prints is as wide as it is; Python's imports are not broken for a phone.
    lines = [line for code in blocks(page, "", "python") for line in code.splitlines() if "import" not in line]
    assert max((len(line) for line in lines), default=0) <= 80


@pages
def test_calls_in_examples_have_arguments_that_exist(page):
    for code in blocks(page, "python"):
        for name, call in re.findall(r"\b(\w+Callback|seed_everything|fine_tuning_callbacks)\(([^()]*)\)", code):
            owner = sb3_resnet.callbacks if hasattr(sb3_resnet.callbacks, name) else sb3_resnet
            if hasattr(owner, name):
                known = tables.arguments_of(f"{owner.__name__}.{name}")
                assert {*re.findall(r"(\w+)=", call)} <= {*known}, call


@pytest.mark.parametrize("name", WITH_TABLE)
def test_a_page_shows_all_arguments(name):
    assert name in asked_for("options")
    expected = own_arguments(name)
    assert expected
    rows = [line.split(" | ") for line in tables.options_table(name).splitlines()[2:]]
    shown = {row[0].strip("| `"): row for row in rows}
    assert {*expected} <= {*shown}
    for argument in expected:
        assert len(shown[argument]) == 3
        assert shown[argument][2].strip(" |"), f"{argument} has no :param: line"


@pytest.mark.parametrize("name", [n for n in PUBLIC if callable(pkgutil.resolve_name(n))])
def test_docstrings_name_no_argument_that_is_not_there(name):
    target = pkgutil.resolve_name(name)
    documented = {*parameters_of(inspect.cleandoc(target.__doc__ or ""))}
    parameters = inspect.signature(target).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert passes_on or documented <= {*parameters}


def test_tables_show_defaults_as_python_writes_them():
    assert "| `save_freq` | `10_000` |" in tables.options_table("sb3_resnet.callbacks.BestCheckpointCallback")
    assert '| `backbone` | `"resnet18"` |' in tables.options_table("sb3_resnet.ResNetExtractor")
    policy = tables.options_table("sb3_resnet.ResNetCnnPolicy")
    assert "| `optimizer_class` | `AdamW` |" in policy
    assert "| `lr_schedule` | from SB3 |" in policy
    assert "| `phases` | required |" in tables.options_table("sb3_resnet.callbacks.UnfreezeCallback")


def test_every_command_has_a_page_with_all_its_options():
    import typer

    from sb3_resnet.cli.app import app

    commands = typer.main.get_command(app).commands
    assert asked_for("command") == {*commands}
    for name, command in commands.items():
        table = tables.command_table(name)
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]:
                assert f"`{option}`" in table


def test_every_limit_of_the_diagnosis_is_in_its_table():
    table = tables.thresholds_table()
    for name, limit in sb3_resnet.diagnosis.THRESHOLDS.items():
        assert f"| `{name}` | {limit.value:g} |" in table
        assert limit.source in table


def test_every_finding_of_the_doctor_is_in_its_guide():
    code = "\n".join(path.read_text() for path in (ROOT / "sb3_resnet" / "diagnosis").glob("*.py"))
    findings = {*re.findall(r"\bFinding\(\s*\"(\w+)\"", code)}
    assert {"loss_explodes", "frozen_random_backbone"} <= findings
    guide = (ROOT / "docs" / "guides" / "diagnose.md").read_text()
    assert [finding for finding in findings if f"`{finding}`" not in guide] == []


def test_what_sb3_passes_comes_last():
    rows = tables.options_table("sb3_resnet.ResNetExtractor").splitlines()
    assert rows[2].startswith("| `backbone` |")
    assert rows[-1].startswith("| `observation_space` | from SB3 |")


def test_markers_become_tables():
    text = tables.on_page_markdown("before\n\n<!-- options: sb3_resnet.seed_everything -->\n\nafter")
    assert text.startswith("before\n\n| argument | default | meaning |\n| --- | --- | --- |\n| `seed` | ")
    assert text.endswith("\n\nafter")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_on_a_reference_page(name):
    assert pkgutil.resolve_name(name).__doc__
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    others = {"sb3_resnet.callbacks.newest_checkpoint": "sb3_resnet.newest_checkpoint"}
    assert re.search(rf"^::: {re.escape(others.get(name, name))}$", text, re.MULTILINE)


def test_every_page_is_in_the_navigation():
    navigation = re.search(r"^nav:.*", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE | re.DOTALL).group()
    assert [page for page in GUIDES if page.relative_to(ROOT / "docs").as_posix() not in navigation] == []


@pytest.mark.parametrize(
    ("sphinx", "markdown"),
    [
        ("``None``: as :class:`~a.b.Name` says", "`None`: as `Name` says"),
        ("An example::\n\n    if x:\n        g(x)\n\nMore", "An example:\n\n```python\nif x:\n    g(x)\n```\n\nMore"),
        ("In RL-Zoo's YAML::\n\n    a: 1\n", "In RL-Zoo's YAML:\n\n```yaml\na: 1\n```\n\n"),
    ],
)
def test_docstrings_become_markdown(sphinx, markdown):
    assert markdown_of(sphinx) == markdown


def test_params_are_read_across_lines():
    text = "Title.\n\n:param one: first\n    line, ``x``\n:param two: second\n:return: nothing\n"
    assert parameters_of(text) == {"one": "first line, `x`", "two": "second"}


def build(config, folder):
    """Run what `make docs` runs, with another configuration and into another folder."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    arguments = re.search(r"\$\(PY\) (-m mkdocs build.*)", (ROOT / "Makefile").read_text()).group(1).split()
    command = [sys.executable, *arguments, "--config-file", str(config), "--site-dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("[a](nothing.md) [b](#nowhere) [c](../benchmarks/results/none.json)", ["nothing.md", "#nowhere", "none.json"]),
        ("::: sb3_resnet.Nobody", ["Nobody"]),
    ],
)
def test_a_broken_page_fails_the_build(text, complaints, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text(f"# Title\n\n{text}\n")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config.update(docs_dir=str(pages), nav=[{"Home": "index.md"}], hooks=[], extra_css=[])
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"].update(paths=[str(ROOT)], options={})
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert [complaint for complaint in complaints if complaint not in done.stderr] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site):
    options = (site / "options" / "extractor" / "index.html").read_text()
    assert "micro_batch_size" in options
    assert "<!-- options" not in options
    assert (site / "benchmarks" / "results" / "throughput.json").is_file()
    pages = "".join(page.read_text() for page in site.rglob("*.html"))
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', pages)
    reference = "".join(page.read_text() for page in (site / "reference").rglob("*.html"))
    assert "FeatureCacheCallback" in reference
    assert [markup for markup in (":param", ":class:", ":func:", "::</p>") if markup in reference] == []


@pytest.mark.slow
def test_the_reference_shows_every_public_name_with_every_argument(site):
    reference = "".join(page.read_text() for page in (site / "reference").rglob("*.html"))
    parts = dict(re.findall(r'<h2 id="([\w.]+)"(.*?)(?=<h2 id=|\Z)', reference, re.DOTALL))
    missing = []
    for name in tables.public_names():
        part = parts.get(name)
        if part is None:
            missing.append(name)
        elif callable(pkgutil.resolve_name(name)):
            text = html.unescape(re.sub(r"<[^>]+>", "", part))
            missing += [
                f"{name}({argument})" for argument in own_arguments(name) if not re.search(rf"\b{argument}\b", text)
            ]
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("learning rate", "guides/learning_rates/"),
        ("resume", "guides/checkpoints/"),
        ("out of memory", "guides/less_memory/"),
        ("BatchNorm", "guides/norm_layers/"),
        ("Dict", "guides/dict/"),
        ("PPO", "guides/ppo/"),
        ("NaN", "guides/nan/"),
        ("mixed precision", "guides/mixed_precision/"),
        ("ONNX", "cli/export/"),
        ("NatureCNN", "guides/from_naturecnn/"),
        ("share a model", "guides/share/"),
    ],
)
def test_a_search_lands_on_the_right_page(site, query, page):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    words = [stem(word) for word in query.split()]

    def score(entry):
        # As the theme's search weighs it: what is in a title counts far more than the text.
        title, text = ([stem(word) for word in re.findall(r"\w+", entry[part])] for part in ("title", "text"))
        in_title = sum(word in title for word in words) / len(words)
        often = sum(text.count(word) for word in words) / (20 + len(text))
        return (1000 * in_title / (1 + len(title)) + often) * entry.get("boost", 1)

    best = max(entries, key=score)
    assert best["location"].partition("#")[0] == page, best["location"]


def stem(word):
    """:return: the word in lower case, without the ``s`` of a plural"""
    return word.lower().removesuffix("s")


def own_arguments(name):
    """:return: the arguments that the package itself gives to a class or function, by its signatures"""
    target = pkgutil.resolve_name(name)
    classes = [c for c in getattr(target, "__mro__", ()) if c.__module__.startswith("sb3_resnet")]
    functions = [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] or [target]
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind in plain and parameter.name != "self"
    }


def test_the_table_of_all_options_has_every_argument_of_every_public_name():
    rows = {*re.findall(r"^\| `(\w+)`<br>`(\w+)`", tables.all_options_table(), re.MULTILINE)}
    wanted = {
        (name.rpartition(".")[2], argument)
        for name in tables.public_names()
        if callable(pkgutil.resolve_name(name))
        for argument in own_arguments(name)
    }
    assert len(wanted) > 150
    assert wanted - rows == set()


@pytest.mark.parametrize("name", [n for n in tables.public_names() if callable(pkgutil.resolve_name(n))])
def test_every_argument_of_every_public_name_is_described(name):
    described = {row[0].strip("`"): row[2] for row in tables.option_rows(name)}
    assert [argument for argument in own_arguments(name) if not described.get(argument)] == []


def test_public_names_are_those_of_all_modules_with_a_list_of_them():
    names = tables.public_names()
    for name in (
        "ResNetExtractor",
        "callbacks.AMPCallback",
        "buffers.FrameReplayBuffer",
        "envs.AtariVecEnv",
        "probing.probe",
    ):
        assert f"sb3_resnet.{name}" in names
    assert "sb3_resnet.callbacks.newest_checkpoint" not in names  # the same as sb3_resnet.newest_checkpoint


_HEADING = re.compile(r"^(?=#{1,2} )", re.MULTILINE)
_MINUS = "\N{MINUS SIGN}"  # as pages write it
_NUMBER = re.compile(rf"[{_MINUS}+-]?[\d.,]*\d(?: ?(?:%|ms|s|kB|MB|GB|min))?")


def sections(page):
    """:return: the page, divided at its first- and second-level headings"""
    return _HEADING.split(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def tables_of_figures(section):
    """:return: tables that show mostly numbers beside their first column, which may count anything"""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", f"{section}\n", re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|"))[1:] for line in table.splitlines()[2:]]
        texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).strip(" *`") for row in rows for cell in row]
        numbers = [text for text in texts if _NUMBER.fullmatch(text) or re.match(rf"[{_MINUS}-]?\d[\d.,]* [(\[]", text)]
        if len(numbers) >= 2 and 2 * len(numbers) >= len(texts):
            found.append(table)
    return found


def results_in(page, text):
    """:return: files in benchmarks/results/ that a text links to, by their path in the repository"""
    links = re.findall(r"\]\(([^)#\s]*benchmarks/results/[^)#\s]+)\)", text)
    return [(page.parent / link).resolve() for link in links]


def commands_of_results():
    """:return: files in benchmarks/results/ that stand in a section with the command that made them, or name it"""
    named = set()
    for page in PAGES:
        for section in sections(page):
            files = results_in(page, section)
            if re.search(r"`python benchmarks/\w+\.py", section):
                named.update(files)
            named.update(file for file in files if file.suffix == ".json" and '"command"' in file.read_text())
    return named


@pages
def test_links_to_results_lead_to_files(page):
    for file in results_in(page, page.read_text()):
        assert file.exists(), file


@pages
def test_every_table_of_figures_names_its_file_and_the_command(page):
    with_command = commands_of_results()
    for section in sections(page):
        for table in tables_of_figures(section):
            files = results_in(page, section)
            assert files, f"no link to benchmarks/results/ beside\n{table}"
            assert {*files} & with_command, f"no `python benchmarks/...` for {files[0].name}, beside\n{table}"


def test_tables_of_figures_are_told_from_others():
    pages_with = {page_id(page) for page in PAGES for section in sections(page) if tables_of_figures(section)}
    assert {"README.md", "docs/results.md"} <= pages_with
    assert tables_of_figures("| a | b |\n|---|---|\n| x | 1.5 |\n" + f"| y | **{_MINUS}3 %** |\n")
    assert tables_of_figures("| a | b |\n|---|---|\n| x | [1.5](f.json) |\n| y | 0.3 [0.2, 0.4] |\n")
    assert not tables_of_figures("| exit | meaning |\n|---|---|\n| 0 | fine |\n| 1 | wrong |\n")


@pytest.mark.parametrize("page", ["README.md", "docs/get_started.md"])
def test_the_quickstart_shows_what_it_printed(page):
    measured = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())
    assert f"```text\n{measured['prints']}\n```" in (ROOT / page).read_text()
