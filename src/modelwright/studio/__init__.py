"""The web page: a person asks, the answer streams in, and every citation opens the passage that it quotes.

Plain HTML, CSS and JavaScript modules in ``page/``, sent as they are: no build step, nothing from other hosts. The
page talks to the same OpenAI-compatible API that programs use.
"""

from pathlib import Path

PAGE = Path(__file__).parent / "page"
