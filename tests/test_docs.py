"""Documentation: links, files, commands, knobs and messages that it names exist; it stays short and narrow."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *(REPO / p for p in ("benchmarks/README.md", "examples/deploy_app/README.md"))]
PAGES += [*REPO.glob("docs/*.md"), *REPO.glob("bundles/*/docs/README.md")]
FOLDERS = "bundles/brats_flair|bundles/chaos_kidney|custom_modules|study|packing|benchmarks|examples|tests|configs"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_page(page):
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 120] == []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists() and (not anchor or anchor in anchors(linked)), target
        assert not page.match("bundles/*/docs/*") or linked.is_relative_to(page.parents[1]), f"{target}: not packed"
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        spec = importlib.util.find_spec(module)
        assert spec and (not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__")), module
    for file in re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]+\.(?:py|yaml|sh|cpp))", text):
        assert (REPO / file).is_file() or (page.parents[1] / file).is_file(), file


def test_readme_is_short():
    assert (REPO / "README.md").stat().st_size <= 8 * 1024


def test_knobs_exist():
    known = {knob for file in REPO.glob("bundles/*/configs/*.yaml") for knob in ConfigParser.load_config_file(file)}
    rows = re.findall(r"^\| (`.+?`) \|", (REPO / "docs/knobs.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 20 and {knob for row in rows for knob in re.findall(r"`(\w+)`", row)} - known == set()


def test_messages_exist():
    folders = ("custom_modules", "study", "packing", "weakseg")
    trees = (ast.parse(file.read_bytes()) for folder in folders for file in (REPO / folder).rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    texts = "\n".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    page = (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = [message for message in re.findall(r"`([^`]+)`", page) if "..." in message]
    assert len(messages) > 40
    assert [m for m in messages if any(part.strip() not in texts for part in re.split(r"\.\.\.", m))] == []
