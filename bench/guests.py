"""What guests of a hotel write in English, by intent: rows for classification. The test sentences have frames of their
own, so that none of them is known from training by its wording.

python bench/guests.py runs/guests            # runs/guests/train.jsonl (480 rows) and runs/guests/test.jsonl (160)
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

THINGS = ["towels", "pillows", "a hair dryer", "an iron", "a baby cot", "an extra blanket", "slippers", "bottled water"]
FAULTS = ["air conditioning", "shower", "television", "door lock", "heating", "wifi", "bedside lamp", "kettle"]
PLACES = ["the airport", "the old town", "the main station", "the museum", "the harbour", "the convention centre"]
DAYS = ["tonight", "this Friday", "next weekend", "the third of May", "tomorrow", "two nights in June"]
FACILITIES = ["pool", "gym", "sauna", "parking garage", "restaurant", "laundry", "meeting room", "playground"]
# intent: frames of the training sentences, frames of the test sentences, what may fill them
INTENTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "book": (
        ["I would like to book a room for {}", "do you have anything free {}", "please reserve a double for {}"],
        ["we are looking for somewhere to stay {}", "can you put us down for {}"],
        DAYS,
    ),
    "cancel": (
        ["please cancel my reservation for {}", "I have to cancel the room I booked for {}", "cancel {} please"],
        ["we can no longer come {}, so drop our booking", "my plans fell through, I will not be there {}"],
        DAYS,
    ),
    "change": (
        ["can I move my booking to {}", "I want to change my dates to {}", "please shift our stay to {}"],
        [
            "would it be possible to arrive {} instead of the day we agreed",
            "something came up, is {} still possible",
        ],
        DAYS,
    ),
    "request": (
        ["could you bring {} to my room", "I need {} please", "may I have {}"],
        ["there were no more {} left up here, send some", "would you mind handing me {} at the desk"],
        THINGS,
    ),
    "repair": (
        ["the {} in my room does not work", "my {} is broken", "the {} stopped working last night"],
        ["something is wrong with the {}, send a technician", "nobody has fixed our {} yet"],
        FAULTS,
    ),
    "route": (
        ["how do I get to {} from here", "which bus goes to {}", "how far is {}"],
        ["what is the quickest way towards {}", "is {} within walking distance"],
        PLACES,
    ),
    "facility": (
        ["do you have a {}", "when does the {} open", "is there a {} in the hotel"],
        ["until what hour may one use the {}", "I read about a {}, on which floor would that be"],
        FACILITIES,
    ),
    "praise": (
        ["thank you, the {} was wonderful", "we loved the {}", "great {}, we will be back"],
        ["I just wanted to say how much my wife enjoyed the {}", "your {} is the best I have seen in years"],
        FACILITIES,
    ),
}
OPENINGS = ["", "", "hello, ", "hi, ", "excuse me, ", "good morning, "]
ENDINGS = ["", "", ".", "!", ", thanks", " please let me know"]


def rows(held: bool, count: int, seed: int) -> list[dict[str, str]]:
    """``count`` rows with as many of each intent, drawn from ``seed``; of the test's frames where they are ``held``."""
    draw, names = random.Random(f"{seed} {held}"), [*INTENTS]
    found = []
    for number in range(count):
        label = names[number % len(names)]
        frames, fill = INTENTS[label][held], INTENTS[label][2]
        text = draw.choice(OPENINGS) + draw.choice(frames).format(draw.choice(fill)) + draw.choice(ENDINGS)
        found.append({"text": text, "label": label})
    draw.shuffle(found)
    return found


def main(folder: Path, seed: int = 0) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held, count in (("train", False, 480), ("test", True, 160)):
        lines = (json.dumps(row) + "\n" for row in rows(held, count, seed))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/guests"))
