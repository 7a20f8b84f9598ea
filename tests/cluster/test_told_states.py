"""What people are told of a deployment. No shards here."""

from __future__ import annotations

import pytest

from cluster.replicas import drained
from cluster.requests import DeploymentState


@pytest.mark.parametrize("state", [DeploymentState.READY, DeploymentState.WARM, DeploymentState.COLD])
def test_drained_is_what_could_serve_again(state: DeploymentState) -> None:
    assert drained("m", state, "ready") == (
        DeploymentState.DRAINED,
        "it takes no requests until `polytrace resume m`",
    )


@pytest.mark.parametrize(
    "state",
    [DeploymentState.STARTING, DeploymentState.WAITING, DeploymentState.FAILED, DeploymentState.RECOVERING],
)
def test_a_drained_deployment_that_cannot_serve_says_why(state: DeploymentState) -> None:
    assert drained("m", state, "no room for 8 GPUs") == (
        state,
        "drained until `polytrace resume m`; no room for 8 GPUs",
    )
