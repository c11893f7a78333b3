"""The text from which the constants of codecs are computed: prose, a program, a conversation, a table, other languages.

It was written for this. Whoever changes it changes the constants of every model that is seen for the first time.
"""

TEXT = '''\
The harbour master wrote down every ship that came in before noon: its name, its flag, how many crates it carried and
for whom. In the evening she read the list aloud, and whoever had been waiting for oil, paper or seven bags of salt went
home knowing when to come back. On the day of the storm she wrote only one line, that nothing had come in, and that the
light on the outer wall had gone out at half past four. Her brother, who mended nets and trusted nobody's handwriting
but his own, kept a second list. "If yours is lost," he used to say, "mine will still be here, and if mine is lost, you
will never hear the end of it." They agreed about ships and about almost nothing else.

Salt draws water out of a fish because there is less water outside than inside: it moves through the skin until both
sides are alike, and what lives in the fish can no longer grow. Temperature matters less than patience. At 4 degrees a
side of cod of 1.8 kg takes 36 to 40 hours; at 12 degrees it takes about half of that, but the surface hardens first.
Researchers measured the loss of weight in 1987 and again in 2015 and found 18% both times, which surprised the people
who had paid for the second study and nobody else.

def arrivals(lines, *, before=12.0):
    """Ships that came in before an hour, by the name of who waits for them."""
    waiting = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, hour, crates, owner = (part.strip() for part in line.split(";"))
        except ValueError as error:
            raise SyntaxError(f"line {number}: expected four fields, not {line!r}") from error
        if float(hour) < before and int(crates) > 0:
            waiting.setdefault(owner, []).append((name, int(crates)))
    return {owner: sorted(ships, key=lambda ship: -ship[1]) for owner, ships in waiting.items()}

class Harbour:
    def __init__(self, berths: int = 8) -> None:
        self.berths = [None] * berths
        self._queue: list[str] = []

    def moor(self, ship: str) -> int | None:
        for i, taken in enumerate(self.berths):
            if taken is None:
                self.berths[i] = ship
                return i
        self._queue.append(ship)  # first come, first served
        return None

| ship      | flag | crates | hour  |
|-----------|------|-------:|------:|
| Aurelia   | NO   |     42 |  6:15 |
| Two Bells | PT   |      7 |  9:40 |
| Marguerite| FR   |    113 | 11:05 |

{"ship": "Aurelia", "crates": 42, "owner": {"name": "K. Lund", "paid": true}, "notes": ["fragile", null, 3.75]}

User: Which of the three brought the most, and may I collect mine after lunch? I am K. Lund.
Assistant: The Marguerite brought the most, 113 crates. Yours are the 42 crates of the Aurelia; they are paid for, so
you can collect them at any time until six. Please bring a cart: they are marked as fragile.
User: Thank you. Write me a short note that I can give to the driver.
Assistant: Of course. Here it is:

1. Go to berth 3 and ask for the Aurelia.
2. Load 42 crates, and count them twice.
3. Don't stack more than two on top of each other.

Is there anything else that I can do for you?
User: No. How far is it to the market, and what is 42 divided by 6?
Assistant: About 2 km along the river. 42 divided by 6 is 7, so with six crates on each cart you need seven carts.

Le soir, elle lisait la liste à haute voix. Am nächsten Morgen war das Meer wieder ruhig. El faro se apagó a las cuatro
y media. 港に船が三隻入った。Свет погас вечером.

Proof. Suppose that x^2 = 2 y^2 with whole numbers x and y that have no common factor. Then x is even, say x = 2k, so
that y^2 = 2k^2 and y is even as well, which contradicts the assumption. Therefore the square root of 2 is irrational.
'''
