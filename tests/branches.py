"""Finds code that branches on a name: what it compares, looks up or matches."""

import ast
from collections.abc import Callable, Iterator


def branches_on(node: ast.AST) -> list[ast.expr]:
    """What a node compares, looks up or matches."""
    match node:
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.Dict():
            return [key for key in node.keys if key is not None]
        case ast.MatchValue():
            return [node.value]
        case ast.Subscript():
            return [node.slice]
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
            return [kinds]
    return []


def found_in(source: str, is_name: Callable[[ast.expr], bool]) -> Iterator[int]:
    """Yield the lines that branch on a name, or on one of several."""

    def holds(node: ast.expr) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(map(holds, node.elts))
        return is_name(node)

    for node in ast.walk(ast.parse(source)):
        yield from (branch.lineno for branch in branches_on(node) if holds(branch))
