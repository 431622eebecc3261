"""A page for each method, from its card and its source."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import griffe

import weft
from generators import results
from generators.text import block, code, escape, prose, table
from weft.cards import Card, ClaimCard
from weft.testing import layer, tags

RELATIONS = {"<=": "at most", "<": "below", ">=": "at least", ">": "above", "==": "exactly"}
COMMON = {"loss": "F.cross_entropy", "at": "None", "seed": "0"}  # what every rule takes, with its default


def cards() -> list[Card]:
    """The methods of this package, without those that other installed packages add."""
    return [card for card in weft.methods() if card.module.startswith("weft.")]


def pages() -> dict[str, str]:
    """Markdown by path: the list of methods and a page for each."""
    records = results.claims()
    made = {f"methods/{card.name}.md": page(card, records) for card in cards()}
    return {"methods/index.md": index(), **made}


def index() -> str:
    """The list of methods, by family."""
    parts = ["# Methods\n", "Each page is made from the method's file: its card, its docstring and its claims.\n"]
    for family in dict.fromkeys(card.family for card in cards()):
        rows = [
            [f"[{card.name}]({card.name}.md)", escape(card.summary), ", ".join(map(code, sorted(card.tags)))]
            for card in cards()
            if card.family == family
        ]
        parts += [f"## {family}\n", table(["method", "what it does", "tags"], rows)]
    return "\n".join(parts)


def page(card: Card, records: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The page of one method or variant."""
    obj = card.load()
    body = card.doc.partition("\n")[2].partition("\nPaper: ")[0]
    parts = [f"# {card.name}\n", escape(card.summary) + "\n", _facts(card)]
    parts += [block(_use(card), "python")]
    if body.strip():
        parts += ["## Equations\n", prose(body)]
    own, parameters = _docstring(obj)
    if own:
        parts += ["## Notes\n", own]
    parts += ["## Options\n", _options(card, parameters)]
    if limits := unsupported(card):
        parts += [
            "## What it cannot do\n",
            "Each of these raises [`weft.Unsupported`][weft.Unsupported] with the reason and what to use instead.\n",
            table(["reason", "use instead"], limits),
        ]
    parts += ["## Claims\n", _claims(card, records)]
    if card.citations or card.papers:
        parts += ["## Papers\n", _papers(card)]
        parts += [block(card.bibtex, "bibtex")] if card.bibtex else []
    if inspect.isclass(obj) and card.variant_of is None:
        parts += ["## Class\n", _class(card, obj)]
    return "\n".join(parts)


def claims_of(card: Card) -> list[ClaimCard]:
    """The claims that speak of this card: its own, and those of its file that speak of no card in particular."""
    return [claim for claim in card.claims if claim.method in (None, card.name)]


def unsupported(card: Card) -> list[tuple[str, str]]:
    """The ``Unsupported(reason, instead)`` that the method's source raises, as cells of a table."""
    found: dict[tuple[str, str], None] = {}
    for call in _calls(card):
        reason, instead = (*(_literal(node) for node in call.args), "", "")[:2]
        link = f"[{instead}]({instead}.md)" if instead in {c.name for c in cards()} else escape(instead)
        if reason:
            found[escape(reason), link] = None
    return list(found)


def at_work(card: Card) -> Any:
    """The rule on its own example."""
    made = card.example()
    return card.build(copy.deepcopy(made.model), **made.options)


def tag_table() -> str:
    """What each tag means and which methods have it; the text is that of the test that measures it."""
    rows = []
    for tag, check in {**tags.CHECKS, "same-forward": layer.same_forward}.items():
        having = [f"[{card.name}](methods/{card.name}.md)" for card in cards() if tag in card.tags]
        rows.append([code(tag), escape((inspect.getdoc(check) or "").split("\n\n")[0]), ", ".join(having)])
    return table(["tag", "what is measured", "methods"], [row for row in rows if row[-1]])


