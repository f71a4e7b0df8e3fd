"""``python -m tests.hub``: the soak, from a module that its forked clients do not import again."""

from tests.hub.soak import main

raise SystemExit(main())
