"""tinyworld: a demo model of under six million parameters, and everything needed to make it again.

`FOLDER` is the shipped model: give it to `transformers`, to `polytrace.load`, or to a service. Importing this
package loads nothing: neither torch nor the corpus.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
