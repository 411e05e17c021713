"""The look of the benchmark page: one sheet, no font or file from elsewhere, light in any mode."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1a1a1a;
       background: #fff; margin: 2.2rem auto 4rem; padding: 0 1.2rem; max-width: 1440px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.6rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.7rem; padding-top: 0.9rem; border-top: 1px solid #ddd; }
h3 { font-size: 0.95rem; margin: 1.5rem 0 0.4rem; color: #333; }
nav ul { list-style: none; padding: 0; margin: 0.4rem 0; display: flex; flex-wrap: wrap;
         gap: 0.2rem 1.2rem; }
a { color: #0b5cad; }
.scroll { overflow-x: auto; margin: 0.5rem 0 0.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums lining-nums;
        font-size: 0.93rem; }
th { font-weight: 600; border-bottom: 2px solid #444; padding: 0.35rem 0.75rem;
     vertical-align: bottom; }
td { border-bottom: 1px solid #e6e6e6; padding: 0.33rem 0.75rem; vertical-align: top; }
th.num, td.num { text-align: right; } th.text, td.text { text-align: left; }
td.num, td.text { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff;
                                 padding-left: 0.3rem; }
tr:hover td { background: #f5f8fb; }
.spread { color: #6b6b6b; display: inline-block; text-align: left; padding-left: 0.35em; }
tr.control td { color: #51606e; background: #f7f8f9; }
tr.reported td { color: #757575; font-style: italic; }
tr.divider td { color: #757575; padding-top: 1.1rem; border-bottom: 1px solid #bbb; }
.failed { color: #b00020; }
.remark { color: #8a4b00; font-size: 0.82rem; line-height: 1.35; white-space: normal;
          max-width: 24rem; font-style: normal; }
.source { color: #757575; font-size: 0.82rem; margin: 0.15rem 0; overflow-wrap: anywhere; }
.warning { border-left: 4px solid #e69f00; background: #fff9ec; padding: 0.4rem 0.8rem;
           margin: 0.5rem 0; }
.banner { border: 2px solid #b00020; color: #b00020; font-weight: 600; padding: 0.5rem 0.9rem;
          margin: 0.7rem 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.1rem 1.2rem;
     color: #444; font-size: 0.88rem; margin: 0.9rem 0; }
dt { color: #6b6b6b; } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 0.8rem 0; color: #444; } summary { cursor: pointer; color: #0b5cad; }
code { font-size: 0.8rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem; margin-top: 1rem; align-items: flex-start; }
figure { margin: 0; } figure.wide { flex: 1 1 100%; }
figure.half { flex: 1 1 420px; max-width: 640px; }
figcaption { font-weight: 600; font-size: 0.92rem; margin-bottom: 0.3rem; }
img { max-width: 100%; height: auto; border: 1px solid #e6e6e6; }
.legend { color: #555; font-size: 0.86rem; } .legend ul { padding-left: 1.1rem; }
"""
