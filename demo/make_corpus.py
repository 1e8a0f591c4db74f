"""Writes the demo corpus: short documents drawn from a small English grammar.

The text is synthetic so that a tiny model can learn it, and so that what the model has to compute is known. To predict
the next token well it must

* make a verb agree with the head of its subject, not with a nearer noun ("the keys near the old mill are ..."),
* remember who owns, keeps, likes or said what, choose pronouns to match, and follow things as they change hands,
* do small arithmetic (sums, differences, products, running balances),
* keep track of open quotations, one inside another at times, and of who is speaking,
* answer questions from what the same document said earlier.

A document depends only on `(seed, index)`, so the same arguments always give the same bytes, and two seeds give two
independent corpora: the model is trained on other seeds than the one evaluated here.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------- lexicon


def words(text: str) -> list[str]:
    """The lexicon is written as plain text: it is easier to read, and to add to, than quoted lists."""
    return text.split()


@dataclass(frozen=True, eq=False)
class Sort:
    """A semantic class of nouns: what its members do, how they can be, and the pronouns of their relative clauses."""

    nouns: list[str]
    acts: list[str]
    states: list[str]
    subject_relative: str = "that"
    object_relative: str = "that"


TRADES = words("baker farmer weaver sailor painter miller doctor singer guard tailor potter fisher hunter")
HERD = words("dog goose cat horse hen pony donkey goat duck rabbit")
WILD = words("fox mouse crow owl wolf bear snake")

PERSON = Sort(
    [*TRADES, "child", "woman", "man"],
    words("wait sing work rest laugh whisper dance"),
    words("tired busy happy late hungry kind proud quiet"),
    "who",
    "whom",
)
ANIMAL = Sort(
    HERD + WILD,
    words("sleep wait hide rest run eat"),
    words("hungry asleep thin quiet wild tame young"),
)
THING = Sort(
    words(
        """kettle lamp key knife basket rope clock bell brush coat box cup shelf ladder drum map chair wheel letter book
        bottle spoon flute boat blanket barrel candle mirror hammer hat"""
    ),
    words("lie stand lean gleam rest"),
    words("broken dusty heavy wet new cheap missing clean strange"),
)
PLACE = Sort(words("mill garden bridge school market harbour church library stable tower well inn gate"), [], [])

TRANSITIVE = {
    (PERSON, THING): words("carry mend polish want hide paint sell clean need"),
    (PERSON, ANIMAL): words("feed brush love chase call"),
    (PERSON, PERSON): words("know help visit thank teach"),
    (ANIMAL, PERSON): words("follow watch fear trust"),
    (ANIMAL, ANIMAL): words("chase follow watch fear"),
}
ADJECTIVES = words("old small large red green blue brass silver wooden plain striped yellow")
FOODS = words("plums pears figs honey soup cheese walnuts bread cherries beans")
WAYS = ["by boat", "on foot", "by cart", "on a mule", "by train"]
NEAR = words("near behind beside by")
ADVERBS = words("often never always still seldom")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ORDINALS = words("first second third fourth fifth sixth seventh")
NAMES = {
    ("she", "her"): words("Ada Mara Lena Nora Ruth Ivy Clara Hanna Rosa Edith Petra Wilma"),
    ("he", "him"): words("Tom Hugo Otto Felix Jonas Karl Ben Oscar Simon Anton Emil Viktor"),
}

IRREGULAR_S = {"child": "children", "woman": "women", "man": "men", "goose": "geese", "knife": "knives",
               "mouse": "mice", "wolf": "wolves", "shelf": "shelves", "have": "has"}  # fmt: skip
IRREGULAR_PAST = {"sing": "sang", "sleep": "slept", "hide": "hid", "run": "ran", "eat": "ate", "lie": "lay",
                  "stand": "stood", "sell": "sold", "feed": "fed", "know": "knew", "have": "had", "keep": "kept",
                  "wake": "woke", "find": "found", "buy": "bought", "lose": "lost", "teach": "taught",
                  "travel": "travelled"}  # fmt: skip
IRREGULAR_ING = {"lie": "lying", "run": "running"}

# -------------------------------------------------------------------------------------------------------- morphology


def with_s(word: str) -> str:
    """The plural of a noun, or the third person singular of a verb: English spells both the same way."""
    *before, last = word.split(" ")
    if last in IRREGULAR_S:
        last = IRREGULAR_S[last]
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "es" if re.search(r"(s|x|ch|sh)$", last) else "s"
    return " ".join([*before, last])


def conjugate(verb: str, plural: bool, past: bool) -> str:
    """`verb` (its first word; a particle may follow) in agreement with its subject; "I" and "you" count as plural."""
    head, *particle = verb.split(" ")
    if head == "be":
        head = ("were" if plural else "was") if past else ("are" if plural else "is")
    elif past:
        regular = re.sub(r"([^aeiou])y$", r"\1ie", head)
        head = IRREGULAR_PAST.get(head) or regular + ("d" if regular.endswith("e") else "ed")
    elif not plural:
        head = with_s(head)
    return " ".join([head, *particle])


def with_ing(verb: str) -> str:
    return IRREGULAR_ING.get(verb) or re.sub(r"e$", "", verb) + "ing"


def a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def series(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(*clauses: str) -> str:
    return capital(" ".join(clauses)) + "."


# --------------------------------------------------------------------------------------------------- people and facts


class Person(NamedTuple):
    name: str
    they: str
    them: str


class Fact(NamedTuple):
    """Something true of a person all through a document: one record gives the statement, the questions, the answers."""

    who: Person
    verb: str
    what: str
    ask: str

    def told(self, subject: str, past: bool = False) -> str:
        return f"{subject} {conjugate(self.verb, plural=subject in ('I', 'you'), past=past)} {self.what}"

    def question(self, subject: str) -> str:
        return f"{self.ask} {'do' if subject == 'you' else 'does'} {subject} {self.verb}?"


class Phrase(NamedTuple):
    """A noun phrase and the number its verb must agree with."""

    text: str
    plural: bool


class Writer:
    """One document in the making: its random source, its cast, the words it has used up, and whom it is speaking of."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: set[object] = set()
        self.recent: deque[object] = deque(maxlen=6)
        self.topic: Person | None = None
        self.pick = rng.choice

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def fresh(self, options: Sequence[T]) -> T:
        """A word no fact of this document uses yet, so that what is said of it later can mean only one thing."""
        word = self.pick([word for word in options if word not in self.used])
        self.used.add(word)
        return word

    def vary(self, options: Sequence[T]) -> T:
        """A word the last few phrases did without, if there is one."""
        word = self.pick([word for word in options if word not in self.recent] or options)
        self.recent.append(word)
        return word

    # Sentences about the world: agreement over distance.

    def where(self) -> str:
        return f"{self.pick(NEAR)} the {self.fresh(PLACE.nouns)}"

    def noun_phrase(self, sort: Sort, depth: int, past: bool) -> Phrase:
        """A noun phrase; with `depth` left it may carry a modifier, whose own nouns then part head and verb."""
        plural, special = self.chance(0.5), self.chance(0.25) and sort is not PLACE
        noun = self.vary([noun for noun in sort.nouns if noun not in self.used])
        adjective = self.pick(ADJECTIVES if sort is THING else ADJECTIVES[:3]) + " " if self.chance(0.3) else ""
        if special and not plural:
            wholes = ["one of the", "each of the"] + ["the pile of", "the row of"] * (sort is THING)
            text = f"{self.pick(wholes)} {adjective}{with_s(noun)}"
        elif special:
            text = f"{self.pick(['some', 'most', 'these', 'two', 'many'])} {adjective}{with_s(noun)}"
        else:
            phrase = adjective + (with_s(noun) if plural else noun)
            text = a(phrase) if not plural and sort is not PLACE and self.chance(0.2) else f"the {phrase}"
        if depth > 0 and self.chance(0.75):
            text += " " + self.modifier(sort, plural, depth - 1, past)
        return Phrase(text, plural)

    def modifier(self, sort: Sort, plural: bool, depth: int, past: bool) -> str:
        """What may follow a head noun: a prepositional phrase, a subject relative or an object relative."""
        agents = [agent for agent, patient in TRANSITIVE if patient is sort]
        shape = self.pick(["place", "does"] + ["undergoes"] * bool(agents))
        if shape == "place" or sort is PLACE:
            return f"{self.pick(NEAR)} {self.noun_phrase(self.pick([THING, PLACE]), depth, past).text}"
        if shape == "does":
            return f"{sort.subject_relative} {self.predicate(sort, plural, past, relative=True)}"
        agent = self.pick(agents)
        subject = self.noun_phrase(agent, 0, past)
        verb = conjugate(self.vary(TRANSITIVE[agent, sort]), subject.plural, past)
        return f"{sort.object_relative} {subject.text} {verb}"

    def predicate(self, sort: Sort, plural: bool, past: bool, relative: bool = False) -> str:
        """What a subject is or does; a relative clause leaves the place where it acts to the main clause."""
        patients = [patient for agent, patient in TRANSITIVE if agent is sort]
        shape = self.pick(["state"] + ["act", "acting"] * (not relative) + ["affects"] * bool(patients))
        adverb = self.pick(ADVERBS) + " " if self.chance(0.15) else ""
        if shape == "state":
            verb = self.pick(["be", "be", "look", "seem"])
            return f"{conjugate(verb, plural, past)} {self.vary(sort.states)}"
        if shape == "affects":
            patient = self.pick(patients)
            verb = conjugate(self.vary(TRANSITIVE[sort, patient]), plural, past)
            return f"{adverb}{verb} {self.noun_phrase(patient, 0, past).text}"
        act = self.vary(sort.acts)
        if shape == "act":
            verb = adverb + conjugate(act, plural, past)
        else:
            verb = f"{conjugate('be', plural, past)} {adverb}{with_ing(act)}"
        return f"{verb} {self.pick(NEAR)} {self.noun_phrase(PLACE, 0, past).text}"

    def clause(self, past: bool, depth: int = 2) -> str:
        sort = self.pick([PERSON, ANIMAL, THING, THING])
        subject = self.noun_phrase(sort, depth, past)
        return f"{subject.text} {self.predicate(sort, subject.plural, past)}"

    def remark(self, past: bool) -> str:
        """A sentence about the surroundings: one clause, or two joined."""
        self.topic = None
        if self.chance(0.75):
            return sentence(self.clause(past))
        return sentence(f"{self.clause(past, depth=1)}, {self.pick(['and', 'but'])} {self.clause(past, depth=1)}")

    # Sentences about the cast: memory, pronouns, possession.

    def cast(self, size: int) -> list[Person]:
        people = [Person(name, *pronouns) for pronouns, names in NAMES.items() for name in names]
        chosen = self.rng.sample(people, size)
        self.used.update(person.name for person in chosen)
        return chosen

    def name(self, person: Person) -> str:
        """A pronoun if the last subject was the same person, else (and now and then anyway) the name."""
        again, self.topic = self.topic is person, person
        return person.they if again and self.chance(0.75) else person.name

    def speaker(self, person: Person, other: Person) -> str:
        """How to name the one of two who speaks: by a pronoun only where it can mean nobody else."""
        return self.pick([person.name, person.they if person.they != other.they else person.name])

    def facts(self, person: Person, count: int) -> list[Fact]:
        """`count` facts of different types about a person; no two people in a document share a detail."""
        animals = with_s(self.fresh(HERD))
        return [
            Fact(person, *rest)
            for rest in self.rng.sample(
                [
                    ("own", a(self.item()), "What"),
                    ("live", self.where(), "Where"),
                    ("keep", f"{self.rng.randint(2, 20)} {animals}", f"How many {animals}"),
                    ("work as", a(self.fresh(TRADES)), "What"),
                    ("like", self.fresh(FOODS), "What"),
                    ("wake", f"at {self.fresh(range(4, 12))}", "When"),
                    ("travel", self.fresh(WAYS), "How"),
                    ("trust", self.fresh([name for names in NAMES.values() for name in names]), "Whom"),
                    ("fear", with_s(self.fresh(ANIMAL.nouns)), "What"),
                ],
                count,
            )
        ]

    def item(self) -> str:
        return f"{self.pick(ADJECTIVES)} {self.fresh(THING.nouns)}"

    def profile(self, facts: Sequence[Fact], past: bool, aside: float = 0.0) -> list[str]:
        """The facts as sentences, some of them two to a sentence, with a remark after each with probability `aside`."""
        facts, sentences = list(facts), []
        while facts:
            fact = facts.pop(0)
            text = fact.told(self.name(fact.who), past)
            if facts and facts[0].who is fact.who and self.chance(0.5):
                text += " and" + facts.pop(0).told("", past)
            sentences.append(sentence(text))
            if self.chance(aside):
                sentences.append(self.remark(past))
        return sentences

    def quote(self, speech: str, speaker: str, more: str = "", reply: bool = False) -> str:
        """Speech with its attribution before or after; `speech` and `more` are sentences with their end marks."""
        verb = "asked" if speech.endswith("?") else self.pick(["said", "replied", "answered"]) if reply else "said"
        if self.chance(0.35):
            return f"{capital(speaker)} {verb}, “{capital(f'{speech} {more}'.strip())}”"
        inverted = speaker[0].isupper() and self.chance(0.7)
        tag = f"{verb} {speaker}" if inverted else f"{speaker} {verb}"
        spoken = capital(re.sub(r"[.](’?)$", r",\1", speech))
        return f"“{spoken}” {tag}." + (f" “{capital(more)}”" if more else "")

    def report(self, fact: Fact) -> str:
        """A quotation inside a speech: what `fact.who` is said to have said."""
        return f"{fact.who.name} told me, ‘{sentence(fact.told('I'))}’"

    # Sentences with numbers.

    def equation(self) -> tuple[str, int]:
        """An expression and its value; values stay below 100, so that a small model can master them."""
        sign, x, y = self.pick("++--x"), self.rng.randint(2, 40), self.rng.randint(2, 30)
        if sign == "x":
            x, y = self.rng.randint(2, 9), self.rng.randint(2, 9)
        x, y = max(x, y), min(x, y)
        value = {"+": x + y, "-": x - y, "x": x * y}[sign]
        return f"{x} {sign} {y}", value

    def tally(self, person: Person, past: bool) -> str:
        """A count that grows or shrinks."""
        things = with_s(self.fresh(THING.nouns))
        before, change = self.rng.randint(6, 30), self.rng.randint(2, 5 if self.chance(0.5) else 20)
        grows = self.chance(0.5) or change >= before
        verb = self.pick(["find", "buy"] if grows else ["lose", "sell"])
        after = before + change if grows else before - change
        first, has = self.name(person), conjugate("have", False, past)
        act = f"{conjugate(verb, False, past)} {change} {'more' if grows else 'of them'}"
        return (f"{capital(first)} {has} {before} {things}. "
                f"{capital(person.they)} {act}, so now {person.they} {has} {after} {things}.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- document kinds


TRANSFERS = [
    "{a} gave {x} to {b}{thanks}",
    "{b} borrowed {x} from {a}{thanks}",
    "{a} sold {x} to {b} for {n} coins",
    "{a} left {x} {place}, and {b} found it there",
    "{b} asked for {x}, and {a} handed it over{thanks}",
    "{a} lost {x} in a game with {b}",
]


def story(w: Writer) -> str:
    """Things change hands; the end says who has what."""
    cast = w.cast(w.rng.randint(2, 3))
    facts = [fact for person in cast for fact in w.facts(person, w.rng.randint(1, 2))]
    holder = {w.item(): person for person in cast}
    opening: list[str] = []
    for item, person in holder.items():
        opening += w.profile([fact for fact in facts if fact.who is person], past=True)
        opening.append(sentence(w.name(person), "had", a(item)))
    middle: list[str] = []
    times = ["then", "later", "after that", "the next day", "in the evening", "before dark"]
    extras = ["remark", "boast", "question", "tally"]
    steps = w.rng.randint(2, 4)
    for time, event, extra in zip(*(w.rng.sample(pool, steps) for pool in (times, TRANSFERS, extras)), strict=True):
        item = w.pick(list(holder))
        giver, taker = holder[item], w.pick([person for person in cast if person is not holder[item]])
        holder[item], w.topic = taker, None
        details = {"x": f"the {item}", "n": w.rng.randint(2, 30), "place": f"near the {w.pick(PLACE.nouns)}"}
        thanks = f", and {taker.they} thanked {giver.them}" if giver.they != taker.they and w.chance(0.6) else ""
        text = event.format(a=giver.name, b=taker.name, thanks=thanks, **details)
        middle.append(sentence(f"{time}, {text}"))
        if extra == "boast":
            middle.append(w.quote(f"Now I have the {item}.", taker.name))
        elif extra == "question":
            asker, other = w.rng.sample(cast, 2)
            answer = "I have it." if taker is other else "You have it." if taker is asker else f"{taker.name} has it."
            middle.append(w.quote(f"Who has the {item}?", asker.name))
            middle.append(w.quote(answer, w.speaker(other, asker), reply=True))
        else:
            middle.append(w.remark(past=True) if extra == "remark" else w.tally(w.pick(cast), past=True))
    ends = []
    for person in cast:
        items = [f"the {item}" for item, owner in holder.items() if owner is person]
        ends.append(f"{person.name} had {series(items) if items else 'none of these'}")
    still = w.pick(facts)
    ending = [sentence(f"in the end, {series(ends)}"), sentence(still.told(f"{still.who.name} still", past=True))]
    return "\n\n".join(" ".join(part) for part in (opening, middle, ending))


def dialogue(w: Writer) -> str:
    """Two people ask, answer, and come back to what was said."""
    first, second, absent = cast = w.cast(3)
    known = [fact for person in cast for fact in w.facts(person, 3)]
    w.rng.shuffle(known)
    said: list[tuple[Person, Fact]] = []
    lines = [sentence(f"{first.name} met {second.name} {w.where()} on {w.pick(DAYS)}")]
    for fact in known[: w.rng.randint(4, 7)]:
        asker, other = (second, first) if fact.who is first else (first, second)
        if fact.who is absent:
            asker, other = w.rng.sample([first, second], 2)
            reply = w.report(fact) if w.chance(0.5) else sentence(fact.told(absent.they))
            question = fact.question(absent.name)
        else:
            question, reply = fact.question("you"), sentence(fact.told("I"))
        aside = sentence(w.clause(past=False, depth=1)) if w.chance(0.3) else ""
        lines.append(w.quote(question, asker.name))
        lines.append(w.quote(reply, w.speaker(other, asker), aside, reply=True))
        said.append((other, fact))
    w.rng.shuffle(said)
    for speaker, fact in said[: w.rng.randint(1, 3)]:
        hearer = second if speaker is first else first
        subject = "you" if fact.who is speaker else fact.who.name
        lines.append(w.quote(f"So {fact.told(subject)}.", hearer.name, w.pick(["I will remember that.", ""])))
        agreed = w.pick(["Yes, that is right.", "That is what I said.", "So it is."])
        lines.append(w.quote(agreed, w.speaker(speaker, hearer), reply=True))
    return "\n".join(lines)


def quiz(w: Writer) -> str:
    """A passage, then questions it answers."""
    cast = w.cast(w.rng.randint(2, 3))
    facts = [fact for person in cast for fact in w.facts(person, w.rng.randint(2, 3))]
    if w.chance(0.5):
        w.rng.shuffle(facts)
    passage = w.profile(facts, past=False, aside=0.4)
    answers = []
    for fact in w.rng.sample(facts, w.rng.randint(3, len(facts))):
        name = fact.who.name
        rivals = [other for other in facts if other.verb == fact.verb and other is not fact]
        shape = w.pick(["what", "who", "yes"] + ["no"] * len(rivals))
        if shape == "what":
            answers.append((fact.question(name), sentence(w.pick([fact.what, fact.told(fact.who.they)]))))
        elif shape == "who":
            answers.append((f"Who {conjugate(fact.verb, False, False)} {fact.what}?", f"{name}."))
        elif shape == "yes":
            answers.append((f"Does {name} {fact.verb} {fact.what}?", sentence(f"yes, {fact.who.they} does")))
        else:
            rival = w.pick(rivals)
            answers.append((f"Does {name} {fact.verb} {rival.what}?", sentence(f"no, {rival.who.name} does")))
    return "\n".join([" ".join(passage), ""] + [f"Question: {asked}\nAnswer: {answer}" for asked, answer in answers])


def ledger(w: Writer) -> str:
    """Purchases with products, a running balance, and a summary that must match the lines above it."""
    buyer, seller = w.cast(2)
    rows = range(w.rng.randint(3, 5))
    lines = [(with_s(w.fresh(THING.nouns)), w.rng.randint(2, 9), w.rng.randint(2, 9)) for _ in rows]
    costs = [count * price for _, count, price in lines]
    left = start = sum(costs) + w.rng.randint(2, 30)
    text = [f"Accounts of {buyer.name}, {w.pick(DAYS)}", f"Purse: {start} coins"]
    for (things, count, price), cost in zip(lines, costs, strict=True):
        working = f"{count} x {price} = {cost}, {left} - {cost} = {left - cost}"
        text.append(f"- {count} {things} at {price} coins each: {working}")
        left -= cost
    things, count, price = w.pick(lines)
    dearest = max(lines, key=lambda line: line[2])
    summary = [
        f"{buyer.name} bought {series([f'{count} {things}' for things, count, _ in lines])} from {seller.name}.",
        f"{capital(buyer.they)} paid {start - left} coins and kept {left}.",
        w.quote(f"How much were the {things}?", w.pick([buyer.name, seller.name])),
        f"The {things} were {price} coins each, so {buyer.they} paid {count * price} coins for them.",
    ]
    if [price for _, _, price in lines].count(dearest[2]) == 1:
        summary.append(f"Nothing cost more than the {dearest[0]}.")
    return "\n".join(text) + "\n\n" + " ".join(summary)


def lesson(w: Writer) -> str:
    """A class: sums asked and answered, word problems, counting in steps, and pairs that differ only in number."""
    teacher, *pupils = w.cast(3)
    lines = [sentence(f"{teacher.name} taught {w.pick(['a lesson', 'the class', 'the children'])} {w.where()}")]
    for _ in range(w.rng.randint(4, 7)):
        pupil, shape = w.pick(pupils), w.pick(["sum", "sum", "compare", "steps", "tally", "number"])
        expression, value = w.equation()
        if shape == "sum":
            checked = f"{w.pick(['Right', 'Yes', 'Good'])}, {expression} = {value}."
            answer = w.quote(f"It is {value}.", pupil.name, reply=True)
            lines.append(w.quote(f"What is {expression}?", teacher.name) + " " + answer)
            lines.append(w.quote(checked, w.speaker(teacher, pupil)))
        elif shape == "compare":
            other = w.rng.randint(max(2, value - 20), value + 20)
            verdict = f"No, {expression} = {value}, and {value} is not more than {other}."
            if value > other:
                verdict = f"Yes, {expression} = {value}, and {value} is more than {other}."
            lines.append(w.quote(f"Is {expression} more than {other}?", teacher.name))
            lines.append(w.quote(verdict, w.speaker(pupil, teacher), reply=True))
        elif shape == "steps":
            step = w.rng.randint(2, 9)
            counted = series([str(step * k) for k in range(1, w.rng.randint(5, 9))])
            lines.append(w.quote(f"Count in steps of {step}.", teacher.name) + f" {pupil.name} counted {counted}.")
        elif shape == "tally":
            w.topic = None
            lines.append(w.tally(pupil, past=False))
        else:
            sort = w.pick([PERSON, ANIMAL, THING])
            noun, act = w.pick(sort.nouns), w.pick(sort.acts)
            # What modifies a place is always a prepositional phrase, and so fits after any noun of either number.
            middle = w.modifier(PLACE, plural=False, depth=0, past=False)
            place = f"{w.pick(NEAR)} the {w.pick(PLACE.nouns)}"
            singular, plural = (
                f"the {word} {middle} {conjugate(act, many, False)} {place}"
                for word, many in ((noun, False), (with_s(noun), True))
            )
            task = w.pick(["Now say it of many.", "And if there are many?"])
            lines.append(w.quote(sentence(singular), teacher.name, task))
            lines.append(w.quote(sentence(plural), pupil.name, reply=True))
    return "\n".join(lines)


def letter(w: Writer) -> str:
    """First and second person: the writer of the letter answers, reports and asks."""
    sender, reader, friend = cast = w.cast(3)
    own, theirs, others = (w.facts(person, 3) for person in cast)
    gift = w.item()
    body = [f"Thank you for the {gift}."] if w.chance(0.6) else []
    parts: list[Callable[[], str]] = [
        lambda: f"You asked, “{own[0].question('you')}” {sentence(own[0].told('I'))}",
        lambda: sentence(f"{theirs[0].told('you')}, and {own[1].told('I')}"),
        lambda: " ".join(w.profile(others[:2], past=False)),
        lambda: f"Yesterday {friend.name} said, “{sentence(others[2].told('I'))}”",
        lambda: w.tally(friend, past=True),
        lambda: w.remark(past=False),
        lambda: f"{w.remark(past=False)} {sentence('here ' + w.clause(past=False, depth=1))}",
        lambda: f"Someone told me, “{sentence(theirs[1].told(reader.name))}” Is that true?",
    ]
    for part in w.rng.sample(parts, w.rng.randint(4, 7)):
        w.topic = None
        body.append(part())
    if body[0].startswith("Thank"):
        body.append(f"I keep your {gift} {w.where()}.")
    return f"Dear {reader.name},\n\n{' '.join(body)}\n\nYour friend,\n{sender.name}"


def inventory(w: Writer) -> str:
    """A numbered list, then sentences that point back into it."""
    keeper, helper = w.cast(2)
    items = [w.item() for _ in range(w.rng.randint(4, 7))]
    counts = [w.rng.randint(2, 12) for _ in items]
    text = [f"What {keeper.name} keeps {w.where()}:"]
    text += [f"{row}. {count} {with_s(item)}" for row, (count, item) in enumerate(zip(counts, items, strict=True), 1)]
    row, (one, two) = w.rng.randrange(len(items)), w.rng.sample(range(len(items)), 2)
    both = f"{counts[one]} + {counts[two]} = {counts[one] + counts[two]}"
    notes = [
        f"The {ORDINALS[row]} line says {counts[row]} {with_s(items[row])}.",
        f"There are {len(items)} lines in all.",
        f"The {with_s(items[one])} and the {with_s(items[two])} together make {both} things.",
        w.quote(f"How many {with_s(items[two])} are there?", helper.name)
        + " " + w.quote(f"There are {counts[two]}.", w.speaker(keeper, helper), reply=True),
        f"The list begins with the {with_s(items[0])} and ends with the {with_s(items[-1])}.",
        w.remark(past=False),
    ]  # fmt: skip
    return "\n".join(text) + "\n\n" + " ".join(w.rng.sample(notes, w.rng.randint(4, 6)))


def tour(w: Writer) -> str:
    """A walk through a place: mostly agreement, with nouns of the other number in between."""
    guide, guest = w.cast(2)
    facts = w.facts(guide, 3)
    text = [sentence(f"{guide.name} shows {guest.name} the village"), *w.profile(facts, past=False)]
    for _ in range(w.rng.randint(4, 9)):
        shape = w.pick(["remark", "remark", "there", "quote", "both"])
        if shape == "there":
            subject = w.noun_phrase(THING, 2, False)
            if not re.match(r"(the|most|these|each)\b", subject.text):
                text.append(sentence(f"there {conjugate('be', subject.plural, False)} {subject.text}"))
        elif shape == "both":
            one, two = (w.noun_phrase(THING, 0, False).text for _ in range(2))
            text.append(sentence(f"{one} and {two} {w.predicate(THING, True, False)}"))
        elif shape == "quote":
            text.append(w.quote(sentence(w.clause(past=False)), w.pick([guide.name, guest.name])))
        else:
            text.append(w.remark(past=False))
    fact = w.pick(facts)
    text.append(w.quote(fact.question("you"), guest.name))
    text.append(w.quote(sentence(fact.told("I")), guide.name, reply=True))
    return " ".join(text)


KINDS: dict[str, Callable[[Writer], str]] = {
    kind.__name__: kind for kind in (story, dialogue, quiz, ledger, lesson, letter, inventory, tour)
}

# ------------------------------------------------------------------------------------------------------------ corpus


def documents(seed: int) -> Iterator[dict[str, str]]:
    """Endless documents of 60 to 250 words, the kinds in turn; those of other lengths are drawn again."""
    index = 0
    while True:
        kind = list(KINDS)[index % len(KINDS)]
        # A string seeds the generator through SHA-512, which no hash randomisation can change.
        rng = random.Random(f"{seed}/{index}")
        text = ""
        while not 60 <= len(text.split()) <= 250:
            text = KINDS[kind](Writer(rng))
        yield {"id": f"{seed}-{index:05d}", "kind": kind, "text": text}
        index += 1


def corpus(seed: int, size: int) -> Iterator[dict[str, str]]:
    """Documents up to `size` bytes of text in all."""
    for document in documents(seed):
        size -= len(document["text"].encode())
        if size < 0:
            return
        yield document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=255_000, help="bytes of text to write, not counting the JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("corpus.jsonl"))
    args = parser.parse_args()
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in corpus(args.seed, args.bytes)]
    args.out.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{args.out}: {len(lines)} documents, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
