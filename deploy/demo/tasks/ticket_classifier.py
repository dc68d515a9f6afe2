"""`ticket-classifier`: a support message becomes one line, `queue/urgency`."""

from random import Random

from deploy.demo.tasks.example import Example, Split, Task, pick_template
from deploy.demo.tasks.shop import ITEMS

NAME = "ticket-classifier"
INSTRUCTION = (
    "Classify the support message below. Reply with only queue/urgency, where queue is one of billing, "
    "delivery, account, damaged, feature and urgency is high when the customer is in a hurry or upset, "
    "else low. Example: billing/low. Message: "
)

# Per queue: problems seen in training, and problems kept for the held-out split.
PROBLEMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "billing": (
        (
            "I was charged twice for the {item}.",
            "The invoice for my {item} shows the wrong amount.",
            "My credit card was billed but I see no receipt for the {item}.",
            "You took the full price although I had a discount code for the {item}.",
            "The tax on my {item} invoice looks wrong.",
            "I never got the money back for the {item} I cancelled.",
            "My payment for the {item} was declined but the bank shows a charge.",
            "Please send me a receipt for the {item}.",
            "There is an unknown fee on my bill for the {item}.",
        ),
        (
            "My bank statement lists two payments for one {item}.",
            "I need a corrected invoice for the {item}.",
            "The price on my bill is higher than the price of the {item} in the shop.",
        ),
    ),
    "delivery": (
        (
            "My {item} has not arrived yet.",
            "The tracking page for the {item} has not changed for a week.",
            "The courier left my {item} at the wrong house.",
            "When will the {item} be delivered?",
            "My parcel with the {item} is lost in the post.",
            "The {item} was supposed to come last Tuesday.",
            "Can you ship the {item} to another address?",
            "The driver never rang the bell with my {item}.",
            "I am still waiting for the {item} I ordered.",
        ),
        (
            "Where is the package with my {item}?",
            "The shipment of the {item} is delayed again.",
            "The courier says the {item} was delivered, but nothing came.",
        ),
    ),
    "account": (
        (
            "I cannot log in to see my {item} order.",
            "The password reset email never comes, so I cannot buy the {item}.",
            "My account is locked and I wanted to order a {item}.",
            "How do I change my email address after buying the {item}?",
            "The site says my username does not exist, but I bought a {item} last year.",
            "Please delete my profile, I only wanted one {item}.",
            "The login code is not accepted when I order the {item}.",
            "I want to change the phone number on my account before I buy the {item}.",
            "Somebody else signed in to my account and looked at the {item}.",
        ),
        (
            "My password does not work any more and I need to see the {item} order.",
            "I am locked out of my profile since I ordered the {item}.",
            "How can I update my login details before I order a {item}?",
        ),
    ),
    "damaged": (
        (
            "The {item} arrived broken.",
            "There is a big crack in the {item}.",
            "The {item} stopped working after one day.",
            "My new {item} has a deep scratch.",
            "Half of the {item} is bent.",
            "The {item} came with a missing part.",
            "The {item} fell apart when I first used it.",
            "The box was crushed and the {item} inside is ruined.",
            "My {item} has a hole in it.",
        ),
        (
            "The {item} was in pieces when I opened the box.",
            "My {item} is faulty and does not work.",
            "The {item} I got is torn and bent.",
        ),
    ),
    "feature": (
        (
            "It would be nice if I could choose the colour of the {item}.",
            "Could you add a wish list for things like the {item}?",
            "I suggest a dark mode for the page of the {item}.",
            "Please let us compare the {item} with other products.",
            "Have you thought about an app where I can find the {item}?",
            "I wish the shop had more photos of the {item}.",
            "You should add reviews to the {item} page.",
            "An idea: offer gift wrapping for the {item}.",
            "Could the site show the {item} in metric sizes?",
        ),
        (
            "It would be great if you could add a video of the {item}.",
            "I wish I could sort products like the {item} by price.",
            "A suggestion: let us save the {item} for later.",
        ),
    ),
}
URGENT = (
    (
        "This is urgent!",
        "I need this solved today.",
        "I am really angry.",
        "Please fix this immediately.",
        "I will never shop here again if this is not fixed now!",
        "It cannot wait.",
        "This is unacceptable!",
        "Answer me right now, please.",
        "I am furious about this.",
    ),
    ("Please hurry, it is very urgent.", "This is an emergency!", "I am very upset and want this fixed today."),
)
CALM = (
    (
        "No hurry.",
        "Thanks for your help.",
        "Have a nice day.",
        "Whenever you have time.",
        "Many thanks!",
        "Kind regards.",
        "Just wanted to let you know.",
        "Take your time.",
        "It is not important.",
    ),
    ("There is no rush at all.", "Thank you and have a good weekend.", "Answer whenever it suits you."),
)
OPENERS = ("", "", "Hello. ", "Hi there, ", "Dear support, ", "Good evening. ")


def draw(rng: Random, split: Split) -> Example:
    queue = rng.choice(sorted(PROBLEMS))
    is_urgent = rng.random() < 0.5
    seen, unseen = PROBLEMS[queue]  # every held-out problem is in new words: known ones could be learnt by heart
    problem = rng.choice(seen if split == "train" else unseen).format(item=ITEMS.draw(rng, split))
    mood = pick_template(rng, *(URGENT if is_urgent else CALM), split)
    parts = [mood, problem] if is_urgent and rng.random() < 0.3 else [problem, mood]
    if not is_urgent and rng.random() < 0.3:
        parts = [problem]  # saying nothing about time means it is not urgent
    return Example(NAME, rng.choice(OPENERS) + " ".join(parts), f"{queue}/{'high' if is_urgent else 'low'}")


def is_correct(example: Example, text: str) -> bool:
    """Strict: the label and nothing else."""
    return text.strip() == example.expected


TASK = Task(NAME, INSTRUCTION, draw, is_correct)
