"""Generated agentic conversations for the demo model: plan, JSON call, tool result, summary.

A scenario is a function that returns its tools and one user turn with all that follows from it. A
conversation joins one or two scenarios under one tool declaration. Arguments are copied from the
request or from an earlier result, so a small model can learn to predict them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from demo_reasoning import NAMES, Message, analysis, final, pseudo_word, user

Tool = tuple[str, str, dict[str, str]]  # name, description, argument -> type
Turn = tuple[list[Tool], list[Message]]

CITIES = [
    "Oslo",
    "Lima",
    "Rome",
    "Cairo",
    "Delhi",
    "Paris",
    "Tokyo",
    "Quito",
    "Accra",
    "Dublin",
    "Madrid",
    "Lisbon",
    "Vienna",
    "Prague",
    "Boston",
    "Austin",
    "Denver",
    "Seoul",
    "Hanoi",
    "Perth",
]
SUBJECTS = [
    "budget",
    "roadmap",
    "release",
    "design",
    "hiring",
    "invoice",
    "contract",
    "survey",
    "launch",
    "audit",
]
ITEMS = [
    "lamp",
    "desk",
    "chair",
    "kettle",
    "router",
    "monitor",
    "keyboard",
    "backpack",
    "jacket",
    "blender",
    "tripod",
    "heater",
]
ROOMS = ["kitchen", "bedroom", "office", "hallway", "garage", "bathroom", "attic", "cellar"]


def call(name: str, arguments: dict[str, Any]) -> Message:
    """An assistant message that calls one function with JSON arguments."""
    return {
        "role": "assistant",
        "channel": "commentary",
        "recipient": f"functions.{name}",
        "content_type": "<|constrain|>json",
        "content": json.dumps(arguments),
    }


def result(name: str, value: object) -> Message:
    """What a function returned to the assistant."""
    return {
        "role": f"functions.{name}",
        "recipient": "assistant",
        "channel": "commentary",
        "content": json.dumps(value),
    }


def _words(value: object) -> str:
    """A JSON value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_words(inner) for inner in value)
    return str(value)


def _step(tool: Tool, arguments: dict[str, Any], value: object, thought: str) -> list[Message]:
    """Plan in words, call, result, result in words."""
    plan = f"{thought} I call {tool[0]} with {_words(arguments)}."
    seen = f"For {_words(arguments)} the tool {tool[0]} returned: {_words(value)}."
    return [analysis(plan), call(tool[0], arguments), result(tool[0], value), analysis(seen)]


def _report(tools: list[Tool], messages: list[Message]) -> list[Message]:
    """Open a turn with the request and the tools in words, close it with the list of calls.

    Only assistant text is scored, and a call without it is mostly delimiters.
    """
    known = "; ".join(f"{name} takes {', '.join(kinds)}" for name, _, kinds in tools)
    calls = [m for m in messages if m.get("recipient", "").startswith("functions.")]
    plan = ", then ".join(m["recipient"].removeprefix("functions.") for m in calls)
    request = messages[0]["content"]
    opening = analysis(f"The request is: {request} My tools: {known}. My plan: {plan}.")
    done = [
        f"{i + 1}. {m['recipient'].removeprefix('functions.')}: {_words(json.loads(m['content']))}"
        for i, m in enumerate(calls)
    ]
    closing = final("\n".join([messages[-1]["content"], "What I did:", *done]))
    return [messages[0], opening, *messages[1:-1], closing]


def _date(rng: random.Random) -> str:
    return f"2025-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _code(rng: random.Random, prefix: str) -> str:
    return f"{prefix}-{rng.randint(1000, 9999)}"


