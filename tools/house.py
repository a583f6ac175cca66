"""Architecture figures of a checkout of convscale: how it is divided, what imports what, how long, how well typed.

    python tools/house.py                        the working tree
    python tools/house.py --at bbd38ae           a commit, read through `git archive`
    python tools/house.py --against bbd38ae      a Markdown table: that commit, then the working tree (or `--at`)
    python tools/house.py --json                 the same for machines, with every list in full

It reads the Python files (`*.py`) of the package `convscale/`: no tests, benchmarks, docs or data files.
It runs no code. What is counted:

- **Files, lines**: physical lines, blank ones and comments included.
- **Rooms**: the packages and modules directly under `convscale/`, but `__init__.py`. `choice_speeds.py` is a room.
- **Import circles**: groups of modules that import each other, directly or round about (strongly connected components
  with more than one member). Every kind of import is an edge: at the top of a module, inside a function, under
  `TYPE_CHECKING`, `import_module` with a literal. A public name that is taken from `convscale` itself leads to the
  module that defines it. *Between rooms*: each room is one node. *Inside rooms*: the modules of one room, with the
  imports among them. No edges: the package that is imported along with a module in it, and `convscale.__version__`.
  Beside them stand the circles of the module-level imports alone.
- **Parameters**: of every `def`, nested ones too, without a method's `self` or `cls`. `*args` and `**kwargs` count one
  each. `@overload` variants are left out. The *public boundary* is the functions of the public table (`__init__.pyi`,
  or `_PUBLIC` in `__init__.py`), the `__init__` of its classes, and the commands: functions that are decorated with
  `X.command(...)` or `X.callback(...)`, or handed to it. All else stands *below the boundary*.
- **Any**: every use of the name `Any` or `typing.Any`. Its imports are left out; quoted types count as what they quote.
- **dict[str, Any]**: that expression. Its read-only twin `Mapping[str, Any]` is counted apart, because to swap one for
  the other types nothing.
- **Public functions that mention Any**: functions at module level and methods of classes at module level, no leading
  underscore in either name, with `Any` anywhere in the annotation of a parameter or of the result. An alias hides it.
- **.get("key") in show/**: calls of a method `get` whose first argument is a string or an f-string.
- **Files to touch**: files that spell an existing name out, so that a sibling of it would have to be added there.
  *A runtime, a family, a block kind*: `openvino`, `mixnet`, `inverted_residual` as a word (no letter before or after
  it; case counts) of a string that is no docstring, or of the name of an imported module.
  *A condition*: the keyword argument `precision=precision`. Functions with a parameter `precision` are counted too.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from imports import PACKAGE, Checkout, ImportKind, Module, last_name

LINE_LIMIT, FILE_LIMIT, PARAMETER_LIMIT, LONGEST = 120, 500, 8, 10
RUNTIME, FAMILY, BLOCK_KIND, CONDITION = "openvino", "mixnet", "inverted_residual", "precision"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """How many parameters a function takes."""

    function: str
    parameters: int
    place: str
    """``path:line``."""

    def __str__(self) -> str:
        return f"{self.parameters:3} {self.function} ({self.place})"


@dataclass(frozen=True)
class House:
    """The figures of one checkout; what each one counts stands in this file's docstring."""

    label: str
    files: int
    lines: int
    rooms: list[str]
    circles_between_rooms: list[tuple[str, ...]]
    circles_inside_rooms: list[tuple[str, ...]]
    circles_of_module_level_imports: list[tuple[str, ...]]
    boundary_signatures: list[Signature]
    """Of every function on the public boundary, longest first."""
    inner_signatures: list[Signature]
    """Of the functions below it, the longest ten and every one over the limit."""
    inner_functions_over_limit: int
    any_uses: int
    any_per_1000_lines: float
    dict_str_any: int
    mapping_str_any: int
    public_functions_with_any: list[str]
    string_gets_in_show: int
    lines_over_limit: int
    files_over_limit: list[str]
    files_naming_a_runtime: list[str]
    files_naming_a_family: list[str]
    files_naming_a_block_kind: list[str]
    files_passing_a_condition: list[str]
    places_passing_a_condition: int
    functions_taking_a_condition: int

    def rows(self) -> list[tuple[str, str]]:
        """(figure, value) of the table."""

        def longest(signatures: list[Signature]) -> str:
            return f"{signatures[0].parameters} (`{signatures[0].function}`)" if signatures else "none"

        passed = f"{CONDITION}={CONDITION}"
        return [
            ("files", f"{self.files}"),
            ("lines", f"{self.lines:,}"),
            ("rooms (packages and modules under `convscale/`)", f"{len(self.rooms)}"),
            ("import circles between rooms", f"{len(self.circles_between_rooms)}"),
            ("import circles inside rooms", f"{len(self.circles_inside_rooms)}"),
            ("of both, by module-level imports alone", f"{len(self.circles_of_module_level_imports)}"),
            ("longest parameter list on the public boundary", longest(self.boundary_signatures)),
            ("longest parameter list below it", longest(self.inner_signatures)),
            (f"functions with more than {PARAMETER_LIMIT} parameters below it", f"{self.inner_functions_over_limit}"),
            ("`Any` per 1,000 lines", f"{self.any_per_1000_lines:.1f} ({self.any_uses} in all)"),
            ("`dict[str, Any]`", f"{self.dict_str_any}"),
            ("`Mapping[str, Any]`", f"{self.mapping_str_any}"),
            ("public functions whose annotations mention `Any`", f"{len(self.public_functions_with_any)}"),
            ('`.get("key")` in `show/`', f"{self.string_gets_in_show}"),
            (f"lines over {LINE_LIMIT} characters", f"{self.lines_over_limit:,}"),
            (f"files over {FILE_LIMIT} lines", f"{len(self.files_over_limit)}"),
            (f"files to touch to add a runtime (name `{RUNTIME}`)", f"{len(self.files_naming_a_runtime)}"),
            (f"files to touch to add a family (name `{FAMILY}`)", f"{len(self.files_naming_a_family)}"),
            (f"files to touch to add a block kind (name `{BLOCK_KIND}`)", f"{len(self.files_naming_a_block_kind)}"),
            (f"files to touch to add a condition (`{passed}`)", f"{len(self.files_passing_a_condition)}"),
            (f"places with `{passed}`", f"{self.places_passing_a_condition}"),
            (f"functions with a parameter `{CONDITION}`", f"{self.functions_taking_a_condition}"),
        ]


