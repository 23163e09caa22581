"""A conformance suite that any method can run with pytest, plug-ins and built-in ones alike. Needs pytest.

    from graftkit.testing import MethodConformance

    class TestTies(MethodConformance):
        method = "ties"

Collects about forty tests of what the engine relies on: shapes, block cutting, precision, seeds, gradients, and the
compiled twin. `PreparationConformance` and `FinisherConformance` do the same for what stands around a method.
`graftkit.testing.samples` makes the inputs, `graftkit.testing.evaluation` runs a method on them, and
`graftkit.testing.rounding` compares results in units of the last place; they serve a method's own tests too.
"""

from graftkit.testing.conformance import MethodConformance
from graftkit.testing.parts import FinisherConformance, PreparationConformance

__all__ = ["FinisherConformance", "MethodConformance", "PreparationConformance"]
