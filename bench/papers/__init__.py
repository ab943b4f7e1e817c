"""
What the papers say of LoRA, tested. bench/claims.py is the command; read in this order:

    arms.py         what is tuned and how (an Arm), and how large everything is (a Scale)
    machine.py      one model and its training step, used for many runs
    laboratory.py   runs that are kept, sweeps over the learning rate, bases, texts
    claim.py        what a claim is, and the verdicts
    rates.py ranks.py layers.py variants.py forgetting.py weights.py bases.py
                    the claims: sentence, source, threshold, experiment and judge of
                    each in one class
    spectra.py      what the claims about weights measure
    all_claims.py   the list of them, in the order in which they are tested
    plan.py         what they would run, and for how long
    page.py         docs/claims.md and its figures, from the results
"""
