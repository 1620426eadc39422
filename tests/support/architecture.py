"""Checks the import directions and habits of DESIGN by reading the sources: every rule lists its violations.

    python tests/support/architecture.py     # prints all violations of this checkout

Imports are all imports, also those inside functions; those under TYPE_CHECKING count for directions, not for circles.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Rooms from the top to the bottom; imports point down. Rooms of one line do not import each other.
LAYERS = (
    ("launch",),
    ("cli",),
    ("reports", "bench", "export", "analysis"),
    ("training",),
    ("planning",),
    ("config",),
    ("checkpoint",),
    ("runs", "cluster"),
    ("engines",),
    ("models",),
    ("data",),
    ("kernels", "sections"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LEAVES = {"errors", "files", "randomness", "launchers", "distributed", "cpu", "tying", "terminal"}
SECTIONS = {f"scalevit.config.{name}" for name in ("base", "data", "model", "training")}
# Inside data: what each folder may import of the others.
DATA = {
    "storage": set(),
    "order": set(),
    "transforms": set(),
    "shards": {"storage"},
    "loading": {"storage", "shards", "order", "transforms"},
    "writing": {"storage", "shards", "order", "transforms", "loading"},
    "inspection": {"storage", "shards", "order", "transforms", "loading"},
}
TORCHLESS = {"config", "sections", "runs", "cluster", "reports"}
# Rooms that are handed the whole config.
NAMES_CONFIG_KEYS = {"config", "sections", "cli", "bench", "training", "planning", "reports"}
# Rooms that are handed whole sections, as arguments of these names.
HANDED_SECTIONS = {"models": {"model", "reduction", "kernels"}}
# Conversion to and from another library's checkpoints names the engine that has that library.
FOREIGN_FORMATS = {
    name: {"scalevit.engines.deepspeed.settings"}
    for name in ("scalevit.export.deepspeed_checkpoint", "scalevit.cli.checkpoint")
}
MOST_LINES, LONGEST_FUNCTION = 400, 60


@dataclass(frozen=True)
class Import:
    """One import of one module."""

    target: str
    line: int
    local: bool
    """Inside a function."""
    typing: bool
    """Under TYPE_CHECKING."""


@dataclass(frozen=True)
class Module:
    """A source file of the package or of launch/."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def room(self) -> str:
        """Its room, "" for the package itself, or the leaf's name."""
        if self.name in SECTIONS:
            return "sections"
        parts = self.name.split(".")
        return "launch" if parts[0] == "launch" else "" if len(parts) == 1 or parts[1] == "__main__" else parts[1]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


