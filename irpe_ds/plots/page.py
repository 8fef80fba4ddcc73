"""A report as one HTML file, which needs no other."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irpe_ds.plots.style import FAINT, INK, PALE

_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{title}}</title><style>
body {{{{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; margin: 2em auto; max-width: 1400px;
  padding: 0 1em }}}}
table {{{{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}}}
th, td {{{{ padding: .25em .6em; text-align: right; border-bottom: 1px solid {FAINT} }}}}
td {{{{ white-space: nowrap }}}}
th {{{{ font-weight: 600; vertical-align: bottom }}}} .text {{{{ text-align: left }}}}
img {{{{ max-width: 100%; display: block; margin: 1.5em 0 }}}} .wide {{{{ overflow-x: auto }}}}
pre {{{{ font-size: 12px }}}} p.note {{{{ color: {PALE}; font-size: 13px }}}}
</style></head><body>
{{body}}
</body></html>
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The file; parts are HTML."""
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def picture(path: Path) -> str:
    """A PNG as a part of the file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table; cells with letters stand to the left."""

    def cell(kind: str, x: Any) -> str:
        text = html.escape(str(x))
        left = ' class="text"' if any(c.isalpha() for c in text) else ""
        return f"<{kind}{left}>{text}</{kind}>"

    top = "".join(cell("th", name) for name in head)
    body = "".join(f"<tr>{''.join(cell('td', x) for x in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
