"""Writes `corpus.jsonl`: about 200 KB of text of our own, for tests. Its output is committed; golden losses rest on it.

Workshop journals drawn from a small grammar: enough structure to learn something of in twenty steps.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

PEOPLE = [
    "Ada",
    "Bruno",
    "Chandra",
    "Dilek",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kaya",
    "Lotte",
    "Mina",
    "Noor",
    "Oskar",
    "Petra",
]
TOOLS = [
    "the caliper",
    "the lathe",
    "the old balance",
    "a brass gauge",
    "the spirit level",
    "the second vernier",
    "a steel rule",
]
PARTS = ["the shaft", "a bearing", "the left plate", "the cover", "a ring of copper", "the worm gear", "the spring"]
PLACES = ["by the north window", "in the cellar", "at the long bench", "behind the furnace", "next to the door"]
WHEN = ["in the morning", "before noon", "after the rain", "late in the evening", "on the way home", "at first light"]
VERBS = ["measured", "turned", "weighed", "filed", "polished", "marked", "fitted", "cooled", "compared"]
RESULTS = [
    "it was {n} hundredths too wide",
    "the two readings agreed to {n} parts in ten thousand",
    "the error was smaller than the line on the scale",
    "nobody could repeat the figure of {n} from the day before",
    "the difference of both was steadier than either of them",
    "the needle stood at {n} and stayed there",
]
THOUGHTS = [
    "A single reading says little; a pair of readings on the same piece says what has changed.",
    "What moves both scales alike drops out when one is taken from the other.",
    "{p} wrote the number down before the light went.",
    "They agreed to look once more, and to say beforehand what would count as a change.",
    "{p} asked how small a change the bench could show at all, and {q} worked it out on the wall.",
    "If the piece is warm, {p} said, then both ends are warm, and the difference does not know it.",
]


def sentence(draw: random.Random) -> str:
    p, q = draw.sample(PEOPLE, 2)
    number = draw.randint(2, 97)
    if draw.random() < 0.25:
        # The number keeps journals from sharing long runs of words, which would make one family of them all.
        return f"Note {number} to {draw.randint(100, 999)}: " + draw.choice(THOUGHTS).format(p=p, q=q)
    start = f"{draw.choice(WHEN).capitalize()} {p} {draw.choice(VERBS)} {draw.choice(PARTS)} with {draw.choice(TOOLS)}"
    if draw.random() < 0.4:
        start += f" {draw.choice(PLACES)}"
    joint = draw.choice([", and ", "; ", ", but ", " until "])
    return f"{start}{joint}{draw.choice(RESULTS).format(n=number)}."


def journal(draw: random.Random, number: int) -> str:
    lines = [f"Journal {number}, kept by {draw.choice(PEOPLE)}"]
    for day in range(draw.randint(2, 7)):
        lines.append(f"Day {day + 1}. " + " ".join(sentence(draw) for _ in range(draw.randint(2, 6))))
    return "\n".join(lines) + "\n"


def main() -> None:
    draw = random.Random(20)
    with open(Path(__file__).with_name("corpus.jsonl"), "w", encoding="utf-8") as file:
        for number in range(1, 121):
            file.write(json.dumps({"text": journal(draw, number)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
