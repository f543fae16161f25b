"""What a catalogue of tools is made of. Its entries: `catalogue_work`, `catalogue_life`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """Something that tools create, find, read, change, end or do something with.

    The fields that end in tools are words for `params.parse`; an empty string is a tool without
    parameters of its own, None is no such tool.

    Attributes:
        noun: one word, in the singular.
        prefix: of its identifiers; empty where they are numbers.
        create: parameters of the tool that makes one.
        find: of the tool that lists those that match.
        get: of the tool that reads one.
        update: what can be changed.
        end: of the tool that ends one; the word before the colon is its verb.
        acts: further tools, each `verb|other verb: parameters`.
        makes: verbs of creation.
        plural: where it is not the noun with an s.
    """

    noun: str
    prefix: str
    create: str | None = None
    find: str | None = None
    get: str | None = None
    update: str | None = None
    end: str | None = None
    acts: tuple[str, ...] = ()
    makes: str = "create add"
    plural: str = ""


@dataclass(frozen=True)
class Solo:
    """A tool that stands alone, such as a conversion.

    Attributes:
        name: verb and object in snake case.
        description: what it does.
        wordings: verb phrases with `{0}`, `{1}`, ... for the parameters in order.
        parameters: all of them required.
        optional: further ones, said in their own wordings.
    """

    name: str
    description: str
    wordings: tuple[str, ...]
    parameters: str
    optional: str = ""


@dataclass(frozen=True)
class Domain:
    """Tools of one field.

    Attributes:
        name: used as the prefix of dotted names.
        place: where its things lie, for descriptions.
        things: the tools of the last one are held out.
        solos: tools that stand alone.
        heldout: whether all its tools are held out.
    """

    name: str
    place: str
    things: tuple[Thing, ...]
    solos: tuple[Solo, ...] = ()
    heldout: bool = False
