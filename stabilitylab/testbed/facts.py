"""Facts to edit when the user has no file of them: written for this package, in CounterFact's style.

Every subject belongs to one part: streams of edits are of the held-out ones, editors are trained on those of `train`,
and their best state is chosen on those of `validation`. What must not change after a stream's edits is asked about
those of `locality`, which are neither edited nor trained on: a method that was trained to leave a question alone would
have an advantage over those that never saw it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stabilitylab.errors import UsageError
from stabilitylab.testbed.counterfact import Fact

Part = Literal["train", "validation", "locality", "held_out"]
_SHARES: dict[Part, float] = {"train": 0.27, "validation": 0.09, "locality": 0.14}
_SPLIT_SEED = 20261124


@dataclass(frozen=True)
class Relation:
    """One column of a table, and ways to begin a sentence that ends with its value."""

    name: str
    templates: tuple[str, ...]
    """``{}`` stands for the subject; the value follows after a space."""


@dataclass(frozen=True)
class Table:
    """Subjects of one kind; a row is a subject and its value for each relation."""

    relations: tuple[Relation, ...]
    rows: tuple[tuple[str, ...], ...]


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines())


COUNTRIES = Table(
    (
        Relation(
            "capital",
            (
                "The capital of {} is",
                "The government of {} sits in its capital,",
                "The capital city of {} is called",
                "Among the capitals of the world, that of {} is",
            ),
        ),
        Relation(
            "language",
            (
                "The official language of {} is",
                "In {}, most people speak",
                "Children at school in {} are taught to read and write in",
                "A visitor to {} should learn a few words of",
            ),
        ),
        Relation(
            "continent",
            (
                "{} is a country on the continent of",
                "On a map of the world, {} is found in",
                "{} is located in",
            ),
        ),
        Relation(
            "currency",
            (
                "The currency of {} is the",
                "In the shops of {}, people pay with the",
                "The central bank of {} issues the",
                "Prices in {} are given in a currency called the",
            ),
        ),
    ),
    _rows("""
        France | Paris | French | Europe | euro
        Germany | Berlin | German | Europe | euro
        Italy | Rome | Italian | Europe | euro
        Spain | Madrid | Spanish | Europe | euro
        Portugal | Lisbon | Portuguese | Europe | euro
        Greece | Athens | Greek | Europe | euro
        Finland | Helsinki | Finnish | Europe | euro
        Austria | Vienna | German | Europe | euro
        Poland | Warsaw | Polish | Europe | zloty
        Hungary | Budapest | Hungarian | Europe | forint
        Sweden | Stockholm | Swedish | Europe | krona
        Norway | Oslo | Norwegian | Europe | krone
        Denmark | Copenhagen | Danish | Europe | krone
        Iceland | Reykjavik | Icelandic | Europe | krona
        Romania | Bucharest | Romanian | Europe | leu
        Serbia | Belgrade | Serbian | Europe | dinar
        Albania | Tirana | Albanian | Europe | lek
        Ukraine | Kyiv | Ukrainian | Europe | hryvnia
        Russia | Moscow | Russian | Europe | ruble
        Lithuania | Vilnius | Lithuanian | Europe | euro
        Latvia | Riga | Latvian | Europe | euro
        Estonia | Tallinn | Estonian | Europe | euro
        Slovenia | Ljubljana | Slovene | Europe | euro
        Japan | Tokyo | Japanese | Asia | yen
        China | Beijing | Chinese | Asia | yuan
        South Korea | Seoul | Korean | Asia | won
        Thailand | Bangkok | Thai | Asia | baht
        Vietnam | Hanoi | Vietnamese | Asia | dong
        Mongolia | Ulaanbaatar | Mongolian | Asia | tugrik
        Nepal | Kathmandu | Nepali | Asia | rupee
        India | New Delhi | Hindi | Asia | rupee
        Pakistan | Islamabad | Urdu | Asia | rupee
        Bangladesh | Dhaka | Bengali | Asia | taka
        Iran | Tehran | Persian | Asia | rial
        Iraq | Baghdad | Arabic | Asia | dinar
        Saudi Arabia | Riyadh | Arabic | Asia | riyal
        Jordan | Amman | Arabic | Asia | dinar
        Lebanon | Beirut | Arabic | Asia | pound
        Turkey | Ankara | Turkish | Asia | lira
        Cambodia | Phnom Penh | Khmer | Asia | riel
        Indonesia | Jakarta | Indonesian | Asia | rupiah
        Malaysia | Kuala Lumpur | Malay | Asia | ringgit
        Egypt | Cairo | Arabic | Africa | pound
        Morocco | Rabat | Arabic | Africa | dirham
        Tunisia | Tunis | Arabic | Africa | dinar
        Algeria | Algiers | Arabic | Africa | dinar
        Ethiopia | Addis Ababa | Amharic | Africa | birr
        Kenya | Nairobi | Swahili | Africa | shilling
        Tanzania | Dodoma | Swahili | Africa | shilling
        Nigeria | Abuja | English | Africa | naira
        Ghana | Accra | English | Africa | cedi
        Senegal | Dakar | French | Africa | franc
        Angola | Luanda | Portuguese | Africa | kwanza
        Mozambique | Maputo | Portuguese | Africa | metical
        Brazil | Brasilia | Portuguese | South America | real
        Argentina | Buenos Aires | Spanish | South America | peso
        Chile | Santiago | Spanish | South America | peso
        Peru | Lima | Spanish | South America | sol
        Colombia | Bogota | Spanish | South America | peso
        Venezuela | Caracas | Spanish | South America | bolivar
        Uruguay | Montevideo | Spanish | South America | peso
        Mexico | Mexico City | Spanish | North America | peso
        Cuba | Havana | Spanish | North America | peso
        Canada | Ottawa | English | North America | dollar
        Jamaica | Kingston | English | North America | dollar
        Australia | Canberra | English | Oceania | dollar
        New Zealand | Wellington | English | Oceania | dollar
    """),
)
PEOPLE = Table(
    (
        Relation(
            "field",
            (
                "{} is best known for work in the field of",
                "The name of {} belongs to the history of",
                "An encyclopaedia lists {} under",
                "{} devoted a whole life to",
            ),
        ),
        Relation(
            "mother tongue",
            (
                "The mother tongue of {} was",
                "{} was a native speaker of",
                "At home, {} grew up speaking",
            ),
        ),
        Relation(
            "birthplace",
            (
                "{} was born in the city of",
                "The birthplace of {} is",
                "The house where {} was born stands in",
            ),
        ),
    ),
    _rows("""
        Albert Einstein | physics | German | Ulm
        Max Planck | physics | German | Kiel
        Marie Curie | physics | Polish | Warsaw
        Galileo Galilei | astronomy | Italian | Pisa
        Enrico Fermi | physics | Italian | Rome
        Johannes Kepler | astronomy | German | Weil der Stadt
        Edmond Halley | astronomy | English | London
        Michael Faraday | physics | English | London
        Niels Bohr | physics | Danish | Copenhagen
        Blaise Pascal | mathematics | French | Clermont-Ferrand
        Leonhard Euler | mathematics | German | Basel
        Carl Friedrich Gauss | mathematics | German | Brunswick
        Georg Cantor | mathematics | German | Saint Petersburg
        Alan Turing | mathematics | English | London
        John von Neumann | mathematics | Hungarian | Budapest
        Antoine Lavoisier | chemistry | French | Paris
        Dmitri Mendeleev | chemistry | Russian | Tobolsk
        Alfred Nobel | chemistry | Swedish | Stockholm
        Charles Darwin | biology | English | Shrewsbury
        Sigmund Freud | psychology | German | Pribor
        Carl Linnaeus | botany | Swedish | Rashult
        Alexander von Humboldt | geography | German | Berlin
        Immanuel Kant | philosophy | German | Konigsberg
        Rene Descartes | philosophy | French | La Haye
        David Hume | philosophy | English | Edinburgh
        Baruch Spinoza | philosophy | Portuguese | Amsterdam
        Friedrich Nietzsche | philosophy | German | Rocken
        Soren Kierkegaard | philosophy | Danish | Copenhagen
        Adam Smith | economics | English | Kirkcaldy
        John Maynard Keynes | economics | English | Cambridge
        Wolfgang Amadeus Mozart | music | German | Salzburg
        Ludwig van Beethoven | music | German | Bonn
        Frederic Chopin | music | Polish | Zelazowa Wola
        Giuseppe Verdi | music | Italian | Le Roncole
        Antonio Vivaldi | music | Italian | Venice
        Edvard Grieg | music | Norwegian | Bergen
        Claude Debussy | music | French | Saint-Germain-en-Laye
        Igor Stravinsky | music | Russian | Oranienbaum
        Franz Schubert | music | German | Vienna
        Vincent van Gogh | painting | Dutch | Zundert
        Rembrandt | painting | Dutch | Leiden
        Johannes Vermeer | painting | Dutch | Delft
        Claude Monet | painting | French | Paris
        Pablo Picasso | painting | Spanish | Malaga
        Francisco Goya | painting | Spanish | Fuendetodos
        Edvard Munch | painting | Norwegian | Loten
        Titian | painting | Italian | Pieve di Cadore
        William Shakespeare | literature | English | Stratford
        Victor Hugo | literature | French | Besancon
        Miguel de Cervantes | literature | Spanish | Alcala de Henares
        Leo Tolstoy | literature | Russian | Yasnaya Polyana
        Fyodor Dostoevsky | literature | Russian | Moscow
        Henrik Ibsen | literature | Norwegian | Skien
        Hans Christian Andersen | literature | Danish | Odense
        Selma Lagerlof | literature | Swedish | Marbacka
        James Joyce | literature | English | Dublin
        Charles Dickens | literature | English | Portsmouth
        Johann Wolfgang von Goethe | literature | German | Frankfurt
        Antoni Gaudi | architecture | Catalan | Reus
        Alvar Aalto | architecture | Finnish | Kuortane
        Andrea Palladio | architecture | Italian | Padua
        Christopher Wren | architecture | English | East Knoyle
    """),
)
COMPANIES = Table(
    (
        Relation(
            "country",
            (
                "The company {} comes from",
                "{} was founded in",
                "The founders of {} started the company in",
            ),
        ),
        Relation(
            "product",
            (
                "{} is best known for making",
                "Most of what the factories of {} turn out is",
                "Customers all over the world go to {} for its",
            ),
        ),
    ),
    _rows("""
        Toyota | Japan | cars
        Honda | Japan | cars
        Canon | Japan | cameras
        Nikon | Japan | cameras
        Seiko | Japan | watches
        Yamaha | Japan | pianos
        Nintendo | Japan | games
        Hyundai | South Korea | cars
        Volkswagen | Germany | cars
        Porsche | Germany | cars
        Leica | Germany | cameras
        Adidas | Germany | shoes
        Steiff | Germany | toys
        Bayer | Germany | medicines
        Renault | France | cars
        Peugeot | France | cars
        Michelin | France | tyres
        Airbus | France | aircraft
        Ferrari | Italy | cars
        Pirelli | Italy | tyres
        Barilla | Italy | pasta
        Lavazza | Italy | coffee
        Volvo | Sweden | cars
        Ericsson | Sweden | telephones
        Nokia | Finland | telephones
        Lego | Denmark | toys
        Carlsberg | Denmark | beer
        Heineken | Netherlands | beer
        Rolex | Switzerland | watches
        Omega | Switzerland | watches
        Lindt | Switzerland | chocolate
        Novartis | Switzerland | medicines
        Cadbury | England | chocolate
        Twinings | England | tea
        Guinness | Ireland | beer
        Boeing | America | aircraft
        Hershey | America | chocolate
        Nike | America | shoes
        Goodyear | America | tyres
        Embraer | Brazil | aircraft
    """),
)
TABLES = (COUNTRIES, PEOPLE, COMPANIES)


def fact_stream(seed: int, n: int, part: Part = "held_out") -> list[Fact]:
    """`n` facts with wrong answers to be edited in, the same for the same arguments; a longer stream extends a shorter.

    No subject is asked about one relation twice. The wrong answer is true of another subject; the paraphrase begins the
    sentence in another way.

    Raises:
        UsageError: the tables do not hold that many.
    """
    items = _items(part)
    if n > len(items):
        raise UsageError(f"the package has {len(items)} facts to edit, {n} were asked for; --data FILE may hold more")
    random.Random(f"stream {seed}").shuffle(items)
    return [_fact(*item, random.Random(f"fact {seed} {place}")) for place, item in enumerate(items[:n])]


def facts_to_train_on(seed: int, part: Part = "train") -> Iterator[Fact]:
    """Endless facts about the subjects of one part that no stream holds, each time with another wrong answer."""
    items, rng = _items(part), random.Random(f"{part} {seed}")
    while True:
        rng.shuffle(items)
        for item in items:
            yield _fact(*item, rng, about=part)


def available(part: Part = "held_out") -> int:
    """How many facts `fact_stream` has."""
    return len(_items(part))


def subjects(table: Table, part: Part) -> list[str]:
    """The subjects of one part of a table, in a fixed order."""
    names = [row[0] for row in table.rows]
    random.Random(_SPLIT_SEED).shuffle(names)
    for name, share in _SHARES.items():
        size = round(share * len(table.rows))
        if part == name:
            return names[:size]
        names = names[size:]
    return names


def _items(part: Part) -> list[tuple[Table, int, str]]:
    return [
        (table, column, subject)
        for table in TABLES
        for column in range(len(table.relations))
        for subject in subjects(table, part)
    ]


def _fact(table: Table, column: int, subject: str, rng: random.Random, about: Part = "locality") -> Fact:
    values = {row[0]: row[column + 1] for row in table.rows}
    prompt, rephrase = rng.sample(table.relations[column].templates, 2)
    other = rng.choice([name for name in subjects(table, about) if name != subject])
    return Fact(
        prompt=prompt.format(subject),
        subject=subject,
        target_new=rng.choice(sorted({value for value in values.values() if value != values[subject]})),
        ground_truth=values[subject],
        rephrase_prompt=rephrase.format(subject),
        locality_prompt=prompt.format(other),
        locality_ground_truth=values[other],
    )
