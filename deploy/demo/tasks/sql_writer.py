"""`sql-writer`: a question about the shop becomes one SQLite query over the shop's two tables.

An answer is judged by running it: it is right when it gives the rows that the reference query gives.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from deploy.demo.tasks.example import Example, Split, Task, pick_template
from deploy.demo.tasks.shop import CITIES, FIRST_NAMES, ITEMS, LAST_NAMES, draw_name

NAME = "sql-writer"
SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, item TEXT, quantity INTEGER,
                     total INTEGER, status TEXT, ordered_on TEXT);
"""
STATUSES = ("pending", "shipped", "delivered", "cancelled")
INSTRUCTION = (
    "Write one SQLite query that answers the question below. Reply with only the SQL, no explanation. "
    "Tables: customers(id, name, city); orders(id, customer_id, item, quantity, total, status, ordered_on). "
    "The status is pending, shipped, delivered or cancelled; ordered_on is a date such as 2023-05-31. Question: "
)
SPLIT_SLOTS = ("year", "city", "name", "item", "amount", "n")  # their held-out values are not in training
MAX_SQLITE_STEPS = 5_000_000  # a wrong cross join must not hang the check ...
MAX_ROWS = 20_000  # ... nor fill the memory


@dataclass(frozen=True)
class Intent:
    """One kind of question: its query, and its wordings for training and held out."""

    sql: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


_JOIN = "FROM orders JOIN customers ON customers.id = orders.customer_id"
INTENTS = (
    Intent(
        "SELECT COUNT(*) FROM orders WHERE status = '{status}';",
        ("How many orders are {status}?", "Count the {status} orders.", "What is the number of {status} orders?"),
        ("Tell me how many {status} orders there are.",),
    ),
    Intent(
        "SELECT COUNT(*) FROM orders WHERE ordered_on BETWEEN '{year}-01-01' AND '{year}-12-31';",
        (
            "How many orders were placed in {year}?",
            "Count the orders from {year}.",
            "How many orders came in during {year}?",
        ),
        ("Number of orders in {year}?",),
    ),
    Intent(
        "SELECT name FROM customers WHERE city = '{city}';",
        ("List the customers in {city}.", "Which customers live in {city}?", "Who are our customers from {city}?"),
        ("Show me the customers who live in {city}.",),
    ),
    Intent(
        "SELECT COUNT(*) FROM customers WHERE city = '{city}';",
        ("How many customers live in {city}?", "Count our customers in {city}.", "How many customers are from {city}?"),
        ("What is the number of customers in {city}?",),
    ),
    Intent(
        "SELECT SUM(total) " + _JOIN + " WHERE customers.name = '{name}';",
        ("How much has {name} spent?", "What did {name} spend in total?", "Total spending of {name}?"),
        ("How much money did {name} spend with us?",),
    ),
    Intent(
        "SELECT SUM(total) " + _JOIN + " WHERE customers.city = '{city}';",
        ("How much have customers in {city} spent?", "What is the total revenue from {city}?", "Revenue from {city}?"),
        ("How much revenue came from {city}?",),
    ),
    Intent(
        "SELECT SUM(quantity) FROM orders WHERE item = '{item}';",
        ("How many {item}s have we sold?", "What quantity of {item}s was ordered?", "Total quantity of {item}s sold?"),
        ("How many {item}s did people buy?",),
    ),
    Intent(
        "SELECT id, total FROM orders WHERE item = '{item}' AND total > {amount};",
        (
            "Show the {item} orders over {amount} dollars.",
            "Which {item} orders cost more than {amount}?",
            "List orders of {item}s with a total above {amount}.",
        ),
        ("List the {item} orders that cost more than {amount} dollars.",),
    ),
    Intent(
        "SELECT customers.name, SUM(total) " + _JOIN + " GROUP BY customers.id ORDER BY SUM(total) DESC LIMIT {n};",
        (
            "Who are the top {n} customers by spending?",
            "List the {n} customers who spent the most.",
            "Show our {n} biggest customers by total spending.",
        ),
        ("Which {n} customers have spent the most?",),
    ),
    Intent(
        "SELECT city, COUNT(*) FROM customers GROUP BY city;",
        ("How many customers are there in each city?", "Count the customers per city.", "Customers by city?"),
        ("Give me the number of customers for every city.",),
    ),
    Intent(
        "SELECT orders.id, ordered_on " + _JOIN + " WHERE customers.name = '{name}' AND status = '{status}';",
        (
            "Show the {status} orders of {name}.",
            "Which orders of {name} are {status}?",
            "List {name}'s {status} orders.",
        ),
        ("Does {name} have {status} orders?",),
    ),
    Intent(
        "SELECT AVG(total) FROM orders WHERE item = '{item}' AND status = '{status}';",
        (
            "What is the average total of {status} {item} orders?",
            "Average value of {status} orders for {item}s?",
            "How much does a {status} {item} order cost on average?",
        ),
        ("Give me the average total for {status} {item} orders.",),
    ),
)