def rule_table() -> str:
    """Every rule: what it does, what it needs of the model, what it cannot do."""
    parts = []
    for card in (one for one in cards() if one.family == "rules"):
        if card.contract != "rule":
            kind = {"layer": "Takes the place of a layer", "solver": "Finds all weights in one call of `fit`"}
            if card.contract in kind:
                parts.append(f"### [{card.name}](methods/{card.name}.md)\n\n{escape(card.summary)}\n")
                parts.append(f"{kind[card.contract]}.\n")
            continue
        rule = at_work(card)
        needs = "a model that can be cut into stages" if rule.cut is not None else "any model, uncut"
        facts = [f"Needs {needs}", "changes the weights itself" if rule.updates == "self" else "adds to `.grad`"]
        if card.tags:
            facts.append("tags " + ", ".join(map(code, sorted(card.tags))))
        parts.append(f"### [{card.name}](methods/{card.name}.md)\n\n{escape(card.summary)}\n\n{'; '.join(facts)}.\n")
        limits = [
            f"- {reason}" + (f"; use instead: {instead.replace('](', '](methods/')}" if instead else "")
            for reason, instead in unsupported(card)
        ]
        parts.append("\n".join(["Raises `Unsupported` for:", "", *limits]) + "\n" if limits else "")
    return "\n".join(parts)


def _facts(card: Card) -> str:
    rows = [["contract", code(card.contract)]]
    rows.append(["use", f"{code(f'weft.{card.family}.{card.export}')} or {code(f'weft.create({card.name!r}, ...)')}"])
    if card.variant_of:
        preset = ", ".join(f"{key}={value!r}" for key, value in card.preset.items())
        rows.append(["variant of", f"[{card.variant_of}]({card.variant_of}.md), with {code(preset)}"])
    if card.variants:
        rows.append(["variants", ", ".join(f"[{name}]({name}.md)" for name in card.variants)])
    if card.defaults:
        chosen = ", ".join(f"{key.replace('lr', 'learning rate')} {value}" for key, value in card.defaults.items())
        rows.append(["trained by default with", chosen])
    if card.tags:
        rows.append(["tags", ", ".join(map(code, sorted(card.tags)))])
    return table(["", ""], rows)


def _use(card: Card) -> str:
    if card.contract == "layer":
        return f"layer = weft.{card.family}.{card.export}.from_dense(layer)  # in place of an ordinary layer"
    if card.contract == "solver":
        return f"solver = weft.create({card.name!r}, model)\nreport = solver.fit(x, y)\nscores = solver(x)"
    if card.contract != "rule":
        return f"made = weft.create({card.name!r}, ...)"
    return (
        f"rule = weft.create({card.name!r}, model)\nloss = rule.step(x, y)  # in place of loss.backward()\n"
        "scores = rule(x)"
    )


