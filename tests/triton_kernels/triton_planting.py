"""What is planted in the Triton kernels, and where: every place of each kind below.

| kind | a fault |
|---|---|
| bound, equal, always, never, negated, joined, order | as in `dispatch_planting` |
| number | one more of a whole number that is no axis and no length of a range |
| sign | + for -, and the other way round: offsets, too |
| factor | the second factor of a product is one more: strides, too |
| extreme | a maximum for a minimum, and the other way round |
| unmasked | a load or a store without its mask |
| swapped | the two sides of a `where` |
| dropped | a store, or what is added to a sum, that is left out |
"""

from __future__ import annotations

import ast
import copy
from typing import Any

import dispatch_planting
from dispatch_planting import ASKED
from mutants import Fault

EXTREME = {"maximum": "minimum", "max": "min", "argmax": "argmin"}
EXTREME |= {wrong: right for right, wrong in EXTREME.items()}
SIGN = {ast.Add: ast.Sub, ast.Sub: ast.Add}
# whose whole numbers are shapes and axes: another is no program
SHAPES = ("arange", "zeros", "full", "sum", "max", "min", "argmax", "argmin", "expand_dims")


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in node.decorator_list)


class Planter(dispatch_planting.Planter):
    """Plants all faults in the kernels of one file, and in what they call there."""

    shortens = False

    def __init__(self, text: str, name: str, faults: list[Fault]) -> None:
        super().__init__(text, name, faults, ("",))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        before, self.open = self.open, self.open or _is_kernel(node)
        node.body = [self.visit(each) for each in node.body]
        self.open = before
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        plain = copy.deepcopy(node)
        right: Any = self.generic_visit(node)
        if self.open and type(plain.op) in SIGN:
            wrong = ast.BinOp(plain.left, SIGN[type(plain.op)](), plain.right)
            return self.unless("sign", plain.lineno, wrong, right)
        if self.open and isinstance(plain.op, ast.Mult):
            more = ast.BinOp(plain.right, ast.Add(), ast.Constant(1))
            wrong = ast.BinOp(plain.left, ast.Mult(), more)
            return self.unless("factor", plain.lineno, wrong, right)
        return right

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if not self.open or name in SHAPES[:3]:
            return node
        plain = copy.deepcopy(node)
        node.args = [each if self._shape(name, each) else self.visit(each) for each in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        right: Any = node
        if name in EXTREME:
            wrong = copy.deepcopy(plain)
            wrong.func.attr = EXTREME[name]  # pyright: ignore[reportAttributeAccessIssue]
            right = self.unless("extreme", plain.lineno, wrong, right)
        if name == "where":
            wrong = copy.deepcopy(plain)
            wrong.args[1:] = reversed(wrong.args[1:])
            right = self.unless("swapped", plain.lineno, wrong, right)
        if any(each.arg == "mask" for each in plain.keywords):
            wrong = copy.deepcopy(plain)
            wrong.keywords = [e for e in wrong.keywords if e.arg not in ("mask", "other")]
            right = self.unless("unmasked", plain.lineno, wrong, right)
        return right

    @staticmethod
    def _shape(name: str, argument: ast.expr) -> bool:
        return name in SHAPES and isinstance(argument, ast.Constant)

    def visit_keyword(self, node: ast.keyword) -> Any:
        return node if node.arg == "axis" else self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        return self.droppable(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        node.value = self.visit(node.value)
        return node

    def visit_Return(self, node: ast.Return) -> Any:
        node.value = node.value and self.visit(node.value)
        return node


def plant(text: str, name: str, faults: list[Fault]) -> str:
    """The source of this text with all faults, which are added to those before."""
    tree = Planter(text, name, faults).visit(ast.parse(text))
    # behind the docstring and what comes from the future
    at = next(i for i, each in enumerate(tree.body) if isinstance(each, ast.Import))
    asks = ast.ImportFrom("dispatch_mutants", [ast.alias("planted", ASKED)], 0)
    tree.body.insert(at, asks)
    return ast.unparse(ast.fix_missing_locations(tree))
