"""Plans before there is any machine: which split of a model fits which GPUs, and what it would cost and reach."""