def _docstring(obj: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring without its first line, and what it says of each parameter."""
    texts: list[str] = []
    parameters: dict[str, str] = {}
    doc = griffe.Docstring(inspect.getdoc(obj) or "")
    for part in doc.parse("google", warnings=False):
        if part.kind is griffe.DocstringSectionKind.text:
            texts.append(part.value)
        elif part.kind is griffe.DocstringSectionKind.parameters:
            parameters |= {item.name: " ".join(item.description.split()) for item in part.value}
    return "\n\n".join(texts), parameters


def _class(card: Card, obj: type) -> str:
    """Signature and own public methods of a class; what it inherits is documented once, with the contract."""
    name = f"weft.{card.family}.{card.export}"
    own = [key for key, value in vars(obj).items() if not key.startswith("_") and inspect.isroutine(value)]
    parts = [f"[](){{ #{name} }}\n[](){{ #{card.module}.{card.object} }}\n", block(_signature(card, name), "python")]
    if card.contract == "rule":
        parts.append("Everything else is as in [`weft.rules.Rule`][weft.rules.base.Rule].\n")
    if card.contract == "solver":
        parts.append("Everything else is as in [`weft.rules.Solver`][weft.rules.solver.Solver].\n")
    for key in own:
        heading = f"      heading: {card.export}.{key}\n      toc_label: {key}\n      heading_level: 3\n"
        parts.append(f"::: {card.module}.{card.object}.{key}\n    options:\n{heading}")
    return "\n".join(parts)


def _signature(card: Card, name: str) -> str:
    given = {"rule": ["model", "*"], "solver": ["model", "*"], "layer": ["layer", "*"]}.get(card.contract, [])
    given += [f"{option.name}={option.default}" for option in card.options if option.name not in COMMON]
    given += [f"{key}={value}" for key, value in COMMON.items() if card.contract == "rule"]
    given += ["seed=0"] * (card.contract == "solver")
    short = f"{name}({', '.join(given)})"
    return short if len(short) <= 88 else f"{name}(\n    " + ",\n    ".join(given) + ",\n)"


def _options(card: Card, parameters: dict[str, str]) -> str:
    """A list of the options: type, default, meaning."""
    items = [("model", "", "", parameters["model"])] if "model" in parameters else []
    for option in card.options:
        default = repr(card.preset[option.name]) if option.name in card.preset else option.default
        items.append((option.name, option.annotation, default, parameters.get(option.name, "")))
    if card.contract == "rule":
        _, common = _docstring(weft.rules.Rule)
        for name, default in COMMON.items():
            if name != "at" or at_work(card).cut is not None:
                items.append((name, "", default, _plain(common[name])))
    return "\n".join(_item(*item) for item in items) + "\n" if items else "None.\n"


def _item(name: str, annotation: str, default: str, meaning: str) -> str:
    facts = ", ".join(part for part in (code(annotation), f"default {code(default)}" if default else "") if part)
    return f"- **{code(name)}**" + f" ({facts})" * bool(facts) + f" – {escape(meaning)}" * bool(meaning)


def _plain(text: str) -> str:
    """A description without the roles of reStructuredText."""
    return text.replace(":func:", "").replace(":meth:", "").replace(":class:", "")


def _claims(card: Card, records: dict[tuple[str, str], dict[str, Any]]) -> str:
    chosen = claims_of(card)
    if not chosen:
        return "None yet.\n"
    items = []
    for claim in chosen:
        rows = claim.row if isinstance(claim.row, list) else [] if claim.row is None else [claim.row]
        facts = [f"row {', '.join(map(str, rows))} of the map of papers"] if rows else []
        facts.append(f"{claim.tier} tier")
        facts.append("mutants: " + ", ".join(f"*{escape(name)}*" for name in claim.mutants) if claim.mutants else "")
        facts.append(_record(records.get((claim.method or card.variant_of or card.name, claim.function))))
        items.append(f"- {escape(claim.statement)}<br><small>{'; '.join(fact for fact in facts if fact)}</small>\n")
    text = f"Check them with `weft claims {card.name} --mutants`"
    text += "; those of the slow tier with `--slow`" if any(claim.tier == "slow" for claim in chosen) else ""
    listed = "\n".join(items)
    return f"{text}. Under each mutant, a change of the source, the claim must fail.\n\n{listed}"


def _record(record: dict[str, Any] | None) -> str:
    """What was measured, against its bound; empty where there is no record."""
    if record is None:
        return ""
    if not record.get("relation"):
        return "**error** when it was last measured"
    measured = "not finite" if record["measured"] is None else f"{record['measured']:.4g}"
    shown = f"measured {measured}, to be {RELATIONS[record['relation']]} {record['bound']:.4g}"
    return shown if record["holds"] else f"**does not hold**: {shown}"


def _papers(card: Card) -> str:
    """The papers of the docstring as a list, with links to where they are."""
    lines = []
    for cite in card.citations:
        where = cite["where"]
        kind, _, name = where.partition(":")
        base = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
        place = f"[{where}]({base}{name})" if base else escape(where)
        lines.append(f"- {escape(cite['authors'])}, {cite['year']}. *{escape(cite['title'])}*. {place}".rstrip())
    titles = {paper["row"]: paper["title"] for paper in weft.papers()}
    for row in card.papers:
        lines.append(f"- Row {row} of the map of papers: *{escape(titles.get(row, ''))}*.")
    return "\n".join(lines) + "\n"


def _calls(card: Card) -> Iterator[ast.Call]:
    tree = ast.parse(card.path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Unsupported":
            yield node


def _literal(node: ast.expr) -> str:
    """A text as the source has it, with names or dots in place of what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_filled(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) and node.value else ""


def _filled(part: ast.expr) -> str:
    if not isinstance(part, ast.FormattedValue):
        return str(part.value) if isinstance(part, ast.Constant) else ""
    if ".shape" in ast.unparse(part.value):
        return "[shape]"
    return part.value.id if isinstance(part.value, ast.Name) else "…"
