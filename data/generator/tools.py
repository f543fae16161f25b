"""From catalogues to tool specifications, and to sentences that ask for a call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .catalogue import Domain, Solo, Thing
from .catalogue_life import LIFE
from .catalogue_work import WORK
from .draw import Draw
from .params import Kit, identifier_kit, parse, text_of

STYLES = ("snake", "camel", "dotted")


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool: the kit it is made from, its name there, whether it is required."""

    kit: Kit
    name: str
    required: bool


@dataclass(frozen=True)
class ToolSpec:
    """A tool, and how people ask for it.

    Attributes:
        name: unique over all tools.
        domain: field it belongs to.
        description: one line.
        parameters: in the order of the schema.
        wordings: verb phrases; `{0}`, `{1}`, ... stand for the first parameters, the others are
            said in clauses of their own.
        heldout: kept out of training altogether.
        wants_one: a request gives one optional argument at least (a change of nothing is none).
    """

    name: str
    domain: str
    description: str
    parameters: tuple[Parameter, ...]
    wordings: tuple[str, ...]
    heldout: bool
    wants_one: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The specification as chat templates take it."""
        properties: dict[str, Any] = {}
        for parameter in self.parameters:
            schema = dict(parameter.kit.schema)
            if parameter.kit.note:
                schema["description"] = parameter.kit.note
            properties[parameter.name] = schema
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": [p.name for p in self.parameters if p.required],
                },
            },
        }


@dataclass(frozen=True)
class Request:
    """A sentence without its opening, and the call that it asks for."""

    text: str
    name: str
    arguments: dict[str, Any]


def all_tools() -> list[ToolSpec]:
    """Every tool of the catalogues, in catalogue order; names are unique."""
    tools: list[ToolSpec] = []
    names: set[str] = set()
    for number, domain in enumerate((*LIFE, *WORK)):
        style = STYLES[number % len(STYLES)]
        for position, thing in enumerate(domain.things):
            held = domain.heldout or position == len(domain.things) - 1
            tools.extend(_thing_tools(domain, thing, style, held))
        tools.extend(_solo_tool(domain, solo, style) for solo in domain.solos)
    for tool in tools:
        if tool.name in names:
            raise ValueError(f"two tools are called {tool.name}")
        names.add(tool.name)
    return tools


def ask(tool: ToolSpec, draw: Draw) -> Request:
    """A request that names every argument it means, for one call of a tool."""
    optional_share = 0.45
    chosen = [p for p in tool.parameters if p.required or draw.chance(optional_share)]
    if tool.wants_one and all(p.required for p in chosen):
        extra = draw.choice([p for p in tool.parameters if not p.required])
        chosen = [p for p in tool.parameters if p in chosen or p is extra]
    drawn = {p.name: p.kit.draw(draw) for p in chosen}
    wording = draw.choice(tool.wordings)
    slots = [int(slot) for slot in re.findall(r"\{(\d)\}", wording)]
    filled = (
        [
            text_of(drawn[tool.parameters[i].name], tool.parameters[i].kit, draw)
            for i in range(max(slots) + 1)
        ]
        if slots
        else []
    )
    words = [wording.format(*filled)]
    spoken = {tool.parameters[i].name for i in slots}
    words += [_clause(p.kit, drawn[p.name], draw) for p in chosen if p.name not in spoken]
    return Request(" ".join(words), tool.name, drawn)


def _clause(kit: Kit, value: Any, draw: Draw) -> str:
    clause = draw.choice(kit.clauses)
    if kit.kind == "boolean":
        return clause.split(" / ")[0 if value else 1]
    return clause.replace("{v}", text_of(value, kit, draw))


def _thing_tools(domain: Domain, thing: Thing, style: str, held: bool) -> list[ToolSpec]:
    plural = thing.plural or f"{thing.noun}s"
    own = "" if thing.prefix else f" of {domain.place}"
    tools = []

    def add(verb: str, noun: str, description: str, words: str, wordings: list[str]) -> None:
        tools.append(
            ToolSpec(
                name=_name(domain.name, verb, noun, style),
                domain=domain.name,
                description=f"{description}{own}" if len(description) < 40 else description,
                parameters=_parameters(words, thing, f"{domain.name} {verb} {noun}"),
                wordings=tuple(wordings),
                heldout=held,
                wants_one=verb == "update",
            )
        )

    one = f"{_article(thing.noun)} {thing.noun}"
    if thing.create is not None:
        verbs = thing.makes.split()
        say = [f"{verb.replace('_', ' ')} {one}" for verb in verbs]
        first = verbs[0].replace("_", " ")
        add(verbs[0], thing.noun, f"{first.capitalize()} {one}", thing.create, say)
    if thing.find is not None:
        say = [f"find {plural}", f"search for {plural}", f"list the {plural}", f"look for {plural}"]
        add("search", plural, f"Search {plural}", thing.find, say)
    if thing.get is not None:
        say = [f"show me the {thing.noun}", f"get the {thing.noun}", f"look up the {thing.noun}"]
        add("get", thing.noun, f"Get {one} by its id", f"@ {thing.get}", say)
    if thing.update is not None:
        say = [f"change the {thing.noun}", f"update the {thing.noun}", f"edit the {thing.noun}"]
        words = " ".join(w if w.endswith("?") else f"{w}?" for w in thing.update.split())
        add("update", thing.noun, f"Change {one}", f"@ {words}", say)
    for act in (thing.end, *thing.acts):
        if act is None:
            continue
        verbs_text, _, words = act.partition(":")
        verbs = verbs_text.split("|")
        say = [f"{verb.replace('_', ' ')} the {thing.noun}" for verb in verbs]
        first = verbs[0].replace("_", " ")
        add(verbs[0], thing.noun, f"{first.capitalize()} {one}", f"@ {words}", say)
    return tools


def _parameters(words: str, thing: Thing, key: str) -> tuple[Parameter, ...]:
    """Parameters from a catalogue's words; `@` is the identifier of the thing."""
    draw = Draw("names", key)
    parameters: list[Parameter] = []
    for word in words.split():
        if word == "@":
            kit, required = identifier_kit(thing.noun, thing.prefix), True
        else:
            kit, required = parse(word)
        taken = {p.name for p in parameters}
        free = [name for name in kit.names if name not in taken]
        parameters.append(Parameter(kit, draw.choice(free), required))
    return tuple(parameters)


def _solo_tool(domain: Domain, solo: Solo, style: str) -> ToolSpec:
    draw = Draw("names", domain.name, solo.name)
    parameters: list[Parameter] = []
    for word in (*solo.parameters.split(), *solo.optional.split()):
        kit, required = parse(word)
        taken = {p.name for p in parameters}
        free = [name for name in kit.names if name not in taken]
        parameters.append(Parameter(kit, draw.choice(free), required))
    verb, _, noun = solo.name.partition("_")
    return ToolSpec(
        name=_name(domain.name, verb, noun, style),
        domain=domain.name,
        description=solo.description,
        parameters=tuple(parameters),
        wordings=solo.wordings,
        heldout=domain.heldout,
    )


def _name(domain: str, verb: str, noun: str, style: str) -> str:
    words = [*verb.split("_"), *noun.split("_")]
    if style == "camel":
        return words[0] + "".join(word.capitalize() for word in words[1:])
    joined = "_".join(words)
    return joined if style == "snake" else f"{domain}.{joined}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" else "a"
