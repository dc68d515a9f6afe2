"""`json-extractor`: an order in a customer's words becomes one JSON object with fixed keys."""

import json
from random import Random

from deploy.demo.tasks.example import Example, Split, Task, pick_template
from deploy.demo.tasks.shop import CITIES, ITEMS, WEEKDAYS, draw_name

NAME = "json-extractor"
INSTRUCTION = (
    "Extract the order from the message below. Reply with only one JSON object with the keys "
    '"customer" (full name), "item" (as written), "quantity" (a number), "city", and "due" '
    "(a weekday, or null when none is named). Message: "
)
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# {due} is a whole phrase or empty; {item} is plural.
TEMPLATES = (
    "Hi, this is {name} from {city}. I would like {n} {item}{due}, please.",
    "Hello! {name} here, please send {n} {item} to {city}{due}.",
    "My name is {name} and I need {n} {item} delivered to {city}{due}.",
    "Please ship {n} {item} to {name} in {city}{due}.",
    "{name} from {city} called and wants {n} {item}{due}.",
    "Can you get {n} {item} to my place in {city}{due}? Thanks, {name}",
    "Order for {name}: {n} {item}, delivery to {city}{due}.",
    "I'd like to order {n} {item}{due}. I live in {city}. Best wishes, {name}",
    "We are out of stock in {city}, so send us {n} {item}{due}. Regards, {name}",
    "Put me down for {n} {item}{due}. {name}, {city}.",
    "{city} office here. {n} {item} for {name}{due}, please!",
    "Good morning, could {name} have {n} {item} sent to {city}{due}?",
    "{n} {item} for {city}{due}, ordered by {name}.",
    "It's {name} again. Another {n} {item} for the shop in {city}{due}.",
)
HELDOUT_TEMPLATES = (
    "Dear team, {name} would love {n} {item}{due}. The address is in {city}.",
    "Hey, I'm {name}. Could you deliver {n} {item} to {city}{due}?",
    "A customer in {city}, {name}, asked for {n} {item}{due}.",
    "Please reserve {n} {item}{due} for {name}, who lives in {city}.",
    "Sending {n} {item} to {city}{due} would be great. Yours, {name}",
)
DUE_PHRASES = (" by {day}", " before {day}", " on {day}", " for {day}")


def draw(rng: Random, split: Split) -> Example:
    template = pick_template(rng, TEMPLATES, HELDOUT_TEMPLATES, split)
    number = rng.randint(2, 12) if rng.random() < 0.4 else rng.randint(2, 99)
    in_words = number <= 12 and rng.random() < 0.6
    due = rng.choice(WEEKDAYS) if rng.random() < 0.6 else None
    order: dict[str, str | int | None] = {
        "customer": draw_name(rng, split),
        "item": ITEMS.draw(rng, split) + "s",
        "quantity": number,
        "city": CITIES.draw(rng, split),
        "due": due,
    }
    prompt = template.format(
        name=order["customer"],
        city=order["city"],
        item=order["item"],
        n=NUMBER_WORDS[number - 2] if in_words else number,
        due=rng.choice(DUE_PHRASES).format(day=due) if due else "",
    )
    prompt = prompt[0].upper() + prompt[1:]
    return Example(NAME, prompt, json.dumps(order, ensure_ascii=False), order)


def is_correct(example: Example, text: str) -> bool:
    """Strict: nothing but one JSON object, with exactly these keys, values and types."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return answer == dict(example.check) and type(answer["quantity"]) is int


TASK = Task(NAME, INSTRUCTION, draw, is_correct)
