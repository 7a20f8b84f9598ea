"""Edits: what a model does in every trace that starts from them, recorded once or given as low-rank changes of weights.

Begin with `sets`: an edit as data. `block` records one, `adapters` reads weights, `http_shelf` has those of a service.
"""
