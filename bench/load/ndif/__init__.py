"""NDIF, nnsight's server, on the same model and machine: its services, what is sent to them, and what comes back.

`services.py` starts it in its own environment, `asking.py` runs there too and writes the requests that nnsight would
send, `sender.py` is a raw client. `on_cpu/` lets it run where there is no GPU.
"""
