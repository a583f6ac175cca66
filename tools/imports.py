"""What the modules of the package import, read from their text: no code is run.

`tools/house.py` counts with it, and `tests/test_layering.py` checks the ranks of the rooms with it.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

PACKAGE = "convscale"

ImportNode = ast.Import | ast.ImportFrom | ast.Call
ImportKind = Literal["module", "local", "typing"]
EVERY_KIND: tuple[ImportKind, ...] = ("module", "local", "typing")


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    name: str
    """Dotted, relative imports resolved: ``convscale.nn.net.create_model``."""
    line: int
    kind: ImportKind
    """``module``: runs when the module is imported. ``local``: in a function. ``typing``: under ``TYPE_CHECKING``."""


def imports_of(tree: ast.Module, module: str, *, is_package: bool = False) -> list[Import]:
    """Every import of a module, in the order of its lines.

    ``import convscale as cs`` stands for every ``cs.name`` that is used; ``from convscale import nn`` for every
    ``nn.name`` too.

    Args:
        tree: the parsed module.
        module: its dotted name, which relative imports start from.
        is_package: whether it is an ``__init__``.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    chains = list(_attribute_chains(tree))
    imports = set()
    for node, kind in _import_nodes(tree):
        for name, variable in _bindings(node, package):
            root = PACKAGE if variable == PACKAGE else name  # `import convscale.nn.net` binds `convscale`
            ours = bool(variable) and root.split(".")[0] == PACKAGE
            used = {f"{root}.{attributes}" for first, attributes in chains if ours and first == variable}
            if name != PACKAGE or not used:
                used.add(name)
            imports |= {Import(one, node.lineno, kind) for one in used}
    return sorted(imports, key=lambda one: (one.line, one.name, one.kind))


def _import_nodes(tree: ast.AST, kind: ImportKind = "module") -> Iterator[tuple[ImportNode, ImportKind]]:
    """Import statements and calls below a node, with where they stand."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ImportNode):
            yield child, kind
        if isinstance(child, ast.If) and last_name(child.test) == "TYPE_CHECKING":
            yield from _import_nodes(ast.Module(child.body, []), "typing")
            yield from _import_nodes(ast.Module(child.orelse, []), kind)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and kind == "module":
            yield from _import_nodes(child, "local")
        else:
            yield from _import_nodes(child, kind)


def _bindings(node: ImportNode, package: list[str]) -> Iterator[tuple[str, str]]:
    """(dotted name, variable that it or its root is bound to) of each name that an import takes."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, alias.asname or alias.name.split(".")[0]
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        prefix = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            yield (prefix, "") if alias.name == "*" else (f"{prefix}.{alias.name}", alias.asname or alias.name)
    elif last_name(node.func) in ("import_module", "__import__"):
        for name in [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]:
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                level = len(name.value) - len(name.value.lstrip("."))
                base = package[: len(package) - level + 1] if level else []
                yield ".".join([*base, name.value[level:]]), ""


