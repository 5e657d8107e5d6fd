"""gemma-2-mini: the small Gemma 2 that comes with this package, its text, and the recipe that made it.

The weights are in `weights/`. corpus.py is the text of the running Python's standard library, spelling.py the
first-letter prompts, pretrain.py the training recipe, and quality.py the three criteria that the model has to meet.
"""

from pathlib import Path

NAME = "gemma-2-mini"
WEIGHTS = Path(__file__).parent / "weights"
