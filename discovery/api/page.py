"""The page that a discovery server shows to people: plain HTML that works without a script.

It has a graph of the networks (inline SVG), and tables. Its script only fetches the page again when the watch reports a change.
Everything that can be selected is a link, so the page can be used with the keyboard alone. It is rendered only from records that
the reader may see. Sans-IO.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from discovery.model.mesh import AllocationSpec, AnyRecord, Key, Kind, Mesh, Record

MAX_NODES = 40
"""Networks in the graph: more are unreadable, and the table has them all."""

MAX_ROWS = 200
"""Rows of each table. The page of one network shows more of it."""

WIDTH, HEIGHT = 880, 420

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageState:
    """The state of the server and its store, as shown on the page."""

    epoch: str
    revision: int
    stale_s: float
    reader: str
    ages: Mapping[Key, float]
    """Age of each record in seconds, if it was created while this server was running."""


def render_page(mesh: Mesh, state: PageState, network: str | None) -> str:
    """Render the page. With a network, the tables show only records that concern it."""
    networks = sorted(mesh.networks)
    shown = [network] if network in mesh.networks else networks
    chosen = f' <a href="/">all networks</a> · only <b>{escape(network)}</b>' if network else ""
    stale = (
        f'<p class="stale" role="alert">This server has been cut off from its store for {age_text(state.stale_s)}: '
        "its records may be out of date.</p>"
        if state.stale_s
        else ""
    )
    body = "".join(
        (
            f'<p id="facts">{len(mesh)} records at revision {state.revision}, as {escape(state.reader)} sees them.{chosen}</p>',
            stale,
            _graph(mesh, networks),
            _networks(mesh, shown),
            _allocations(mesh, state, network),
            _relays(mesh, state, shown),
            _turns(mesh, state, shown),
            _gateways(mesh, state, shown),
            _services(mesh, shown),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>crossnet discovery</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/page.css"><script src="/page.js" defer></script></head>'
        f'<body data-epoch="{escape(state.epoch)}" data-revision="{state.revision}">'
        '<a class="skip" href="#live">To the tables</a><header><h1>crossnet discovery</h1>'
        '<p id="status" role="status">As of when the page was loaded; <a href="">reload</a>.</p></header>'
        f'<main id="live" tabindex="-1">{body}</main></body></html>\n'
    )


def age_text(seconds: float | None) -> str:
    """Format a duration for people."""
    if seconds is None:
        return "since before this server"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def allocation_state(mesh: Mesh, allocation: Record[AllocationSpec]) -> str:
    """Return a description of whether relays can use an allocation, according to the records."""
    spec = allocation.spec
    turn = mesh.record(Kind.TURN, spec.via, spec.turn)
    if turn is None:
        return "no TURN server with that id"
    if not turn.spec.port_min <= spec.port <= turn.spec.port_max:
        return "port outside the TURN server's range"
    if not mesh.relays(spec.via):
        return "no relay there"
    return "usable"


def _graph(mesh: Mesh, networks: Sequence[str]) -> str:
    ways: dict[tuple[str, str], int] = {}
    for network in networks:
        for allocation in mesh.allocations(network):
            way = (allocation.spec.via, network)
            ways[way] = ways.get(way, 0) + 1
    weight: dict[str, int] = dict.fromkeys(networks, 0)
    for way, count in ways.items():
        for end in way:
            weight[end] = weight.get(end, 0) + count
    drawn = sorted(sorted(networks, key=lambda network: -weight[network])[:MAX_NODES])
    places = {}
    for index, network in enumerate(drawn):
        angle = 2 * math.pi * index / max(len(drawn), 1) - math.pi / 2
        places[network] = (
            WIDTH / 2 + (WIDTH / 2 - 90) * math.cos(angle),
            HEIGHT / 2 + (HEIGHT / 2 - 40) * math.sin(angle),
        )
    lines = []
    for (via, network), count in sorted(ways.items()):
        if via in places and network in places:
            (x1, y1), (x2, y2) = places[via], places[network]
            length = math.hypot(x2 - x1, y2 - y1) or 1.0
            # The line ends at the edge of the node. It is curved, so that it does not cover the line in the other direction.
            x2, y2 = x2 - (x2 - x1) / length * 26, y2 - (y2 - y1) / length * 26
            bend_x, bend_y = (x1 + x2) / 2 - (y2 - y1) * 0.12, (y1 + y2) / 2 + (x2 - x1) * 0.12
            lines.append(
                f'<path d="M{x1:.0f} {y1:.0f}Q{bend_x:.0f} {bend_y:.0f} {x2:.0f} {y2:.0f}" marker-end="url(#arrow)">'
                f"<title>{escape(via)} reaches {escape(network)} by {count} allocation(s)</title></path>"
            )
    nodes = [
        f'<a href="/?network={escape(network)}"><circle cx="{x:.0f}" cy="{y:.0f}" r="22"></circle>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{escape(network if len(network) < 9 else network[:7] + "…")}</text>'
        f"<title>Network {escape(network)}: {len(mesh.relays(network))} relays, "
        f"{len(mesh.services(network))} services</title></a>"
        for network, (x, y) in places.items()
    ]
    more = (
        f"<p>Only the {MAX_NODES} networks with the most connections, of {len(networks)}, are drawn.</p>"
        if len(networks) > MAX_NODES
        else ""
    )
    return (
        '<section><h2 id="graph">Networks and their connections</h2>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-labelledby="graph"><defs><marker id="arrow" '
        'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        '<path class="head" d="M0 0L10 5L0 10z"></path></marker></defs>'
        f"{''.join(lines)}{''.join(nodes)}</svg>"
        f"<p>An arrow from a to b: clients of a reach services of b through a TURN server of a.</p>{more}</section>"
    )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows[:MAX_ROWS]
    )
    more = f"<p>… and {len(rows) - MAX_ROWS} more: choose a network.</p>" if len(rows) > MAX_ROWS else ""
    if not rows:
        return f"<section><h2>{title}</h2><p>None.</p></section>"
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<section><h2>{title} <small>{len(rows)}</small></h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{more}</section>"
    )


def _link(network: str) -> str:
    return f'<a href="/?network={escape(network)}">{escape(network)}</a>'


def _networks(mesh: Mesh, shown: Sequence[str]) -> str:
    rows = [
        (
            _link(network),
            *(
                str(len(found))
                for found in (
                    mesh.relays(network),
                    mesh.turns(network),
                    mesh.allocations(network),
                    mesh.gateways(network),
                    mesh.services(network),
                )
            ),
        )
        for network in shown
    ]
    return _table(
        "Networks", ("network", "relays", "TURN servers", "allocations into it", "gateways", "services"), rows
    )


def _allocations(mesh: Mesh, state: PageState, network: str | None) -> str:
    rows = []
    for target in sorted(mesh.networks):
        for record in mesh.allocations(target):
            if network in (None, target, record.spec.via):
                spec = record.spec
                good = allocation_state(mesh, record)
                mark = "good" if good == "usable" else "bad"
                rows.append(
                    (
                        _link(target),
                        _link(spec.via),
                        escape(spec.turn),
                        str(spec.port),
                        escape(spec.gateway),
                        _age(state, record),
                        f'<span class="{mark}">{good}</span>',
                    )
                )
    heads = ("into", "via", "TURN server", "port", "gateway", "age", "state")
    return _table("Allocations", heads, rows)


def _relays(mesh: Mesh, state: PageState, shown: Sequence[str]) -> str:
    rows = [
        (
            _link(network),
            escape(record.id),
            escape(", ".join(record.spec.addresses)),
            ", ".join(map(str, record.spec.ports)),
            _age(state, record),
        )
        for network in shown
        for record in mesh.relays(network)
    ]
    return _table("Relays", ("network", "id", "addresses", "ports", "age"), rows)


def _turns(mesh: Mesh, state: PageState, shown: Sequence[str]) -> str:
    rows = [
        (
            _link(network),
            escape(record.id),
            escape(record.spec.url),
            escape(", ".join(record.spec.relay_addresses)),
            f"{record.spec.port_min}–{record.spec.port_max}",
            _age(state, record),
        )
        for network in shown
        for record in mesh.turns(network)
    ]
    return _table("TURN servers", ("network", "id", "URL", "relay addresses", "ports", "age"), rows)


def _gateways(mesh: Mesh, state: PageState, shown: Sequence[str]) -> str:
    rows = [
        (_link(network), escape(record.id), escape(record.spec.address), _age(state, record))
        for network in shown
        for record in mesh.gateways(network)
    ]
    return _table("Gateways reached directly", ("network", "id", "address", "age"), rows)


def _services(mesh: Mesh, shown: Sequence[str]) -> str:
    rows = [
        (
            _link(network),
            escape(record.spec.name),
            ", ".join(escape(port) for port in record.spec.ports),
            str(sum(map(len, record.spec.ports.values()))) or "",
        )
        for network in shown
        for record in mesh.services(network)
    ]
    return _table("Services", ("network", "name", "ports", "endpoints you may see"), rows)


def _age(state: PageState, record: AnyRecord) -> str:
    return age_text(state.ages.get(record.key))


STYLE = """
:root{color-scheme:light dark;--line:#8886;--link:#0b57d0;--good:#137333;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--link:#8ab4f8;--good:#81c995;--bad:#f28b82}}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:0 1rem 3rem}
h1{font-size:1.4rem;margin:1rem 0 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}h2 small{font-weight:400;opacity:.7}
#status{margin:.2rem 0;opacity:.8}a{color:var(--link)}:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);font-weight:400}thead th{font-weight:600}
.good{color:var(--good)}.bad,.stale{color:var(--bad);font-weight:600}
svg{width:100%;height:auto;max-height:26rem}svg path{fill:none;stroke:currentColor;stroke-opacity:.55;stroke-width:1.5}
svg path.head{fill:currentColor;stroke:none}svg circle{fill:Canvas;stroke:var(--link);stroke-width:2}
svg text{text-anchor:middle;font-size:13px;fill:currentColor}svg a:focus-visible circle{stroke-width:5}
"""

SCRIPT = """
"use strict";
// Fetches the page again when the watch reports a change, at most once a second. The page works without this script.
const status = document.getElementById("status");
let due = null;
function say(text) { if (status.textContent !== text) status.textContent = text; }
async function refresh() {
  due = null;
  const answer = await fetch(location.href, {headers: {Accept: "text/html"}});
  if (!answer.ok) throw new Error("status " + answer.status);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const active = document.activeElement && document.activeElement.closest("main a");
  const href = active && active.getAttribute("href");
  const alike = () => [...document.querySelectorAll("main a")].filter(a => a.getAttribute("href") === href);
  const index = active ? alike().indexOf(active) : -1;  // keep the keyboard focus on the same link
  document.getElementById("live").replaceChildren(...fresh.getElementById("live").childNodes);
  if (index >= 0) {
    const same = alike();
    if (same.length) same[Math.min(index, same.length - 1)].focus({preventScroll: true});
  }
}
function retry() {
  refresh().catch(() => say("Not live: the page cannot be fetched."));
}
async function follow() {
  const body = document.body.dataset;
  let revision = body.revision;
  for (;;) {
    try {
      const answer = await fetch("/v1/watch?from=" + revision + "&epoch=" + body.epoch);
      if (!answer.ok) throw new Error("status " + answer.status);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const {value, done} = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\\n");
        rest = lines.pop();
        for (const line of lines) {
          if (!line) continue;
          const change = JSON.parse(line);
          if (change.type === "sync") say("Live.");
          if (change.type === "reset") body.epoch = change.epoch;
          if (!change.more) revision = change.revision;
          if (change.type !== "sync" && due === null) due = setTimeout(retry, 1000);
        }
      }
    } catch (error) {
      say("Not live: " + error.message + "; retrying.");
    }
    await new Promise(resolve => setTimeout(resolve, 2000));
  }
}
follow();
"""
