"""Load as an institution makes it: many tenants with mixes of experiments, whose requests arrive when they please.

    python -m bench.load --help

`arrivals.py` says when, `mixes.py` what, `tenants.py` who; `clients.py` sends it over HTTP and writes down what became
of each request; `figures.py` makes figures of that, `pictures.py` draws them. `peer.py` sends the same to NDIF.
"""