def weather(rng: random.Random) -> Turn:
    """Compare the weather of two or three cities."""
    tool = ("get_weather", "Current weather of a city.", {"city": "string", "unit": "string"})
    cities, unit = rng.sample(CITIES, rng.randint(2, 3)), rng.choice(["celsius", "fahrenheit"])
    day = _date(rng)
    temperatures = rng.sample(range(-5, 38), len(cities))
    ask = rng.choice(
        ["Which city is warmest on {}: {}? Use {}.", "For {} compare the weather of {} in {}."]
    )
    messages = [user(ask.format(day, " and ".join(cities), unit))]
    for i, (city, degrees) in enumerate(zip(cities, temperatures, strict=True)):
        sky = rng.choice(["sunny", "cloudy", "rainy", "windy"])
        thought = f"I need the weather of {city}, city {i + 1} of {len(cities)}."
        value = {"temperature": degrees, "sky": sky}
        messages += _step(tool, {"city": city, "unit": unit}, value, thought)
    best = max(temperatures)
    winner = cities[temperatures.index(best)]
    readings = ", ".join(f"{c}: {t}" for c, t in zip(cities, temperatures, strict=True))
    messages.append(analysis(f"Readings: {readings}. The highest is {best}, so {winner} wins."))
    listed = "\n".join(f"- {c}: {t} {unit}" for c, t in zip(cities, temperatures, strict=True))
    messages.append(final(f"{winner} is the warmest with {best} {unit}.\n{listed}"))
    return [tool], messages


def parcel(rng: random.Random) -> Turn:
    """Find an order, then track its parcel."""
    find = ("find_order", "Look up an order.", {"order_id": "string"})
    track = ("track_parcel", "Where a parcel is.", {"tracking_id": "string"})
    order, tracking, item = _code(rng, "ORD"), _code(rng, "TRK"), rng.choice(ITEMS)
    city, day, count = rng.choice(CITIES), _date(rng), rng.randint(1, 9)
    ask = rng.choice(["Where is my order {}?", "Please track order {}.", "When will {} arrive?"])
    messages = [user(ask.format(order))]
    value = {"item": item, "count": count, "tracking_id": tracking}
    thought = f"The user asks about order {order}. First I need its tracking id."
    messages += _step(find, {"order_id": order}, value, thought)
    where = {"city": city, "arrives": day}
    thought = f"Order {order} has {count} x {item} and the tracking id {tracking}."
    messages += _step(track, {"tracking_id": tracking}, where, thought)
    messages.append(analysis(f"Parcel {tracking} is in {city} and arrives on {day}."))
    text = f"Your order {order} ({count} x {item}) is in {city} and should arrive on {day}."
    messages.append(final(text))
    return [find, track], messages


def meeting(rng: random.Random) -> Turn:
    """Read a day's events, then book the free hour after the last one."""
    read = ("list_events", "Events of a day.", {"date": "string"})
    book = (
        "create_event",
        "Add an event.",
        {"title": "string", "date": "string", "start": "string"},
    )
    day, subject, who = _date(rng), rng.choice(SUBJECTS), rng.choice(NAMES)
    hour = rng.randint(8, 11)
    events = []
    for name in rng.sample(SUBJECTS, rng.randint(1, 3)):
        events.append({"title": name, "start": f"{hour:02d}:00", "end": f"{hour + 1:02d}:00"})
        hour += 1
    title = f"{subject} with {who}"
    ask = rng.choice(["Book '{}' on {} after my last event.", "On {1} add '{0}' after all events."])
    messages = [user(ask.format(title, day))]
    messages += _step(read, {"date": day}, events, f"I must see the events of {day} first.")
    busy = ", ".join(f"{e['title']} {e['start']} to {e['end']}" for e in events)
    end = events[-1]["end"]
    thought = f"The events are: {busy}. The last one ends at {end}, so the new one starts at {end}."
    arguments = {"title": title, "date": day, "start": end}
    event = _code(rng, "EVT")
    messages += _step(book, arguments, {"event_id": event, "status": "created"}, thought)
    messages.append(final(f"Done. '{title}' is booked on {day} at {end} (event {event})."))
    return [read, book], messages


