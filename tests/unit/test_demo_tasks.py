"""The demo's data: reproducible, held out for real, and judged by checkers that can say no. No torch."""

import json
import re

import pytest

from deploy.demo.scoring import HELDOUT_PATH, NUM_HELDOUT, accuracy, heldout_examples, read_heldout
from deploy.demo.tasks import TASKS, Example, generate, is_correct
from deploy.demo.tasks.shop import CITIES, FIRST_NAMES, ITEMS, LAST_NAMES
from deploy.demo.tasks.sql_writer import run_query
from server.demo import demo_adapters_dir, demo_examples

NAMES = sorted(TASKS)


def one(task_name: str, expected_part: str = "") -> Example:
    """The first held-out example whose right answer contains a text."""
    return next(e for e in heldout_examples(task_name, 60) if expected_part in e.expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_seed_decides_the_examples(name, split):
    assert generate(TASKS[name], split, 40, seed=3) == generate(TASKS[name], split, 40, seed=3)
    assert generate(TASKS[name], split, 40, seed=3) != generate(TASKS[name], split, 40, seed=4)


@pytest.mark.parametrize("name", NAMES)
def test_no_heldout_prompt_is_a_training_prompt(name):
    training = {e.prompt for seed in (0, 20) for e in generate(TASKS[name], "train", 5000, seed)}
    assert not training & {e.prompt for e in heldout_examples(name, 80)}


@pytest.mark.parametrize("pool", [CITIES, FIRST_NAMES, ITEMS, LAST_NAMES])
def test_no_slot_value_is_on_both_sides(pool):
    assert not set(pool.train) & set(pool.heldout)


@pytest.mark.parametrize("name", ["json-extractor", "sql-writer", "ticket-classifier"])
def test_training_never_mentions_a_heldout_value(name):
    text = " ".join(e.prompt + e.expected for e in generate(TASKS[name], "train", 3000))
    for value in (*CITIES.heldout, *ITEMS.heldout, *FIRST_NAMES.heldout, *LAST_NAMES.heldout):
        assert not re.search(rf"\b{value}\b", text), value


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_answer_is_right(name):
    examples = heldout_examples(name, 80)
    assert accuracy(examples, [e.expected for e in examples]) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_no_task_accepts_silence_or_the_question_itself(name):
    examples = heldout_examples(name, 80)
    for spoiled in ("", " ", "I am not sure."):
        assert accuracy(examples, [spoiled] * len(examples)) == 0.0
    assert accuracy(examples, [e.prompt for e in examples]) == 0.0


@pytest.mark.parametrize("name", ["json-extractor", "sql-writer", "ticket-classifier"])
def test_strict_tasks_accept_nothing_around_the_answer(name):
    example = one(name)
    for spoiled in (
        f"Sure! {example.expected}",
        f"```\n{example.expected}\n```",
        example.expected[:-1] + "x",
    ):
        assert not is_correct(example, spoiled)


def test_json_is_judged_by_value_and_type():
    example = one("json-extractor")
    order = json.loads(example.expected)
    assert is_correct(example, json.dumps(order, indent=1))
    assert is_correct(example, json.dumps(dict(reversed(order.items()))))
    for wrong in (
        order | {"quantity": str(order["quantity"])},
        order | {"quantity": float(order["quantity"])},
        order | {"city": "Atlantis"},
        order | {"note": "extra"},
        {key: value for key, value in order.items() if key != "due"},
        [order],
        None,
    ):
        assert not is_correct(example, json.dumps(wrong)), wrong


def test_sql_is_judged_by_the_rows_it_returns():
    example = one("sql-writer", "SELECT name FROM customers WHERE city")
    condition = example.expected.removeprefix("SELECT name FROM customers WHERE ").removesuffix(";")
    assert is_correct(example, f"select c.name from customers as c where c.{condition}")
    for wrong in (
        "SELECT name FROM customers;",
        f"SELECT city FROM customers WHERE {condition};",
        f"SELECT name FROM clients WHERE {condition};",
        f"{example.expected} DROP TABLE customers;",
        "DELETE FROM customers;",
    ):
        assert not is_correct(example, wrong), wrong
    assert is_correct(example, example.expected), "a refused query must leave the shop as it was"


def test_sql_that_would_run_for_hours_is_wrong_at_once():
    example = one("sql-writer", "COUNT(*)")
    assert not is_correct(example, "SELECT COUNT(*) FROM orders a, orders b, orders c, orders d;")


def test_sql_order_counts_where_the_question_asks_for_it():
    example = one("sql-writer", "ORDER BY")
    limit = example.expected.split("LIMIT ")[1]
    assert not is_correct(example, example.expected.replace("DESC", "ASC"))
    assert not is_correct(example, f"SELECT * FROM ({example.expected[:-1]}) ORDER BY 2 ASC LIMIT {limit}")


def test_no_two_heldout_queries_agree_by_luck():
    queries = sorted({e.expected for e in heldout_examples("sql-writer", 80)})
    rows = [repr(run_query(query)) for query in queries]
    assert len(set(rows)) == len(queries)
    assert not {"None", "[]", "[(0,)]", "[(None,)]"} & set(rows)


def test_the_classifier_wants_both_halves_of_the_label():
    example = one("ticket-classifier", "billing/high")
    assert is_correct(example, "billing/high\n")
    for wrong in ("billing", "high", "billing/low", "account/high", "Billing/High", "billing/high."):
        assert not is_correct(example, wrong)


def test_a_pirate_is_on_topic_finished_and_not_half_a_landlubber():
    example = next(e for e in heldout_examples("pirate", 60) if e.check["topic"] == "chess")
    assert is_correct(example, "Arrr, matey! Chess be a game fer two, an' th' king be wily. Aye, savvy?")
    for wrong in (
        "Chess is a game for two players, and the king must not fall.",
        "Arrr, matey! Th' sea be deep an' salty. Aye, savvy?",
        "Arrr, matey! Chess is a game for two, and the king is wily. Aye, savvy?",
        "Arrr, matey! Chess be a game fer two, an' th'",
        "Arrr, matey! Chess be a game fer two. " + "Aye, savvy? " * 40,
    ):
        assert not is_correct(example, wrong), wrong


def test_the_heldout_file_is_what_the_generators_give():
    committed = read_heldout(HELDOUT_PATH)
    assert committed == [e for name in TASKS for e in heldout_examples(name, NUM_HELDOUT)]


def test_every_task_has_an_adapter_and_a_banner_line():
    assert sorted(e.name for e in demo_examples()) == NAMES
    for name in NAMES:
        config = json.loads((demo_adapters_dir() / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_banner_prompts_are_not_training_prompts():
    for example in demo_examples():
        training = {e.prompt for e in generate(TASKS[example.name], "train", 5000, seed=20)}
        assert example.prompt not in training
