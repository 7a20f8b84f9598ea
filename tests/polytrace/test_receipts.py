"""A receipt prints as one line, wherever it stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import polytrace
from bench import tinyworld
from polytrace import methods
from polytrace.certificate import Fired, Generated, PassEntry


def test_a_receipt_is_one_line_however_much_fired(receipt_of_a_run: Any) -> None:
    fired = [
        Fired(site=f"model.layers.{number % 8}.output", invoke=number, kind=kind, passes=1, where="a.py:3")
        for number in range(200)
        for kind in ("read", "write in place")
    ]
    entry = PassEntry(pass_id=0, requests=3, tokens=4096, layer_rows=(4096,) * 8, seconds=0.1)
    one = replace(receipt_of_a_run, fired=tuple(fired), passes=(entry,), token_layers=123456, run_seconds=0.25)
    told = "<receipt of tiny: 1 pass, 3 tokens, 123,456 token-layers (12 alone), 8 bytes returned, 8 moved, "
    assert repr(one) == str(one) == told + "fired: 8 sites (200 reads, 200 writes); 0.250 s>"
    generated = (Generated(invoke=0, sequence=0, ids=(4, 5), finish="length"),)
    more = replace(receipt_of_a_run, generated=generated, notes=("ragged",))
    assert repr(more).endswith("fired: 0 sites (0 reads, 0 writes), 2 new tokens, 1 note; 0.000 s>")
    assert one != more and len(one.fired) == 400, "all of it is there"


def test_a_sweep_prints_without_what_fired() -> None:
    pytest.importorskip("xarray")
    with polytrace.load(str(tinyworld.FOLDER), threads=1) as model:
        swept = methods.ablate(model, "The Eiffel Tower is in the city of", methods.logit(" Paris"), method="zero")
    text = repr(swept)
    assert "receipt=<receipt of" in text and "Fired(" not in text
    assert np.isfinite(np.asarray(swept.effect)).all()