class Sources:
    """All modules of a checkout with their imports."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.modules: dict[str, Module] = {}
        for folder in ("scalevit", "kernels", "launch"):
            for path in sorted((root / folder).rglob("*.py")):
                inside = path.relative_to(root)
                if inside.parts[:2] == ("scalevit", "kernels"):
                    continue  # the link to kernels/
                parts = [*(["scalevit"] if folder == "kernels" else []), *inside.with_suffix("").parts]
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                self.modules[name] = Module(name, path)
        self.seams = {cls: name for name, cls, bases in self._classes() if "Part" in bases}
        """Seam base class -> its module."""
        found = [
            (name, cls, self.seams[base]) for name, cls, bases in self._classes() for base in bases & set(self.seams)
        ]
        self.parts = {name: seam for name, _, seam in found}
        """Module of a Part -> module of its seam's base class."""
        self.listed = {f"{seam.rpartition('.')[0]}.{cls}": name for name, cls, seam in found}
        """A Part's class, as imported from its seam's `__init__` -> its module."""
        self.imports = {name: list(self._imports(module)) for name, module in self.modules.items()}

    def _classes(self) -> Iterator[tuple[str, str, set[str]]]:
        for module in self.modules.values():
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef):
                    yield module.name, node.name, {base.id for base in node.bases if isinstance(base, ast.Name)}

    def _imports(self, module: Module) -> Iterator[Import]:
        def visit(node: ast.AST, local: bool, typing: bool) -> Iterator[Import]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Import | ast.ImportFrom):
                    for target in self._targets(module, child):
                        yield Import(target, child.lineno, local, typing)
                inner = local or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, inner, typing or guarded)

        yield from visit(module.tree, False, False)

    def _targets(self, module: Module, node: ast.Import | ast.ImportFrom) -> Iterable[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = node.module or ""
        if node.level:
            package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        names = (f"{base}.{alias.name}" for alias in node.names)
        return sorted({name if name in self.modules else self.listed.get(name, base) for name in names})


def at(sources: Sources, module: str, line: int) -> str:
    return f"{sources.modules[module].path.relative_to(sources.root)}:{line}"


def wrong_directions(sources: Sources) -> list[str]:
    """Imports that point up, sideways, or from a leaf into a room."""
    found = []
    for name, imports in sources.imports.items():
        room = sources.modules[name].room
        for item in imports:
            target = sources.modules.get(item.target)
            if target is None or not room or target.room in ("", room) or target.room in LEAVES:
                continue
            if name == "scalevit.config.tree" and _of_a_seam(sources, item.target):
                continue
            if room in LEAVES or LEVEL[target.room] <= LEVEL[room]:
                found.append(f"{at(sources, name, item.line)}: {room} imports {item.target}")
    return found


def _of_a_seam(sources: Sources, target: str) -> bool:
    """A Part, the base class of a seam, or the `__init__` that lists its Parts."""
    return (
        target in sources.parts
        or target in sources.parts.values()
        or any(item.target in sources.parts for item in sources.imports[target])
    )


def wrong_directions_inside(sources: Sources) -> list[str]:
    """Imports between the folders of data against their order, and between engines."""
    found = []
    for name, imports in sources.imports.items():
        own = name.split(".")[1:3]
        for item in imports:
            other = item.target.split(".")[1:3]
            if (
                len(own) < 2
                or len(other) < 2
                or own[0] != other[0]
                or own == other
                or item.target not in sources.modules
            ):
                continue
            upward = own[0] == "data" and other[1] in DATA and own[1] in DATA and other[1] not in DATA[own[1]]
            engines = own[0] == "engines" and name.count(".") > 2 and item.target.count(".") > 2
            if upward or engines:
                found.append(f"{at(sources, name, item.line)}: {'.'.join(own)} imports {item.target}")
    return found


def heavy_parts(sources: Sources) -> list[str]:
    """What Parts import at module level besides `config.base`, their seam's base, leaves, and their own room where
    that knows no torch."""
    found = []
    for name, seam in sources.parts.items():
        for item in sources.imports[name]:
            target = sources.modules.get(item.target)
            room = sources.modules[name].room
            allowed = item.target in ("scalevit.config.base", seam) or (
                target and (target.room in LEAVES or (target.room == room and room in TORCHLESS))
            )
            ours_or_torch = target is not None or item.target.split(".")[0] == "torch"
            if ours_or_torch and not (item.local or item.typing or allowed):
                found.append(f"{at(sources, name, item.line)}: a Part imports {item.target} at module level")
    return found


def torch_where_it_must_not_be(sources: Sources) -> list[str]:
    """Rooms that must not know torch."""
    return [
        f"{at(sources, name, item.line)}: {sources.modules[name].room} imports torch"
        for name, imports in sources.imports.items()
        for item in imports
        if item.target.split(".")[0] == "torch"
        and sources.modules[name].room in TORCHLESS
        and name not in sources.parts
    ]


def circles(sources: Sources) -> list[str]:
    """Groups of modules that import each other, also by imports inside functions."""
    graph: dict[str, list[str]] = {}
    for name, imports in sources.imports.items():
        part = name in sources.parts
        room = sources.modules[name].room
        graph[name] = sorted(
            {
                item.target
                for item in imports
                if item.target in sources.modules
                and item.target != name
                and not item.typing
                and not (part and item.local and sources.modules[item.target].room == room)
            }
        )
    return [" <-> ".join(sorted(group)) for group in _strong_components(graph) if len(group) > 1]


def _strong_components(graph: dict[str, list[str]]) -> list[list[str]]:
    """Tarjan's algorithm."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            groups.append(group)

    for node in graph:
        if node not in number:
            visit(node)
    return groups


def too_long(sources: Sources) -> list[str]:
    """Files and functions that are too long, tests included."""
    found = []
    paths = [module.path for module in sources.modules.values()] + sorted((sources.root / "tests").rglob("*.py"))
    for path in paths:
        text, where = path.read_text(encoding="utf-8"), path.relative_to(sources.root)
        if (lines := len(text.splitlines())) > MOST_LINES:
            found.append(f"{where}: {lines} lines, more than {MOST_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{where}:{node.lineno}: {node.name} has {lines} lines, more than {LONGEST_FUNCTION}")
    return found


def config_keys_in_rooms(sources: Sources, keys: Iterable[str]) -> list[str]:
    """Texts (not docstrings) that name a key of a section that the room is not handed."""
    dotted = sorted((re.escape(key) for key in keys if "." in key), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w./])(?:{'|'.join(dotted)})(?!\w)")
    found = []
    for module in sources.modules.values():
        if module.room in NAMES_CONFIG_KEYS or module.name in sources.parts:
            continue
        handed = HANDED_SECTIONS.get(module.room, set())
        documentation = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                for match in pattern.finditer(node.value):
                    if match.group().partition(".")[0] in handed:
                        continue
                    found.append(f"{at(sources, module.name, node.lineno)}: names the config key {match.group()}")
    return found


def named_parts(sources: Sources) -> list[str]:
    """Imports of a seam's Part by anything but the seam's `__init__`, and files in a folder of the Part's own."""
    found = []
    for name, imports in sources.imports.items():
        for item in imports:
            folder, seam = (path.rpartition(".")[0] for path in (item.target, sources.parts.get(item.target, "")))
            listed = any(item.target == other.target for other in sources.imports.get(seam, ()))
            own_folder = folder != seam and name.startswith(f"{folder}.")
            if listed and not own_folder and name != seam and item.target not in FOREIGN_FORMATS.get(name, ()):
                found.append(f"{at(sources, name, item.line)}: names the Part {item.target}")
    return found


RULES = (
    wrong_directions,
    wrong_directions_inside,
    heavy_parts,
    named_parts,
    torch_where_it_must_not_be,
    circles,
    too_long,
)


def main() -> None:
    from config_keys import config_keys

    sources = Sources()
    violations = {rule.__name__: rule(sources) for rule in RULES}
    violations["config_keys_in_rooms"] = config_keys_in_rooms(sources, config_keys())
    for rule, found in violations.items():
        print(f"{rule}: {len(found)}", *found, sep="\n  ")
    sys.exit(any(violations.values()))


if __name__ == "__main__":
    main()
