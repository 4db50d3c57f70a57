"""For all tests."""

from __future__ import annotations

import signal

# A shell's background ignores SIGINT, nohup SIGHUP; what tests start, and then send these to, would
# inherit that. A handler is not inherited.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *received: None)