def _attribute_chains(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(variable, dotted attributes) of every ``variable.a.b``; ``variable.a`` comes too."""
    for node in ast.walk(tree):
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name):
            yield node.id, ".".join(attributes)


def last_name(node: ast.AST) -> str:
    """``c`` of the expressions ``c`` and ``a.b.c``; empty for any other."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def circles(edges: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach each other: strongly connected components with more than one member, sorted."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        reached, waiting = set(), list(edges[start])
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting.extend(edges.get(node, ()))
        reach[start] = reached
    mutual = ([other for other in edges if other in reach[node] and node in reach[other]] for node in edges)
    return sorted({tuple(sorted(group)) for group in mutual if len(group) > 1})


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    path: str
    """From the repository's root, with slashes: ``convscale/nn/net.py``."""
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """Parsed."""
        return ast.parse(self.source, self.path)

    @property
    def is_package(self) -> bool:
        """Whether it is an ``__init__``."""
        return self.path.endswith("/__init__.py")

    @property
    def name(self) -> str:
        """Dotted: ``convscale.nn.net``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """What stands directly under the package; empty for its own ``__init__``."""
        return [*self.name.split("."), ""][1]

    @cached_property
    def imports(self) -> list[Import]:
        """All of them, in the order of their lines."""
        return imports_of(self.tree, self.name, is_package=self.is_package)


def public_table(init: str, stub: str | None = None) -> dict[str, str]:
    """Public name -> dotted module that defines it.

    Args:
        init: the text of ``__init__.py``, whose ``_PUBLIC`` is read where there is no stub.
        stub: the text of ``__init__.pyi``, whose imports are read.
    """
    table: dict[str, str] = {}
    for node in ast.parse(init if stub is None else stub).body:
        if stub is None and isinstance(node, ast.Assign) and last_name(node.targets[0]) == "_PUBLIC":
            table |= {name: f"{PACKAGE}.{module}" for name, module in ast.literal_eval(node.value).items()}
        elif stub is not None and isinstance(node, ast.ImportFrom) and node.module:
            module = f"{PACKAGE}.{node.module}" if node.level else node.module
            if module.startswith(f"{PACKAGE}."):
                table |= {alias.asname or alias.name: module for alias in node.names}
    return {name: module for name, module in table.items() if not name.startswith("_")}


@dataclass(frozen=True)
class Checkout:
    """The package's files and its public table."""

    label: str
    modules: tuple[Module, ...]
    public: dict[str, str]

    @classmethod
    def of(cls, label: str, files: Mapping[str, str]) -> Checkout:
        """From texts by path: ``convscale/**.py`` and, if there is one, ``convscale/__init__.pyi``."""
        public = public_table(files.get(f"{PACKAGE}/__init__.py", ""), files.get(f"{PACKAGE}/__init__.pyi"))
        modules = (Module(path, text) for path, text in sorted(files.items()) if path.endswith(".py"))
        return cls(label, tuple(modules), public)

    @classmethod
    def on_disk(cls, root: Path) -> Checkout:
        """Of a working tree."""
        paths = [*(root / PACKAGE).rglob("*.py"), *(root / PACKAGE).glob("__init__.pyi")]
        texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
        return cls.of("working tree", texts)

    @classmethod
    def at(cls, root: Path, commit: str) -> Checkout:
        """Of a commit; the working tree is not touched."""
        command = ["git", "-C", str(root), "archive", "--format=tar", commit, "--", PACKAGE]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise ValueError(f"{commit} can not be read: {done.stderr.decode(errors='replace').strip()}")
        texts = {}
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith((".py", "__init__.pyi")) else None
                if file is not None:
                    texts[member.name] = file.read().decode("utf-8")
        return cls.of(commit, texts)

    @cached_property
    def names(self) -> frozenset[str]:
        """Dotted names of all modules but the package's own ``__init__``."""
        return frozenset(module.name for module in self.modules if module.room)

    def defining_module(self, name: str) -> str | None:
        """The module of ours that a dotted name stands in; None for another library's and for the package itself."""
        top, *rest = name.split(".")
        if top != PACKAGE or not rest:
            return None
        if rest[0] in self.public:  # the name is found before a module called so
            return self.public[rest[0]]
        prefixes = (".".join([top, *rest[:length]]) for length in range(len(rest), 0, -1))
        return next((prefix for prefix in prefixes if prefix in self.names), None)

    @cached_property
    def edges(self) -> dict[str, set[tuple[str, ImportKind]]]:
        """Module -> (module that it imports, kind of import); the package's own ``__init__`` is no node."""
        edges: dict[str, set[tuple[str, ImportKind]]] = {}
        for module in self.modules:
            if module.room:
                targets = edges[module.name] = set()
                for one in module.imports:
                    target = self.defining_module(one.name)
                    if target is not None and target != module.name:
                        targets.add((target, one.kind))
        return edges

    @property
    def rooms(self) -> list[str]:
        """What stands directly under the package, sorted."""
        return sorted({module.room for module in self.modules} - {""})

    def circles_between_rooms(self, kinds: tuple[ImportKind, ...] = EVERY_KIND) -> list[tuple[str, ...]]:
        """Groups of rooms that import each other by these kinds of import."""
        graph: dict[str, set[str]] = {room: set() for room in self.rooms}
        for name, targets in self.edges.items():
            graph[name.split(".")[1]] |= {target.split(".")[1] for target, kind in targets if kind in kinds}
        return circles(graph)

    def circles_inside(self, room: str, kinds: tuple[ImportKind, ...] = EVERY_KIND) -> list[tuple[str, ...]]:
        """Groups of modules of one room that import each other by these kinds of import."""
        inside = {name for name in self.edges if name.split(".")[1] == room}
        graph = {name: {to for to, kind in self.edges[name] if kind in kinds and to in inside} for name in inside}
        return circles(graph)
