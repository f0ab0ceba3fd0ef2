"""Imports point one way, down the list of rooms, and no module is part of a circle; imports inside functions count as well."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mmgen

ROOT = Path(mmgen.__file__).parent
ROOMS = (  # a room may import from those below it, and from itself
    {"cli"}, {"methods"}, {"training"}, {"metrics"}, {"sampling"}, {"data", "formats", "encoders"}, {"report"}, {"config"},
    {"presets"}, {"losses"}, {"models"}, {"networks"}, {"diffusion"}, {"system"}, {"errors", "__init__"},
)  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """Of each module, `room.name`, those of mmgen that it imports, wherever in the file."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for target in (".".join([*base, alias.name]) for alias in node.names):
                known = target if target in modules else target.rpartition(".")[0]
                found[name].add(known or "__init__")
        found[name].discard(name)
    return found


def test_imports_point_down():
    wrong = {
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in targets
        if name not in ("__init__", "__main__") and LEVEL[name.split(".")[0]] > LEVEL[target.split(".")[0]]
    }
    assert not wrong, sorted(wrong)


def test_there_is_no_circle():
    graph = imports()
    del graph["__init__"]  # the public API names modules of many rooms; what imports it asks for the version
    TopologicalSorter({name: targets - {"__init__"} for name, targets in graph.items()}).prepare()


# What README.md calls importable beside `mmgen` itself; a folder means the modules in it
PUBLIC = ("mmgen", "mmgen.data", "mmgen.errors", "mmgen.losses", "mmgen.networks", "mmgen.diffusion", "mmgen.sampling.flow_map_samplers",
          "mmgen.sampling.denoiser_samplers", "mmgen.metrics.frechet", "mmgen.metrics.neighbours", "mmgen.report.charts",
          "mmgen.report.images")  # fmt: skip
FOLDERS = ("mmgen.losses.", "mmgen.networks.", "mmgen.diffusion.")


def not_public(source: str) -> list[str]:
    """What a script imports of mmgen that is not public."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in node.names] if modules == ["mmgen"] and isinstance(node, ast.ImportFrom) else []
        wrong += [m for m in modules if m.split(".")[0] == "mmgen" and m not in PUBLIC and not m.startswith(FOLDERS)]
        wrong += [f"mmgen.{name}" for name in names if name not in mmgen.__all__ and f"mmgen.{name}" not in PUBLIC]
    return wrong


def test_examples_import_what_is_public():
    """Losses, samplers, networks and formulas may be imported as a notebook would; settings, loops and readers may not."""
    assert not_public("from mmgen.training.loop import Trainer\nfrom mmgen import config") == ["mmgen.training.loop", "mmgen.config"]
    wrong = {path.name: found for path in sorted((ROOT.parent / "examples").glob("*.py")) if (found := not_public(path.read_text()))}
    assert not wrong, wrong
    readme = (ROOT.parent / "README.md").read_text()
    assert [name for name in PUBLIC if name not in readme] == []


NEWER = {  # than Python 3.10, the oldest that mmgen runs on
    "typing": {"Self", "Never", "LiteralString", "Unpack", "TypeVarTuple", "NotRequired", "Required", "assert_never",
               "assert_type", "reveal_type", "dataclass_transform", "override"},
    "enum": {"StrEnum", "verify", "member", "nonmember", "ReprEnum"}, "datetime": {"UTC"}, "contextlib": {"chdir"},
    "itertools": {"batched"}, "asyncio": {"TaskGroup", "Runner", "timeout"},
}  # fmt: skip


def test_nothing_is_newer_than_python_3_10():
    """Names of the standard library that came later are imported for type checks alone, or where their absence is handled."""
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.Try)]
        inside = {child for node in guarded for child in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in inside:
                wrong += [f"{path.name}: {node.module}.{a.name}" for a in node.names if a.name in NEWER.get(node.module or "", ())]
            elif isinstance(node, ast.Import) and node not in inside:
                wrong += [f"{path.name}: {alias.name}" for alias in node.names if alias.name == "tomllib"]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node not in inside:
                if node.attr in NEWER.get(node.value.id, ()):
                    wrong.append(f"{path.name}: {node.value.id}.{node.attr}")
    assert not wrong, wrong
