"""``search_hotels`` as a tool of a conversation: the demo's database behind the schema the model was tuned with.

toolset(seed=0)["search_hotels"](type="豪华型")         # {"count": 250, "hotels": [{...}, {...}]}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from weitiao.demo.database import Database, answer, search_hotels

NAME = "hotel"


def toolset(seed: int = 0) -> dict[str, Callable[..., Any]]:
    """The functions of the hotel assistant on the whole database of ``seed``."""
    hotels = Database.build(seed).all

    def search(**arguments: Any) -> dict[str, Any]:
        return answer(search_hotels(hotels, **arguments))

    search.__name__, search.__doc__ = search_hotels.__name__, search_hotels.__doc__
    search.__signature__ = inspect.signature(partial(search_hotels, hotels))  # pyright: ignore[reportFunctionMemberAccess]
    return {search.__name__: search}
