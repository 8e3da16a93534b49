"""Names of operations for instructions that the compiler made and left without one, taken from their neighbours.

A conversion that was hoisted out of a loop has no name: what uses it says where it belongs. Names are jax's (`op_name`
in an instruction's metadata), paths of scopes; those of arguments are no such paths.
"""

import collections

from t5x_like.planner import hlo

_STEPS = 5  # so many neighbours away


class Sources:
    """Of one module."""

    def __init__(self, module: hlo.Module) -> None:
        self.module = module
        self._users: dict[str, dict[str, list[str]]] = {}

    def of(self, computation: hlo.Computation, instruction: hlo.Instruction) -> str:
        """The name of an instruction, of what is fused into it, of the nearest user, or of the nearest operand."""
        own = self._own(instruction)
        if own:
            return own
        return self._near(computation, instruction, self._used_by(computation)) or self._near(computation, instruction)

    def _own(self, instruction: hlo.Instruction) -> str:
        if "/" in instruction.source:
            return instruction.source
        if instruction.opcode == "fusion":
            fused = self.module.computations[instruction.called("calls")[0]]
            for inner in reversed(list(fused.instructions.values())):
                name = self._own(inner)
                if name:
                    return name
        return ""

    def _near(
        self, computation: hlo.Computation, start: hlo.Instruction, users: dict[str, list[str]] | None = None
    ) -> str:
        """Users are followed where they are given, else operands."""
        seen, level = {start.name}, [start]
        for _ in range(_STEPS):
            names = [name for item in level for name in (item.operands if users is None else users.get(item.name, ()))]
            # The argument of a parameter or a constant names no instruction.
            new = [name for name in dict.fromkeys(names) if name not in seen and name in computation.instructions]
            level = [computation.instructions[name] for name in new]
            seen.update(new)
            for item in level:
                if item.opcode != "parameter" and item.name != computation.root:
                    name = self._own(item)
                    if name:
                        return name
            level = [item for item in level if item.name != computation.root]
        return ""

    def _used_by(self, computation: hlo.Computation) -> dict[str, list[str]]:
        if computation.name not in self._users:
            users = collections.defaultdict(list)
            for item in computation.instructions.values():
                for operand in item.operands:
                    if operand in computation.instructions:
                        users[operand].append(item.name)
            self._users[computation.name] = dict(users)
        return self._users[computation.name]