def files(rng: random.Random) -> Turn:
    """List a folder, then move every file with one ending."""
    show = ("list_dir", "Files of a folder.", {"path": "string"})
    move = ("move_file", "Move a file.", {"source": "string", "target": "string"})
    folder, target = "/" + pseudo_word(rng, 2), "/" + pseudo_word(rng, 2)
    ending = rng.choice(["txt", "csv", "log", "md"])
    names = [f"{pseudo_word(rng, 2)}.{ending}" for _ in range(rng.randint(1, 3))]
    others = [f"{pseudo_word(rng, 2)}.{rng.choice(['png', 'zip', 'pdf'])}" for _ in range(2)]
    listing = rng.sample(names + others, len(names) + 2)
    ask = rng.choice(["Move all .{} files from {} to {}.", "Put each .{} file of {} into {}."])
    messages = [user(ask.format(ending, folder, target))]
    messages += _step(show, {"path": folder}, listing, f"I list {folder} to find .{ending} files.")
    moved = [name for name in listing if name.endswith("." + ending)]
    for i, name in enumerate(moved):
        head = f"Files to move: {', '.join(moved)}. " if i == 0 else ""
        arguments = {"source": f"{folder}/{name}", "target": f"{target}/{name}"}
        thought = f"{head}File {i + 1} of {len(moved)} is {name}."
        messages += _step(move, arguments, {"ok": True}, thought)
    listed = "\n".join(f"- {folder}/{name} -> {target}/{name}" for name in moved)
    messages.append(final(f"I moved {len(moved)} file(s):\n{listed}"))
    return [show, move], messages


def transfer(rng: random.Random) -> Turn:
    """Check a balance, then transfer money when it is enough."""
    check = ("get_balance", "Balance of an account.", {"account": "string"})
    send = ("transfer", "Send money.", {"source": "string", "target": "string", "amount": "number"})
    source, target = _code(rng, "ACC"), _code(rng, "ACC")
    balance, amount = rng.randint(50, 900), rng.randint(50, 900)
    ask = rng.choice(
        ["Send {} dollars from {} to {}.", "Transfer {} dollars from {} to {}, please."]
    )
    messages = [user(ask.format(amount, source, target))]
    value = {"balance": balance}
    messages += _step(check, {"account": source}, value, f"First I check the balance of {source}.")
    if balance < amount:
        missing = amount - balance
        text = f"The balance {balance} is less than {amount}: {amount} - {balance} = {missing}."
        messages.append(analysis(text + " I must not transfer."))
        text = f"Account {source} has only {balance} dollars, {missing} less than {amount}."
        messages.append(final(text + " I did not transfer anything."))
        return [check, send], messages
    left = balance - amount
    thought = (
        f"The balance {balance} is enough for {amount}: {balance} - {amount} = {left} is left."
    )
    arguments = {"source": source, "target": target, "amount": amount}
    number = _code(rng, "TX")
    messages += _step(send, arguments, {"transaction": number, "balance": left}, thought)
    text = f"I sent {amount} dollars from {source} to {target} (transaction {number})."
    messages.append(final(f"{text} The balance of {source} is now {left} dollars."))
    return [check, send], messages


def email(rng: random.Random) -> Turn:
    """Look up a contact, then send a message."""
    find = ("find_contact", "Look up a person.", {"name": "string"})
    send = (
        "send_email",
        "Send a message.",
        {"to": "string", "subject": "string", "body": "string"},
    )
    who, subject, day = rng.choice(NAMES), rng.choice(SUBJECTS), _date(rng)
    family = pseudo_word(rng, 2).title()
    address = f"{who.lower()}.{family.lower()}@{pseudo_word(rng, 2)}.example"
    ask = rng.choice(["Tell {} {} that the {} is due on {}.", "Email {} {}: the {} is due on {}."])
    messages = [user(ask.format(who, family, subject, day))]
    name = f"{who} {family}"
    value = {"email": address}
    messages += _step(find, {"name": name}, value, f"I need the address of {name}.")
    body = f"Hello {who}, the {subject} is due on {day}."
    arguments = {"to": address, "subject": f"{subject} due {day}", "body": body}
    thought = f"The address of {name} is {address}. The message says the {subject} is due on {day}."
    messages += _step(send, arguments, {"status": "sent"}, thought)
    messages.append(final(f"I wrote to {name} at {address}: '{body}'"))
    return [find, send], messages


