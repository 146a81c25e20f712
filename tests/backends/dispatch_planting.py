"""What is planted in the Python that chooses who runs, and where: every place of each kind below.

| kind | a fault |
|---|---|
| bound | < for <=, > for >= and the other way round |
| equal | == and !=, `is` and `is not`, `in` and `not in` for one another |
| always, never | of an `if`, also within an expression or a comprehension |
| negated | a `not` that is left out |
| joined | `or` for `and`, and the other way round |
| dropped | a call, an assignment to a part of something, or a `raise` that is left out |
| extreme | min for max, any for all, and the other way round |
| number | one more; True for False, and the other way round |
| order | the first two of a tuple change places |
| shorter | a tuple lacks its last |
| nothing | None is returned |

A fault is an expression beside the right one behind a test of its number, so that all of a file are
compiled at once.
"""

from __future__ import annotations

import ast
import copy
from typing import Any

from mutants import Fault

BOUND = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
EQUAL = {ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
EQUAL |= {wrong: right for right, wrong in EQUAL.items()}
EXTREME = {"min": "max", "max": "min", "any": "all", "all": "any"}
ASKED = "_planted"  # the test of a number, which the planted module is given


def _call(function: str, value: int) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), [ast.Constant(value)], [])


class Planter(ast.NodeTransformer):
    """Plants all faults of one file; within: in these functions alone, () in all of it."""

    shortens = True  # whether a tuple without its last is a fault that needs a test

    def __init__(self, text: str, name: str, faults: list[Fault], within: tuple[str, ...]) -> None:
        self.lines, self.name, self.faults, self.within = text.splitlines(), name, faults, within
        self.open = not within

    def fault(self, kind: str, line: int) -> ast.Call:
        """The test of a new fault's number."""
        self.faults.append(Fault(kind, self.name, line, self.lines[line - 1].strip()))
        return _call(ASKED, len(self.faults) - 1)

    def unless(self, kind: str, line: int, wrong: ast.expr, right: ast.expr) -> ast.IfExp:
        return ast.IfExp(self.fault(kind, line), copy.deepcopy(wrong), right)

    def condition(self, test: ast.expr, line: int) -> ast.expr:
        test = self.visit(test)
        if not self.open:
            return test
        always = ast.BoolOp(ast.Or(), [self.fault("always", line), test])
        never = ast.UnaryOp(ast.Not(), self.fault("never", line))
        return ast.BoolOp(ast.And(), [never, always])

    def droppable(self, node: Any) -> Any:
        line = node.lineno
        node = self.generic_visit(node)
        if not self.open:
            return node
        return ast.If(ast.UnaryOp(ast.Not(), self.fault("dropped", line)), [node], [])

    # ---- where nothing is planted ---------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        before, self.open = self.open, self.open or node.name in self.within
        node.args.defaults = [self.visit(each) for each in node.args.defaults]
        node.body = [self.visit(each) for each in node.body]
        self.open = before
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = node.value and self.visit(node.value)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        return node  # what is said, not what is done

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        types = isinstance(node.slice, ast.Tuple | ast.List)
        return node if types else self.generic_visit(node)

    # ---- expressions ----------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> Any:
        plain = copy.deepcopy(node)
        right: Any = self.generic_visit(node)
        for at, each in enumerate(plain.ops if self.open else ()):
            for kind, table in (("bound", BOUND), ("equal", EQUAL)):
                if type(each) in table:
                    ops = [*plain.ops[:at], table[type(each)](), *plain.ops[at + 1 :]]
                    wrong = ast.Compare(plain.left, ops, plain.comparators)
                    right = self.unless(kind, plain.lineno, wrong, right)
        return right

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        plain = copy.deepcopy(node)
        right: Any = self.generic_visit(node)
        if self.open and isinstance(plain.op, ast.Not):
            return self.unless("negated", plain.lineno, plain.operand, right)
        return right

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        plain = copy.deepcopy(node)
        right: Any = self.generic_visit(node)
        if not self.open:
            return right
        turned = ast.Or() if isinstance(plain.op, ast.And) else ast.And()
        return self.unless("joined", plain.lineno, ast.BoolOp(turned, plain.values), right)

    def visit_Call(self, node: ast.Call) -> Any:
        plain = copy.deepcopy(node)
        right: Any = self.generic_visit(node)
        if not (self.open and isinstance(plain.func, ast.Name) and plain.func.id in EXTREME):
            return right
        plain.func = ast.Name(EXTREME[plain.func.id], ast.Load())
        return self.unless("extreme", plain.lineno, plain, right)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if not self.open or not isinstance(node.value, bool | int):
            return node
        wrong = not node.value if isinstance(node.value, bool) else node.value + 1
        return self.unless("number", node.lineno, ast.Constant(wrong), node)

    def visit_Tuple(self, node: ast.Tuple) -> Any:
        plain = copy.deepcopy(node)
        right: Any = self.generic_visit(node)
        if not self.open or not isinstance(plain.ctx, ast.Load) or len(plain.elts) < 2:
            return right
        first, second, *rest = plain.elts
        turned = ast.Tuple([second, first, *rest], ast.Load())
        right = self.unless("order", plain.lineno, turned, right)
        if not self.shortens:
            return right
        shorter = ast.Tuple(plain.elts[:-1], ast.Load())
        return self.unless("shorter", plain.lineno, shorter, right)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        node.test = self.condition(node.test, node.lineno)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> Any:
        node.iter = self.visit(node.iter)
        node.ifs = [self.condition(test, test.lineno) for test in node.ifs]
        return node

    # ---- statements -----------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.condition(node.test, node.lineno)
        node.body = [self.visit(each) for each in node.body]
        node.orelse = [self.visit(each) for each in node.orelse]
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        return (
            self.droppable(node) if isinstance(node.value, ast.Call) else self.generic_visit(node)
        )

    def visit_Raise(self, node: ast.Raise) -> Any:
        return self.droppable(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        if any(isinstance(each, ast.Attribute | ast.Subscript) for each in node.targets):
            return self.droppable(node)
        node.value = self.visit(node.value)
        return node

    def visit_Return(self, node: ast.Return) -> Any:
        told = node.value
        if told is None:
            return node
        line, node.value = node.lineno, self.visit(told)
        if self.open and not (isinstance(told, ast.Constant) and told.value is None):
            node.value = self.unless("nothing", line, ast.Constant(None), node.value)
        return node


def plant(text: str, name: str, faults: list[Fault], within: tuple[str, ...] = ()) -> ast.Module:
    """The module of this text with all faults, which are added to those before."""
    tree = Planter(text, name, faults, within).visit(ast.parse(text))
    return ast.fix_missing_locations(tree)
