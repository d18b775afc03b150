"""What the slots of the tagger's sentence patterns are filled with: lists, and forms made of other slots.

A backslash and an n inside a line are a line end.
"""

from modelwright.data import names

# Slots that are one of a list.
LISTS = {
    "country": names.COUNTRIES,
    "nat": names.NATIONALITIES,
    "field": names.FIELDS,
    "legal": names.LEGAL,
    "known": names.ORGANIZATIONS,
    "public": names.PUBLIC,
    "ending": names.ENDINGS,
    "title": names.TITLES,
    "job": names.JOBS,
    "particle": names.PARTICLES,
    "street": names.STREETS,
    "before": names.STREET_BEFORE,
    "after": names.STREET_AFTER,
    "word": names.STREET_WORDS,
    "state": names.STATES,
    "region": names.REGIONS,
    "door": names.DOORS,
    "month": names.MONTHS,
    "wind": ("N", "S", "E", "W", "North", "South"),
    "letter": ("a", "B", "", ""),
    "postcode": ("AB", "DE", "HA"),
    "gap": (", ", ", ", "\n", " ", "\n "),
    "force": ("AA", "AE", "AP"),
}


def _forms(text: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in text.strip().splitlines()]


# Slots that are made of slots; a form that stands twice comes twice as often.
FORMS = {
    "full": _forms("""
{first} {last}
{first} {last}
{first} {last}
{first} {last}
{first}
{first}
{last}
{first} {capital}. {last}
{first} {capital} {last}
{capital}. {last}
{last}, {first}
{first} {first} {last}
{last} {first}
{first} {last}-{last}
{first}-{first} {last}
{first} {particle} {last}
{first} {last} Jr.
{first} {last} III
{first} {last} {last}
"""),
    "org": _forms("""
{known}
{known}
{last} {legal}
{brand} {legal}
{last}, {last} and {last}
{last}-{last}
{last} {field}
{brand} {field} {legal}
{brand} {field}
{field} {field}
{brand}
{last} & {last}
{capitals}
{brand}{ending}
{public}
{plain} {brand}
{plain} {field}
"""),
    "made_city": _forms("""
{townform}
{townform}
{townform}
{town}
{town}
"""),
    "townform": [form.replace("{}", "{town}") for form in names.TOWNS],
    "address": _forms("""
{line}
{line}
{line}
{line}{gap}{town_line}
{line}{gap}{town_line}
{line}{gap}{town_line}
{line}{gap}{town_line}{gap}{country}
"""),
    "line": _forms("""
{road}
{road}
{road} {doors}
{road}, {doors}
{doors}, {road}
{house} {road}
"""),
    "doors": [form.replace("{}", "{small}") for form in names.DOORS],
    "road": _forms("""
{house} {core} {street}
{house} {core} {street}
{house} {core} {street}
{house} {wind} {core} {street}
{before} {core} {small}
{small} {before} {core}
{core}{after} {small}
{core}{after} {small}{letter}
{core} {house}
{house} {core}{after} {small}
{house} {core} {last} {street}
{core} {street}
P.O. Box {house}
PO Box {house}
Box {house}
{plain_corner}
"""),
    "plain_corner": _forms("""
the corner of {core} {street} and {core} {street}
corner of {core} {street} and {core}{after}
Unit {house}, Box {house}, APO {force} {zip}
PSC {house} Box {house}\nFPO {force} {zip}
"""),
    "core": _forms("""
{last}
{last}
{town}
{first}
{first} {last}
{word}
"""),
    "town_line": _forms("""
{city}, {state} {zip}
{city} {state} {zip}
{zip} {city}
{city}{gap}{country} {zip}
{city} {zip}
{city}, {region} {zip}
{city}
"""),
    "zip": _forms("""
{digit}{digit}{digit}{digit}{digit}
{digit}{digit}{digit}{digit}{digit}
{digit}{digit}{digit}{digit}
{digit}{digit}{digit} {digit}{digit}
{digit}{digit}{digit}{digit}{digit}-{digit}{digit}{digit}{digit}
{capital}{day} {digit}{postcode}
{capital}{digit}{capital} {digit}{capital}{digit}
"""),
    "date": _forms("""
{month} {day}
{day} {month} {year}
{month} {day}, {year}
{day}/{day}/{year}
{year}-0{digit}-{day}
"""),
    "phone": _forms("""
{digits}-{digits}-{digits}
({digits}) {digits}-{digits}
+{digits} {digits} {digits}
"""),
}
