"""The pages do what they say: every block of the guide and the README's Python run here, on two runs of the demo model."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from pages import Block, Session, blocks, difference, ran

from fisher_ray import cli
from fisher_ray.cluster import COUNTERS, GAUGES

ROOT = Path(__file__).resolve().parent.parent
GUIDE, README = ROOT / "docs/guide.md", ROOT / "README.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory as the repository's root is to a reader, current, with the package as users run it: without shape checks."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "demo").symlink_to(ROOT / "demo")
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def guide(place: Path) -> list[tuple[Block, str]]:
    """Every block of the guide with what it prints; its two runs stay where they are."""
    found = ran(GUIDE, Session(), ["python", "sh"])
    (place / "runs/demo").symlink_to(place / "runs/guide/trained")
    return found


def test_guide_prints_what_it_shows(guide: list[tuple[Block, str]]) -> None:
    wrong = {
        f"guide.md:{block.line}": found
        for block, printed in guide
        if block.shown is not None and (found := difference(block.shown, printed)) is not None
    }
    assert not wrong, "\n\n".join(f"{where}\n{found}" for where, found in wrong.items())


def test_every_block_of_the_guide_is_run() -> None:
    """Blocks are counted here too, by their fences, so that none is passed over."""
    text = GUIDE.read_text(encoding="utf-8")
    found = blocks(text)
    fences = re.findall(r"^ *```", text, re.MULTILINE)
    assert len(fences) == 2 * (len(found) + sum(block.shown is not None for block in found))
    assert {block.language for block in found} == {"python", "sh"}
    assert sum(block.shown is not None for block in found) >= 10


def test_readme_examples_run(guide: list[tuple[Block, str]], place: Path) -> None:
    """In their order, in one namespace, as a reader types them after ``make demo``."""
    found = ran(README, Session(), ["python"])
    assert len(found) == len(re.findall(r"^```python$", README.read_text(encoding="utf-8"), re.MULTILINE)) >= 5


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("layer 3", "layer 4"),
        ("9 of 9 tasks", "9 of 10 tasks"),
        ("trace 3.05", "trace 3.09"),
        ("trace 0.0446", "trace 0.0456"),
        ("1.2e-05", "1.4e-05"),
        ("-5.58", "5.58"),
        ("complete, ... ago", "unfinished, 0:00:01 ago"),
        ("raises 'the'", "raises 'a'"),
        ("a b", "a b c"),
        ("77,066", "77,067"),
    ],
)
def test_other_outputs_are_told(shown: str, printed: str) -> None:
    assert difference(shown, printed) is not None
    assert difference(shown, shown.replace("...", "0:00:07")) is None


@pytest.mark.parametrize(
    ("shown", "printed"), [("a\n  3.05  b\n", "a 3.06 b"), ("0.0446", "0.04464"), ("... end", "1 2\n3 end")]
)
def test_the_same_output_is_taken(shown: str, printed: str) -> None:
    assert difference(shown, printed) is None


def test_metrics_and_exit_codes_are_all_in_the_page() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `ray_fisher_ray_(\w+)` \| (\w+) \|", text, re.MULTILINE))
    counters = {f"{name}_total": "counter" for name in COUNTERS}
    assert described == {**dict.fromkeys(GAUGES, "gauge"), **counters, "task_seconds": "histogram"}
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert codes == {
        cli.COMPLETE, cli.FAILED, cli.BAD_INPUT, cli.REFUSED, cli.QUARANTINED, cli.DAMAGED, cli.STOPPED,
    }  # fmt: skip


COMMANDS = {
    "run", "plan", "status", "verify", "report", "validate", "project", "clean", "inspect", "diff", "export", "submit", "sweep",
}  # fmt: skip


def test_commands_of_the_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag after ``fisher-ray COMMAND`` in a block of a page, and every one in the README's table."""
    known: dict[str, set[str]] = {}
    for command in sorted(COMMANDS):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known[command] = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    used = 0
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        fenced = "\n".join(re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
        for line in fenced.replace("\\\n", " ").splitlines():
            for command, rest in re.findall(r"(?:^|[ /])fisher-ray (?:submit -- )?([a-z]+)([^#]*)", line):
                flags = set(re.findall(r"(?<= )--[a-z][a-z-]*", rest))
                assert flags <= known.get(command, set()), f"{page.name}: {line.strip()}"
                used += 1
    assert used > 25
    table = re.findall(r"^\| (`--[^|]*) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {flag for cell in table for flag in re.findall(r"--[a-z][a-z-]*", cell)} <= known["run"]


def test_modules_import_only_from_those_listed_above_them() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^  (\w+)\.py ", text, re.MULTILINE)
    package = ROOT / "fisher_ray"
    assert sorted(listed) == sorted({path.stem for path in package.glob("*.py")} - {"__init__"})
    for i, name in enumerate(listed):
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fisher_ray":
                whole = node.module == "fisher_ray"  # from fisher_ray import inspection
                used = {alias.name for alias in node.names} if whole else {str(node.module).split(".")[1]}
                assert used <= {*listed[:i], "__version__"}, f"{name} imports {sorted(used)}"


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those within the repository; links between pages are checked where the pages are built."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", README.read_text(encoding="utf-8"))
    assert len(links) > 8
    for path, anchor in links:
        target = ROOT / path if path else README
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path}#{anchor}"


def test_pages_build_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strictly: no warning of a link, an anchor or a docstring."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {page.name for page in pages} >= {
        "index.html",
        "guide.html",
        "concepts.html",
        "formats.html",
        "reference.html",
    }
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>", text)
        assert not loaded, f"{page.name}: {loaded}"
