"""Imports point one way: each rule is a function from the source tree to the lines that break it.

A source tree is {module name: source text}; the rules are shown to catch on trees made up here, and
then hold on the real one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("taid_megatron", "data_tools")

# From the top down. A module may import from lower layers and from its own package; packages side
# by side in a layer do not know of each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("manual", "quickstart"),
    ("evaluation",),
    ("training",),
    ("conversion", "planning"),
    ("models", "checkpointing"),
    ("data", "runtime"),
    ("config", "losses", "schedules", "reporting"),
)
FORBIDDEN = {
    "config": ("torch", "megatron"),
    "losses": ("megatron",),
    "schedules": ("megatron",),
}
# May be absent, or break at import where there is no GPU: only the function that needs one asks.
OPTIONAL = ("transformer_engine", "apex", "nvidia.dali", "triton", "wandb")
# Built on one of them, and itself imported by the function that needs it alone.
BUILT_ON = {"taid_megatron.losses.triton_kernels": "triton"}

Sources = dict[str, str]


class Import(NamedTuple):
    importer: str
    imported: str
    """A module where there is one of that name in the tree, else the name as written."""
    line: int
    at_import: bool
    """Executed when the importer is imported: neither in a function nor for type checkers only."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def real_sources() -> Sources:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(sources: Sources) -> Iterator[Import]:
    for importer, text in sources.items():
        is_package = any(other.startswith(f"{importer}.") for other in sources)
        for node, at_import in nodes(ast.parse(text), at_import=True):
            for name in named(node, importer, is_package, sources):
                yield Import(importer, name, node.lineno, at_import)


