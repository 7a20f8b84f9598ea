"""The names of what the service counts and measures as it goes, and what each means (`docs/service/operating.md`).

What stands in the database, such as queues and deployments, is not counted but looked up (`api.metrics`).
"""

from __future__ import annotations

from api.tally import Counter, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_USERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

ACCEPTED = Counter(name="polytrace_requests_accepted", help="Requests that were accepted.", labels=("model", "class"))
ENDED = Counter(
    name="polytrace_requests_ended",
    help="Requests that have ended: done, failed or cancelled.",
    labels=("model", "state", "class"),
)
ERRORS = Counter(
    name="polytrace_request_errors", help="Requests that ended with an error, by its code.", labels=("model", "code")
)
QUEUE = Histogram(
    name="polytrace_request_queue_seconds",
    help="From a request's acceptance until the controller took it, of those that ran to an end.",
    labels=("model", "class"),
    buckets=_SECONDS,
)
RUN = Histogram(
    name="polytrace_request_run_seconds",
    help="From then until its result was kept.",
    labels=("model", "class"),
    buckets=_SECONDS,
)
TOKENS = Counter(name="polytrace_tokens", help="Tokens of the sequences of requests that are done.", labels=("model",))
TOKEN_LAYERS = Counter(
    name="polytrace_token_layers", help="Token-layers that requests were charged.", labels=("model",)
)
TOKEN_LAYERS_ALONE = Counter(
    name="polytrace_token_layers_alone",
    help="Token-layers that the requests that are done would have taken one by one.",
    labels=("model",),
)
TOKEN_LAYERS_SAVED = Counter(
    name="polytrace_token_layers_saved",
    help="Token-layers that requests that are done were spared by sharing passes.",
    labels=("model",),
)
MOVED = Counter(
    name="polytrace_moved_bytes", help="Bytes that were carried, gathered, returned and kept.", labels=("model",)
)
RETURNED = Counter(name="polytrace_result_bytes", help="Bytes of results that were kept for users.", labels=("model",))
PASSES = Counter(name="polytrace_passes", help="Merged passes that ran.", labels=("model",))
PASS_ROWS = Counter(name="polytrace_pass_rows", help="Rows of the passes at their first layer.", labels=("model",))
PASS_USERS = Histogram(
    name="polytrace_pass_users", help="Requests that shared a pass.", labels=("model",), buckets=_USERS
)
PASS_SECONDS = Histogram(
    name="polytrace_pass_seconds",
    help="From the first shard's start of a pass to the last shard's end.",
    labels=("model",),
    buckets=_SECONDS,
)
STAGE_BUSY = Counter(
    name="polytrace_stage_busy_seconds",
    help="Seconds in which a stage worked on passes, and did not wait for another; all replicas together.",
    labels=("model", "stage"),
)
STARTS = Counter(
    name="polytrace_deployment_starts",
    help="Times that a request found a deployment not loaded, and had it loaded.",
    labels=("model",),
)
RESTS = Counter(
    name="polytrace_deployment_rests",
    help="Times that a deployment was unloaded without an operator's word: idle, for another's room, or failed.",
    labels=("model", "cause"),
)
HTTP = Histogram(
    name="polytrace_http_seconds",
    help="From a call's arrival to the end of its answer; calls that wait for results last as long as they wait.",
    labels=("route", "method", "status"),
    buckets=_SECONDS,
)
HTTP_ERRORS = Counter(
    name="polytrace_http_errors", help="Calls that were answered with an error, by its code.", labels=("code",)
)
CHECK = Histogram(
    name="polytrace_check_seconds",
    help="From a request's receipt to its certificate, with the wait for a checking process.",
    labels=("model",),
    buckets=_SECONDS,
)

COUNTERS = (
    ACCEPTED,
    ENDED,
    ERRORS,
    TOKENS,
    TOKEN_LAYERS,
    TOKEN_LAYERS_ALONE,
    TOKEN_LAYERS_SAVED,
    MOVED,
    RETURNED,
    PASSES,
    PASS_ROWS,
    STAGE_BUSY,
    STARTS,
    RESTS,
    HTTP_ERRORS,
)
HISTOGRAMS = (QUEUE, RUN, PASS_USERS, PASS_SECONDS, HTTP, CHECK)


def class_of(is_interactive: object) -> str:
    """A request's class, as a label has it."""
    return "interactive" if is_interactive else "batch"
