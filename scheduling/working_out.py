"""Works a request out, to a model of any kind: its program, and what is known of each node's value.

Where workers, intake and shards in one process enter. Owns nothing but which way it is done: `scheduling.program` for
prompts in shared passes, `scheduling.whole` for calls of a model as it is.
"""

from __future__ import annotations

from polytrace.description import ModelDescription, PassLayout
from polytrace.graph import Request
from scheduling.plan import Program, RequestId
from scheduling.program import work_out_prompts
from scheduling.steps import Facts, Infer
from scheduling.whole import work_out_call


def work_out(
    request_id: RequestId, request: Request, description: ModelDescription, infer: Infer
) -> tuple[Program, Facts]:
    """The program and the facts; `description` is that of the request (`scheduling.whole.described`) where its model is
    called as it is. Raises GraphError with the user's line, and TooLargeError.

    `infer` says what is known of each node's value: of a generation of step 0 and then of every different step.
    """
    if description.layout is not PassLayout.WHOLE:
        return work_out_prompts(request_id, request, description, infer)
    facts = infer(request)
    return work_out_call(request_id, request, description, facts), facts
