"""Between frontends and engines of one machine: records in shared memory instead of sockets.

`memory.py` (anonymous shared memory), `ring.py` (bytes), `peers.py` (who is at the other end),
`channel.py` (both directions, large records), `steps.py` (a decode step as columns).
"""
