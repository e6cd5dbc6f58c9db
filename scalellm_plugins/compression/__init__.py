"""`scalellm compress MODEL OUT`: smaller checkpoints that any server loads.

Three independent steps, in this order: whole layers are dropped (`--drop-layers`), channels of the
MLPs are cut (`--prune-ffn`), and matrices become integers (`--scheme`). The life of a run:

    checkpoint.py  what is there, by headers alone; damage is named before anything is written
    influence.py   which layers and channels matter, from calibration text (only where asked for)
    plan.py        what becomes of every tensor: pure, so sizes are known before the first byte
    writer.py      tensor by tensor, shard by shard into OUT.partial; journal.py remembers
    measure.py     quality and speed of both models; report.py says so
    journal.py     OUT.partial becomes OUT in one rename

torch and transformers are imported only by the modules that compute.
"""
