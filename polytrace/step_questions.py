"""What is asked of the service about values of steps, put as a question about prompts: it knows shapes of one forward.

A later step is a forward of one token a sequence, so a read of one is a read of prompts of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from polytrace.errors import GraphError
from polytrace.graph import Constant, Invoke, Last, Node, Op, Port, Read
from polytrace.tensors import RawTensor


def as_prompts(
    nodes: Sequence[Node], invokes: Sequence[Invoke], *, is_late: bool
) -> tuple[tuple[Node, ...], tuple[Invoke, ...], dict[str, RawTensor]]:
    """Nodes that read prompts alone, in the same places, with their invokes and constants of their own.

    `is_late`: what acts at several steps is meant at the last of them.
    """
    made: list[Node] = []
    own: list[Invoke] = [replace(one, generation=None) for one in invokes]
    places: dict[tuple[int, int], int] = {}  # of invokes' prompts as they are asked about at a step

    def column(invoke: int) -> int:
        return place(invoke, 0, [sequence[-1:] for sequence in invokes[invoke].sequences])

    def so_far(invoke: int, step: int) -> int:
        return place(invoke, step, [(*sequence, *[0] * step) for sequence in invokes[invoke].sequences])

    def place(invoke: int, step: int, sequences: list[tuple[int, ...]]) -> int:
        if (invoke, step) not in places:
            places[invoke, step] = len(own)
            own.append(Invoke(sequences=tuple(sequences)))
        return places[invoke, step]

    constants: dict[str, RawTensor] = {}
    for node in nodes:
        if isinstance(node, Read):
            invoke = column(node.invoke) if node.step > 0 or (is_late and node.num_steps > 1) else node.invoke
            if node.site.port.is_attended and node.step > 0:
                invoke = so_far(node.invoke, node.step)
            if node.site.port.is_of_pairs and invoke != node.invoke:
                told = "what follows from scores behind the prompt has no known shape here: save the scores themselves"
                raise GraphError(told, where=node.where)
            if node.site.port is Port.TOKEN:
                shape = (len(own[invoke].sequences), own[invoke].longest)
                name = f"tokens {shape[0]} {shape[1]}"
                constants[name] = RawTensor(dtype="int64", shape=shape, data=memoryview(bytes(8 * shape[0] * shape[1])))
                made.append(Constant(name=name, where=node.where))
            else:
                made.append(replace(node, invoke=invoke, step=0, num_steps=1))
        elif isinstance(node, Last):
            made.append(Op(name="clone", args=node.values[:1], where=node.where))
        else:
            made.append(node)
    return tuple(made), tuple(own), constants
