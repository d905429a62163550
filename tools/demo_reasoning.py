"""Worked reasoning conversations for the demo model: questions, solved step by step.

Every generator takes a seeded `random.Random` and returns a list of messages (dicts with `role`,
`channel`, `content`). The analysis channel writes each step out, because a small model can only
predict an answer whose steps it has read: the text is low in entropy without being trivial.
Phrasing is drawn from a few templates so that the model stays uncertain somewhere.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, str]
NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Iris",
    "Jack",
    "Kira",
    "Liam",
    "Maya",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
]
THINGS = [
    "apples",
    "books",
    "chairs",
    "cups",
    "hats",
    "lamps",
    "maps",
    "pens",
    "plates",
    "rings",
    "ropes",
    "shoes",
    "stamps",
    "tiles",
]
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def analysis(content: str) -> Message:
    """An assistant message in the analysis channel."""
    return {"role": "assistant", "channel": "analysis", "content": content}


def final(content: str) -> Message:
    """An assistant message in the final channel."""
    return {"role": "assistant", "channel": "final", "content": content}


def pseudo_word(rng: random.Random, syllables: int) -> str:
    """A pronounceable word; made up, so that there are enough of them to hold some out."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def solved(question: str, steps: list[str], answer: str, rng: random.Random) -> list[Message]:
    """Question, steps in the analysis channel, answer in the final channel."""
    opening = rng.choice(["Let me work step by step.", "Step by step:", "I will do this in steps."])
    closing = rng.choice(["The answer is", "Result:", "So the answer is"])
    return [user(question), analysis("\n".join([opening, *steps])), final(f"{closing} {answer}.")]


def multiply(rng: random.Random) -> list[Message]:
    """Schoolbook product of a number of two or three digits and one of two digits."""
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = b - b % 10, b % 10
    steps = [
        f"{b} = {tens} + {ones}.",
        f"{a} * {tens} = {a} * {tens // 10} * 10 = {a * (tens // 10)} * 10 = {a * tens}.",
        f"{a} * {ones} = {a * ones}.",
        f"{a * tens} + {a * ones} = {a * b}.",
    ]
    ask = rng.choice(["What is {} * {}?", "Multiply {} by {}.", "Compute {} times {}."])
    return solved(ask.format(a, b), steps, f"{a * b}", rng)


def add_columns(rng: random.Random) -> list[Message]:
    """Addition digit by digit with the carry written out."""
    a, b = rng.randint(1000, 999999), rng.randint(1000, 999999)
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(
            f"Column {place + 1}: {x} + {y} + carry {carry} = {total}; "
            f"write {total % 10}, carry {total // 10}."
        )
        carry = total // 10
    if carry:
        steps.append(f"Write the last carry {carry}.")
    steps.append(f"Read from the top column down: {a + b}.")
    ask = rng.choice(["Add {} and {} column by column.", "What is {} + {}? Show the carries."])
    return solved(ask.format(a, b), steps, f"{a + b}", rng)


def selection_sort(rng: random.Random) -> list[Message]:
    """Sorting by taking the smallest (or largest) remaining number each time."""
    numbers = rng.sample(range(1, 100), rng.randint(5, 8))
    largest = rng.random() < 0.4
    ask = "Sort these numbers from {}: {}."
    order = "largest to smallest" if largest else "smallest to largest"
    question = ask.format(order, ", ".join(map(str, numbers)))
    left, taken, steps = list(numbers), [], []
    while left:
        pick = max(left) if largest else min(left)
        left.remove(pick)
        taken.append(pick)
        rest = ", ".join(map(str, left)) or "nothing"
        steps.append(f"Take {pick}. Left: {rest}. Sorted: {', '.join(map(str, taken))}.")
    return solved(question, steps, ", ".join(map(str, taken)), rng)


def euclid(rng: random.Random) -> list[Message]:
    """Greatest common divisor by Euclid's algorithm."""
    factor = rng.randint(2, 40)
    a, b = factor * rng.randint(5, 90), factor * rng.randint(3, 60)
    question = rng.choice(
        ["Find the greatest common divisor of {} and {}.", "What is gcd({}, {})?"]
    ).format(a, b)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    steps.append(f"The remainder is 0, so the gcd is {x}.")
    return solved(question, steps, f"{x}", rng)


