"""Ray: placement, driving the pipeline, deployments."""
