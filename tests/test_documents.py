"""Documents: every link leads somewhere, every command parses, every setting, preset and file that they name exists."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from mmgen.cli import app
from mmgen.cli.training_options import shared_changes
from mmgen.config import distill, imm, teacher
from mmgen.config.sections import nest, parse_assignment, preset_names, read_preset, read_toml

ROOT = Path(__file__).parents[1]
FOLDERS = "mmgen", "tests", "examples"
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(file for top in FOLDERS for file in (ROOT / top).rglob("*.md"))]
)
COMMANDS = typer.main.get_command(app).commands
CONFIGS = {
    "train-imm": (imm, imm.ImmConfig), "train-teacher": (teacher, teacher.TeacherConfig), "distill": (distill, distill.DistillConfig),
}  # fmt: skip
LAUNCHERS = r"(?:accelerate launch|python -m torch\.distributed\.run)(?: --\w+(?: \d+)?)* -m "
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fenced(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(text: str) -> Iterator[str]:
    """Every `mmgen ...`, in a block or within a sentence, without the launcher before it."""
    lines = [line for block in fenced(text, "bash") for line in block.splitlines()]
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(text))]
    for line in [*lines, *spans]:
        line = re.sub(f"^{LAUNCHERS}", "", line.strip())
        if re.match(r"mmgen [a-z]", line) and "--help" not in line:
            yield line


def every_command() -> list[tuple[str, str]]:
    return [(path, line) for path in DOCUMENTS for line in dict.fromkeys(commands((ROOT / path).read_text()))]


def in_help_and_examples() -> list[tuple[str, str]]:
    """The commands in the help of the commands, and in examples/ and its settings files."""
    texts = {f"help of {name}": command.help for name, command in COMMANDS.items()}
    texts |= {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "examples").iterdir() if file.is_file() and file.suffix != ".png"}
    found = []
    for place, text in texts.items():
        if not place.endswith(".md"):
            paragraphs = re.split(r"\n\s*\n", text) if place.startswith("help") else text.splitlines()
            lines = [" ".join(one.split()).removeprefix("# ") for one in paragraphs]
            lines = [re.sub(f"^(?:[A-Z][\\w', ]*: )?(?:{LAUNCHERS})?", "", line) for line in lines]
            lines = [line.replace('"$@"', "") for line in lines if not line.endswith("...")]
            found += [(place, line) for line in lines if re.match("mmgen [a-z]", line)]
    return found


def parsed(line: str) -> tuple[str, dict]:
    """The command and its options. Raises click's errors for an unknown option, a missing argument or a wrong value."""
    _, name, *arguments = shlex.split(line, comments=True)
    return name, COMMANDS[name].make_context(name, [a for a in arguments if a != "..."]).params


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


def test_there_are_documents():
    assert {"README.md", "CHANGELOG.md", "mmgen/training/README.md", "examples/results.md"} <= set(DOCUMENTS)
    assert len(every_command()) > 60 and len(in_help_and_examples()) > 15
    assert anchors("# A\n```bash\n# not one\n```\n## What `mmgen` did, and not\n") == {"a", "what-mmgen-did-and-not"}


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links(path):
    text = (ROOT / path).read_text()
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(text))
    for link in links:
        if re.match("https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", DOCUMENTS)
def test_files_that_are_named(path):
    """`tests/x.py` and its like, from the root or from the document's folder; what ends in / or has a * is a pattern."""
    text = (ROOT / path).read_text()
    for name in re.findall(r"(?<![\w/.])((?:mmgen|tests|examples)/[\w/.*-]+\.(?:py|md|sh|toml|png))", text):
        assert list(ROOT.glob(name)), name
    for module in re.findall(r"python -m (tests(?:\.\w+)+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


@pytest.mark.parametrize("place, line", in_help_and_examples(), ids=lambda value: value[:60])
def test_commands_of_help_and_examples_parse(place, line):
    parsed(line)


@pytest.mark.parametrize("path, line", every_command(), ids=lambda value: value[:60])
def test_commands_parse(path, line):
    if re.fullmatch(r"mmgen [\w-]+", line) and line.split()[1] in COMMANDS:
        return  # the name of a command; in a block, what has defaults for all
    try:
        name, options = parsed(re.sub(r"\b[A-Z]\b", "1", line))  # N, K: any number
    except Exception as error:  # click's, which typer has a copy of
        lacks = type(error).__name__ == "MissingParameter" or "requires an argument" in str(error)
        assert lacks and f"`{line}`" in re.sub(r"\s+", " ", prose((ROOT / path).read_text())), error
        return  # within a sentence a command may lack something; unknown options are found before
    if name in CONFIGS:
        module, config = CONFIGS[name]
        table = read_preset(options["preset"] or preset_names(name)[0], name)
        file = read_toml(ROOT / options["config"], name) if options["config"] else {}
        changes = dict(parse_assignment(text) for text in options["set_"] or []) | shared_changes(options)
        module.resolve(table, file, nest(changes, config))  # raises ConfigError for an unknown preset, setting or value


def test_an_unknown_option_is_found():
    for wrong in ("mmgen sample x --nums 3", "mmgen fid", "mmgen train-imm --lr fast", "mmgen trian-imm"):
        with pytest.raises((Exception, SystemExit)):
            parsed(wrong)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_python_parses(path):
    for block in fenced((ROOT / path).read_text(), "python"):
        ast.parse(block)


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert (ROOT / "examples/digits.png").stat().st_size < 100_000 and "\"examples/digits.png\"" in text
    linked = set(re.findall(r"\]\(([\w/.]+\.md)\)", text))
    assert linked == set(DOCUMENTS) - {"README.md"}, "the README links to every document"
    assert "git clone" in text and "pip install -e ." in text


def test_contributing_names_what_there_is():
    """Each row of the table: a file that exists, and the name to extend in the file beside it."""
    text = (ROOT / "README.md").read_text().partition("## Contributing")[2].partition("\n## ")[0]
    rows = [row.strip("|").split("|") for row in text.splitlines() if row.startswith("| ") and not row.startswith("| to add")]
    assert {row[0].strip() for row in rows} >= {"schedule", "network", "format", "metric", "loss", "method", "kind of condition"}
    for row in rows:
        for name, file in re.findall(r"`(\w+)` in \[[^\]]*\]\(([^)]+)\)", row[2]):
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)
        assert re.search(r"`\w+` in \[", row[2]), row