def stock(rng: random.Random) -> Turn:
    """Check the stock of several items and reorder what is low."""
    check = ("check_stock", "Units in stock.", {"item": "string"})
    buy = ("reorder", "Order more units.", {"item": "string", "count": "number"})
    items, level = rng.sample(ITEMS, rng.randint(2, 3)), 10 * rng.randint(2, 6)
    ask = rng.choice(["Keep at least {} of each: {}.", "Reorder up to {} units where needed: {}."])
    messages = [user(ask.format(level, ", ".join(items)))]
    lines = []
    for item in items:
        count = rng.randint(1, 80)
        value = {"count": count}
        messages += _step(check, {"item": item}, value, f"How many of {item} are there?")
        if count >= level:
            messages.append(analysis(f"{item}: {count} is at least {level}, nothing to do."))
            lines.append(f"- {item}: {count} in stock, nothing ordered")
            continue
        need = level - count
        thought = f"{item}: {count} is below {level}: {level} - {count} = {need}."
        messages += _step(buy, {"item": item, "count": need}, {"status": "ordered"}, thought)
        lines.append(f"- {item}: {count} in stock, {need} ordered")
    messages.append(final("Stock check finished.\n" + "\n".join(lines)))
    return [check, buy], messages


def query(rng: random.Random) -> Turn:
    """Answer a question from a table with one SQL query."""
    run = ("run_sql", "Run a query.", {"sql": "string"})
    table, column = rng.choice(SUBJECTS), rng.choice(["city", "owner", "item"])
    values = {"city": CITIES, "owner": NAMES, "item": ITEMS}[column]
    picked = rng.sample(values, rng.randint(3, 5))
    counts = sorted((rng.randint(1, 99) for _ in picked), reverse=True)
    limit = len(picked)
    ask = rng.choice(
        ["Top {} of table {} by count for each {}?", "Count rows by {2} in {1}, show the top {0}."]
    )
    since = _date(rng)
    messages = [user(ask.format(limit, table, column) + f" Only since {since}.")]
    sql = (
        f"SELECT {column}, COUNT(*) AS n FROM {table} WHERE day >= '{since}' "
        f"GROUP BY {column} ORDER BY n DESC LIMIT {limit}"
    )
    rows = [{column: value, "n": n} for value, n in zip(picked, counts, strict=True)]
    thought = f"I group table {table} by {column} since {since} and keep the top {limit}."
    messages += _step(run, {"sql": sql}, rows, thought)
    listed = "\n".join(
        f"{i + 1}. {value}: {n}" for i, (value, n) in enumerate(zip(picked, counts, strict=True))
    )
    top = f"{picked[0]} leads with {counts[0]}"
    messages.append(analysis(f"The query gave {limit} rows. {top}."))
    messages.append(final(f"Top {limit} by {column} in {table} since {since}:\n{listed}\n{top}."))
    return [run], messages


def flight(rng: random.Random) -> Turn:
    """Search flights, choose the cheapest, book it."""
    search = (
        "search_flights",
        "Find flights.",
        {"from": "string", "to": "string", "date": "string"},
    )
    book = ("book_flight", "Book a flight.", {"flight": "string", "passenger": "string"})
    start, goal = rng.sample(CITIES, 2)
    day, who = _date(rng), rng.choice(NAMES)
    prices = rng.sample(range(80, 900), rng.randint(2, 4))
    offers: list[dict[str, Any]] = [
        {"flight": _code(rng, "FL"), "price": price} for price in prices
    ]
    cheapest = "Book the cheapest flight from {} to {} on {} for {}."
    ask = rng.choice([cheapest, "{3} wants to fly from {0} to {1} on {2}, as cheaply as possible."])
    messages = [user(ask.format(start, goal, day, who))]
    arguments = {"from": start, "to": goal, "date": day}
    messages += _step(search, arguments, offers, f"I look for flights from {start} to {goal}.")
    best = min(offers, key=lambda offer: offer["price"])
    listed = ", ".join(f"{offer['flight']} costs {offer['price']}" for offer in offers)
    thought = f"Offers: {listed}. The cheapest is {best['flight']} at {best['price']}."
    arguments = {"flight": best["flight"], "passenger": who}
    booking = _code(rng, "BK")
    messages += _step(book, arguments, {"booking": booking}, thought)
    text = f"{who} is booked on {best['flight']} from {start} to {goal} on {day}"
    messages.append(final(f"{text} for {best['price']} dollars. Booking: {booking}."))
    return [search, book], messages


