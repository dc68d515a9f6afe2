"""`pirate`: any question gets a short answer in pirate speech.

The training answers are plain English facts put through `to_pirate`, so the adapter learns a way of talking
on top of what the base knows; the held-out prompts are about topics that training never mentions.
"""

import re
from random import Random

from deploy.demo.tasks.example import Example, Split, Task, words
from deploy.demo.tasks.pirate_facts import CAPITALS, FEELINGS, HOW_TO, THINGS

NAME = "pirate"
INSTRUCTION = "Talk like a pirate. Answer in one or two short sentences. "

# Whole words, in this order; the speech of an answer is decided here and nowhere else.
LEXICON = (
    ("you are", "ye be"), ("they are", "they be"), ("it is", "it be"), ("is", "be"), ("are", "be"),
    ("you", "ye"), ("your", "yer"), ("my", "me"), ("friend", "matey"), ("and", "an'"), ("of", "o'"),
    ("the", "th'"), ("to", "t'"), ("for", "fer"), ("with", "wi'"), ("money", "doubloons"), ("yes", "aye"),
    ("water", "grog"), ("small", "wee"),
)  # fmt: skip
OPENERS = ("Arrr, matey!", "Ahoy, matey!", "Avast, landlubber!", "Shiver me timbers!")
CLOSERS = ("Aye, savvy?", "Yo ho, ye scallywag!", "Aye, by th' Kraken!")
MARKERS = frozenset(  # without "be" and "me", which plain English has too
    words(
        "arrr ahoy matey avast landlubber shiver timbers yo ho savvy scallywag aye kraken ye yer an' o' th' t' "
        "fer wi' doubloons grog wee"
    )
)
PLAIN = frozenset(words("is are you your my friend and of the to for with"))  # what a pirate never says
MIN_MARKERS = 4
MAX_PLAIN = 1
MAX_WORDS = 60


def to_pirate(plain: str, rng: Random) -> str:
    """Plain English in pirate speech, between an opener and a closer."""
    for word, pirate in LEXICON:
        plain = re.sub(rf"\b{word}\b", pirate, plain)
        plain = re.sub(rf"\b{word.capitalize()}\b", pirate.capitalize(), plain)
    return f"{rng.choice(OPENERS)} {plain} {rng.choice(CLOSERS)}"


def draw(rng: Random, split: Split) -> Example:
    """A question about a capital, a thing, a task or a feeling; `topic` is what the answer must mention."""
    kind = rng.choice(("capital", "thing", "thing", "how", "how", "feeling"))
    if kind == "capital":
        country = rng.choice(sorted(CAPITALS[split]))
        city = CAPITALS[split][country]
        question = rng.choice(
            ("What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.")
        ).format(country)
        return _example(rng, question, f"The capital of {country} is {city}.", city)
    if kind == "thing":
        thing = rng.choice(sorted(THINGS[split]))
        question = rng.choice(("Tell me about {}.", "What do you know about {}?", "What can you say about {}?"))
        return _example(rng, question.format(thing), THINGS[split][thing], thing)
    if kind == "how":
        task = rng.choice(sorted(HOW_TO[split]))
        question = rng.choice(("How do I {}?", "What is the best way to {}?", "Can you teach me to {}?"))
        topic, answer = HOW_TO[split][task]
        return _example(rng, question.format(task), answer, topic)
    feeling = rng.choice(sorted(FEELINGS[split]))
    question = rng.choice(("I am {} today.", "I feel {}.", "My friend is {}. What should I say?"))
    return _example(rng, question.format(feeling), FEELINGS[split][feeling], feeling)


def _example(rng: Random, question: str, answer: str, topic: str) -> Example:
    return Example(NAME, question, to_pirate(answer, rng), {"topic": topic.removeprefix("the ")})


def is_correct(example: Example, text: str) -> bool:
    """Pirate words and hardly a plain one, the topic named, a finished answer, and not an endless one."""
    spoken = re.findall(r"[a-z]+'?", text.lower())
    topic = str(example.check["topic"]).lower().removesuffix("s")
    return (
        len(MARKERS & set(spoken)) >= MIN_MARKERS
        and sum(word in PLAIN for word in spoken) <= MAX_PLAIN
        and topic in text.lower()
        and len(spoken) <= MAX_WORDS
        and text.rstrip()[-1:] in ("!", "?", ".")
    )


TASK = Task(NAME, INSTRUCTION, draw, is_correct)
