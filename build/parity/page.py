"""A certificate as one HTML page that needs no other file."""

from __future__ import annotations

import math
from html import escape

from build.parity.certificate import Certificate
from build.parity.checks import Check

__all__ = ["render_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { display: inline-block; padding: .2rem .7rem; border-radius: .3rem; color: #fff;
  font-weight: 600; }
.passed { background: #176b3a; } .failed { background: #a61b1b; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .75rem .45rem 0;
  border-bottom: 1px solid #d5dbe3; }
.facts td:first-child { width: 20rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.small { color: #566173; font-size: .85rem; } code { font-size: .85rem; word-break: break-all; }
"""


def render_page(certificate: Certificate) -> str:
    """The whole document."""
    manifest = certificate.manifest
    title = f"{manifest.model}, {certificate.llm.precision}, TP {certificate.llm.tp_size}"
    facts = {
        "checkpoint": f"sha256 {manifest.checkpoint_sha256}",
        "profile": certificate.profile,
        "engines": certificate.engines,
        "reference": certificate.reference,
        "written at": certificate.written_at,
    }
    limits = {name: f"{value:,}" for name, value in manifest.limits.items()}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Parity certificate: {escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Parity certificate: {escape(title)}</h1>
<p>{_verdict(certificate.passed)} The artefacts, beside the checkpoint run in PyTorch.</p>
<h2>Checks</h2>
<table>
<tr><th>check</th><th class="number">measured</th><th class="number">limit</th><th></th></tr>
{"".join(_row(check) for check in certificate.checks)}
</table>
<h2>For information</h2>
{_table(certificate.information)}
<h2>What was compared</h2>
{_table(facts)}
<h2>Versions</h2>
{_table(certificate.versions)}
<h2>Limits of the deployment</h2>
{_table(limits)}
</body>
</html>
"""


def format_number(value: float) -> str:
    """0, 12, 3.4e-06; another shape or not a number has no difference."""
    if not math.isfinite(value):
        return "not comparable"
    return str(int(value)) if value == int(value) else f"{value:.2g}"


def _row(check: Check) -> str:
    about = f'<br><span class="small">{escape(check.meaning)}; {escape(check.of)}</span>'
    return (
        f"<tr><td>{escape(check.name)}{about}</td>"
        f'<td class="number">{format_number(check.measured)}</td>'
        f'<td class="number">{format_number(check.limit)}</td>'
        f"<td>{_verdict(check.passed)}</td></tr>\n"
    )


def _verdict(passed: bool) -> str:
    word = "passed" if passed else "failed"
    return f'<span class="verdict {word}">{word}</span>'


def _table(rows: dict[str, str]) -> str:
    cells = (
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>"
        for name, value in rows.items()
    )
    return f'<table class="facts">{"".join(cells)}</table>'