def figures(checkout: Checkout) -> House:
    """All figures of a checkout."""
    modules = checkout.modules
    lines = sum(len(module.source.splitlines()) for module in modules)
    nodes = [node for module in modules for node in nodes_of(module)]
    any_uses = sum(_is_any(node) for node in nodes)
    boundary, inner = _signatures(checkout)
    over = sum(signature.parameters > PARAMETER_LIMIT for signature in inner)
    passing = {module.path: sum(_passes_on(node, CONDITION) for node in ast.walk(module.tree)) for module in modules}
    shown = [node for module in modules if module.room == "show" for node in ast.walk(module.tree)]
    functions = [function for module in modules for _, function, _ in functions_of(module)]
    level: tuple[ImportKind, ...] = ("module",)
    return House(
        label=checkout.label,
        files=len(modules),
        lines=lines,
        rooms=checkout.rooms,
        circles_between_rooms=checkout.circles_between_rooms(),
        circles_inside_rooms=[circle for room in checkout.rooms for circle in checkout.circles_inside(room)],
        circles_of_module_level_imports=[
            *checkout.circles_between_rooms(level),
            *(circle for room in checkout.rooms for circle in checkout.circles_inside(room, level)),
        ],
        boundary_signatures=boundary,
        inner_signatures=inner[: max(over, LONGEST)],
        inner_functions_over_limit=over,
        any_uses=any_uses,
        any_per_1000_lines=1000 * any_uses / max(lines, 1),
        dict_str_any=sum(_is_str_any(node, ("dict", "Dict")) for node in nodes),
        mapping_str_any=sum(_is_str_any(node, ("Mapping", "MutableMapping")) for node in nodes),
        public_functions_with_any=[name for module in modules for name in _public_with_any(module)],
        string_gets_in_show=sum(map(_is_string_get, shown)),
        lines_over_limit=sum(len(line) > LINE_LIMIT for module in modules for line in module.source.splitlines()),
        files_over_limit=[module.path for module in modules if len(module.source.splitlines()) > FILE_LIMIT],
        files_naming_a_runtime=[module.path for module in modules if _spells_out(module, RUNTIME)],
        files_naming_a_family=[module.path for module in modules if _spells_out(module, FAMILY)],
        files_naming_a_block_kind=[module.path for module in modules if _spells_out(module, BLOCK_KIND)],
        files_passing_a_condition=[path for path, places in passing.items() if places],
        places_passing_a_condition=sum(passing.values()),
        functions_taking_a_condition=sum(CONDITION in [arg.arg for arg in _arguments(one)] for one in functions),
    )