def linear_equation(rng: random.Random) -> list[Message]:
    """One linear equation in one unknown, checked at the end."""
    a, x, b = rng.randint(2, 19), rng.randint(2, 60), rng.randint(3, 99)
    name, c = rng.choice("xyznmk"), a * x + b
    steps = [
        f"{a}{name} + {b} = {c}.",
        f"Subtract {b} from both sides: {a}{name} = {c} - {b} = {c - b}.",
        f"Divide both sides by {a}: {name} = {c - b} / {a} = {x}.",
        f"Check: {a} * {x} + {b} = {a * x} + {b} = {c}. Correct.",
    ]
    ask = rng.choice(["Solve {}{} + {} = {} for {}.", "Given {}{} + {} = {}, find {}."])
    return solved(ask.format(a, name, b, c, name), steps, f"{name} = {x}", rng)


def shopping(rng: random.Random) -> list[Message]:
    """A bill of several items, paid with a note, with the change."""
    who, items = rng.choice(NAMES), rng.sample(THINGS, rng.randint(2, 4))
    lines = [(rng.randint(2, 9), item, rng.randint(2, 12)) for item in items]
    total = sum(count * price for count, _, price in lines)
    paid = (total // 50 + 1) * 50
    bought = ", ".join(f"{count} {item} at {price} dollars each" for count, item, price in lines)
    question = f"{who} buys {bought}. {who} pays with {paid} dollars. How much change is due?"
    steps = [
        f"{item}: {count} * {price} = {count * price} dollars." for count, item, price in lines
    ]
    running = 0
    for count, _, price in lines:
        steps.append(f"Total so far: {running} + {count * price} = {running + count * price}.")
        running += count * price
    steps.append(f"Change: {paid} - {total} = {paid - total} dollars.")
    return solved(question, steps, f"{paid - total} dollars", rng)


def trace_loop(rng: random.Random) -> list[Message]:
    """Run a small Python loop by hand."""
    start, count, step = rng.randint(0, 20), rng.randint(4, 7), rng.randint(2, 9)
    mod, minus, total = rng.choice([2, 3, 4]), rng.randint(1, 5), start
    code = [
        "```python",
        f"total = {start}",
        f"for i in range({count}):",
        f"    if i % {mod} == 0:",
        f"        total += {step} * i",
        "    else:",
        f"        total -= {minus}",
        "print(total)",
        "```",
    ]
    steps = [f"Before the loop total = {start}."]
    for i in range(count):
        before = total
        if i % mod == 0:
            total += step * i
            change = f"total = {before} + {step} * {i} = {before} + {step * i} = {total}"
        else:
            total -= minus
            change = f"total = {before} - {minus} = {total}"
        truth = "is 0, so the test is true" if i % mod == 0 else "is not 0, so the test is false"
        steps.append(f"i = {i}: {i} % {mod} = {i % mod} {truth}; {change}.")
    steps.append(f"The loop ends and the program prints {total}.")
    ask = rng.choice(["What does this program print?", "Trace this program."])
    return solved(ask + "\n" + "\n".join(code), steps, f"{total}", rng)


def trace_stack(rng: random.Random) -> list[Message]:
    """Follow pushes and pops on a stack (or appends and takes on a queue)."""
    queue = rng.random() < 0.5
    kind, take = ("queue", "dequeue") if queue else ("stack", "pop")
    put = "enqueue" if queue else "push"
    items: list[int] = []
    operations, steps = [], []
    for _ in range(rng.randint(6, 9)):
        if items and rng.random() < 0.4:
            value = items.pop(0 if queue else -1)
            operations.append(take)
            done = f"{take} removes {value}"
        else:
            value = rng.randint(1, 99)
            items.append(value)
            operations.append(f"{put} {value}")
            done = f"{put} {value}"
        shown = ", ".join(map(str, items))
        steps.append(f"{done}: the {kind} is [{shown}].")
    question = f"Start with an empty {kind}. Do: {', '.join(operations)}. What is in the {kind}?"
    return solved(question, steps, f"[{', '.join(map(str, items))}]", rng)


def to_binary(rng: random.Random) -> list[Message]:
    """Decimal to binary by repeated halving."""
    n = rng.randint(20, 4000)
    steps, digits, x = [], "", n
    while x:
        digits = str(x % 2) + digits
        steps.append(f"{x} / 2 = {x // 2} remainder {x % 2}; digits: {digits}.")
        x //= 2
    ask = rng.choice(["Write {} in binary.", "Convert {} to base 2."])
    return solved(ask.format(n), steps, digits, rng)


def order_puzzle(rng: random.Random) -> list[Message]:
    """Put people in order from pairwise facts that form one chain."""
    people = rng.sample(NAMES, rng.randint(4, 6))
    more, most = rng.choice([("taller", "tallest"), ("older", "oldest"), ("faster", "fastest")])
    facts = [f"{a} is {more} than {b}." for a, b in itertools.pairwise(people)]
    shuffled = rng.sample(facts, len(facts))
    question = " ".join(shuffled) + f" Who is the {most}? Give the whole order."
    losers = ", ".join(people[1:])
    steps = [f"These people have someone {more} than them: {losers}."]
    steps.append(f"Only {people[0]} is left, so {people[0]} is the {most}.")
    chain = people[0]
    for a, b in itertools.pairwise(people):
        chain += f" > {b}"
        steps.append(f"{a} is {more} than {b}: {chain}.")
    return solved(question, steps, f"{people[0]}; the order is {chain}", rng)


def brackets(rng: random.Random) -> list[Message]:
    """Check whether brackets are balanced, with the stack after each one."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    text = ""
    opened: list[str] = []
    for _ in range(rng.randint(4, 10)):
        if opened and rng.random() < 0.5:
            closing = pairs[opened.pop()]
            text += rng.choice(")]}") if rng.random() < 0.1 else closing
        else:
            opened.append(rng.choice("([{"))
            text += opened[-1]
    while opened and rng.random() < 0.9:
        text += pairs[opened.pop()]
    steps, stack, verdict = [], [], ""
    for mark in text:
        if mark in pairs:
            stack.append(mark)
            steps.append(f"{mark} opens; stack: {' '.join(stack)}.")
        elif stack and pairs[stack[-1]] == mark:
            steps.append(f"{mark} closes {stack.pop()}; stack: {' '.join(stack) or 'empty'}.")
        else:
            verdict = "not balanced"
            steps.append(f"{mark} does not match the top of the stack.")
            break
    if not verdict:
        verdict = "not balanced" if stack else "balanced"
        steps.append("The stack is empty at the end." if not stack else "The stack is not empty.")
    question = rng.choice(["Are these brackets balanced? {}", "Check the brackets: {}"])
    return solved(question.format(" ".join(text)), steps, verdict, rng)


def statistics(rng: random.Random) -> list[Message]:
    """Sum, mean, smallest and largest of a list whose mean is whole."""
    numbers = [rng.randint(1, 60) for _ in range(rng.randint(4, 7))]
    numbers[-1] += -sum(numbers) % len(numbers)
    steps, total = [], 0
    for n in numbers:
        steps.append(f"{total} + {n} = {total + n}.")
        total += n
    mean = total // len(numbers)
    steps.append(
        f"There are {len(numbers)} numbers, so the mean is {total} / {len(numbers)} = {mean}."
    )
    steps.append(f"The smallest is {min(numbers)} and the largest is {max(numbers)}.")
    steps.append(f"The range is {max(numbers)} - {min(numbers)} = {max(numbers) - min(numbers)}.")
    ask = rng.choice(["Give the mean and the range of {}.", "Find mean and range: {}."])
    answer = f"mean {mean}, range {max(numbers) - min(numbers)}"
    return solved(ask.format(", ".join(map(str, numbers))), steps, answer, rng)


def sort_words(rng: random.Random) -> list[Message]:
    """Put made-up words into alphabetical order."""
    words = sorted({pseudo_word(rng, rng.randint(2, 3)) for _ in range(rng.randint(4, 6))})
    shuffled = rng.sample(words, len(words))
    ask = rng.choice(["Sort these words alphabetically: {}.", "Put in alphabetical order: {}."])
    left, taken, steps = list(shuffled), [], []
    for word in words:
        left.remove(word)
        taken.append(word)
        rest = ", ".join(left) or "nothing"
        steps.append(f"First of the rest: {word}. Left: {rest}.")
    return solved(ask.format(", ".join(shuffled)), steps, ", ".join(taken), rng)


def count_letters(rng: random.Random) -> list[Message]:
    """Count each vowel of a made-up phrase, letter by letter."""
    phrase = " ".join(pseudo_word(rng, rng.randint(2, 3)) for _ in range(rng.randint(2, 4)))
    counts, steps = 0, []
    for word in phrase.split():
        found = [letter for letter in word if letter in VOWELS]
        steps.append(
            f"{word}: {' '.join(word)}; vowels: {' '.join(found)}; "
            f"{counts} + {len(found)} = {counts + len(found)}."
        )
        counts += len(found)
    ask = rng.choice(["How many vowels are in '{}'?", "Count the vowels of '{}'."])
    return solved(ask.format(phrase), steps, f"{counts}", rng)


OWN: dict[str, Callable[[random.Random], list[Message]]] = {
    f.__name__: f
    for f in (
        multiply, add_columns, selection_sort, euclid, linear_equation, shopping, trace_loop,
        trace_stack, to_binary, order_puzzle, brackets, statistics, sort_words, count_letters,
    )
}  # fmt: skip


def _chain_sum(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    terms = meta["expression"].split()
    steps, total = [], int(terms[0])
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}.")
        total = after
    return steps, answer


def _spell_backward(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    word = meta["word"]
    steps = [f"Letters: {' '.join(word)}.", f"From the end: {' '.join(answer)}."]
    return steps + [f"{answer[: i + 1]}" for i in range(len(answer))], answer


def _leg_counting(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps, total = [], 0
    for animal, count in meta["animals"].items():
        legs = ANIMALS[animal]
        steps.append(
            f"{animal}: {count} * {legs} = {count * legs}; {total} + {count * legs} = "
            f"{total + count * legs}."
        )
        total += count * legs
    return steps, answer


def _letter_counting(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    letter, steps, total = meta["target_letter"], [], 0
    for word in meta["span"]:
        here = word.lower().count(letter)
        steps.append(f"{word}: {here}; {total} + {here} = {total + here}.")
        total += here
    return steps, answer


def _caesar(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    pairs = zip(meta["cipher_text"].split(), meta["clear_text"].split(), strict=True)
    steps = [f"Every letter moves back by {meta['rotation']}."]
    return steps + [f"{' '.join(a)} -> {' '.join(b)}: {b}" for a, b in pairs], answer


def _prime_factors(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    steps, n = [], meta["number"]
    for factor in meta["factors"]:
        steps.append(f"{n} / {factor} = {n // factor}.")
        n //= factor
    return [*steps, "1 is left, so all factors are found."], answer


def _fraction(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    a, b = meta["numerator"], meta["denominator"]
    divisor = math.gcd(a, b)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    steps.append(f"The gcd is {divisor}.")
    steps.append(f"{a} / {divisor} = {a // divisor}; {b} / {divisor} = {b // divisor}.")
    return steps, answer


def _number_filtering(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    limit, kept = meta["filter_value"], set(meta["result"])
    steps = []
    for number in meta["original_numbers"]:
        size = "larger" if float(number) > float(limit) else "not larger"
        steps.append(f"{number} is {size} than {limit}: {'keep' if number in kept else 'remove'}.")
    return steps, answer


def _gsm(meta: dict[str, Any], answer: str) -> tuple[list[str], str]:
    lines = [line.strip() for line in meta["answer_cot"].split("\n")]
    return [line for line in lines if line and not line.startswith("####")], answer


# reasoning-gym task -> how its metadata becomes written steps
GYM: dict[str, Callable[[dict[str, Any], str], tuple[list[str], str]]] = {
    "chain_sum": _chain_sum,
    "spell_backward": _spell_backward,
    "leg_counting": _leg_counting,
    "letter_counting": _letter_counting,
    "caesar_cipher": _caesar,
    "prime_factorization": _prime_factors,
    "fraction_simplification": _fraction,
    "number_filtering": _number_filtering,
    "gsm_symbolic": _gsm,
}


def gym_conversations(task: str, size: int, seed: int) -> Iterator[list[Message]]:
    """Questions of one reasoning-gym task with worked steps and its own answer."""
    if not size:  # the package is wanted only where its questions are
        return
    import reasoning_gym

    rng = random.Random(f"{task}/{seed}")
    for item in reasoning_gym.create_dataset(task, size=size, seed=seed):
        steps, answer = GYM[task](item["metadata"], item["answer"])
        yield solved(item["question"].strip(), steps, answer, rng)
