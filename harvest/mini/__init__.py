"""gemma-2-mini: the small Gemma 2 that comes with this package, its text, and the recipe that made it.

The weights are in `weights/`. corpus.py reads the text of the running Python's standard library, spelling.py writes the
first-letter prompts, pretrain.py is the training recipe, and quality.py measures the three criteria that the model has
to meet.
"""

from pathlib import Path

NAME = "gemma-2-mini"
WEIGHTS = Path(__file__).parent / "weights"
