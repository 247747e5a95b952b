"""One harness that times this package and what a user could take instead, on the same weights and the same batch.

    workload        what is computed: model, sizes, batch; its weights and its floating-point operations
    competitors     who computes it: this package, stock transformers, DTensor, megatron-core, transformers' own TP
    worker          a process of a competitor: builds the model once, then obeys commands, a reply for each
    meters          what a worker reads off itself: time, memory, collectives
    fleet           the workers, seen from the script that commands them
    machine         what it is, and the load that others put on it
    agreement       whether they computed the same
    rounds          samples in turns, their spread, ratios within a round
    derived         what follows from the samples: spreads, ratios, peaks
    targets         the ratios that are aimed at
    report, tables  all of it as Markdown and as a figure

A configuration is a competitor on so many ranks with so many threads each. The workers of all configurations stay
alive during a run and are sampled in turns, in another order each round, so that what changes on the machine meets all
of them.
"""
