"""What is published: addresses, the long description, the wheel, the release."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import sb3_resnet
from scripts.release_check import problems

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
ADDRESS = re.search(r'^Repository = "(.+)"$', PYPROJECT, re.MULTILINE)[1]


def test_the_address_of_the_project_stands_in_one_file():
    addresses = re.findall(r"""https://[^\s'"]+""", PYPROJECT)
    assert len(addresses) > 5
    assert [address for address in addresses if not address.startswith(ADDRESS)] == []
    for path in [*ROOT.glob("*.*"), *(ROOT / ".github").rglob("*"), *(ROOT / "docs").rglob("*.md")]:
        if path.is_file() and path.name != "pyproject.toml" and path.suffix in (".md", ".yml", ".cff"):
            assert ADDRESS not in path.read_text(), path


def described():
    """:return: README as PyPI will show it, by the substitutions of pyproject.toml"""
    text = (ROOT / "README.md").read_text()
    rules = re.findall(r"^pattern = '(.+)'\nreplacement = '(.+)'$", PYPROJECT, re.MULTILINE)
    assert len(rules) == 2
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def test_the_long_description_has_no_link_into_a_folder():
    links = re.findall(r"(!?)\[[^\[\]]*\]\(([^)\s]+)\)", described())
    assert [link for _, link in links if not link.startswith(("https://", "#"))] == []
    ours = [(picture, link) for picture, link in links if link.startswith(ADDRESS)]
    assert len(ours) > 10
    for picture, link in ours:
        kind, path = re.fullmatch(rf"{re.escape(ADDRESS)}/(raw|blob)/main/([^#]+)(?:#.*)?", link).groups()
        assert kind == ("raw" if picture else "blob"), link
        assert (ROOT / path).exists(), link


def test_the_release_is_refused_until_all_fits(tmp_path):
    for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml", "sb3_resnet/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(PYPROJECT.replace("https://example.org/", "https://example.com/"))
    changelog = tmp_path / "CHANGELOG.md"
    released = re.sub(r"## \[Unreleased\]\n.*?(?=## \[)", "## [Unreleased]\n\n", changelog.read_text(), flags=re.DOTALL)
    changelog.write_text(released)
    tag = f"v{sb3_resnet.__version__}"
    assert problems(tag, tmp_path) == []
    changelog.write_text(released.replace("## [Unreleased]\n", "## [Unreleased]\n\n### Fixed\n\n- A defect.\n"))
    (found,) = problems(tag, tmp_path)
    assert "has entries under [Unreleased]" in found
    changelog.write_text(released)
    assert "does not name the version" in problems("v9", tmp_path)[0]
    pyproject.write_text("https://example.org/x")
    assert "example.org" in problems(tag, tmp_path)[0]
    pyproject.write_text("")
    changelog.write_text(re.sub(r"\] - \d{4}-\d\d-\d\d", "] - soon", released))
    assert "has no heading" in problems(tag, tmp_path)[0]
    changelog.write_text(released)
    citation = tmp_path / "CITATION.cff"
    citation.write_text(citation.read_text().replace("date-released: 2", "date-released: 1"))
    assert "does not name the date" in problems(tag, tmp_path)[0]
    citation.write_text("")
    assert len(problems(tag, tmp_path)) == 2


def test_forms_and_workflows_are_yaml_that_names_real_commands():
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    forms = [*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert {path.stem for path in forms} == {"bug", "config", "feature"}
    for path in [*forms, *(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / "CITATION.cff"]:
        assert yaml.safe_load(path.read_text())
        assert {*re.findall(r"run: make ([a-z-]+)", path.read_text())} <= targets
        for script in re.findall(r"run: python (\S+)", path.read_text()):
            assert (ROOT / script).is_file()
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    # Only the job that publishes has the identity that PyPI trusts, and only after the package was tried.
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert release["jobs"]["publish"]["needs"] == "build"
    assert release["permissions"] == {"contents": "read"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_configurations(tmp_path):
    # Without isolation: what builds it is installed here, and the tests have no network.
    for module in ("hatchling", "hatch_fancy_pypi_readme", "build", "twine"):
        pytest.importorskip(module, reason="pip install -e '.[dev]'")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    archives = [*tmp_path.glob("*.whl"), *tmp_path.glob("*.tar.gz")]
    assert len(archives) == 2
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *archives], check=True, capture_output=True)
    with zipfile.ZipFile(archives[0]) as wheel:
        names = {*wheel.namelist()}
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = wheel.read(metadata).decode()
    for path in (ROOT / "zoo_configs").glob("*.yml"):
        assert f"sb3_resnet/zoo_configs/{path.name}" in names
    for path in (ROOT / "sb3_resnet").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"sb3_resnet"}
    assert described().strip() in text
