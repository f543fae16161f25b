"""Parameter kits: for each kind of argument its names, JSON schema, values and wordings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import values as v
from .draw import Draw

Make = Callable[[Draw], Any]


@dataclass(frozen=True)
class Kit:
    """One kind of argument.

    Attributes:
        label: how people name it.
        names: names that a tool may give it, in snake case.
        schema: its JSON schema without a description.
        make: draws a value; unused for enums and booleans, whose schema says it all.
        clauses: wordings with `{v}` for the value; for a boolean two, split by ` / `: true, false.
        note: description in the schema; empty where the name says enough.
        plain: whether `the {label} is {v}` is a good sentence too.
    """

    label: str
    names: tuple[str, ...]
    schema: dict[str, Any]
    make: Make | None
    clauses: tuple[str, ...]
    note: str = ""
    plain: bool = True

    @property
    def kind(self) -> str:
        """`string`, `integer`, `number`, `boolean`, `array`."""
        return str(self.schema["type"])

    def draw(self, draw: Draw) -> Any:
        """A value that the schema allows."""
        if self.kind == "boolean":
            return draw.chance(0.6)
        if "enum" in self.schema:
            return draw.choice(self.schema["enum"])
        if self.make is None:
            raise ValueError(f"the kit {self.label!r} makes no values")
        return self.make(draw)


def text_of(value: Any, kit: Kit, draw: Draw) -> str:
    """The value as a person writes it, such that a reader can tell the argument from it."""
    if isinstance(value, list):
        words = [str(item) for item in value]
        return ", ".join(words[:-1]) + f" and {words[-1]}"
    if "enum" in kit.schema:
        return str(value).replace("_", " ")
    if kit.make is v.iso_date and draw.chance(0.25):
        return v.spoken_date(value)
    if kit.make is v.title or kit.make in _QUOTED:
        return f'"{value}"'
    return str(value)


_MESSAGE = v.one_of(v.MESSAGES)
_REASON = v.one_of(v.REASONS)
_QUOTED = (_MESSAGE,)
_TYPES = {str: "string", int: "integer", float: "number"}


def _kit(
    label: str, names: str, make: Make, clauses: str, note: str = "", plain: bool = True
) -> Kit:
    # Prices mix whole and broken numbers: a number all the same.
    example = make(Draw("type of", label))
    schema: dict[str, Any]
    if isinstance(example, list):
        schema = {"type": "array", "items": {"type": _TYPES[type(example[0])]}}
    elif make is v.money:
        schema = {"type": "number"}
    else:
        schema = {"type": _TYPES[type(example)]}
    return Kit(label, tuple(names.split()), schema, make, tuple(clauses.split("|")), note, plain)


def _enum(label: str, names: str, options: str, clauses: str, note: str = "") -> Kit:
    schema = {"type": "string", "enum": options.split()}
    return Kit(label, tuple(names.split()), schema, None, tuple(clauses.split("|")), note)


def _flag(label: str, names: str, clauses: str, note: str = "") -> Kit:
    words = tuple(clauses.split("|"))
    return Kit(label, tuple(names.split()), {"type": "boolean"}, None, words, note, plain=False)


_DAY = "YYYY-MM-DD"
_HOUR = "HH:MM"

KITS: dict[str, Kit] = {
    # people
    "customer": _kit(
        "customer",
        "customer customer_name client client_name",
        v.person,
        "for {v}|for the customer {v}|with {v} as the customer",
    ),
    "person": _kit("name", "name full_name person", v.person, "for {v}|under the name {v}"),
    "guest": _kit(
        "guest", "guest guest_name booked_for", v.person, "for {v}|under {v}|in the name of {v}"
    ),
    "assignee": _kit(
        "assignee",
        "assignee assigned_to responsible",
        v.person,
        "assigned to {v}|with {v} as the assignee|to be handled by {v}",
    ),
    "owner": _kit("owner", "owner owner_name", v.person, "owned by {v}|with {v} as the owner"),
    "author": _kit("author", "author author_name written_by", v.person, "by {v}|written by {v}"),
    "teacher": _kit(
        "teacher", "teacher instructor taught_by", v.person, "taught by {v}|with {v} as the teacher"
    ),
    "driver": _kit(
        "driver", "driver driver_name", v.person, "driven by {v}|with {v} as the driver"
    ),
    "email": _kit("email", "email email_address to_email", v.email, "to {v}|to the address {v}"),
    "contact_email": _kit(
        "email", "email contact_email", v.email, "with the email {v}|reachable at {v}"
    ),
    "phone": _kit(
        "phone number", "phone phone_number", v.phone, "with the phone number {v}|on phone {v}"
    ),
    "company": _kit(
        "company", "company company_name organisation", v.company, "at {v}|for the company {v}"
    ),
    "supplier": _kit(
        "supplier", "supplier supplier_name vendor", v.company, "from {v}|supplied by {v}"
    ),
    # places
    "city": _kit("city", "city city_name town", v.one_of(v.CITIES), "in {v}|in the city of {v}"),
    "place": _kit("location", "location place venue", v.address, "at {v}|located at {v}"),
    "address": _kit(
        "address", "address delivery_address street_address", v.address, "to {v}|going to {v}"
    ),
    "origin": _kit("origin", "origin from_city departure_city", v.one_of(v.CITIES), "from {v}"),
    "destination": _kit(
        "destination", "destination to_city arrival_city", v.one_of(v.CITIES), "to {v}"
    ),
    "country": _kit("country", "country country_name", v.one_of(v.COUNTRIES), "in {v}|for {v}"),
    "room": _kit("room", "room room_code room_name", v.room, "in room {v}|in {v}"),
    # texts
    "title": _kit(
        "title", "title name heading", v.title, "called {v}|titled {v}|with the title {v}"
    ),
    "topic": _kit("topic", "topic subject theme", v.title, "about {v}|on the topic {v}"),
    "note": _kit(
        "note",
        "note notes comment remarks",
        _MESSAGE,
        "with the note {v}|and add the comment {v}|noting {v}",
    ),
    "message": _kit(
        "message", "message text body", _MESSAGE, "saying {v}|with the message {v}|that reads {v}"
    ),
    "reason": _kit(
        "reason", "reason reason_text", _REASON, "because of: {v}|giving {v} as the reason"
    ),
    "keyword": _kit(
        "keyword", "query keyword search_term", v.one_of(v.WORDS), 'matching "{v}"|about {v}'
    ),
    "product": _kit(
        "product", "product product_name item_name", v.one_of(v.PRODUCTS), "for the product {v}"
    ),
    "dish": _kit("dish", "dish dish_name", v.one_of(v.DRINKS_DISHES), "for {v}|for the dish {v}"),
    # times
    "due_date": _kit(
        "due date",
        "due_date due deadline",
        v.iso_date,
        "due on {v}|with a due date of {v}|due by {v}",
        _DAY,
    ),
    "date": _kit("date", "date day on_date", v.iso_date, "on {v}|dated {v}", _DAY),
    "start_date": _kit(
        "start date", "start_date from_date start", v.iso_date, "starting on {v}|from {v}", _DAY
    ),
    "end_date": _kit(
        "end date", "end_date to_date until", v.iso_date, "ending on {v}|until {v}", _DAY
    ),
    "after": _kit("earliest date", "after since date_from", v.iso_date, "dated after {v}", _DAY),
    "before": _kit("latest date", "before date_to up_to", v.iso_date, "dated before {v}", _DAY),
    "time": _kit("time", "time start_time at_time", v.clock, "at {v}", _HOUR),
    "minutes": _kit(
        "duration",
        "minutes duration_minutes length_min",
        v.whole(10, 180, 5),
        "for {v} minutes|lasting {v} minutes",
        plain=False,
    ),
    "days": _kit(
        "number of days", "days num_days day_count", v.whole(2, 21), "for {v} days", plain=False
    ),
    "year": _kit("year", "year in_year", v.whole(1950, 2025), "from the year {v}|of {v}"),
    # numbers
    "amount": _kit("amount", "amount total sum", v.money, "of {v}|for an amount of {v}"),
    "price": _kit("price", "price unit_price cost", v.money, "at a price of {v}|priced at {v}"),
    "max_price": _kit("maximum price", "max_price price_limit", v.money, "under {v}|up to {v}"),
    "budget": _kit("budget", "budget max_budget", v.money, "with a budget of {v}"),
    "quantity": _kit(
        "quantity", "quantity count units", v.whole(2, 120), "with a quantity of {v}|({v} units)"
    ),
    "weight": _kit(
        "weight",
        "weight_kg weight mass_kg",
        v.decimal(1, 40),
        "weighing {v} kg|with a weight of {v} kg",
        "kg",
        plain=False,
    ),
    "distance": _kit(
        "distance",
        "distance_km distance km",
        v.decimal(2, 60),
        "over {v} km|covering {v} km",
        "km",
        plain=False,
    ),
    "radius": _kit(
        "radius",
        "radius_km within_km",
        v.whole(1, 40),
        "within {v} km|in a radius of {v} km",
        plain=False,
    ),
    "guests": _kit(
        "number of people",
        "guests party_size people",
        v.whole(2, 12),
        "for {v} people|for a group of {v}",
        plain=False,
    ),
    "capacity": _kit(
        "capacity", "capacity max_people seats", v.whole(8, 300), "with {v} seats|seating {v}"
    ),
    "percent": _kit("percentage", "percent percentage rate", v.whole(5, 60), "of {v} percent"),
    "level": _kit("level", "level percent value", v.whole(5, 100), "to {v} percent", plain=False),
    "degrees": _kit(
        "temperature", "temperature celsius degrees", v.decimal(15, 26), "to {v} degrees"
    ),
    "limit": _kit(
        "limit",
        "limit max_results top_n",
        v.whole(3, 25),
        "showing at most {v}|limited to {v} results",
        plain=False,
    ),
    "page": _kit("page", "page page_number", v.whole(2, 40), "on page {v}|(page {v})"),
    "rating": _kit("rating", "rating stars score", v.whole(1, 5), "with {v} stars", plain=False),
    "min_rating": _kit(
        "minimum rating",
        "min_rating rating_from",
        v.decimal(2, 5),
        "rated {v} or better|with a rating of at least {v}",
    ),
    # choices
    "priority": _enum(
        "priority",
        "priority urgency",
        "low normal high critical",
        "with {v} priority|at {v} priority",
    ),
    "currency": _enum(
        "currency", "currency currency_code", "EUR USD GBP JPY CHF", "in {v}|with {v} as currency"
    ),
    "language": _enum(
        "language", "language lang", "English Spanish German French Japanese", "in {v}"
    ),
    "format": _enum(
        "format", "format file_format output_format", "pdf csv xlsx json", "as {v}|in {v} format"
    ),
    "size": _enum("size", "size size_class", "small medium large", "in size {v}|in the size {v}"),
    "color": _enum(
        "colour", "color colour", "red green blue black white", "in {v}|in the colour {v}"
    ),
    "channel": _enum("channel", "channel via send_by", "email sms push post", "by {v}|via {v}"),
    "sort": _enum(
        "sort order",
        "sort_by order_by",
        "date name price popularity",
        "sorted by {v}|ordered by {v}",
    ),
    "repeat": _enum(
        "repetition",
        "repeat frequency recurrence",
        "daily weekly monthly yearly",
        "repeating {v}|on a {v} basis",
    ),
    "weekday": _enum(
        "weekday", "weekday day", "Monday Tuesday Wednesday Thursday Friday", "on {v}|on a {v}"
    ),
    "unit": _enum("unit", "unit units", "celsius fahrenheit kelvin", "in {v}"),
    # switches
    "notify": _flag(
        "notification",
        "notify send_notification",
        "and notify everyone / without notifying anyone",
        "Tell those concerned",
    ),
    "archived": _flag(
        "archived ones",
        "include_archived archived",
        "including archived ones / leaving archived ones out",
    ),
    "express": _flag(
        "express delivery", "express is_express", "by express delivery / without express delivery"
    ),
    "private": _flag("privacy", "private is_private", "kept private / open to the public"),
    "insured": _flag("insurance", "insured with_insurance", "with insurance / without insurance"),
    "breakfast": _flag(
        "breakfast", "breakfast with_breakfast", "with breakfast / without breakfast"
    ),
    "photos": _flag("photos", "include_photos photos", "with photos / without photos"),
    "details": _flag(
        "details", "detailed include_details", "with full details / without the details"
    ),
    # lists
    "attendees": _kit(
        "attendees",
        "attendees participants people",
        v.several(v.one_of(v.FIRST_NAMES)),
        "with {v}|attended by {v}",
    ),
    "tags": _kit(
        "tags", "tags labels", v.several(v.one_of(v.TAGS)), "tagged {v}|with the tags {v}"
    ),
    "items": _kit("items", "items articles", v.several(v.one_of(v.ITEMS)), "containing {v}"),
    "skills": _kit(
        "skills", "skills required_skills", v.several(v.one_of(v.SKILLS)), "with skills in {v}"
    ),
    "numbers": _kit("numbers", "numbers values data", v.several(v.whole(2, 99), 3, 5), "for {v}"),
}

# For arguments that only one kind of thing has: `label:pool` in the catalogues.
POOLS: dict[str, Make] = {
    "person": v.person,
    "email": v.email,
    "company": v.company,
    "city": v.one_of(v.CITIES),
    "country": v.one_of(v.COUNTRIES),
    "title": v.title,
    "crop": v.one_of(v.CROPS),
    "sport": v.one_of(v.SPORTS),
    "subject": v.one_of(v.SUBJECTS),
    "host": v.one_of(v.HOSTS),
    "symptom": v.one_of(v.SYMPTOMS),
    "model": v.one_of(v.CAR_MODELS),
    "word": v.one_of(v.WORDS),
    "skill": v.one_of(v.SKILLS),
    "item": v.one_of(v.ITEMS),
    "dish": v.one_of(v.DRINKS_DISHES),
    "product": v.one_of(v.PRODUCTS),
    "room": v.room,
    "few": v.whole(1, 9),
    "some": v.whole(10, 90),
    "many": v.whole(100, 5000, 10),
    "decimal": v.decimal(1, 30),
    "money": v.money,
    "date": v.iso_date,
    "time": v.clock,
    "items": v.several(v.one_of(v.ITEMS)),
    "hosts": v.several(v.one_of(v.HOSTS)),
    "cities": v.several(v.one_of(v.CITIES)),
    "crops": v.several(v.one_of(v.CROPS)),
    "subjects": v.several(v.one_of(v.SUBJECTS)),
    "names": v.several(v.one_of(v.FIRST_NAMES)),
}
_NOTES = {"date": _DAY, "time": _HOUR}
_OWN = "with the {label} {v}|with {v} as the {label}|with {label} {v}"


def parse(token: str) -> tuple[Kit, bool]:
    """A kit and whether it is required, from a word of a catalogue.

    `key` names a kit, `label:pool` draws from a pool, `label=a|b|c` chooses; a final `?` makes it
    optional.
    """
    required = not token.endswith("?")
    match = re.fullmatch(r"(\w+)(?:([:=])([\w|]+))?", token.removesuffix("?"))
    if match is None:
        raise ValueError(f"{token!r} is no parameter")
    name, kind, rest = match.groups()
    if kind is None:
        return KITS[name], required
    label = name.replace("_", " ")
    if kind == "=":
        return _enum(label, name, rest.replace("|", " "), _OWN.replace("{label}", label)), required
    kit = _kit(label, name, POOLS[rest], _OWN.replace("{label}", label), _NOTES.get(rest, ""))
    return kit, required


def identifier_kit(noun: str, prefix: str) -> Kit:
    """The argument that says which `noun` is meant."""
    stem = noun.replace(" ", "_")
    kit = _kit(
        f"{noun} id", f"{stem}_id id {stem}_ref {stem}_number", v.identifier(prefix), "with id {v}"
    )
    # A bare `id` beside a tool named after its noun needs no description.
    return replace(kit, plain=False)
