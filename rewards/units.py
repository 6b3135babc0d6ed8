"""Names of units and currencies: what may stand beside a number without being a part of it.

A table of names, so that nothing unknown passes for a unit. Factors are exact and agree with those of pint. Units are
never needed to read a number; they tell whether "2.5 hours or 150 minutes" says one thing or two.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    """A factor to the base unit of its dimension; the dimension is empty where nothing is converted."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]


# dimension: names = factor; a star allows the prefixes of SI, names of three and more letters have a plural in s
_TABLE = """
L: m* meter* metre* = 1; in inch inches = 0.0254; ft foot feet = 0.3048; yd yard = 0.9144; mi mile = 1609.344
L: nmi nautical_mile = 1852; au = 149597870700; angstrom = 0.0000000001
M: g* gram* gramme* gm = 1; t tonne = 1000000; lb lbs pound = 453.59237; oz ounce = 28.349523125; stone = 6350.29318
T: s* sec second* = 1; min minute = 60; h hr hour = 3600; day d = 86400; week wk = 604800; fortnight = 1209600
C: month mo = 1; year yr annum = 12; decade = 120; century centuries = 1200
V: l* L* liter* litre* = 1; gal gallon = 3.785411784; qt quart = 0.946352946; pt pint = 0.473176473
V: cup = 0.2365882365; fl_oz fluid_ounce = 0.0295735295625; tbsp tablespoon = 0.01478676478125
V: tsp teaspoon = 0.00492892159375; cc = 0.001
A: acre = 1; hectare ha = 1
v: mph = 1.609344; kph kmh kmph = 1; knot kn = 1.852
I: bit* b = 1; byte* B* = 8
cent: cent ¢ penny pennies pence = 1
-: degree deg degrees_celsius celsius fahrenheit kelvin K C F °C °F radian rad steradian
-: N* newton* J* joule* W* watt* Wh* watt_hour* V* volt* A* amp* ampere* ohm* Ω* Hz* hertz* Pa* pascal* bar* atm
-: mol* mole* cal calorie kcal Cal eV* F farad H henry T tesla Wb C coulomb lm lx lux cd candela
-: psi mmHg Bq Gy Sv rpm fps dB decibel
-: unit item piece point pt pts percent_points am pm a.m p.m o'clock st nd rd th each pair time person people
-: dollar euro buck rupee yuan yen won peso franc ruble rouble krona krone real lira rand dirham riyal baht taka naira
-: ton barrel ringgit rupiah zloty shekel RMB sen dong pesos forint
"""
_CODES = """
USD EUR GBP JPY CNY INR CHF CAD AUD NZD SEK NOK DKK RUB BRL MXN KRW ZAR TRY PLN CZK HUF ILS THB SGD HKD IDR
MYR PHP VND AED SAR EGP NGN KES PKR BDT LKR ARS CLP COP PEN UAH RON BGN HRK ISK TWD KWD QAR OMR BHD JOD MAD
TND GHS ETB RMB Rs Rs. Re Re. kr kr.
"""
CODES = frozenset(_CODES.split())
SYMBOLS = "$€£¥₹₩₽₱₺₴₦₫₪₡₲₵₸¢฿₭₮₨₼₾"
CURRENCY = (  # in front of a number
    rf"(?:(?:US|CA?|AU?|NZ|HK|S|R|NT|Mex)?\s?\\?\$|[{SYMBOLS}]|\\(?:pounds|textsterling|(?:text)?(?:euro|yen|cent)s?)(?![A-Za-z])"
    r"|(?P<code>[A-Z]{3}|Rs\.?|Re\.?|kr\.?)(?![A-Za-z]))"
)
_SHORT = {"p": -12, "n": -9, "µ": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12}
_LONG = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9, "tera": 12}


def _names() -> dict[str, Unit]:
    found: dict[str, Unit] = {}
    prefixed: dict[str, Unit] = {}
    for line in _TABLE.strip().splitlines():
        letter, _, entries = line.partition(": ")
        for entry in entries.split(";"):
            names, _, factor = entry.partition(" = ")
            for name in names.split():
                plain = name.rstrip("*").replace("_", " ")
                unit = Unit(Fraction(factor or 1), () if letter == "-" else ((letter, 1),))
                found[plain] = unit
                powers = (_LONG if len(plain) > 3 else _SHORT) if name.endswith("*") else {}
                for prefix, power in powers.items():
                    prefixed[prefix + plain] = Unit(unit.factor * Fraction(10) ** power, unit.dimension)
    found = prefixed | found
    found |= {f"{name}s": unit for name, unit in found.items() if len(name) > 2 and name[-1] != "s" and name.isalpha()}
    return found | dict.fromkeys([*CODES, *SYMBOLS], Unit(Fraction(1), ()))


NAMES = _names()
_TERM = re.compile(
    r"\s*(?P<by>/|\bper\b|[*·-]|\\cdot(?![A-Za-z]))?\s*(?:(?P<power>square|cubic|sq\.?|cu\.?)\s+)?"
    r"(?P<name>fl\.? oz|fluid ounces?|nautical miles?|watt hours?|degrees? (?:celsius|fahrenheit)|a\.m|p\.m|o'clock"
    r"|°[CF]|[A-Za-zµΩ]{1,20}|[^\sA-Za-z0-9\\/*^{}().,;:!?_-])\.?(?:\s?\^\s?\{?(?P<exponent>-?[0-9])\}?)?",
    re.IGNORECASE,
)

_OVER = re.compile(r"\\frac\s?\{([^{}]*)\}\{\s*([^{}\s]*(?:\^\{?[0-9]\}?)?)\s*\}")  # of one denominator: m/s^2


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """The unit that a text spells, as `km/h`, `square meters` or `m s^{-1}`; None if any part of it is unknown."""
    text = re.sub(r"\\mu(?![A-Za-z])\s*", "µ", text.strip().replace("μ", "µ"))
    text = _OVER.sub(r"\1/\2", re.sub(r"\\(?:Omega|ohm)(?![A-Za-z])", "Ω", text))
    dimension: dict[str, int] = {}
    factor, position = Fraction(1), 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or match.end() == position or len(text) > 60:
            return None
        unit = NAMES.get(match["name"]) or NAMES.get(match["name"].lower().replace(".", ""))
        if unit is None:
            return None
        word = (match["power"] or "")[:1].lower()
        exponent = int(match["exponent"] or (2 if word == "s" else 3 if word == "c" else 1))
        if match["by"] in ("/", "per"):
            exponent = -exponent
        factor *= unit.factor**exponent
        for letter, power in unit.dimension:
            dimension[letter] = dimension.get(letter, 0) + power * exponent
        position = match.end()
    return Unit(factor, tuple(sorted(dimension.items()))) if text else None