def nodes(tree: ast.AST, at_import: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import statement, and whether importing the module executes it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, at_import
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = True
        yield from nodes(node, at_import and not inside)


def named(node: ast.stmt, importer: str, is_package: bool, sources: Sources) -> Iterator[str]:
    """What an import statement names: `from a import b` is a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = importer.split(".")
            above = above[: len(above) - node.level + is_package]
            base = ".".join([*above, base]).rstrip(".")
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            local = base.split(".")[0] in PACKAGES
            yield whole if whole in sources or not local else base


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(module: str) -> tuple[int, str]:
    """(depth, package) of a module of taid_megatron."""
    package = module.split(".")[1]
    depths = [depth for depth, packages in enumerate(LAYERS) if package in packages]
    assert depths, f"{module}: '{package}' has no place in LAYERS; give it one"
    return depths[0], package


def upward(sources: Sources) -> list[str]:
    """Imports of a higher layer, or of a neighbour in the same one."""
    broken = []
    for found in imports(sources):
        ends = (found.importer, found.imported)
        # The top package itself, which has the version alone, is everybody's.
        if not all(name.startswith("taid_megatron.") for name in ends):
            continue
        (from_depth, from_package), (to_depth, to_package) = map(layer, ends)
        if from_package != to_package and to_depth <= from_depth:
            broken.append(str(found))
    return broken


def forbidden(sources: Sources) -> list[str]:
    """Imports that a package is to do without, in functions and for type checkers too."""
    return [
        str(found)
        for found in imports(sources)
        for package, names in FORBIDDEN.items()
        if within(found.importer, f"taid_megatron.{package}")
        and any(within(found.imported, name) for name in names)
    ]


def eager(sources: Sources) -> list[str]:
    """Optional packages, or modules built on them, that are imported along with a module."""
    return [
        str(found)
        for found in imports(sources)
        if found.at_import
        and any(
            within(found.imported, name) and BUILT_ON.get(found.importer) != name
            for name in (*OPTIONAL, *BUILT_ON)
        )
    ]


def cycles(sources: Sources) -> list[str]:
    """Modules that reach themselves through imports, those inside functions included."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for found in imports(sources):
        if found.imported in graph:
            graph[found.importer].add(found.imported)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(graph[name])
        return seen

    return [name for name in sorted(graph) if name in reachable(name)]


def shared(sources: Sources) -> set[str]:
    """Modules of one package that the other one imports."""
    return {
        found.imported
        for found in imports(sources)
        if found.imported.split(".")[0] in PACKAGES
        and found.imported.split(".")[0] != found.importer.split(".")[0]
    }


@pytest.mark.parametrize("rule", [upward, forbidden, eager, cycles], ids=lambda rule: rule.__name__)
def test_the_source_keeps_to(rule):
    assert rule(real_sources()) == []


def test_trainer_and_data_tools_share_at_most_one_module():
    assert len(shared(real_sources())) <= 1, shared(real_sources())


def test_every_module_was_read():
    assert {"taid_megatron.config.schema", "taid_megatron.cli", "data_tools"} <= set(real_sources())
    assert any(found.imported.startswith("megatron.core") for found in imports(real_sources()))


def tree(**modules: str) -> Sources:
    """Made-up modules of taid_megatron: config__load='import yaml'."""
    named = {f"taid_megatron.{name.replace('__', '.')}": text for name, text in modules.items()}
    packages = {name.rpartition(".")[0]: "" for name in named}
    return {**packages, **named}


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (upward, tree(config__load="from taid_megatron.training import loop", training__loop="")),
        (upward, tree(config__load="import taid_megatron.runtime.log", runtime__log="")),
        (upward, tree(config__load="from ..runtime.log import say", runtime__log="")),
        (upward, tree(config__load="from ..runtime import log", runtime__log="")),
        (upward, tree(config__load="def f():\n    from .. import losses", losses__kl="")),
        (upward, tree(models__pair="from taid_megatron.checkpointing import store")),
        (upward, tree(training__loop="from taid_megatron import cli", cli="")),
        (forbidden, tree(config__load="import torch.distributed")),
        (forbidden, tree(losses__kl="def f():\n    from megatron.core import mpu")),
        (forbidden, tree(schedules__taid="if TYPE_CHECKING:\n    import megatron")),
        (eager, tree(losses__kl="import triton.language as tl")),
        (eager, tree(losses__kl="from . import triton_kernels", losses__triton_kernels="")),
        (eager, tree(losses__triton_kernels="import triton, apex")),
        (eager, tree(losses__kl="try:\n    import apex\nexcept ImportError:\n    apex = None")),
        (eager, tree(data__reader="from nvidia import dali")),
        (eager, tree(data__reader="class Reader:\n    import nvidia.dali.fn")),
        (eager, tree(models__build="from transformer_engine import pytorch")),
        (cycles, tree(a__b="from . import c", a__c="def f():\n    from taid_megatron.a import b")),
        (cycles, tree(a__b="from .c import x", a__c="from .d import y", a__d="from . import b")),
        (cycles, {"data_tools.a": "import data_tools.a", "data_tools": ""}),
    ],
)
def test_a_rule_catches(rule, sources: Sources):
    assert rule(sources) != []


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (upward, tree(training__loop="from taid_megatron.config import load", config__load="")),
        (upward, tree(training__loop="from taid_megatron import __version__")),
        (upward, tree(config__load="from .schema import Config", config__schema="")),
        (upward, tree(models__pair="from taid_megatron.models import build", models__build="")),
        (forbidden, tree(losses__kl="import torch", models__pair="import megatron.core")),
        (forbidden, tree(config__load="import torchlike")),
        (eager, tree(losses__kl="def kernel():\n    import triton")),
        (eager, tree(losses__triton_kernels="import triton.language as tl")),
        (eager, tree(losses__kl="def f():\n    from . import triton_kernels")),
        (eager, tree(data__reader="if TYPE_CHECKING:\n    import nvidia.dali")),
        (cycles, tree(a__b="from . import c", a__c="import yaml")),
        (cycles, tree(a__b="from taid_megatron import a")),
    ],
)
def test_a_rule_lets_pass(rule, sources: Sources):
    assert rule(sources) == []


def test_sharing_is_counted_in_both_directions():
    sources = {
        "data_tools.a": "from taid_megatron.config import load",
        "taid_megatron.config.load": "",
        "taid_megatron.data.reader": "from data_tools.manifest import read\nimport data_tools.a",
        "data_tools.manifest": "",
    }
    assert shared(sources) == {"taid_megatron.config.load", "data_tools.manifest", "data_tools.a"}
