"""One name, one meaning: no two rooms give the same name to different things."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(__file__).parents[2] / "server" / "warmkv_server"


def named(tree: ast.Module) -> Iterator[str]:
    """Classes and types that a module defines, but for type variables and constants."""
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name):
                yield name
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=value)
            ) if not name.isupper() and name.strip("_")[:1].isupper():
                if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("TypeVar", "ParamSpec")):
                    yield name


def test_no_type_is_defined_twice() -> None:
    where = defaultdict(list)
    for path in sorted(SERVER.rglob("*.py")):
        for name in named(ast.parse(path.read_text(encoding="utf-8"))):
            where[name].append(str(path.relative_to(SERVER)))
    assert len(where) > 200
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
