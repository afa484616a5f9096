"""What the project's HTML pages have in common."""

from __future__ import annotations

import base64
import io

from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
footer, dd { color: #666; }
"""


def embedded(figure: Figure) -> str:
    """A picture as text, for the `src` of an image: `data:image/png;base64,…`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()
