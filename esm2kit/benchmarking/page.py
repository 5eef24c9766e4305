"""The HTML of a report: one file, no network, light or dark as the reader's system is."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5d6570; --paper: #ffffff; --line: #d5d9de; --mark: #eef4fb; --link: #0b5cad; --ours: #0173b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --faint: #a4acb7; --paper: #16181c; --line: #3a3f47; --mark: #1d2a3a; --link: #7ab8f5; --ours: #5cb0e8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
p, li { max-width: 60rem; } h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.lead { font-size: 1.1rem; margin: .2rem 0 1rem; } .faint, caption, figcaption { color: var(--faint); font-size: .9rem; }
a { color: var(--link); } code { font-size: .88em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding: .3rem 0; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; } tr.ours { background: var(--mark); font-weight: 600; }
td small { color: var(--faint); font-weight: 400; display: block; } td:first-child { min-width: 11rem; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; color: var(--ink); }
ul { padding-left: 1.2rem; } details { margin-top: 1rem; } pre { overflow-x: auto; font-size: .8rem; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for paragraph in facts %}<p class="faint">{{ paragraph }}</p>
{% endfor %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.points %}<ul>{% for point in section.points %}<li>{{ point }}</li>{% endfor %}</ul>{% endif %}
{% if section.table %}
<div class="wide"><table>
{% if section.table.caption %}<caption>{{ section.table.caption }}</caption>{% endif %}
<thead><tr>{% for head in section.table.heads %}<th scope="col"{% if head.number %} class="n"{% endif %}>{{ head.text }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.table.rows %}<tr{% if row.ours %} class="ours"{% endif %}>{% for cell in row.cells %}<td{% if cell.number %} class="n"{% endif %}>{{ cell.text }}{% if cell.small %} <small>{{ cell.small }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for figure in section.figures %}
<figure><div role="img" aria-label="{{ figure.alt }}">{{ figure.svg | safe }}</div><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% if section.code %}<details><summary>{{ section.summary }}</summary><pre>{{ section.code }}</pre></details>{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