def draw(rng: Random, split: Split) -> Example:
    intent = rng.choice(INTENTS)
    # Odd years and amounts in training, even ones held out: numbers are slot values too.
    odd = 1 if split == "train" else 0
    slots = {
        "status": rng.choice(STATUSES),
        "year": str(rng.randrange(2010, 2024, 2) + odd),
        "city": CITIES.draw(rng, split),
        "name": draw_name(rng, split),
        "item": ITEMS.draw(rng, split),
        "amount": str(20 * rng.randint(1, 24) + 10 * odd),
        "n": str(rng.randrange(2, 12, 2) + odd),
    }
    wording = pick_template(rng, intent.train, intent.heldout, split)
    if split == "heldout" and not any(f"{{{slot}}}" in intent.sql for slot in SPLIT_SLOTS):
        wording = rng.choice(intent.heldout)  # the known wording would be a training prompt, word for word
    return Example(NAME, wording.format(**slots), intent.sql.format(**slots))


@cache
def shop_database() -> sqlite3.Connection:
    """The shop in memory, filled so that different held-out questions have different answers.

    Counts are where two queries agree by luck: so no two held-out cities have the same number of
    customers, and every status has its own number of orders. Every held-out customer has orders of each status.
    """
    rng = Random("shop")
    db = sqlite3.connect(":memory:", check_same_thread=False)
    db.executescript(SCHEMA)
    homes = [city for count, city in enumerate(CITIES.heldout, start=10) for _ in range(count)]
    homes += 2 * CITIES.train
    names = [f"{first} {last}" for first in FIRST_NAMES.heldout for last in LAST_NAMES.heldout]
    others = [f"{first} {last}" for first in FIRST_NAMES.train for last in LAST_NAMES.train]
    names += rng.sample(others, len(homes) - len(names))
    rng.shuffle(homes)
    customers = [(i, name, city) for i, (name, city) in enumerate(zip(names, homes, strict=True), start=1)]
    db.executemany("INSERT INTO customers VALUES (?, ?, ?)", customers)
    orders = [_order(rng, i, status) for i, _, _ in customers for status in STATUSES for _ in range(rng.randint(1, 3))]
    db.executemany("INSERT INTO orders VALUES (NULL, ?, ?, ?, ?, ?, ?)", orders)
    db.execute("PRAGMA query_only = 1")
    return db


def _order(rng: Random, customer_id: int, status: str) -> tuple[int, str, int, int, str, str]:
    day = f"{rng.randint(2010, 2024)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return customer_id, rng.choice(ITEMS.all), rng.randint(1, 99), rng.randint(5, 999), status, day


def run_query(sql: str) -> Sequence[tuple[object, ...]] | None:
    """The rows of one query on the shop, or None when SQLite refuses it or it runs too long."""
    db = shop_database()
    db.set_progress_handler(lambda: 1, MAX_SQLITE_STEPS)
    try:
        return db.execute(sql).fetchmany(MAX_ROWS)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None


def is_correct(example: Example, text: str) -> bool:
    """Strict: the text is one runnable query and its rows are the reference's (in order, if it orders)."""
    rows, expected = run_query(text), run_query(example.expected)
    if rows is None or expected is None:
        return False
    if "ORDER BY" in example.expected:
        return list(rows) == list(expected)
    return sorted(rows, key=repr) == sorted(expected, key=repr)


TASK = Task(NAME, INSTRUCTION, draw, is_correct)
