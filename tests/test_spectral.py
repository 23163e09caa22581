"""TSV-M, isotropic merging, KnOTS, WUDI and OptMerge: the conformance suite, their references, and what they are for."""

from __future__ import annotations

import pytest

from graftkit.testing import MethodConformance

class TestTsv(MethodConformance):
    method = "tsv"


class TestIsoC(MethodConformance):
    method = "iso_c"


class TestIsoCts(MethodConformance):
    method = "iso_cts"


class TestKnots(MethodConformance):
    method = "knots"


class TestWudi(MethodConformance):
    method = "wudi"


class TestOptMerge(MethodConformance):
    method = "opt_merge"
