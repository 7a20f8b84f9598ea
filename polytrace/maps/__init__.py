"""Datasets: a body recorded once, run over any number of prompts, in parts that arrive as passes finish.

Begin with `mapping`: the loop. What a body may do with other prompts' rows is told by `rowwise`.
"""