def functions_of(module: Module) -> list[tuple[str, Function, bool]]:
    """(name inside the module, definition, whether it is a method) of every function, nested ones too, no overloads."""
    return list(_functions_below(module.tree, "", in_class=False))


def _functions_below(node: ast.AST, prefix: str, *, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if "overload" not in map(last_name, child.decorator_list):
                yield f"{prefix}{child.name}", child, in_class
                yield from _functions_below(child, f"{prefix}{child.name}.<locals>.", in_class=False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions_below(child, f"{prefix}{child.name}.", in_class=True)
        else:
            yield from _functions_below(child, prefix, in_class=in_class)


def types_of(node: ast.AST) -> list[ast.expr]:
    """The types that a node states: an annotation, a result's, the first argument of a cast."""
    stated = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    if isinstance(node, ast.Call) and last_name(node.func) == "cast":
        stated.extend(node.args[:1])
    return [expression for expression in stated if expression is not None]


def quoted_types(expression: ast.AST) -> Iterator[ast.expr]:
    """What the quoted parts of a type say; the values of a Literal and what Annotated adds are no types."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        try:
            yield ast.parse(expression.value, mode="eval").body
        except SyntaxError:
            return
    elif isinstance(expression, ast.Subscript) and last_name(expression.value) in ("Literal", "Annotated"):
        if last_name(expression.value) == "Annotated" and isinstance(expression.slice, ast.Tuple):
            yield from quoted_types(expression.slice.elts[0])
    else:
        for child in ast.iter_child_nodes(expression):
            yield from quoted_types(child)


def nodes_of(module: Module) -> list[ast.AST]:
    """Of the whole tree, and of its quoted types."""
    nodes = list(ast.walk(module.tree))
    quoted = (part for node in nodes for stated in types_of(node) for part in quoted_types(stated))
    return [*nodes, *(node for part in quoted for node in ast.walk(part))]


def _signatures(checkout: Checkout) -> tuple[list[Signature], list[Signature]]:
    """Parameter counts on the public boundary and below it, each longest first."""
    commands = {name for module in checkout.modules for name in _commands(module)}
    public = {f"{module}.{name}" for name, module in checkout.public.items()}
    public |= {f"{name}.__init__" for name in public}
    boundary: list[Signature] = []
    inner: list[Signature] = []
    for module in checkout.modules:
        for name, function, is_method in functions_of(module):
            full = f"{module.name}.{name}"
            is_static = "staticmethod" in map(last_name, function.decorator_list)
            count = len(_arguments(function)) - (is_method and not is_static)
            signature = Signature(full.removeprefix(f"{PACKAGE}."), count, f"{module.path}:{function.lineno}")
            (boundary if full in public | commands else inner).append(signature)
    boundary.sort(key=lambda one: (-one.parameters, one.function))
    inner.sort(key=lambda one: (-one.parameters, one.function))
    return boundary, inner


def _commands(module: Module) -> Iterator[str]:
    """Full names of the functions that are put on the command line."""

    def registers(node: ast.AST) -> bool:
        target = node.func if isinstance(node, ast.Call) else node
        return isinstance(target, ast.Attribute) and target.attr in ("command", "callback")

    for name, function, _ in functions_of(module):
        if any(registers(decorator) for decorator in function.decorator_list):
            yield f"{module.name}.{name}"
    imported = {one.name.rpartition(".")[2]: one.name for one in module.imports}
    statements = [node for node in ast.walk(module.tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    renamed = {alias.asname: alias.name for node in statements for alias in node.names}
    for node in ast.walk(module.tree):  # app.command("train")(train_command)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and registers(node.func):
            for arg in node.args:
                name = renamed.get(ast.unparse(arg), ast.unparse(arg))
                yield imported.get(name.rpartition(".")[2], f"{module.name}.{name}")


def _arguments(function: Function) -> list[ast.arg]:
    args = function.args
    optional = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *optional]


def _public_with_any(module: Module) -> Iterator[str]:
    for name, function, is_method in functions_of(module):
        parts = name.split(".")
        if len(parts) == (2 if is_method else 1) and not any(part.startswith("_") for part in parts):
            stated = [part for node in (function, *_arguments(function)) for part in types_of(node)]
            quoted = [part for annotation in stated for part in quoted_types(annotation)]
            if any(_is_any(node) for part in stated + quoted for node in ast.walk(part)):
                yield f"{module.name.removeprefix(f'{PACKAGE}.')}.{name}"


def _is_any(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and last_name(node) == "Any"


def _is_str_any(node: ast.AST, containers: tuple[str, ...]) -> bool:
    if not isinstance(node, ast.Subscript) or last_name(node.value) not in containers:
        return False
    return isinstance(node.slice, ast.Tuple) and [last_name(part) for part in node.slice.elts] == ["str", "Any"]


def _is_string_get(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.JoinedStr() | ast.Constant(value=str()), *_]):
            return True
    return False


def _passes_on(node: ast.AST, name: str) -> bool:
    match node:
        case ast.keyword(arg=keyword, value=ast.Name(id=variable)):
            return keyword == variable == name
    return False


def _spells_out(module: Module, name: str) -> bool:
    """Whether a name is a word of a string that is no docstring, or of an imported module's name."""
    word = re.compile(rf"(?<![A-Za-z]){name}(?![A-Za-z])")
    docstrings = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(module.tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    texts = [node.value for node in strings if isinstance(node.value, str)] + [one.name for one in module.imports]
    return any(word.search(text) for text in texts)


# ---------------------------------------------------------------- printing


def as_text(house: House) -> str:
    """The figures, and the lists behind them."""
    rows = [(name.replace("`", ""), value.replace("`", "")) for name, value in house.rows()]
    out = [f"{PACKAGE}, {house.label}", "", *(f"{name:64} {value}" for name, value in rows)]

    def section(title: str, lines: Iterable[str]) -> None:
        out.extend(["", title, *(f"  {line}" for line in list(lines) or ["none"])])

    section("Circles between rooms", map(" <-> ".join, house.circles_between_rooms))
    section("Circles inside rooms", map(" <-> ".join, house.circles_inside_rooms))
    outer, inner = house.boundary_signatures[:LONGEST], house.inner_signatures[:LONGEST]
    section("Longest parameter lists on the public boundary", map(str, outer))
    section("Longest parameter lists below the boundary", map(str, inner))
    section(f"Files over {FILE_LIMIT} lines", house.files_over_limit)
    section("Files that name a runtime", house.files_naming_a_runtime)
    section("Files that name a family", house.files_naming_a_family)
    section("Files that name a block kind", house.files_naming_a_block_kind)
    section("Files that pass a condition on", house.files_passing_a_condition)
    return "\n".join(out)


def as_table(before: House, after: House) -> str:
    """Two checkouts side by side, in Markdown."""
    rows = [f"| {name} | {old} | {new} |" for (name, old), (_, new) in zip(before.rows(), after.rows(), strict=True)]
    return "\n".join([f"| figure | {before.label} | {after.label} |", "|---|---|---|", *rows])


def main() -> None:
    """Print the figures; exit code 2 when a commit can not be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=here, help="the checkout (this one when left out)")
    parser.add_argument("--at", metavar="COMMIT", help="the figures of this commit instead of the working tree's")
    parser.add_argument("--against", metavar="COMMIT", help="a Markdown table with this commit before it")
    parser.add_argument("--json", action="store_true", help="for machines, with every list in full")
    args = parser.parse_args()
    try:
        now = figures(Checkout.at(args.root, args.at) if args.at else Checkout.on_disk(args.root))
        before = figures(Checkout.at(args.root, args.against)) if args.against else None
    except (ValueError, SyntaxError, OSError) as error:
        print(f"house: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps({"before": asdict(before), "after": asdict(now)} if before else asdict(now), indent=2))
    else:
        print(as_table(before, now) if before else as_text(now))


if __name__ == "__main__":
    main()