def home(rng: random.Random) -> Turn:
    """Read sensors of rooms and set the heating."""
    read = ("read_sensor", "Temperature of a room.", {"room": "string"})
    put = ("set_heating", "Set a room's heating.", {"room": "string", "target": "number"})
    rooms, goal = rng.sample(ROOMS, rng.randint(2, 3)), rng.randint(18, 24)
    ask = rng.choice(["Heat {} to {} degrees if colder.", "Make sure {} have at least {} degrees."])
    messages = [user(ask.format(" and ".join(rooms), goal))]
    lines = []
    for room in rooms:
        now = rng.randint(12, 27)
        messages += _step(read, {"room": room}, {"degrees": now}, f"Check the {room}.")
        if now >= goal:
            messages.append(analysis(f"The {room} has {now}, at least {goal}. Nothing to set."))
            lines.append(f"- {room}: {now} degrees, unchanged")
            continue
        thought = f"The {room} has {now}, colder than {goal}."
        arguments = {"room": room, "target": goal}
        messages += _step(put, arguments, {"status": "heating"}, thought)
        lines.append(f"- {room}: {now} degrees, heating to {goal}")
    messages.append(final("Here is the result.\n" + "\n".join(lines)))
    return [read, put], messages


def ticket(rng: random.Random) -> Turn:
    """List open tickets of a project and assign the oldest one."""
    show = ("list_tickets", "Open tickets.", {"project": "string"})
    assign = ("assign_ticket", "Assign a ticket.", {"ticket": "string", "owner": "string"})
    project, who = pseudo_word(rng, 3), rng.choice(NAMES)
    ages = rng.sample(range(1, 90), rng.randint(2, 4))
    rows: list[dict[str, Any]] = [{"ticket": _code(rng, "T"), "age_days": age} for age in ages]
    ask = rng.choice(["Give {1} the oldest open ticket of {0}.", "In {} assign the oldest to {}."])
    messages = [user(ask.format(project, who))]
    messages += _step(show, {"project": project}, rows, f"I list the open tickets of {project}.")
    oldest = max(rows, key=lambda row: row["age_days"])
    listed = ", ".join(f"{row['ticket']} is {row['age_days']} days old" for row in rows)
    thought = f"{listed}. The oldest is {oldest['ticket']} with {oldest['age_days']} days."
    arguments = {"ticket": oldest["ticket"], "owner": who}
    messages += _step(assign, arguments, {"status": "assigned"}, thought)
    text = f"{who} now owns {oldest['ticket']} of {project}"
    messages.append(final(f"{text}, which is {oldest['age_days']} days old."))
    return [show, assign], messages


def currency(rng: random.Random) -> Turn:
    """Convert an amount with a fetched whole-number rate."""
    rate_of = ("get_rate", "Exchange rate.", {"source": "string", "target": "string"})
    source, target = rng.sample(["EUR", "USD", "JPY", "INR", "SEK", "BRL", "KRW", "MXN"], 2)
    amount, rate = rng.randint(11, 99), rng.randint(2, 40)
    ask = rng.choice(["How much is {} {} in {}?", "Convert {} {} to {}."])
    messages = [user(ask.format(amount, source, target))]
    arguments = {"source": source, "target": target}
    value = {"rate": rate}
    thought = f"I need the rate from {source} to {target}."
    messages += _step(rate_of, arguments, value, thought)
    tens, ones = amount - amount % 10, amount % 10
    work = (
        f"The rate is {rate}. {amount} * {rate}: {tens} * {rate} = {tens * rate}, "
        f"{ones} * {rate} = {ones * rate}, together {amount * rate}."
    )
    messages.append(analysis(work))
    text = f"{amount} {source} is {amount * rate} {target} at a rate of {rate}."
    messages.append(final(text))
    return [rate_of], messages


SCENARIOS: list[Callable[[random.Random], Turn]] = [
    weather, parcel, meeting, files, transfer, email, stock, query, flight, home, ticket, currency,
]  # fmt: skip


def agent_conversation(rng: random.Random) -> tuple[list[Tool], list[Message]]:
    """One or two scenarios, one after the other, under one declaration of their tools."""
    tools: list[Tool] = []
    messages: list[Message] = []
    for scenario in rng.sample(SCENARIOS, rng.choice([1, 1, 1, 2])):
        new_tools, turn = scenario(rng)
        tools += new_tools
        messages += _report(new_tools, turn)
    return tools, messages
