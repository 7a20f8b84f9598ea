"""Commands about costs: `polytrace validate` before a request runs, `usage` after, `limits` of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.asking import HERE, Key, Url, quoted
from api.console import errors
from api.service_calls import Service


def validate(
    file: Annotated[Path, typer.Argument(help="A request, as `tracer.save_request(path)` writes it.", exists=True)],
    model: Annotated[str | None, typer.Option(help="Name of the deployment; default: the only one.")] = None,
    url: Url = HERE,
    key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="The certificate as JSON.")] = False,
) -> None:
    """Show what a request would cost and return, and whether it would be taken now. Nothing runs.

    The exit code is 1 when it would be refused.
    """
    with errors():
        import json

        from polytrace.certificate import Certificate
        from polytrace.codec import from_json
        from polytrace.errors import NotFoundError

        service = Service(url, key)
        if model is None:
            names = [one["name"] for one in service.deployments()]
            if len(names) != 1:
                raise NotFoundError(f"the service has {', '.join(names) or 'no deployments'}: name one with --model")
            model = names[0]
        with file.open("rb") as body:
            plain = service.ask("POST", f"/v1/models/{quoted(model)}/validate", content=body)
        certificate = from_json(Certificate, plain)
        print(json.dumps(plain) if as_json else certificate)
        if not certificate.is_admitted:
            raise typer.Exit(code=1)


def usage(
    month: Annotated[str | None, typer.Option(help="YYYY-MM, UTC; default: this one.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of one tenant; operators see all.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV, for accounting.")] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Show what was used in a month, by tenant, user and deployment."""
    with errors():
        from polytrace.price_tables import in_bytes

        asked = {name: value for name, value in (("month", month), ("tenant", tenant)) if value is not None}
        service = Service(url, key)
        if csv:
            typer.echo(service.text("/v1/usage", params={**asked, "format": "csv"}), nl=False)
            return
        answer = service.ask("GET", "/v1/usage", params=asked)
        lines = [("tenant", "user", "model", "requests", "failed", "tokens", "token-layers", "moved", "results", "s")]
        for one in answer["usage"]:
            counts = [f"{one[name]:,}" for name in ("requests", "failed", "tokens", "token_layers")]
            sizes = [in_bytes(one[name]) for name in ("moved_bytes", "result_bytes")]
            lines.append((one["tenant"], one["user"], one["model"], *counts, *sizes, f"{one['run_seconds']:,.1f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(answer["month"])
        for line in lines:
            names = [each.ljust(width) for each, width in zip(line[:3], widths, strict=False)]
            print("  ".join([*names, *(each.rjust(width) for each, width in zip(line[3:], widths[3:], strict=True))]))


def limits(
    name: Annotated[str, typer.Argument(help="Name of the deployment.")],
    given: Annotated[
        list[str] | None, typer.Argument(metavar="[LIMIT=NUMBER]...", help="All that it is to have; `none`: none.")
    ] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Show the limits that hold for one's requests to a deployment, or give the deployment its own.

    Limits are requests_in_flight, requests_a_minute, request_bytes, result_bytes, token_layers, passes and tape_bytes.
    """
    with errors():
        from polytrace.errors import UserError

        service = Service(url, key)
        if given:
            wish: dict[str, int] = {}
            for one in given if given != ["none"] else []:
                what, _, number = one.partition("=")
                if not number.isdecimal():
                    raise UserError(f"{one!r} is no limit: write token_layers=1000000")
                wish[what] = int(number)
            service.ask("PUT", f"/v1/models/{quoted(name)}/limits", json=wish)
        told = service.ask("GET", f"/v1/models/{quoted(name)}/limits")
        for whose, own in ((f"tenant {told['tenant']}", told["tenants"]), (f"deployment {name}", told["deployments"])):
            known = {what: limit for what, limit in own.items() if limit is not None}
            print(f"{whose}: {', '.join(f'{what} {limit:,}' for what, limit in known.items()) or 'no limits'}")
