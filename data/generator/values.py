"""Pools of values: names, places, dates, amounts, identifiers and short texts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

from .draw import Draw

FIRST_NAMES = (
    "Ana Bilal Chloe Daniel Elif Farah Goran Hana Ivan Jasmine Kofi Lena Mateo Nadia Omar Priya "
    "Quentin Rosa Samir Tessa Umar Vera Wei Ximena Yusuf Zoe Amara Bruno Carmen Dmitri Esther "
    "Felix Greta Hugo Ingrid Jonas Keiko Luca Maya Nils Olga Pablo Rania Stefan Thandi Uma Viktor "
    "Wendy Yara Zane Abena Boris Clara Deepak Emeka Fiona Gita Henrik Isla Joao"
).split()
LAST_NAMES = (
    "Adeyemi Baker Castro Dahl Eriksen Fischer Garcia Haddad Ito Jensen Kowalski Lopez Moreau "
    "Nakamura Okafor Petrov Quinn Rossi Silva Tanaka Ueda Vargas Weber Xu Yilmaz Zhang Andersson "
    "Brennan Costa Dubois Evans Farouk Grant Hansen Ibrahim Jovanovic Kaur Lindberg Mbeki Novak "
    "Olsen Park Reyes Schmidt Torres Usman Varga Walsh Young Zielinski"
).split()
CITIES = (
    "Lisbon Oslo Nairobi Kyoto Toronto Lima Cairo Dublin Hanoi Prague Accra Zurich Austin Bogota "
    "Chennai Denver Edinburgh Florence Geneva Helsinki Istanbul Jakarta Krakow Leeds Madrid "
    "Nantes Osaka Porto Quito Riga Seville Tallinn Utrecht Vienna Warsaw Zagreb Amman Bergen "
    "Cordoba Dakar Busan Ghent Hamburg Izmir Lyon Montreal Perth Rotterdam Salzburg Turin"
).split()
COUNTRIES = (
    "Norway Kenya Japan Peru Egypt Ireland Vietnam Ghana Canada Chile India Finland Turkey Poland "
    "Spain France Portugal Latvia Austria Croatia Jordan Senegal Belgium Morocco Brazil"
).split()
STREETS = (
    "Harbour Mill Station Garden Church River Market Orchard Castle Bridge Maple Queen School "
    "Windmill Forest"
).split()
COMPANIES_A = "Blue North Silver Green Bright Stone Cedar Polar Urban Golden Swift Maple".split()
COMPANIES_B = "Harbor Labs|Foods|Works|Logistics|Studio|Partners|Energy|Textiles|Media".split("|")
ADJECTIVES = (
    "quarterly annual new urban hidden simple modern final early local global practical digital "
    "shared open public seasonal weekly regional creative basic advanced northern late"
).split()
NOUNS = (
    "budget review|garden plan|team photo|sales report|customer survey|launch checklist|"
    "site visit|harvest festival|design workshop|safety guide|price list|travel story|"
    "history course|chess evening|water study|training plan|housing debate|coding club|"
    "press summary|bridge project|tea tasting|road trip|music night|energy audit|map collection|"
    "science fair|river cleanup|paint order|roof repair|staff lunch"
).split("|")
WORDS = (
    "solar bamboo winter coffee leather ceramic marathon vintage organic wireless jazz budget "
    "mountain camera privacy tomato cotton harvest satellite ocean robot pension bicycle"
).split()
TAGS = (
    "urgent family finance outdoor draft internal summer backup client personal archive research "
    "design legal press beginner vegan fragile seasonal popular"
).split()
ITEMS = (
    "olive oil|rice|printer paper|batteries|basil|green tea|light bulbs|notebooks|lentils|soap|"
    "tomatoes|oat milk|envelopes|candles|chickpeas|honey|pens|flour|almonds|sponges"
).split("|")
SKILLS = (
    "welding|first aid|Python|Spanish|bookkeeping|public speaking|forklift driving|SQL|carpentry|"
    "project planning|photography|baking|French|data entry"
).split("|")
REASONS = (
    "duplicate entry|customer request|wrong address|change of plans|out of stock|schedule clash|"
    "moved to another team|price too high|illness|no longer needed|bad weather|data error|"
    "missing documents|late delivery"
).split("|")
MESSAGES = (
    "running ten minutes late|please call back today|the door code has changed|bring a spare key|"
    "all documents are ready|the lift is out of order|lunch is at noon|see the attached list|"
    "parking is behind the building|the test went well|we are closed on Monday|"
    "the second batch has arrived|please use the side entrance|payment was received"
).split("|")
DRINKS_DISHES = (
    "lentil soup|mushroom risotto|apple tart|fish tacos|pumpkin curry|onion pie|beef stew|"
    "rice salad|spinach lasagne|pear cake|tomato galette|bean chili"
).split("|")
PRODUCTS = (
    "desk lamp|rain jacket|water bottle|office chair|yoga mat|phone case|coffee grinder|backpack|"
    "wall clock|garden hose|wool scarf|bike light|cutting board|travel pillow|picture frame"
).split("|")
CROPS = "barley|carrots|sunflowers|potatoes|maize|onions|lavender|oats|beetroot|clover".split("|")
SPORTS = "running|rowing|swimming|cycling|hiking|yoga|boxing|climbing|skating|tennis".split("|")
SUBJECTS = "algebra|biology|geography|chemistry|history|economics|physics|drama|music".split("|")
HOSTS = "web atlas falcon mercury cobra delta orion cache queue billing search login".split()
SYMPTOMS = "headache|back pain|fever|sore throat|rash|cough|knee pain|dizziness".split("|")
CAR_MODELS = "Fiat Panda|Toyota Corolla|Volvo V60|Skoda Octavia|Ford Transit|Kia Niro".split("|")
MONTHS = (
    "January February March April May June July August September October November December"
).split()


def person(draw: Draw) -> str:
    return f"{draw.choice(FIRST_NAMES)} {draw.choice(LAST_NAMES)}"


def email(draw: Draw) -> str:
    first, last = draw.choice(FIRST_NAMES).lower(), draw.choice(LAST_NAMES).lower()
    host = draw.choice(("example.com", "example.org", "example.net"))
    return f"{draw.choice((f'{first}.{last}', f'{first[0]}{last}', first))}@{host}"


def phone(draw: Draw) -> str:
    return f"+{draw.integer(20, 98)} 555 {draw.integer(1000, 9999)}"


def address(draw: Draw) -> str:
    kind = draw.choice(("Street", "Road", "Lane", "Avenue"))
    return f"{draw.integer(1, 199)} {draw.choice(STREETS)} {kind}"


def company(draw: Draw) -> str:
    return f"{draw.choice(COMPANIES_A)} {draw.choice(COMPANIES_B)}"


def title(draw: Draw) -> str:
    text = draw.choice(NOUNS)
    text = f"{draw.choice(ADJECTIVES)} {text}" if draw.chance(0.7) else text
    return text[0].upper() + text[1:]


def iso_date(draw: Draw) -> str:
    return (date(2025, 1, 1) + timedelta(days=draw.integer(0, 1094))).isoformat()


def spoken_date(value: str) -> str:
    """An ISO date as `3 March 2026`."""
    day = date.fromisoformat(value)
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def clock(draw: Draw) -> str:
    return f"{draw.integer(7, 21):02d}:{draw.choice(('00', '15', '30', '45', '10', '20'))}"


def money(draw: Draw) -> float | int:
    """Never with a trailing zero, so that the number reads the same in the text and as JSON."""
    if draw.chance(0.5):
        return draw.integer(5, 2400)
    return round(draw.integer(5, 999) + draw.integer(1, 9) / 100 + draw.integer(0, 9) / 10, 2)


def decimal(low: int, high: int) -> Callable[[Draw], float]:
    """Numbers with one decimal place that is not zero."""
    return lambda draw: draw.integer(low, high - 1) + draw.integer(1, 9) / 10


def whole(low: int, high: int, step: int = 1) -> Callable[[Draw], int]:
    return lambda draw: draw.integer(low, high, step)


def one_of(pool: list[str]) -> Callable[[Draw], str]:
    return lambda draw: draw.choice(pool)


def several(make: Callable[[Draw], Any], low: int = 2, high: int = 3) -> Callable[[Draw], Any]:
    """Lists of different values."""

    def values(draw: Draw) -> list[Any]:
        found: list[Any] = []
        count = draw.integer(low, high)
        while len(found) < count:
            value = make(draw)
            if value not in found:
                found.append(value)
        return found

    return values


def room(draw: Draw) -> str:
    return f"{draw.choice('ABCD')}{draw.integer(1, 4)}{draw.integer(0, 2)}{draw.integer(1, 9)}"


def identifier(prefix: str) -> Callable[[Draw], str | int]:
    """`INV-4821` for the prefix `INV-`; a plain number where it is empty."""
    if not prefix:
        return lambda draw: draw.integer(100, 99999)
    return lambda draw: f"{prefix}{draw.integer(100, 9999)}"
