"""Hours of a large deployment in minutes: the product's scheduler and planner, and a cost model in place of the shards.

    python -m bench.simulator --help

Real: how requests are recorded and worked out (`experiments.py`, of a model that is never loaded: `description.py`),
who is taken out of the store's queue (`waiting.py`, with `cluster.shares`), counters of tenants, the choice of who
goes, plans with their rows, forks, trunks and caches, what receipts say and what tenants are charged (`scheduling`).

A model: the seconds that a stage takes for a plan (`costs.py`, `stages.py`): a roofline of makers' data sheets, which
no real run beats. So seconds, rates and occupancy are figures of that model, NOT measured on GPUs, and better than a
real deployment's; what holds of fairness holds of the real scheduler, which knows nothing of seconds.

Not modelled: HTTP, the store's time, working requests out (a thread of its own in the product), the controller's time
for planning a pass (it is measured here and reported beside), losses of shards, passes that turn out too large,
gradients, models other than packed ones, several replicas. Sequences never end early.

`population.py` says who asks for what, `policies.py` what the product is held against, `simulation.py` is the loop,
`books.py` and `figures.py` say what became of it.
"""
