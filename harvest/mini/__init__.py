"""gemma-2-mini: the small Gemma 2 that this repository carries, its text, and the recipe that made it.

The weights stand in `weights/`; `corpus` is the text of the running Python's standard library, `spelling` the
first-letter prompts, `make` the training recipe, `quality` the three bars that it has to pass.
"""

from pathlib import Path

NAME = "gemma-2-mini"
WEIGHTS = Path(__file__).parent / "weights"
