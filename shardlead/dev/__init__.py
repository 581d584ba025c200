"""`shardlead dev`: a whole cluster of real processes on this machine, for trying and for developing.

It starts a store, workers (the controller's seat is among them) and a router, tells what to try and who leads what,
then each change as it happens. It starts processes and reads their admin servers, and imports no role, no cluster and
no store: what it runs is what anybody would run by hand.

Law: nothing is started before the port is known to be free and the data folder to be ours; nothing runs any more
when it returns, whatever happened. A worker that dies is told and not replaced: to see the others take over is what
people come for, and the line that starts another one is printed.
"""

from shardlead.dev.options import DevOptions
from shardlead.dev.run import main

__all__ = ["DevOptions", "main"]
